"""Means with confidence intervals, and differences between two models, over users.

reads: nothing. writes: nothing. costs: a resample draws every user once; resamples are drawn in blocks of 32 MiB.

The unit is the user, who may answer queries in several domains: a resample draws users, each with all of their
queries, and the statistic is the mean over domains of the domain's mean (one domain: its mean). Everything is seeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NUMBERS_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class Observations:
    """One value per query, with whose it is and the number of its domain (0, 1, ...; each occurs)."""

    values: Floats
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


def mean_interval(observed: Observations, *, confidence: float = 0.95, n_resamples: int = 2000,
                  seed: int = 0) -> Interval:
    """Macro-averaged mean and its bootstrap percentile interval over users.

    A domain that a resample leaves without users is left out of that resample's average.
    """
    sums, counts = _per_user(observed)
    rng = np.random.default_rng(seed)
    means = []
    for n in _blocks(n_resamples, sums.size):
        drawn = rng.integers(0, len(sums), (n, len(sums)))
        # (resamples, users, domains) -> (resamples, domains)
        total, count = sums[drawn].sum(axis=1), counts[drawn].sum(axis=1)
        means.append(np.nanmean(np.where(count > 0, total / np.maximum(count, 1), np.nan), axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float((sums.sum(axis=0) / counts.sum(axis=0)).mean()), float(low), float(high))


def paired_difference(a: Observations, b: Observations, *, confidence: float = 0.95, n_resamples: int = 2000,
                      n_permutations: int = 10_000, seed: int = 0) -> Difference:
    """Mean of a - b over the same queries in the same order, with interval and p.

    Under the null hypothesis a user's differences change sign together; p counts the observed one in, so that it is
    never 0, and is 1 for equal values.
    """
    assert list(a.users) == list(b.users) and np.array_equal(a.domains, b.domains), "not the same queries"
    delta = Observations(a.values - b.values, a.users, a.domains)
    interval = mean_interval(delta, confidence=confidence, n_resamples=n_resamples, seed=seed)
    sums, counts = _per_user(delta)
    shares = (sums / counts.sum(axis=0)).mean(axis=1)  # what each user adds to the statistic
    rng, observed, n_as_far = np.random.default_rng(seed + 1), abs(shares.sum()), 0
    for n in _blocks(n_permutations, len(shares)):
        signs = rng.integers(0, 2, (n, len(shares))) * 2 - 1
        n_as_far += int((np.abs(signs @ shares) >= observed - 1e-12).sum())
    return Difference(interval.mean, interval.low, interval.high, (1 + n_as_far) / (1 + n_permutations))


def _per_user(observed: Observations) -> tuple[Floats, Floats]:
    """Sum of values and number of queries, (users, domains) each."""
    _, user = np.unique(np.asarray(observed.users, dtype=np.str_), return_inverse=True)
    shape = (int(user.max()) + 1, int(observed.domains.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (user, observed.domains), observed.values)
    np.add.at(counts, (user, observed.domains), 1.0)
    return sums, counts


def _blocks(n: int, numbers_each: int) -> Iterator[int]:
    """Sizes of blocks that add up to `n`, each of a bounded amount of memory."""
    size = max(1, NUMBERS_PER_BLOCK // numbers_each)
    yield from (min(size, n - start) for start in range(0, n, size))
