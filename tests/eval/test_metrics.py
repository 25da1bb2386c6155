"""Metrics and popularity against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from cprec.eval.baselines import popularity, rank_by_baseline
from cprec.eval.metrics import METRICS, Answers, Ranked, best, chance_hit_rate, coverage, mid_rank
from cprec.eval.queries import load_queries
from tests.eval.folders import Query, Shop, write_queries

RANKS = [1.0, 1.5, 3.0, 10.0, 10.5, 60.0]
BY_HAND = {
    "HR@1": [1, 0, 0, 0, 0, 0],
    "HR@10": [1, 1, 1, 1, 0, 0],
    "HR@50": [1, 1, 1, 1, 1, 0],
    # 1 / log2(rank + 1): log2 2 = 1, log2 2.5 = 1.3219, log2 4 = 2, log2 11 = 3.4594
    "NDCG@10": [1, 0.75647, 0.5, 0.28906, 0, 0],
    "MRR": [1, 2 / 3, 1 / 3, 0.1, 0.095238, 1 / 60],
    # of 99 others: all, all but half a one, all but 2, 9, 9.5 and 59 beaten
    "AUC": [1, 98.5 / 99, 97 / 99, 90 / 99, 89.5 / 99, 40 / 99],
    "NLL": [2, 2, 2, 2, 2, 2],
    # 2 nats are 2.88539 bits, over 4 bytes
    "bits/byte": [0.72135] * 6,
    "ARP@10": [7.5] * 6,
    "valid": [1] * 6,
}


def answers(ranks: list[float], *, n_candidates: float = 100.0, known_up_to: float = np.inf) -> Answers:
    n = len(ranks)
    return Answers(rank=np.array(ranks), known_up_to=np.full(n, known_up_to), n_candidates=np.full(n, n_candidates),
                   nll=np.full(n, 2.0), n_bytes=np.full(n, 4.0), top10_events=np.full(n, 7.5), valid=np.ones(n))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_equals_its_table(name: str) -> None:
    found = METRICS[name](answers(RANKS))
    np.testing.assert_allclose(found, BY_HAND[name], atol=1e-5)


OF_RANKS = ("HR@1", "HR@10", "HR@50", "NDCG@10", "MRR", "AUC")


def test_a_target_that_a_list_lacks_is_a_miss_and_beats_an_unknown_share() -> None:
    missed = {name: float(METRICS[name](answers([np.inf]))[0]) for name in OF_RANKS}
    assert np.isnan(missed.pop("AUC")) and set(missed.values()) == {0.0}


@pytest.mark.parametrize(("known_up_to", "unknown"), [(50, {"AUC"}), (20, {"AUC", "HR@50"}),
                                                      (5, {"AUC", "HR@50", "HR@10", "NDCG@10"})])
def test_of_a_search_that_stopped_only_what_it_settled_is_a_number(known_up_to: float, unknown: set[str]) -> None:
    values = {name: METRICS[name](answers([2.0, np.inf], known_up_to=known_up_to)) for name in OF_RANKS}
    assert {name for name, (_, stopped) in values.items() if np.isnan(stopped)} == unknown
    assert values["MRR"].tolist() == [0.5, 0.0]
    assert not any(np.isnan(found) for found, _ in values.values())


def test_auc_of_a_target_without_rivals_is_a_half() -> None:
    assert METRICS["AUC"](answers([1.0], n_candidates=1.0)).tolist() == [0.5]


def test_auc_is_that_of_ranking_curves() -> None:
    # scipy: the Mann-Whitney statistic of the target's score among the others', ties counted half
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 20, 50).astype(float)
    rank = mid_rank(int((scores[1:] > scores[0]).sum()), int((scores[1:] == scores[0]).sum()))
    statistic = mannwhitneyu(scores[:1], scores[1:]).statistic
    assert METRICS["AUC"](answers([rank], n_candidates=50.0))[0] == pytest.approx(statistic / 49)


def test_coverage_is_the_share_of_items_in_any_list() -> None:
    assert coverage([np.array([1, 2]), np.array([2, 3])], 12) == 3 / 12
    assert coverage([], 12) == 0


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
    found = rank_by_baseline(popularity, queries, 0, top_k=3)
    assert (found.rank, found.n_candidates, found.score, found.certified) == (1 + 1 + 2 / 2, 4, 4, True)
    assert found.top_items.tolist() == [2, 1, 3]
    # v: candidates 0 1 2 3 with 9 4 7 4; target 1: two better, one equal
    assert rank_by_baseline(popularity, queries, 1).rank == 1 + 2 + 1 / 2
