"""What is asked of a query: the full catalogue, a few sampled candidates, a choice among letters, or a generated list.

reads: frozen queries. writes: nothing. Every protocol answers the same queries, as `--protocol NAME` says:

    full             the target against the whole catalogue, exactly: the headline
    uniform-M        against M negatives drawn from the candidates, all equally likely
    popularity-M     against M negatives drawn by their events in the training window
    choice-M         the M uniform negatives and the target as lettered options of one prompt, in several orders
    beam-W           a beam of width W inside the trie: what constrained decoding would list, and what it loses
    open-W           a beam of width W over plain text, each text then grounded to the nearest line of the catalogue

Sampled candidates change which model wins (Krichene and Rendle 2020, doi 10.1145/3394486.3403226): they are here for
comparison with papers. `expected_metric` says what the full rank makes one expect of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cprec.errors import ConfigError
from cprec.eval.queries import Bools, DomainQueries, Ints
from cprec.eval.trie import Floats

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS = ("full", "uniform", "popularity", "choice", "beam", "open")


@dataclass(frozen=True)
class Protocol:
    """A kind with its number: of negatives, or the width of a beam (0 for `full`)."""

    kind: str
    n: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind}-{self.n}"

    @property
    def is_sampled(self) -> bool:
        """Whether the candidates are the target and `n` negatives."""
        return self.kind in ("uniform", "popularity", "choice")


def parse_protocol(text: str) -> Protocol:
    """The protocol of a name such as `uniform-19`. Raises ConfigError."""
    found = re.fullmatch(r"(\w+)-([1-9]\d*)", text)
    if text == "full":
        return Protocol("full")
    if not found or found[1] not in KINDS or found[1] == "full":
        raise ConfigError(f"protocol={text!r} is none; give full, or one of {', '.join(KINDS[1:])} with its number, as "
                          f"in uniform-19 or beam-20")
    protocol = Protocol(found[1], int(found[2]))
    if protocol.kind == "choice" and protocol.n >= len(LETTERS):
        raise ConfigError(f"protocol={text!r}: there are {len(LETTERS)} letters, so at most {len(LETTERS) - 1} "
                          f"negatives; rank more of them with uniform-{protocol.n}")
    return protocol


def negatives(protocol: Protocol, queries: DomainQueries, i: int, *, seed: int) -> Ints:
    """The negatives of query i, different items, in the order drawn; fewer where there are fewer candidates.

    They follow from the seed, the domain, the user and the moment alone, so every model gets the same ones, and
    multiple choice those of the uniform protocol. By popularity, items without an event in the training window are only
    drawn when all others are.
    """
    target = int(queries.targets[i])
    others = np.flatnonzero(queries.candidates(i))
    others = others[others != target]
    rng = _rng(queries, i, seed=seed, use="popularity" if protocol.kind == "popularity" else "uniform")
    if protocol.kind != "popularity":
        uniform: Ints = rng.permutation(others)[:protocol.n]
        return uniform
    # the largest keys u^(1/w) are a weighted draw without replacement (Efraimidis and Spirakis 2006); in logarithms
    weight = queries.catalogue.n_train[others].astype(np.float64)
    with np.errstate(divide="ignore"):
        keys = np.where(weight > 0, np.log(rng.random(len(others))) / weight, -np.inf)
    weighted: Ints = others[np.argsort(-keys, kind="stable")][:protocol.n]
    return weighted


def orders(options: Ints, queries: DomainQueries, i: int, *, n: int, seed: int) -> list[Ints]:
    """`n` random orders of query i's options, from what its negatives follow from."""
    rng = _rng(queries, i, seed=seed, use="orders")
    return [rng.permutation(options) for _ in range(n)]


def _rng(queries: DomainQueries, i: int, *, seed: int, use: str) -> np.random.Generator:
    """What is drawn for query i and one use, wherever the query stands in its file."""
    name = f"{seed}\x1f{queries.domain}\x1f{queries.user_ids[i]}\x1f{queries.query_ts[i]}\x1f{use}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def sampled(protocol: Protocol, queries: DomainQueries, i: int, *, seed: int) -> Bools:
    """Mask of query i's candidates under a sampled protocol: the negatives and the target."""
    mask = np.zeros(len(queries.catalogue), dtype=bool)
    mask[negatives(protocol, queries, i, seed=seed)] = True
    mask[queries.targets[i]] = True
    return mask


def expected_metric(value_at: Callable[[Floats], Floats], rank: float, n_candidates: int, n_negatives: int) -> float:
    """Expected value of a metric under uniform negatives, of a target whose rank in all candidates is known.

    Of the `n_negatives` drawn from `n_candidates - 1` others, of which `rank - 1` are better, the better ones are
    hypergeometric. `value_at` gives the metric at ranks. A rank between two is taken as half of either.
    """
    drawn = min(n_negatives, n_candidates - 1)
    values = []
    for n_better in {int(np.floor(rank)) - 1, int(np.ceil(rank)) - 1}:
        among = np.arange(drawn + 1)
        share = stats.hypergeom.pmf(among, n_candidates - 1, n_better, drawn)
        values.append(float((share * value_at(1.0 + among.astype(np.float64))).sum()))
    return float(np.mean(values))
