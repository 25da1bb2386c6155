"""What one ranked query is, and every metric of it, by name.

reads: nothing. writes: nothing. A new metric is one function and one line in METRICS; it is then in every table.

Ranks are mid-ranks: 1 + better candidates + half of those that tie with the target, so a rank may end in .5. A metric
maps the answers to n queries to n values; its mean over users is what tables show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What is known of n answered queries; entry i of every field is of query i."""

    rank: Floats
    """Of the target; infinite where a generated list lacks it, or where the search stopped before it."""
    known_up_to: Floats
    """An infinite rank lies beyond this one; infinite itself where a list lacks the target: a miss at any K."""
    n_candidates: Floats
    nll: Floats
    """Nats: minus the log-probability of the target's line; NaN for what gives no probability."""
    n_bytes: Floats
    """UTF-8 bytes of that line."""
    top10_events: Floats
    """Mean number of training events of the ten best items; NaN where fewer than ten were asked for."""
    valid: Floats
    """Share of what was generated that is a line of the catalogue as it stands; 1 where only such lines can be."""


Metric = Callable[[Answers], Floats]


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


def ndcg_at(k: int, rank: Floats) -> Floats:
    """NDCG@k with one relevant item: 1 / log2(rank + 1) where the rank is at most k, else 0."""
    gain: Floats = np.where(rank <= k, 1 / np.log2(rank + 1), 0.0)
    return gain


def hits_at(k: int, rank: Floats) -> Floats:
    """HR@k: 1 where the rank is at most k."""
    return (rank <= k).astype(np.float64)


def hit_rate(k: int) -> Metric:
    """`hits_at` of the answers; NaN where it is not known whether the rank is beyond k."""
    return lambda a: _where_known(k, a, hits_at(k, a.rank))


def ndcg(k: int) -> Metric:
    """`ndcg_at` of the answers; NaN where it is not known whether the rank is beyond k."""
    return lambda a: _where_known(k, a, ndcg_at(k, a.rank))


def _where_known(k: int, a: Answers, values: Floats) -> Floats:
    return np.where(np.isinf(a.rank) & (a.known_up_to < k), np.nan, values)


def mrr(a: Answers) -> Floats:
    """Reciprocal rank, not cut off; 0 for an infinite one."""
    return 1 / a.rank


def auc(a: Answers) -> Floats:
    """Share of the other candidates that the target beats, ties counted half: 1 - (rank - 1) / (candidates - 1); one
    half where there is no other, NaN for an infinite rank, which does not say how many."""
    others = np.maximum(a.n_candidates - 1, 1)
    share = np.where(a.n_candidates > 1, 1 - (a.rank - 1) / others, 0.5)
    return np.where(np.isinf(a.rank), np.nan, share)


def bits_per_byte(a: Answers) -> Floats:
    """Bits that a byte of the target's line costs, which tokenizers do not change the unit of."""
    return a.nll / (math.log(2) * a.n_bytes)


METRICS: dict[str, Metric] = {
    "HR@1": hit_rate(1), "HR@10": hit_rate(10), "HR@50": hit_rate(50), "NDCG@10": ndcg(10), "MRR": mrr, "AUC": auc,
    "NLL": lambda a: a.nll, "bits/byte": bits_per_byte, "ARP@10": lambda a: a.top10_events,
    "valid": lambda a: a.valid,
}
"""By the name that tables show. NLL in nats per item. ARP@10: average recommendation popularity, the training events of
the ten best items (Yin et al., 2012). valid: share of generated texts that are lines of the catalogue; 1 for ranks."""
TABLE_METRICS = ("HR@10", "NDCG@10", "MRR", "NLL")
"""The columns of a report; the others are in its JSON, and in its second table."""
LOWER_IS_BETTER = ("NLL", "bits/byte")


def chance_hit_rate(n_candidates: Floats, k: int = 10) -> float:
    """Expected HR@k of a random order: the mean of k / candidates."""
    return float(np.minimum(1.0, k / n_candidates).mean())


def coverage(top10: Sequence[Ints], n_items: int) -> float:
    """Share of a catalogue of `n_items` that is in the ten best of at least one query."""
    return len(np.unique(np.concatenate(list(top10)))) / n_items if len(top10) else 0.0
