"""The promises of the reader's order at sizes that no machine here holds: 10^12 rows, 16,384 ranks, position 10^13."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from cprec.data.dataset import PackedDataset
from cprec.data.sampler import PERIOD, Phase, Sampler, permute, quotas_of, redistribute
from cprec.format import FACTS

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


class Arithmetic:
    """A corpus of which a row's facts are a function of its number: what the dealing of a step asks of a corpus."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.asked = 0

    def __len__(self) -> int:
        return self.n_rows

    def facts(self, rows: Ints) -> npt.NDArray[np.void]:
        self.asked += len(rows)
        facts = np.empty(len(rows), dtype=FACTS)
        facts["cost"], facts["n_labels"], facts["n_pad"] = 10**5 + rows % 9_999_991, rows % 2048, rows % 8
        return facts


@pytest.mark.parametrize("step", [0, 10**12 // 32_768, 10**13 // 32_768])  # the second holds the change of phase
def test_a_step_has_the_same_rows_whatever_the_world_size_and_no_row_for_two_ranks(step: int) -> None:
    batch, sampler = 32_768, huge()
    want = sampler.rows(step * batch, batch)
    drawn = list(zip(want.corpus.tolist(), want.row.tolist(), strict=True))
    assert len(set(drawn)) == batch
    for world_size in (1, 2, 4, 8, 64, 1024, 16_384):
        corpora = [Arithmetic(size) for size in SIZES]
        read = PackedDataset(cast(Any, corpora), huge(), global_batch_size=batch, micro_batch_size=2,
                             world_size=world_size).step_rows(step)
        assert list(zip(read.corpus.tolist(), read.row.tolist(), strict=True)) == drawn
        assert np.array_equal(read.cost, 10**5 + want.row % 9_999_991)
        assert (int(read.n_labels.sum()), int(read.n_pad.sum())) == ((want.row % 2048).sum(), (want.row % 8).sum())
        assert sum(corpus.asked for corpus in corpora) == batch  # of every row once, whoever gets it
        assert read.dealt.shape == (batch // (2 * world_size), 2, world_size)
        by_rank = read.dealt.transpose(2, 0, 1).reshape(world_size, -1)  # (rank, its places)
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


def permuted(place: int, size: int, key: tuple[int, str, int]) -> int:
    """`permute` of one place in Python's integers, which have no end: 6 Feistel rounds over the even number of bits
    that holds `size`, the round function SplitMix64's, until the value is one of the rows."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    digest = hashlib.blake2b(repr(key).encode(), digest_size=48).digest()
    while True:
        left, right = place >> half, place % 2**half
        for i in range(6):
            x = right ^ int.from_bytes(digest[8 * i:8 * i + 8], "little")
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (x ^ x >> 31) % 2**half
        place = (left << half) + right
        if place < size:
            return place


@pytest.mark.parametrize(("weights", "quotas"), [
    ([1, 0], (16_384, 0)), ([1, 1e-9], (16_383, 1)), ([1, PERIOD - 1], (1, 16_383)), ([3, 5], (6144, 10_240))])
def test_nothing_overflows_at_10_to_the_12_rows_and_100_epochs_whatever_the_quotas(
        weights: list[float], quotas: tuple[int, int]) -> None:
    assert quotas_of(weights) == quotas
    size, before = 10**12, 10**14
    sampler = Sampler(("a", "b"), (size, size), (Phase(0, quotas), Phase(before, quotas)), seed=0)
    drawn = [q * 5**14 for q in quotas]  # 10^14 rows are 5^14 periods
    assert sampler.drawn(before).tolist() == drawn
    head = sampler.rows(0, 12_445).corpus.tolist()  # the corpora near position 0 come again after whole periods
    at = sampler.rows(before + 12_345, 100)
    assert at.corpus.tolist() == head[12_345:]
    drawn = [n + head[:12_345].count(c) for c, n in enumerate(drawn)]
    for c, row, epoch in zip(at.corpus.tolist(), at.row.tolist(), at.epoch.tolist(), strict=True):
        assert epoch == drawn[c] // size and row == permuted(drawn[c] % size, size, (0, "ab"[c], epoch))
        drawn[c] += 1
    assert sampler.drawn(before + 12_445).tolist() == drawn
    if quotas == (16_384, 0):
        assert at.epoch.tolist() == [100] * 100  # after 100 whole ones, 0 to 99


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
