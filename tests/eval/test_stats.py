"""Statistics against values worked out by hand, scipy's tests and statsmodels' table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as reference

from cprec.eval.stats import (
    Observations,
    detectable_difference,
    holm,
    mcnemar,
    mean_interval,
    mean_intervals,
    paired_difference,
    paired_differences,
    seed_deviations,
)


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


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    x = np.random.default_rng(7).exponential(size=300)
    ours = mean_interval(observations(x.tolist()), n_resamples=8000)
    theirs = reference.bootstrap((x,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(1))
    # a percentile of 8,000 resamples has a standard error of some 2 % of the interval's width
    assert [ours.low, ours.high] == pytest.approx(theirs.confidence_interval, abs=0.01)


def test_p_is_that_of_scipys_permutation_test() -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(0.4, 1, 12), rng.normal(0, 1, 12)
    # 2^12 sign patterns: scipy takes all
    exact = reference.permutation_test((x, y), lambda a, b: np.mean(a - b), permutation_type="samples",
                                       n_resamples=np.inf).pvalue
    ours = paired_difference(observations(x.tolist()), observations(y.tolist()), n_permutations=40_000).p
    assert ours == pytest.approx(exact, abs=0.01)


def test_several_metrics_at_once_are_each_as_alone() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    users, domains = [f"u{i % 30}" for i in range(40)], np.arange(40) % 2
    together = paired_differences([Observations(a, users, domains)], [Observations(b, users, domains)])
    alone = [paired_difference(Observations(a[:, k], users, domains), Observations(b[:, k], users, domains))
             for k in range(3)]
    for x, y in zip(together, alone, strict=True):
        assert (x.mean, x.low, x.high, x.p) == pytest.approx((y.mean, y.low, y.high, y.p))


def of_seeds(values: Sequence[Sequence[float]]) -> list[Observations]:
    return [observations(list(v)) for v in values]


def test_seeds_that_agree_leave_the_interval_as_it_is() -> None:
    x = np.random.default_rng(4).normal(size=100).tolist()
    one, three = mean_interval(*of_seeds([x])), mean_interval(*of_seeds([x, x, x]))
    assert three.mean == pytest.approx(one.mean)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval_by_their_own_spread() -> None:
    # all users alike: what is left is the bootstrap of the seeds 0, 0 and 3, whose means are 0 to 3 in thirds
    found = mean_interval(*of_seeds([[0.0] * 50, [0.0] * 50, [3.0] * 50]))
    assert found.mean == 1
    # P(no seed of value 3) = 8 / 27, P(all three) = 1 / 27: both beyond 2.5 %
    assert (found.low, found.high) == (0, 3)
    assert seed_deviations(of_seeds([[0.0], [0.0], [3.0]])) == pytest.approx([3 ** 0.5])
    assert seed_deviations(of_seeds([[0.0]])) is None


def test_users_may_lack_queries_of_a_seed() -> None:
    # seed 1: a 1, b 0; seed 2: a 1 only; over all queries 2 / 3
    found = mean_intervals([observations([1, 0], users=["a", "b"]), observations([1], users=["a"])])[0]
    assert found.mean == pytest.approx(2 / 3)


def test_one_seed_is_held_against_each_of_several() -> None:
    several, one = of_seeds([[1.0] * 8, [2.0] * 8]), of_seeds([[1.0] * 8])
    assert paired_differences(several, one)[0].mean == pytest.approx(0.5)
    assert paired_differences(one, several)[0].mean == pytest.approx(-0.5)


@pytest.mark.parametrize(("only_a", "only_b", "p"), [
    (0, 0, 1.0),
    (5, 0, 2 / 32),
    (4, 1, 2 * 6 / 32),  # 2 (C(5,0) + C(5,1)) / 2^5
    (3, 3, 1.0),
])
def test_mcnemar_counts_who_is_hit_by_one_only(only_a: int, only_b: int, p: float) -> None:
    a = [1.0] * only_a + [0.0] * only_b + [1.0, 0.0]
    b = [0.0] * only_a + [1.0] * only_b + [1.0, 0.0]
    assert mcnemar(observations(a), observations(b)) == pytest.approx(p)


def test_mcnemar_is_not_given_where_users_answer_twice() -> None:
    x = observations([1, 0, 1], users=["a", "a", "b"])
    assert mcnemar(x, x) is None


def test_holm_multiplies_the_smallest_by_most_and_never_goes_down() -> None:
    # 4 x .005, 3 x .01, then 2 x .03 and 1 x .04, which would be below
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(("n", "points"), [(943, 2.6), (5000, 1.1), (6040, 1.0), (22363, 0.53), (35598, 0.42)])
def test_the_detectable_difference_is_the_published_rule_of_thumb(n: int, points: float) -> None:
    # sqrt(7.85 q / n) with q = .08
    assert 100 * detectable_difference(n) == pytest.approx(points, abs=0.05)


def test_a_test_of_that_size_finds_that_difference_four_times_in_five() -> None:
    n, q = 2000, 0.08
    delta, rng = detectable_difference(n, discordant=q), np.random.default_rng(11)
    found = 0
    for _ in range(600):
        n_a, n_b, _ = rng.multinomial(n, [(q + delta) / 2, (q - delta) / 2, 1 - q])
        found += abs(n_a - n_b) / np.sqrt(n_a + n_b) > 1.96
    assert found / 600 == pytest.approx(0.8, abs=0.05)  # standard error 1.6 points
