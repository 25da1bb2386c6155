"""From packed corpora to the micro-batches of a step, for one rank: read, deal, collate, one step ahead.

reads: the corpora of a `packed` folder, by memory map. State: none; `step(n)` is a pure function of n, so a run resumes
at any step, on any world size that divides the global batch, with the same rows in each step.
Costs: one prefetch thread, the batches of two steps; resident memory does not grow with the corpora.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cprec.data.collate import Batch, collate
from cprec.data.sampler import Sampler
from cprec.errors import DataError
from cprec.format import Manifest, PackedCorpus, list_corpora, read_manifest, row_cost


@dataclass(frozen=True)
class StepRow:
    """One row of a step: its corpus number, its row number there, and what its document lengths say."""

    corpus: int
    row: int
    cost: int
    """Attention cost in token pairs: the sum of squared document lengths."""
    n_valid: int
    """Labels to predict: every real token but the first of each document, or those of them in its loss mask."""
    n_pad: int


@dataclass(frozen=True)
class Step:
    """One optimizer step for one rank: its own micro-batches, and the totals over all ranks."""

    batches: list[Batch]
    n_valid: int
    n_pad: int
    cost: int


class PackedDataset:
    """Rows of several packed corpora in the order of a `Sampler`, dealt to the ranks of a run step by step."""

    def __init__(self, packed: str | Path, sampler: Sampler, *, global_batch_size: int, micro_batch_size: int,
                 rank: int, world_size: int) -> None:
        self.corpora = [PackedCorpus(Path(packed) / name) for name in sampler.names]
        self.sampler = sampler
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size
        assert global_batch_size % (micro_batch_size * world_size) == 0

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches that each rank runs per step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step_rows(self, step: int) -> list[list[list[StepRow]]]:
        """The step's rows as [micro-step][rank][row of the micro-batch]: the same set for every world size.

        Rows are sorted by attention cost and dealt back and forth, so that the ranks of a micro-step, which wait for
        each other in every layer, get rows of nearly equal cost. The set of rows, and so the gradient, is unchanged.
        """
        at = self.sampler.rows(step * self.global_batch_size, self.global_batch_size)
        rows = [self._describe_row(int(c), int(r)) for c, r in zip(at.corpus, at.row, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: (-rows[i].cost, i))
        shape = (self.grad_accum_steps, self.micro_batch_size, self.world_size)
        dealt = np.array(order).reshape(shape)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1]  # back and forth, as cards are dealt
        return [[[rows[i] for i in micro[:, rank]] for rank in range(self.world_size)] for micro in dealt]

    def step(self, step: int) -> Step:
        """This rank's part of a step, ready for the device."""
        micro_steps = self.step_rows(step)
        batches = [self._collate(micro[self.rank]) for micro in micro_steps]
        rows = [r for micro in micro_steps for rank in micro for r in rank]
        return Step(batches, sum(r.n_valid for r in rows), sum(r.n_pad for r in rows), sum(r.cost for r in rows))

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Every step from `first` to before `last`, prepared one ahead by a thread."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="cprec-reader") as reader:
            ahead: Future[Step] | None = reader.submit(self.step, first) if first < last else None
            for step in range(first, last):
                assert ahead is not None
                ready = ahead.result()
                ahead = reader.submit(self.step, step + 1) if step + 1 < last else None
                yield ready

    def describe(self, step: int) -> list[str]:
        """The step's rows as `corpus row n (shard, place)`, for messages that must name them."""
        named = []
        for r in (r for micro in self.step_rows(step) for rank in micro for r in rank):
            shard, place = self.corpora[r.corpus].locate(r.row)
            named.append(f"{self.sampler.names[r.corpus]} row {r.row} ({shard}:{place})")
        return sorted(named)

    def _describe_row(self, corpus: int, row: int) -> StepRow:
        packed = self.corpora[corpus][row]
        return StepRow(corpus, row, row_cost(packed.doc_lens), packed.n_labels, packed.n_pad)

    def _collate(self, rows: Sequence[StepRow]) -> Batch:
        batch = collate([self.corpora[r.corpus][r.row] for r in rows], [r.corpus for r in rows])
        return batch.pin() if torch.cuda.is_available() else batch


def open_manifests(packed: str | Path, kind: str) -> dict[str, Manifest]:
    """Manifests of the finished corpora of `kind` ("train" or "valid") below `packed`, by name.

    Raises DataError when there is none.
    """
    if not Path(packed).is_dir():
        raise DataError(f"data.packed={packed}: no such folder; run launch/prepare.py first")
    found = {name: read_manifest(Path(packed) / name) for name in list_corpora(packed)}
    chosen = {name: m for name, m in found.items() if m.kind == kind and m.n_rows > 0}
    if not chosen:
        raise DataError(f"data.packed={packed}: no finished {kind} corpus below it; run launch/prepare.py to its end")
    return chosen


def check_alike(manifests: dict[str, Manifest], packed: str | Path) -> None:
    """Raise DataError when corpora that serve one run disagree about seq_len, split, template or tokenizer; plain text
    has no template to disagree about."""
    first_name, first = next(((name, m) for name, m in manifests.items() if m.template), next(iter(manifests.items())))
    for name, m in manifests.items():
        for field in ("seq_len", "split_hash", "template_hash"):
            if getattr(m, field) != getattr(first, field) and not (field == "template_hash" and m.template is None):
                raise DataError(f"{packed}: corpora {first_name} and {name} differ in {field} ({getattr(first, field)} "
                                f"and {getattr(m, field)}); prepare them together")
        if m.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise DataError(f"{packed}: corpora {first_name} and {name} were packed with different tokenizers "
                            f"({first.tokenizer.name}, {m.tokenizer.name}); prepare them together")
