"""Rankings without a language model: on the same queries, candidates and tie rule, tuned on the validation window.

reads: for all but popularity, the preparation that the queries lie in (see `cprec.eval.events`). writes: nothing. A new
baseline is one function and one line in BASELINES.

    popularity   events in the training window, the same order for everyone
    markov       what followed the last item
    item_knn     what the same users had
    title        titles that share words with those of the history; no training
    sasrec       self-attention over the last items, cross-entropy over the whole catalogue (RecTools)
    bert4rec     the same, masked and in both directions (RecTools)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from cprec import dist
from cprec.errors import ConfigError
from cprec.eval.events import DomainEvents, load_events
from cprec.eval.metrics import Floats, Ranked, best, mid_rank, ndcg_at
from cprec.eval.neighbours import item_knn, markov, title_similarity
from cprec.eval.queries import Bools, DomainQueries
from cprec.format import file_hash, read_queries_manifest
from cprec.log import get_logger

log = get_logger(__name__)
Baseline = Callable[[DomainQueries, int], Floats]
"""Scores of all items for query i, higher is better; it may read the history, never the target."""
Kind = Literal["sasrec", "bert4rec"]
Settings = Mapping[str, int | float | str]
EPOCHS_PER_LOOK, PATIENCE, MOST_EPOCHS = 5, 3, 100
"""A network is looked at every so many epochs, and stops after so many looks without a gain."""


class Trial(BaseModel):
    """Settings that were tried, and the mean NDCG@10 that they had on the validation queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    ndcg10: float


@dataclass(frozen=True)
class Fitted:
    """A baseline with the settings that were best on the validation window, and all that were tried."""

    score: Baseline
    tried: tuple[Trial, ...]
    """Best first; empty where there is nothing to choose."""


@dataclass(frozen=True)
class Problem:
    """What a baseline is fitted to."""

    events: DomainEvents
    max_items: int
    """Longest history of a query."""
    seed: int

    def judge(self, score: Baseline) -> float:
        """Mean NDCG@10 on the validation queries."""
        queries = self.events.validation
        ranks = [rank_by_baseline(score, queries, i).rank for i in range(len(queries))]
        return float(ndcg_at(10, np.array(ranks)).mean())


def popularity(queries: DomainQueries, _i: int) -> Floats:
    """Events of each item in the training window, the same for everyone."""
    return queries.catalogue.n_train.astype(np.float64)


def _counting(make: Callable[..., Baseline], **grid: Sequence[Any]) -> Callable[[Problem], Fitted]:
    """A fit that makes a baseline with every combination of settings and keeps the best."""
    def fit(problem: Problem) -> Fitted:
        catalogue = problem.events.validation.catalogue
        found = []
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            score = make(problem.events.train, catalogue, **settings)
            found.append((Trial(settings=settings, ndcg10=problem.judge(score)), score))
        found.sort(key=lambda pair: -pair[0].ndcg10)
        return Fitted(found[0][1], tuple(trial for trial, _ in found))
    return fit


def _network(kind: Kind, **grid: Sequence[Any]) -> Callable[[Problem], Fitted]:
    """A fit that trains a network with every combination of settings, each for as long as it gets better."""
    def fit(problem: Problem) -> Fitted:
        if dist.world_size() > 1:
            raise ConfigError(f"baseline {kind} trains in one process; start it without torchrun")
        found = [train_to_best(kind, problem, dict(zip(grid, values, strict=True)))
                 for values in itertools.product(*grid.values())]
        found.sort(key=lambda fitted: -fitted.tried[0].ndcg10)
        return Fitted(found[0].score, tuple(fitted.tried[0] for fitted in found))
    return fit


