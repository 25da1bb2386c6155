"""Metrics, baselines and statistics against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cprec.eval.baselines import BASELINES, rank_by_baseline
from cprec.eval.metrics import METRICS, Ranked, best, chance_hit_rate, mid_rank
from cprec.eval.queries import load_queries
from cprec.eval.stats import Observations, mean_interval, paired_difference
from tests.eval.folders import Query, Shop, write_queries

RANKS = [1.0, 1.5, 3.0, 10.0, 10.5, 60.0]
BY_HAND = {
    "HR@1": [1, 0, 0, 0, 0, 0],
    "HR@10": [1, 1, 1, 1, 0, 0],
    "HR@50": [1, 1, 1, 1, 1, 0],
    # 1 / log2(rank + 1): log2 2 = 1, log2 2.5 = 1.3219, log2 4 = 2, log2 11 = 3.4594
    "NDCG@10": [1, 0.75647, 0.5, 0.28906, 0, 0],
    "MRR": [1, 2 / 3, 1 / 3, 0.1, 0.095238, 1 / 60],
    "NLL": [2, 2, 2, 2, 2, 2],
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_equals_its_table(name: str) -> None:
    found = METRICS[name](np.array(RANKS), np.full(6, 100.0), np.full(6, 2.0))
    np.testing.assert_allclose(found, BY_HAND[name], atol=1e-5)


def test_ties_count_half() -> None:
    assert [mid_rank(0, 0), mid_rank(0, 1), mid_rank(3, 2), mid_rank(3, 3)] == [1, 1.5, 5, 5.5]


def test_best_items_are_ordered_by_score_then_by_number() -> None:
    items, scores = best(np.array([7, 3, 5, 1]), np.array([2.0, 2.0, 9.0, 1.0]), 3)
    assert (items.tolist(), scores.tolist()) == ([5, 3, 7], [9, 2, 2])


def test_a_result_is_certified_only_below_both_the_target_and_the_last_of_the_list() -> None:
    def ranked(bound: float) -> Ranked:
        return Ranked(rank=1, score=-2, n_candidates=9, n_nodes=3, top_items=np.array([0, 1], np.int32),
                      top_scores=np.array([-2.0, -3.0]), bound=bound)
    assert [ranked(b).certified for b in (-np.inf, -3.1, -3.0, -2.5, -1.0)] == [True, True, False, False, False]


def test_chance_is_ten_over_the_candidates_and_at_most_one() -> None:
    assert chance_hit_rate(np.array([100.0, 5.0])) == pytest.approx((0.1 + 1.0) / 2)


def test_popularity_ranks_by_training_events_among_the_same_candidates(tmp_path: Path) -> None:
    #      item: 0  1  2  3  4  5;   5 appears later, 0 was seen
    shop = Shop(list("abcdef"), [Query("u", [0], 3), Query("v", [4], 1)], n_train=[9, 4, 7, 4, 4, 8],
                first_ts=[0, 0, 0, 0, 0, 5000])
    queries = load_queries(write_queries(tmp_path / "q", {"food": shop}), "food")
    # u: candidates 1 2 3 4 with 4 7 4 4 events; target 3: one better, two equal
    found = rank_by_baseline(BASELINES["popularity"], queries, 0, top_k=3)
    assert (found.rank, found.n_candidates, found.score, found.certified) == (1 + 1 + 2 / 2, 4, 4, True)
    assert found.top_items.tolist() == [2, 1, 3]
    # v: candidates 0 1 2 3 with 9 4 7 4; target 1: two better, one equal
    assert rank_by_baseline(BASELINES["popularity"], queries, 1).rank == 1 + 2 + 1 / 2


def observations(values: list[float], users: list[str] | None = None, domains: list[int] | None = None) -> Observations:
    n = len(values)
    return Observations(np.array(values, float), users or [f"u{i}" for i in range(n)], np.array(domains or [0] * n))


def test_interval_of_a_constant_is_that_constant() -> None:
    found = mean_interval(observations([0.25] * 9))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    # 400 users, half of them hits: standard error sqrt(.25 / 400) = .025, so 0.5 -+ 0.049
    found = mean_interval(observations([0.0, 1.0] * 200))
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.451, abs=0.006)
    assert found.high == pytest.approx(0.549, abs=0.006)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    samples = [mean_interval(observations(rng.normal(3, 1, 60).tolist()), n_resamples=500) for _ in range(200)]
    covered = np.mean([s.low <= 3 <= s.high for s in samples])
    assert 0.88 <= covered <= 0.99  # 95 % of 200 has a standard error of 1.5 points


def test_the_macro_average_weighs_domains_and_not_queries() -> None:
    # domain 0: mean 1 of one query; domain 1: mean 0 of three
    assert mean_interval(observations([1, 0, 0, 0], domains=[0, 1, 1, 1])).mean == 0.5


def test_queries_of_one_user_are_drawn_together() -> None:
    together = mean_interval(observations([1, 1, 1, 0, 0, 0], users=["a"] * 3 + ["b"] * 3))
    assert (together.low, together.high) == (0, 1)


def test_the_same_seed_gives_the_same_interval() -> None:
    x = observations(np.random.default_rng(0).normal(size=50).tolist())
    assert mean_interval(x, seed=3) == mean_interval(x, seed=3) != mean_interval(x, seed=4)


def test_identical_models_differ_by_nothing_with_p_one() -> None:
    x = observations([0.1, 0.7, 0.2])
    found = paired_difference(x, x)
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_p_of_a_model_that_always_wins_is_that_of_all_signs_equal() -> None:
    # 6 users, each better by 1: 2 of the 64 sign patterns are as extreme
    found = paired_difference(observations([2.0] * 6), observations([1.0] * 6), n_permutations=20_000)
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert found.p == pytest.approx(2 / 64, abs=0.004)
