"""The promises of the reader's order at sizes that no machine here holds: 10^12 rows, 16,384 ranks, position 10^13."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from cprec.data.dataset import deal
from cprec.data.sampler import PERIOD, Phase, Sampler, permute, quotas_of, redistribute

Ints = npt.NDArray[np.int64]
SIZES = (10**12, 7 * 10**11 + 13, 10**9 + 7, 1_000_003)
WEIGHTS = (5.0, 3.0, 1.0, 0.25)


def huge() -> Sampler:
    phases = (Phase(0, quotas_of([1, 1, 1, 0])), Phase(10**12 + 5, quotas_of(WEIGHTS)))
    return Sampler(("mixed", "specific/a", "specific/b", "text"), SIZES, phases, seed=11)


@pytest.mark.parametrize("start", [0, 10**12, 10**12 + 5, 3 * 10**12 + 1, 10**13])
def test_every_window_anywhere_has_its_exact_shares_and_costs_no_memory_per_row(start: int) -> None:
    sampler = huge()
    tracemalloc.start()
    at = sampler.rows(start, 4 * PERIOD)
    before, after = sampler.drawn(start), sampler.drawn(start + 4 * PERIOD)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6, f"{peak:,} bytes for a window of {4 * PERIOD:,} rows"
    assert (after - before).tolist() == np.bincount(at.corpus, minlength=4).tolist()
    if start > 10**12:
        quotas = np.array(quotas_of(WEIGHTS))
        assert (after - before).tolist() == (4 * quotas).tolist()  # whole periods, from wherever
        for n in (1000, 5000, 40_000):
            drift = np.bincount(at.corpus[:n], minlength=4) - quotas / PERIOD * n
            assert np.abs(drift).max() < 2  # within one row at both ends
    assert all(0 <= r < SIZES[c] for c, r in zip(at.corpus, at.row, strict=True))
    seen = set(zip(at.corpus.tolist(), at.epoch.tolist(), at.row.tolist(), strict=True))
    assert len(seen) == 4 * PERIOD


@pytest.mark.parametrize("start", [12_345, 10**13 - 16_384])
def test_a_step_has_the_same_rows_whatever_the_world_size_and_no_row_for_two_ranks(start: int) -> None:
    batch = 32_768
    at = huge().rows(start, batch)
    cost = np.random.default_rng(0).integers(10**5, 10**7, size=batch)
    whole = list(zip(at.corpus.tolist(), at.epoch.tolist(), at.row.tolist(), strict=True))
    assert len(set(whole)) == batch
    for world_size in (1, 2, 4, 8, 64, 1024, 16_384):
        places = deal(cost, world_size=world_size, micro_batch_size=2)
        assert places.shape == (batch // (2 * world_size), 2, world_size)
        by_rank = places.transpose(2, 0, 1).reshape(world_size, -1)  # (rank, its places)
        assert np.array_equal(np.sort(by_rank, axis=None), np.arange(batch))  # all ranks together: every row, once



def test_a_permutation_of_10_to_the_12_rows_is_uniform_and_differs_from_epoch_to_epoch() -> None:
    n, bins = 64_000, 64
    rows = {epoch: permute(np.arange(n), 10**12, key=(7, "mixed", epoch)) for epoch in range(3)}
    for epoch, found in rows.items():
        assert len(set(found.tolist())) == n
        counts = np.bincount(found * bins // 10**12, minlength=bins)
        chi2 = float(((counts - n / bins) ** 2 / (n / bins)).sum())
        assert 25 < chi2 < 115, (epoch, chi2)  # 63 degrees of freedom: 63 +- 11; these are 3.4 and 4.6 deviations
        low = np.bincount(found % bins, minlength=bins)
        assert 25 < float(((low - n / bins) ** 2 / (n / bins)).sum()) < 115
        steps = np.diff(found)
        assert 0.3 < (steps > 0).mean() < 0.7 and abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert not (rows[0] == rows[1]).any() and not (rows[1] == rows[2]).any()


@pytest.mark.parametrize("weights", [[1, 0], [1, 1e-9], [1, PERIOD - 1], [3, 5]])
def test_nothing_overflows_at_10_to_the_12_rows_and_100_epochs_whatever_the_quotas(weights: list[float]) -> None:
    quotas = quotas_of(weights)
    sampler = Sampler(("a", "b"), (10**12, 10**12), (Phase(0, quotas), Phase(10**14, quotas)), seed=0)
    far = 10**14 + 12_345
    want = [quotas[0] * (10**14 // PERIOD), quotas[1] * (10**14 // PERIOD)]
    drawn = sampler.drawn(10**14)
    assert drawn.sum() == 10**14 and all(0 <= d - w <= PERIOD for d, w in zip(drawn.tolist(), want, strict=True))
    at = sampler.rows(far, 1000)
    assert at.row.min() >= 0 and at.row.max() < 10**12 and at.epoch.min() >= 0 and at.epoch.max() <= 100
    # by hand: the first of the thousand is the row of its corpus that follows all drawn before it
    c = int(at.corpus[0])
    epoch, place = divmod(int(sampler.drawn(far)[c]), 10**12)
    assert at.epoch[0] == epoch
    assert at.row[0] == permute(np.array([place]), 10**12, key=(0, "ab"[c], epoch))[0]


def test_a_corpus_of_10_to_the_12_rows_runs_dry_at_the_very_row_without_counting_there() -> None:
    sampler = huge()
    caps: list[int | None] = [2 * 10**12, None, 5 * 10**8, None]
    phases = redistribute(sampler.phases, caps, until=10**13)
    capped = Sampler(sampler.names, sampler.sizes, phases, sampler.seed)
    assert [p.start_row for p in phases] == sorted({p.start_row for p in phases}) and len(phases) == 4
    assert capped.drawn(10**13).sum() == 10**13
    for c, cap in ((0, 2 * 10**12), (2, 5 * 10**8)):
        last = capped.position_of(c, cap - 1)
        assert last is not None and capped.rows(last, 1).corpus[0] == c
        assert (capped.drawn(last)[c], capped.drawn(last + 1)[c]) == (cap - 1, cap)
        assert capped.drawn(10**13)[c] == cap and capped.position_of(c, cap) is None


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1023, 1025])
def test_at_small_sizes_each_epoch_is_seen_to_hold_every_row_once(size: int) -> None:
    sampler = Sampler(("a", "b"), (size, 10**12), (Phase(0, quotas_of([3, 1])),), seed=size)
    at = sampler.rows(0, 5 * size)
    orders = [at.row[(at.corpus == 0) & (at.epoch == e)].tolist() for e in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 100 or orders[0] != orders[1] != orders[2] != orders[0]