def train_to_best(kind: Kind, problem: Problem, settings: dict[str, Any], *, most_epochs: int = MOST_EPOCHS) -> Fitted:
    """A network trained for as long as it gets better on the validation queries, as it was when it was best."""
    from cprec.eval.sequential import Network  # an optional package, and seconds to import

    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    network = Network(kind, problem.events.train, max_items=problem.max_items, seed=problem.seed, **settings)
    most, best_epoch, state = -1.0, 0, None
    for epoch in range(EPOCHS_PER_LOOK, most_epochs + 1, EPOCHS_PER_LOOK):
        network.train(EPOCHS_PER_LOOK)
        ndcg10 = problem.judge(network)
        log.info("%s %s: %d epochs, validation NDCG@10 %.4f", kind, settings, epoch, ndcg10)
        if ndcg10 > most:
            most, best_epoch, state = ndcg10, epoch, network.state()
        elif epoch >= best_epoch + PATIENCE * EPOCHS_PER_LOOK:
            break
    network.restore(state)
    return Fitted(network, (Trial(settings=settings | {"epochs": best_epoch}, ndcg10=most),))


COUNTING = {
    "markov": _counting(markov, gap=(1, 5)),
    "item_knn": _counting(item_knn, last=(1, 5, 10, 50)),
    "title": _counting(title_similarity, analyzer=("word", "char_wb"), last=(1, 5, 50)),
}
BASELINES: dict[str, Callable[[Problem], Fitted] | None] = {
    "popularity": None,
    **COUNTING,
    "sasrec": _network("sasrec", n_factors=(64, 128), dropout=(0.2, 0.5)),
    "bert4rec": _network("bert4rec", n_factors=(64, 128), dropout=(0.2, 0.5)),
}
"""Name -> its fit; None where nothing is learned but the counts that the queries hold."""
TRAINED = tuple(name for name in BASELINES if name != "popularity" and name not in COUNTING)
"""Those whose ranks follow from a seed."""


def fit_baseline(name: str, queries_folder: str | Path, queries: DomainQueries, *, seed: int = 0) -> Fitted:
    """The baseline, fitted to the queries' domain. Raises DataError where the preparation's events are not beside the
    queries, ConfigError where a package is missing."""
    fit = BASELINES[name]
    if fit is None:
        return Fitted(popularity, ())
    manifest = read_queries_manifest(queries_folder)
    events = load_events(queries_folder, manifest, queries)
    fitted = fit(Problem(events, manifest.max_history, seed))
    log.info("%s on %s: %s, validation NDCG@10 %.4f over %d queries; tried %d", name, queries.domain,
             dict(fitted.tried[0].settings), fitted.tried[0].ndcg10, len(events.validation), len(fitted.tried))
    return fitted


def baseline_hash(name: str, queries_folder: str | Path, *, seed: int) -> str:
    """What the baseline's ranks follow from besides the queries: its name, the seed and the events."""
    if BASELINES[name] is None:
        return f"baseline:{name}"
    events = Path(queries_folder).resolve().parent / "interactions"
    hashes = [file_hash(path) for path in (events / "clean.parquet", events / "train.parquet") if path.is_file()]
    return hashlib.sha256(json.dumps([name, seed, hashes]).encode()).hexdigest()


def rank_by_baseline(baseline: Baseline, queries: DomainQueries, i: int, *, top_k: int = 10,
                     candidates: Bools | None = None) -> Ranked:
    """Exact mid-rank of query i's target by the baseline's scores, and its best `top_k` candidates.

    `candidates`: a mask over the items that holds the target; those of the full catalogue unless given.
    """
    scores, target = baseline(queries, i), int(queries.targets[i])
    candidates = queries.candidates(i) if candidates is None else candidates
    items = np.flatnonzero(candidates)
    among = scores[items]
    n_better, n_equal = int((among > scores[target]).sum()), int((among == scores[target]).sum()) - 1
    top_items, top_scores = best(items, among, top_k)
    return Ranked(rank=mid_rank(n_better, n_equal), score=float(scores[target]), n_candidates=len(items), n_nodes=0,
                  top_items=top_items, top_scores=top_scores, bound=-np.inf)
