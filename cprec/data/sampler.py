"""Which row of which corpus stands at global position g: pure arithmetic, no index array, no state but g.

Position g counts the rows that the run has consumed. The phase's mixing weights give each position its corpus, by
quotas that never drift: from a phase's start to any position each corpus is within one row of its share, over a window
from anywhere within two. A keyed permutation of the corpus per epoch gives the row. Any rank of any world size, and any
tool, computes the same answer from (seed, phases, g). Memory: one pattern of 16,384 small integers per phase; nothing
grows with the corpus.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from cprec.errors import did_you_mean, raise_all

Ints = npt.NDArray[np.int64]
Uints = npt.NDArray[np.uint64]
PERIOD = 16384
"""Mixing weights are honoured in units of 1/16384; over every period exactly."""
ROUNDS = 6


@dataclass(frozen=True)
class Phase:
    """From global position `start_row` on, rows are drawn by `quotas`: rows of each corpus in every PERIOD rows."""

    start_row: int
    quotas: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """What stands at positions g0, g0 + 1, ...: corpus number, row in the corpus, epoch of the corpus; (n,) each."""

    corpus: Ints
    row: Ints
    epoch: Ints


@dataclass(frozen=True)
class Sampler:
    """The run's order of rows over corpora of `sizes` rows each. Phases are in order; the first starts at 0.

    >>> two_to_one = Phase(start_row=0, quotas=quotas_of([2, 1]))
    >>> sampler = Sampler(names=("books", "toys"), sizes=(100, 10), phases=(two_to_one,), seed=0)
    >>> sampler.rows(0, 6).corpus.tolist()
    [0, 1, 0, 0, 1, 0]
    >>> sorted(sampler.rows(0, 30).row[sampler.rows(0, 30).corpus == 1].tolist())  # an epoch of toys: each row once
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    >>> int(sampler.rows(10**12, 1).epoch[0]) > 10**9  # any position costs as much as the first
    True
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    phases: tuple[Phase, ...]
    seed: int
    reseeds: tuple[tuple[int, int], ...] = ()
    """(position, seed), in order: from there on the rows that an epoch has left, and those of later epochs, come in
    another order. So no epoch has a row twice, whatever the seed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", int(self.seed))  # numpy's 3 and Python's are one seed, but differ as text

    def rows(self, start: int, n: int) -> Position:
        """Positions `start` to `start + n`. Costs O(n), wherever `start` is."""
        positions = np.arange(start, start + n, dtype=np.int64)
        corpus = np.empty(n, dtype=np.int64)
        count = np.empty(n, dtype=np.int64)  # how many rows of its corpus the run drew before this one
        for k, phase in enumerate(self.phases):
            end = self.phases[k + 1].start_row if k + 1 < len(self.phases) else None
            here = (positions >= phase.start_row) & (positions < end if end is not None else True)
            if here.any():
                corpus[here], drawn = _draw(phase.quotas, positions[here] - phase.start_row)
                count[here] = drawn + self._drawn_before[k][corpus[here]]
        epoch = count // np.asarray(self.sizes, dtype=np.int64)[corpus]
        row = np.empty(n, dtype=np.int64)
        for c, e in {(int(c), int(e)) for c, e in zip(corpus, epoch, strict=True)}:
            here = (corpus == c) & (epoch == e)
            row[here] = self._rows_of(c, e, count[here] - e * self.sizes[c], len(self.reseeds))
        return Position(corpus, row, epoch)

    def _rows_of(self, corpus: int, epoch: int, place: Ints, n_reseeds: int) -> Ints:
        """Rows at places of an epoch of a corpus, as the first `n_reseeds` reseeds order them."""
        size, name = self.sizes[corpus], self.names[corpus]
        if n_reseeds == 0:
            return permute(place, size, key=(self.seed, name, epoch))
        position, seed = self.reseeds[n_reseeds - 1]
        read = min(max(int(self.drawn(position)[corpus]) - epoch * size, 0), size)  # rows of the epoch before it
        moved = place.copy()
        after = place >= read
        if after.any():
            moved[after] = read + permute(place[after] - read, size - read, key=(seed, name, epoch))
        return self._rows_of(corpus, epoch, moved, n_reseeds - 1)

    def drawn(self, end: int) -> Ints:
        """Rows of each corpus drawn before global position `end`: (n_corpora,)."""
        k = max(i for i, phase in enumerate(self.phases) if phase.start_row <= end)
        within = _drawn_until(self.phases[k].quotas, end - self.phases[k].start_row)
        return self._drawn_before[k] + within

    def position_of(self, corpus: int, n: int) -> int | None:
        """Global position of the `n`-th row (from 0) that is drawn of corpus number `corpus`; None if it never is."""
        for k, phase in enumerate(self.phases):
            if phase.quotas[corpus] == 0:
                continue
            at = phase.start_row + _offset_of(phase.quotas, corpus, n - int(self._drawn_before[k][corpus]))
            if k + 1 == len(self.phases) or at < self.phases[k + 1].start_row:
                return at
        return None

    def order_until(self, end: int) -> tuple[object, ...]:
        """All that decides the rows at the positions before `end`: equal for two samplers with the same rows there."""
        return self.seed, [r for r in self.reseeds if r[0] < end], self.phases_until(end)

    def phases_until(self, end: int) -> list[tuple[int, dict[str, int]]]:
        """What decides the corpora at the positions before `end`: each phase's start and positive quotas by name.

        Two samplers of one seed for which it is equal have the same rows there, also when one knows more corpora.
        """
        return [(phase.start_row, {name: q for name, q in zip(self.names, phase.quotas, strict=True) if q})
                for phase in self.phases if phase.start_row < end]

    @cached_property
    def _drawn_before(self) -> list[Ints]:
        """Rows of each corpus drawn before the start of each phase."""
        before = [np.zeros(len(self.names), dtype=np.int64)]
        for phase, after in zip(self.phases, self.phases[1:], strict=False):
            before.append(before[-1] + _drawn_until(phase.quotas, after.start_row - phase.start_row))
        return before


def quotas_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole rows per PERIOD (largest remainder; a positive weight gets at least one row).

    >>> quotas_of([1, 3])
    (4096, 12288)
    """
    share = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
    quotas = np.where(share > 0, np.maximum(np.floor(share), 1), 0).astype(np.int64)
    order = np.argsort(-(share - np.floor(share)), kind="stable")
    order = order[share[order] > 0]
    i = 0
    while quotas.sum() < PERIOD:
        quotas[order[i % len(order)]] += 1
        i += 1
    while quotas.sum() > PERIOD:  # many tiny weights were lifted to one row: the largest gives
        quotas[np.argmax(quotas)] -= 1
    return tuple(int(q) for q in quotas)


