"""Which row stands where: exact quotas, permutations, resumption, all as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.data.sampler import (
    PERIOD,
    Phase,
    Sampler,
    _round_keys,
    badly_rounded,
    permute,
    quotas_of,
    redistribute,
    resolve_caps,
    resolve_mix,
)
from cprec.errors import ConfigError

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_a_permutation_holds_every_row_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, key=(seed, "mixed", epoch))) == list(range(size))


def test_epochs_and_seeds_and_corpora_have_orders_of_their_own() -> None:
    places = np.arange(1000)
    orders = [permute(places, 1000, key=key) for key in [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]]
    for i, a in enumerate(orders):
        for b in orders[i + 1:]:
            assert (a == b).mean() < 0.02  # two random orders of 1000 agree in about one place
        assert abs(np.corrcoef(places, a)[0, 1]) < 0.1


def test_a_corpus_of_10_to_the_12_rows_is_permuted_without_an_index() -> None:
    rows = permute(np.arange(10_000), 10**12, key=(3, "mixed", 0))
    assert len(set(rows.tolist())) == 10_000 and rows.min() >= 0 and rows.max() < 10**12
    assert 0.45e12 < rows.mean() < 0.55e12


@given(weights)
@settings(max_examples=8, deadline=None)
def test_after_every_position_each_corpus_is_within_one_row_of_its_share(values: list[float]) -> None:
    quotas = quotas_of(values)
    assert sum(quotas) == PERIOD and min(quotas) >= 1
    sampler = Sampler(tuple(map(str, range(len(values)))), (7,) * len(values), (Phase(0, quotas),), seed=0)
    corpus = sampler.rows(0, PERIOD).corpus
    positions = np.arange(1, PERIOD + 1)
    for c, quota in enumerate(quotas):
        drift = np.cumsum(corpus == c) - quota / PERIOD * positions
        assert drift.min() > -1 and drift.max() < 1
        assert abs(quota / PERIOD - values[c] / sum(values)) <= len(values) / PERIOD


def make_sampler() -> Sampler:
    return Sampler(("a", "b", "c"), (11, 50, 300), (
        Phase(0, quotas_of([1, 1, 0])), Phase(40, quotas_of([1, 2, 3])), Phase(123, quotas_of([0, 0, 1]))), seed=5)


@given(start=st.integers(0, 400), n=st.integers(1, 100))
def test_any_window_is_a_piece_of_the_whole(start: int, n: int) -> None:
    whole, window = make_sampler().rows(0, 500), make_sampler().rows(start, n)
    for field in ("corpus", "row", "epoch"):
        assert getattr(window, field).tolist() == getattr(whole, field)[start:start + n].tolist()


def test_every_epoch_of_every_corpus_reads_each_row_once_across_changes_of_phase() -> None:
    sampler = make_sampler()
    at = sampler.rows(0, 2000)
    for c, size in enumerate(sampler.sizes):
        for epoch in range(int(at.epoch[at.corpus == c].max())):  # all but the last, which is under way
            rows = at.row[(at.corpus == c) & (at.epoch == epoch)]
            assert sorted(rows) == list(range(size))


@given(end=st.integers(0, 2000))
def test_rows_drawn_are_counted_without_drawing_them(end: int) -> None:
    sampler = make_sampler()
    assert sampler.drawn(end).tolist() == np.bincount(sampler.rows(0, end).corpus, minlength=3).tolist()


def test_the_order_of_a_corpus_does_not_depend_on_the_others_in_the_mixture() -> None:
    alone = Sampler(("b",), (50,), (Phase(0, quotas_of([1])),), seed=5).rows(0, 100)
    mixed = make_sampler().rows(0, 2000)
    n = int((mixed.corpus == 1).sum())
    assert mixed.row[mixed.corpus == 1][:min(n, 100)].tolist() == alone.row[:min(n, 100)].tolist()


def test_a_patterns_weight_is_shared_by_size() -> None:
    mix = resolve_mix({"specific/*": 3, "mixed": 1}, {"mixed": 10, "specific/a": 200, "specific/b": 100}, field="mix")
    assert mix == {"mixed": 1.0, "specific/a": 2.0, "specific/b": 1.0}
    assert resolve_mix(None, {"a": 1, "b": 3}, field="mix") == {"a": 0.25, "b": 0.75}


def test_the_name_of_a_corpus_is_not_read_as_a_pattern() -> None:
    rows = {"a[1]": 30, "a1": 10, "a": 10}
    assert resolve_mix({"a[1]": 2, "a1": 1}, rows, field="mix") == {"a[1]": 2.0, "a1": 1.0, "a": 0.0}
    assert resolve_caps({"a[1]": 2, "a": 1}, rows, field="data.max_epochs") == [60, None, 10]
    assert resolve_mix({"a[12]": 2}, rows, field="mix") == {"a[1]": 0.0, "a1": 2.0, "a": 0.0}  # which is a pattern


def test_weights_that_16384_rows_cannot_hold_are_found() -> None:
    assert quotas_of([1e9, 10]) == (PERIOD - 1, 1)
    (tiny,) = badly_rounded([1e9, 10])  # wants 0.00016 rows of 16,384, gets one
    assert (tiny.corpus, tiny.quota) == (1, 1) and tiny.share == pytest.approx(1e-8)
    # 1.5 rows of 16,384 get one, or two, and 10.5 of them ten, or eleven: a third, and a twentieth, off
    assert [r.corpus for r in badly_rounded([PERIOD - 12, 1.5, 10.5])] == [1]
    assert badly_rounded([1, 2, 0]) == [] and badly_rounded([PERIOD - 1, 1]) == []


def test_a_seed_of_numpy_is_the_seed_that_python_has() -> None:
    places = np.arange(100)
    ours = permute(places, 100, key=(903, "a", 0)).tolist()
    _round_keys.cache_clear()  # which takes both for one key
    assert permute(places, 100, key=(np.int64(903), "a", 0)).tolist() == ours
    phases = (Phase(0, quotas_of([1])),)
    assert repr(Sampler(("a",), (9,), phases, np.int64(3))) == repr(Sampler(("a",), (9,), phases, 3))


def test_all_problems_of_a_mixture_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)mix.mixt: .*did you mean 'mixed'.*mix.a=-1"):
        resolve_mix({"mixt": 1, "a": -1}, {"mixed": 1, "a": 1}, field="mix")


def test_an_exact_name_beats_a_pattern_and_epochs_are_counted_in_decimals() -> None:
    rows = {"mixed": 100, "specific/a": 10, "specific/b": 7, "text": 5}
    caps = resolve_caps({"specific/*": 1.5, "specific/a": 3, "mixed": 0.29}, rows, field="data.max_epochs")
    assert caps == [29, 30, 10, None]  # 0.29 * 100 is 28.999... in floating point; floor(1.5 * 7) is 10


def test_all_problems_of_caps_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as e:
        resolve_caps({"s*": 1, "*a": 2, "mixd": 3, "b": 0.1}, {"mixed": 9, "s/a": 9, "b": 9}, field="data.max_epochs")
    said = str(e.value)
    assert "3 problems" in said and "mixd: no training corpus of that name; did you mean 'mixed'?" in said
    assert "'s*' and '*a' both match s/a" in said and "b=0.1 is less than one of the 9 rows of b" in said


def capped(caps: list[int | None], until: int) -> Sampler:
    phases = (Phase(0, quotas_of([1, 1, 1])), Phase(123, quotas_of([1, 2, 3])))
    return Sampler(("a", "b", "c"), (11, 50, 300), redistribute(phases, caps, until=until), seed=5)


def test_from_the_row_at_which_a_corpus_is_exhausted_the_others_take_its_share() -> None:
    sampler = Sampler(("a", "b", "c"), (3, 50, 50), (Phase(0, (PERIOD // 2, PERIOD // 4, PERIOD // 4)),), seed=0)
    (whole,) = sampler.phases
    phases = redistribute([whole], [10, None, None], until=1000)
    last = sampler.position_of(0, 9)
    assert last is not None and np.flatnonzero(sampler.rows(0, 100).corpus == 0)[9] == last
    assert phases == (whole, Phase(last + 1, (0, PERIOD // 2, PERIOD // 2)))
    assert redistribute([whole], [None] * 3, until=1000) == (whole,)
    assert redistribute([whole], [3, 5, 1], until=1000)[-1].quotas == (0, 0, 0)  # nine rows in all
    assert redistribute([whole], [3, 5, 1], until=1000)[-1].start_row == 9
    assert redistribute([whole], [3, 5, 1], until=9)[-1].start_row < 9  # which suffice


@given(caps=st.tuples(st.integers(1, 60), st.integers(1, 90), st.none()), until=st.integers(1, 700))
@settings(max_examples=12)
def test_caps_hold_over_all_phases_and_a_longer_run_changes_no_row(
        caps: tuple[int, int, None], until: int) -> None:
    short, long = capped([*caps], until), capped([*caps], 700)
    assert short.phases == long.phases[:len(short.phases)]
    a, b = short.rows(0, until), long.rows(0, until)
    assert a.corpus.tolist() == b.corpus.tolist() and a.row.tolist() == b.row.tolist()
    counts = np.bincount(long.rows(0, 700).corpus, minlength=3)
    assert counts[0] <= caps[0] and counts[1] <= caps[1] and counts.sum() == 700
    assert long.drawn(700).tolist() == counts.tolist()


@given(corpus=st.integers(0, 2), n=st.integers(0, 600))
def test_the_position_of_a_corpus_nth_row_is_where_it_is_drawn(corpus: int, n: int) -> None:
    at = make_sampler().position_of(corpus, n)
    found = np.flatnonzero(make_sampler().rows(0, 2000).corpus == corpus)
    assert at == found[n] if n < len(found) else at is None or at >= 2000


@given(anneal=st.sampled_from([[1, 1, 1], [0, 5, 0], [0, 1, 3], [2, 1, 0]]), fork=st.integers(1, 300))
@settings(max_examples=20)
def test_a_corpus_that_is_added_for_a_branch_moves_no_row_of_the_trunk_and_repeats_none(
        anneal: list[int], fork: int) -> None:
    weights = [1.0, 2.0]
    trunk = Sampler(("a", "c"), (40, 500), (Phase(0, quotas_of(weights)),), seed=5)
    phases = (Phase(0, quotas_of([1.0, 0, 2.0])), Phase(fork, quotas_of(anneal)))
    branch = Sampler(("a", "b", "c"), (40, 30, 500), phases, seed=5)
    before, same = trunk.rows(0, fork), branch.rows(0, fork)
    assert [("a", "c")[c] for c in before.corpus] == [("a", "b", "c")[c] for c in same.corpus]
    assert before.row.tolist() == same.row.tolist()
    assert trunk.phases_until(fork) == branch.phases_until(fork)
    whole = branch.rows(0, fork + 600)
    read = list(zip(whole.corpus.tolist(), whole.epoch.tolist(), whole.row.tolist(), strict=True))
    assert len(set(read)) == len(read)  # no row twice in an epoch of its corpus, across the fork too
