"""Validation: the loss of every validation corpus, on rows drawn once and the same every time.

reads: the packed validation corpora of a run. Costs: `validation.rows_per_corpus` forward passes per corpus, shared out
over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cprec import dist
from cprec.data.collate import collate
from cprec.data.remote import open_corpus
from cprec.data.sampler import permute
from cprec.format import Manifest, PackedCorpus
from cprec.log import get_logger
from cprec.train.engine import Engine
from cprec.train.metrics import ValidationRecord
from cprec.train.plan import Plan

log = get_logger(__name__)


def validate(plan: Plan, engine: Engine, step: int, *, alive: Callable[[], None]) -> ValidationRecord:
    """Loss of every validation corpus on `rows_per_corpus` of its rows, the same ones every time. Collective.

    `alive` is called before every row."""
    losses, total, n_total = {}, 0.0, 0.0
    for name, manifest in plan.valid.items():
        loss_sum, n_valid = _validate_corpus(plan, engine, name, manifest, alive)
        losses[name] = loss_sum / n_valid
        total, n_total = total + loss_sum, n_total + n_valid
    shown = "  ".join(f"{name.removeprefix('valid/')} {loss:.3f}" for name, loss in losses.items())
    log.info("step %7d  validation loss %.4f  (%s)", step, total / n_total, shown)
    return ValidationRecord(step=step, loss=total / n_total, loss_by_corpus=losses)


def _validate_corpus(plan: Plan, engine: Engine, name: str, manifest: Manifest,
                     alive: Callable[[], None]) -> tuple[float, float]:
    """Summed loss and predicted tokens over all ranks. Ranks without a row left run a row that does not count, since
    under ZeRO-3 every rank takes part in every forward."""
    corpus = _open_valid(plan, name, manifest)
    n_rows = min(plan.config.validation.rows_per_corpus, len(corpus))
    rows = permute(np.arange(n_rows), len(corpus), key=(plan.config.data.seed, name, 0))
    loss_sum = n_valid = 0.0
    for first in range(0, n_rows, plan.world_size):
        alive()
        mine = first + dist.rank()
        batch = collate([corpus[int(rows[min(mine, n_rows - 1)])]], [0])
        loss = float(engine.row_losses(batch).sum())
        if mine < n_rows:
            loss_sum, n_valid = loss_sum + loss, n_valid + batch.n_valid
    corpus.release()  # until the next validation, which may be hours away
    loss_sum, n_valid = dist.sum_over_ranks([loss_sum, n_valid])
    return loss_sum, n_valid


_valid_corpora: dict[str, PackedCorpus] = {}
"""The validation corpora of the process's run, by name."""


def _open_valid(plan: Plan, name: str, manifest: Manifest) -> PackedCorpus:
    """The corpus, opened at the run's first validation. Another manifest object, even if equal, is another run's."""
    corpus = _valid_corpora.get(name)
    if corpus is None or corpus.manifest is not manifest:
        corpus = _valid_corpora[name] = open_corpus(plan.places[name], plan.cache, manifest=manifest)
    return corpus
