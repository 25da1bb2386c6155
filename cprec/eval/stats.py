"""Means with confidence intervals, and differences between two models, over users and over seeds.

reads: nothing. writes: nothing. costs: per call, `n_resamples` x users random numbers, whatever the number of columns;
in blocks of 32 MiB.

The unit is the user, who may answer queries in several domains: a resample draws users, each with all of their
queries, and the statistic is the mean over domains of the domain's mean (one domain: its mean). With several seeds (of
training, or of the order of tied events) a resample first draws seeds, then users, the same ones for every seed.
Everything is seeded. scipy's bootstrap and permutation test know neither users with several queries nor averages over
domains; with one query each and one domain the tests hold ours against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NUMBERS_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class Observations:
    """Values of n queries, with whose each query is and the number of its domain (0, 1, ...; each occurs)."""

    values: Floats
    """(n,), or (n, k) for k metrics at once."""
    users: Sequence[str]
    domains: Ints


@dataclass(frozen=True)
class Interval:
    """A mean over domains of means over users, and its percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean difference with its interval, and the two-sided p of a sign-flip permutation over users."""

    mean: float
    low: float
    high: float
    p: float


def mean_interval(*seeds: Observations, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """`mean_intervals` of one metric."""
    return mean_intervals(seeds, confidence=confidence, n_resamples=n_resamples, seed=seed)[0]


def mean_intervals(seeds: Sequence[Observations], *, confidence: float = 0.95, n_resamples: int = 2000,
                   seed: int = 0) -> list[Interval]:
    """Of each metric, the macro-averaged mean over all seeds, and its bootstrap interval over seeds and users.

    A domain that a resample leaves without users is left out of that resample's average. R seeds that are drawn from
    themselves show (R - 1) / R of their variance: with two or three of them the interval is still narrow.
    """
    sums, counts = _per_user(seeds)
    rng = np.random.default_rng(seed)
    means = []
    for n in _blocks(n_resamples, sums.shape[1]):
        drawn = _draws(rng, n, sums.shape[1])
        of_seed = np.ones((n, 1)) if len(sums) == 1 else _draws(rng, n, len(sums))
        # (resamples, domains, metrics), summed over the drawn users of the drawn seeds
        total, count = (np.stack([of_seed[:, s, None, None] * np.tensordot(drawn, part[s], 1)
                                  for s in range(len(sums))]).sum(axis=0) for part in (sums, counts))
        n_domains = np.sum(count > 0, axis=1)
        in_any = n_domains[:, 0] > 0
        means.append(((total / np.maximum(count, 1)).sum(axis=1) / np.maximum(n_domains, 1))[in_any])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return [Interval(float(m), float(lo), float(hi)) for m, lo, hi in zip(_macro(sums, counts), low, high, strict=True)]


def paired_difference(a: Observations, b: Observations, *, confidence: float = 0.95, n_resamples: int = 2000,
                      n_permutations: int = 10_000, seed: int = 0) -> Difference:
    """`paired_differences` of one metric and one seed."""
    return paired_differences([a], [b], confidence=confidence, n_resamples=n_resamples, n_permutations=n_permutations,
                              seed=seed)[0]


def paired_differences(a: Sequence[Observations], b: Sequence[Observations], *, confidence: float = 0.95,
                       n_resamples: int = 2000, n_permutations: int = 10_000, seed: int = 0) -> list[Difference]:
    """Of each metric, the mean of a - b over the same queries in the same order, with interval and p.

    The first seed of a is held against the first of b and so on; a single one against all. Under the null hypothesis
    a user's differences, averaged over the seeds, change sign together; p counts the observed one in, so that it is
    never 0, and is 1 for equal values.
    """
    n = max(len(a), len(b))
    assert {len(a), len(b)} <= {1, n}, f"{len(a)} and {len(b)} seeds cannot be paired"
    deltas = [_minus(x, y) for x, y in zip([*a] * (n // len(a)), [*b] * (n // len(b)), strict=True)]
    intervals = mean_intervals(deltas, confidence=confidence, n_resamples=n_resamples, seed=seed)
    sums, counts = (part.sum(axis=0) for part in _per_user(deltas))
    shares = (sums / counts.sum(axis=0)).mean(axis=1)  # (users, metrics): what each user adds to the statistic
    rng, observed = np.random.default_rng(seed + 1), np.abs(shares.sum(axis=0))
    n_as_far = np.zeros(shares.shape[1])
    for size in _blocks(n_permutations, len(shares)):
        signs = rng.integers(0, 2, (size, len(shares)), dtype=np.int8) * 2.0 - 1
        n_as_far += (np.abs(signs @ shares) >= observed - 1e-12).sum(axis=0)
    return [Difference(i.mean, i.low, i.high, float(p))
            for i, p in zip(intervals, (1 + n_as_far) / (1 + n_permutations), strict=True)]


def mcnemar(a: Observations, b: Observations) -> float | None:
    """Exact two-sided p that a and b hit (values 0 or 1) equally often, from the queries where only one does; None
    where a user has several queries, which are not independent."""
    if len(set(a.users)) < len(a.users):
        return None
    delta = _minus(a, b).values
    n_a, n_b = int((delta > 0).sum()), int((delta < 0).sum())
    return float(binomtest(n_a, n_a + n_b).pvalue) if n_a + n_b else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """P-values adjusted for being `len(ps)` of them (Holm, 1979), in the order given: the i-th smallest times what is
    left, and never below the one before."""
    adjusted = [0.0] * len(ps)
    least = 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = least
    return adjusted


def detectable_difference(n_users: int, *, discordant: float = 0.08, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest difference of hit rates that a paired comparison of `n_users` finds with that power, where so large a
    share of the users is hit by one of the two models only: (z_alpha/2 + z_power) sqrt(discordant / n)."""
    return float((norm.isf(alpha / 2) + norm.ppf(power)) * np.sqrt(discordant / n_users))