@dataclass(frozen=True)
class Rounded:
    """A weight that PERIOD rows cannot hold: the corpus gets `quota` of them, its weight is `share` of all weights."""

    corpus: int
    share: float
    quota: int


def badly_rounded(weights: Sequence[float]) -> list[Rounded]:
    """Each corpus whose quota is more than a tenth off its weight: few rows of PERIOD, or one where it wants less."""
    total = sum(weights)
    found = [Rounded(c, weight / total, quota) for c, (weight, quota) in
             enumerate(zip(weights, quotas_of(weights), strict=True)) if weight > 0]
    return [r for r in found if abs(r.quota - r.share * PERIOD) > 0.1 * r.share * PERIOD]


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that `pattern` (`specific/*`) means. What is itself a name means that corpus, also `a[1]`."""
    known = list(names)
    return [pattern] if pattern in known else fnmatch.filter(known, pattern)


def resolve_mix(mix: Mapping[str, float] | None, tokens: Mapping[str, int], *, field: str) -> dict[str, float]:
    """Weight of every corpus by name; `mix` maps names or patterns (`specific/*`) to weights, None means by size.

    A pattern's weight is shared among its corpora in proportion to their tokens. `tokens`: real tokens per training
    corpus. Raises ConfigError listing every entry that matches nothing or has an impossible weight.
    """
    weights = dict.fromkeys(tokens, 0.0)
    problems: list[str] = []
    for pattern, weight in ({"*": 1.0} if mix is None else mix).items():
        matched = matching(pattern, tokens)
        if not matched:
            problems.append(f"{field}.{pattern}: no training corpus of that name; {did_you_mean(pattern, tokens)}")
        if not 0 <= weight < float("inf"):
            problems.append(f"{field}.{pattern}={weight}: a weight must be a number >= 0")
        total = sum(tokens[name] for name in matched)
        for name in matched:  # a weight of its own stays as it is, to the last bit
            weights[name] += weight if len(matched) == 1 else weight * tokens[name] / total
    if not problems and sum(weights.values()) <= 0:
        problems.append(f"{field}: all weights are zero; give at least one corpus a positive weight")
    raise_all(problems, of="mixture")
    return weights


def resolve_caps(max_epochs: Mapping[str, float], rows: Mapping[str, int], *, field: str) -> list[int | None]:
    """Most rows that a run may draw of each corpus, floor(max_epochs * rows), in the order of `rows`; None: any number.

    `max_epochs` maps names or patterns to epochs; an exact name beats a pattern. Raises ConfigError listing every entry
    that matches nothing, and every corpus that two patterns match or that would get no row.
    """
    problems = [f"{field}.{pattern}: no training corpus of that name; {did_you_mean(pattern, rows)}"
                for pattern in max_epochs if not matching(pattern, rows)]
    caps: list[int | None] = []
    for name, n_rows in rows.items():
        found = [name] if name in max_epochs else [p for p in max_epochs if name in matching(p, rows)]
        if len(found) > 1:
            problems.append(f"{field}: {' and '.join(repr(p) for p in found)} both match {name}; name it by itself")
        # a decimal fraction as it was written: 0.29 of 100 rows are 29, not floor(28.999...)
        caps.append(int(Fraction(str(max_epochs[found[0]])) * n_rows) if found else None)
        if found and caps[-1] == 0:
            problems.append(f"{field}.{found[0]}={max_epochs[found[0]]} is less than one of the {n_rows:,} rows of "
                            f"{name}; raise it, or give the corpus weight 0 in data.mix")
    raise_all(problems, of="epochs")
    return caps


def redistribute(phases: Sequence[Phase], caps: Sequence[int | None], *, until: int) -> tuple[Phase, ...]:
    """The phases up to position `until`, in which a corpus that has reached its cap leaves its share to the others.

    From the very row at which a corpus is exhausted a further phase begins, without it, the others in proportion to
    their quotas. A later `until` adds phases and changes none. Where a phase has no corpus left, its quotas are all
    zero and nothing follows.
    """
    out: list[Phase] = []
    drawn = np.zeros(len(caps), dtype=np.int64)
    for phase, after in zip(phases, [*phases[1:], None], strict=True):
        start, end = phase.start_row, until if after is None else min(after.start_row, until)
        while start < end:
            left = [None if cap is None else cap - int(n) for cap, n in zip(caps, drawn, strict=True)]
            quotas = _without([n == 0 for n in left], phase.quotas)
            out.append(Phase(start, quotas))
            if not any(quotas):
                return tuple(out)
            dry = [start + _offset_of(quotas, c, n - 1) + 1 for c, n in enumerate(left) if n and quotas[c]]
            stop = min([end, *dry])
            drawn += _drawn_until(quotas, stop - start)
            start = stop
    return tuple(out)


def _without(dry: Sequence[bool], quotas: tuple[int, ...]) -> tuple[int, ...]:
    """`quotas` without the corpora that are dry; all zero when that leaves none."""
    kept = [0 if d else q for q, d in zip(quotas, dry, strict=True)]
    return quotas if tuple(kept) == quotas else quotas_of(kept) if any(kept) else tuple(kept)


def permute(place: Ints, size: int, *, key: tuple[int, str, int]) -> Ints:
    """Row at each place (0 <= place < size) of a keyed pseudorandom permutation of range(size).

    A balanced Feistel network over the smallest even number of bits that holds `size`, with cycle walking: values
    outside the range go through again, fewer than four times on average. O(1) memory at any size.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    keys = _round_keys(key)
    out = place.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        x = out[todo]
        left, right = x >> shift, x & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        out[todo] = (left << shift) | right
        todo &= out >= np.uint64(size)
    return out.astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, str, int]) -> tuple[np.uint64, ...]:
    seed, name, epoch = key  # as Python's own: repr(numpy.int64(3)) is another text
    digest = hashlib.blake2b(repr((int(seed), str(name), int(epoch))).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(np.uint64(int.from_bytes(digest[i:i + 8], "little")) for i in range(0, len(digest), 8))


def _mix(x: Uints) -> Uints:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _pattern(quotas: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Corpus at each position of one period, and how many of its rows came before it in the period: (PERIOD,) each.

    The chairman assignment of Tijdeman (1980): after every position, counted from the phase's start, each corpus is
    within one row of its exact share. Over a window that starts anywhere it is so at both ends: within two rows, and
    exact over whole periods.
    """
    active = np.flatnonzero(quotas)
    q = np.asarray(quotas, dtype=np.int64)[active]
    slack = 2 * max(len(active) - 1, 1)
    number = np.repeat(np.arange(len(active)), q)  # of each row of the period: its corpus,
    given = np.arange(PERIOD) - np.repeat(np.cumsum(q) - q, q)  # and its corpus' rows before it
    # row g of a corpus may come once its share owes it 1/slack of a row, and must before it owes 1 - 1/slack
    release = -(-PERIOD * (1 + slack * given) // (slack * q[number]))
    deadline = PERIOD * (slack - 1 + slack * given) / q[number]
    order = np.argsort(release, kind="stable")
    jobs = list(zip(deadline[order].tolist(), number[order].tolist(), given[order].tolist(), strict=True))
    corpus, before = np.empty(PERIOD, dtype=np.int64), np.empty(PERIOD, dtype=np.int64)
    waiting: list[tuple[float, int, int]] = []
    first = 0
    for t, last in enumerate(np.searchsorted(release[order], np.arange(1, PERIOD + 1), side="right").tolist()):
        for job in jobs[first:last]:
            heappush(waiting, job)
        first = last
        _, winner, before[t] = heappop(waiting)
        corpus[t] = active[winner]
    return corpus, before


def _draw(quotas: tuple[int, ...], offset: Ints) -> tuple[Ints, Ints]:
    """Corpus at each offset into a phase, and how many of its rows the phase drew before."""
    corpus, before = _pattern(quotas)
    period, place = offset // PERIOD, offset % PERIOD
    return corpus[place], period * np.asarray(quotas, dtype=np.int64)[corpus[place]] + before[place]


def _drawn_until(quotas: tuple[int, ...], n: int) -> Ints:
    """Rows of each corpus among the first n of a phase."""
    corpus, _ = _pattern(quotas)
    head = np.bincount(corpus[:n % PERIOD], minlength=len(quotas)).astype(np.int64)
    return np.asarray(quotas, dtype=np.int64) * (n // PERIOD) + head


def _offset_of(quotas: tuple[int, ...], corpus: int, n: int) -> int:
    """Offset into a phase of the `n`-th row (from 0) of a corpus with a positive quota."""
    period, nth = divmod(n, quotas[corpus])
    return period * PERIOD + int(np.flatnonzero(_pattern(quotas)[0] == corpus)[nth])
