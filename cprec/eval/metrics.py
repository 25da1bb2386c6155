"""What one ranked query is, and every metric of it, by name.

reads: nothing. writes: nothing. A new metric is one function and one line in METRICS; it is then in every table.

Ranks are mid-ranks: 1 + better candidates + half of those that tie with the target, so a rank may end in .5. A metric
maps the ranks, the numbers of candidates and the negative log-likelihoods of n queries to n values; its mean over
users is what tables show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Metric = Callable[[Floats, Floats, Floats], Floats]


@dataclass(frozen=True)
class Ranked:
    """The exact place of one query's target among its candidates, with the proof that it is exact.

    `score` is the target's (natural log-probability of its line for a model). Every candidate that was not scored has
    a score of at most `bound`; all scores were computed (a baseline) when it is -inf. `top_items` are the best
    candidates, best first, equal ones by item number; there are fewer than asked for only if the candidates are.
    """

    rank: float
    score: float
    n_candidates: int
    n_nodes: int
    """Trie prefixes put through the model."""
    top_items: npt.NDArray[np.int32]
    top_scores: Floats
    bound: float

    @property
    def certified(self) -> bool:
        """No candidate that was not scored can reach the target or the last of the top list."""
        return self.bound < min(self.score, float(self.top_scores.min(initial=np.inf)))


def mid_rank(n_better: int, n_equal: int) -> float:
    """Rank of a target among `n_better` better and `n_equal` equal other candidates, in the middle of its ties."""
    return 1 + n_better + n_equal / 2


def best(items: npt.NDArray[np.int64], scores: Floats, k: int) -> tuple[npt.NDArray[np.int32], Floats]:
    """The k best of `items` by score, best first, equal ones by item number."""
    order = np.lexsort((items, -scores))[:k]
    return items[order].astype(np.int32), scores[order]


def hit_rate(k: int) -> Metric:
    """HR@k: 1 where the rank is at most k."""
    return lambda rank, _n_candidates, _nll: (rank <= k).astype(np.float64)


def ndcg(k: int) -> Metric:
    """NDCG@k with one relevant item: 1 / log2(rank + 1) where the rank is at most k, else 0."""
    return lambda rank, _n_candidates, _nll: np.where(rank <= k, 1 / np.log2(rank + 1), 0.0)


def mrr(rank: Floats, _n_candidates: Floats, _nll: Floats) -> Floats:
    """Reciprocal rank, not cut off."""
    return 1 / rank


def nll(_rank: Floats, _n_candidates: Floats, nll: Floats) -> Floats:
    """Nats per item: minus the log-probability of the target's line; NaN for what gives no probability."""
    return nll


METRICS: dict[str, Metric] = {
    "HR@1": hit_rate(1), "HR@10": hit_rate(10), "HR@50": hit_rate(50), "NDCG@10": ndcg(10), "MRR": mrr, "NLL": nll,
}
TABLE_METRICS = ("HR@10", "NDCG@10", "MRR", "NLL")
"""The columns of a report; the others are in its JSON."""


def chance_hit_rate(n_candidates: Floats, k: int = 10) -> float:
    """Expected HR@k of a random order: the mean of k / candidates."""
    return float(np.minimum(1.0, k / n_candidates).mean())
