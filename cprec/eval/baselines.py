"""Rankings without a language model, on the same queries, candidates and tie rule.

reads: nothing. writes: nothing. A new baseline is one function and one line in BASELINES.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cprec.eval.metrics import Floats, Ranked, best, mid_rank
from cprec.eval.queries import DomainQueries

Baseline = Callable[[DomainQueries, int], Floats]
"""Scores of all items for query i, higher is better; it may read the history, never the target."""


def popularity(queries: DomainQueries, _i: int) -> Floats:
    """Events of each item in the training window, the same for everyone."""
    return queries.catalogue.n_train.astype(np.float64)


BASELINES: dict[str, Baseline] = {"popularity": popularity}


def rank_by_baseline(baseline: Baseline, queries: DomainQueries, i: int, *, top_k: int = 10) -> Ranked:
    """Exact mid-rank of query i's target by the baseline's scores, and its best `top_k` candidates."""
    scores, candidates, target = baseline(queries, i), queries.candidates(i), int(queries.targets[i])
    items = np.flatnonzero(candidates)
    among = scores[items]
    n_better, n_equal = int((among > scores[target]).sum()), int((among == scores[target]).sum()) - 1
    top_items, top_scores = best(items, among, top_k)
    return Ranked(rank=mid_rank(n_better, n_equal), score=float(scores[target]), n_candidates=len(items), n_nodes=0,
                  top_items=top_items, top_scores=top_scores, bound=-np.inf)