def power_line(n_users: int) -> str:
    """What a comparison of so many users can show, in words, for printing before it is made."""
    shown = ", ".join(f"{detectable_difference(n_users, discordant=q):.4f} with {q:.0%} discordant"
                      for q in (0.02, 0.08, 0.2))
    return (f"{n_users} users show a difference in HR@K of at least {shown} (80 % power, two-sided 5 %; discordant: "
            f"users whom only one of the two models hits)")


def seed_deviations(seeds: Sequence[Observations]) -> list[float] | None:
    """Of each metric, the standard deviation of the mean over seeds; None of fewer than two."""
    if len(seeds) < 2:
        return None
    means = np.stack([_macro(*_per_user([x])) for x in seeds])
    return [float(sd) for sd in np.std(means, axis=0, ddof=1)]


def _macro(sums: Floats, counts: Floats) -> Floats:
    """(metrics,)"""
    means: Floats = (sums.sum(axis=(0, 1)) / counts.sum(axis=(0, 1))).mean(axis=0)
    return means


def _minus(a: Observations, b: Observations) -> Observations:
    assert list(a.users) == list(b.users) and np.array_equal(a.domains, b.domains), "not the same queries"
    return Observations(a.values - b.values, a.users, a.domains)


def _per_user(seeds: Sequence[Observations]) -> tuple[Floats, Floats]:
    """Sums of values, (seeds, users, domains, metrics), and numbers of queries, (seeds, users, domains, 1). With other
    queries per seed, a user may lack those of one."""
    names, user = np.unique(np.concatenate([np.asarray(x.users, dtype=np.str_) for x in seeds]), return_inverse=True)
    which = np.repeat(np.arange(len(seeds)), [len(x.values) for x in seeds])
    domain = np.concatenate([x.domains for x in seeds])
    values = np.concatenate([x.values.reshape(len(x.values), -1) for x in seeds])
    shape = (len(seeds), len(names), int(domain.max()) + 1)
    sums, counts = np.zeros((*shape, values.shape[1])), np.zeros((*shape, 1))
    np.add.at(sums, (which, user, domain), values)
    np.add.at(counts, (which, user, domain), 1.0)
    return sums, counts


def _draws(rng: np.random.Generator, n: int, size: int) -> Floats:
    """(n, size): how often each of `size` is in each of n draws of `size` with replacement."""
    drawn = rng.integers(0, size, (n, size)) + np.arange(n)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=n * size).reshape(n, size).astype(np.float64)


def _blocks(n: int, numbers_each: int) -> Iterator[int]:
    """Sizes of blocks that add up to `n`, each of a bounded amount of memory."""
    size = max(1, NUMBERS_PER_BLOCK // numbers_each)
    yield from (min(size, n - start) for start in range(0, n, size))
