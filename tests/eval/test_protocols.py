"""Protocol names, negatives, and what a full rank makes one expect of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cprec.errors import ConfigError
from cprec.eval.metrics import hits_at, ndcg_at
from cprec.eval.protocols import Protocol, expected_metric, negatives, orders, parse_protocol, sampled
from cprec.eval.queries import DomainQueries, load_queries
from tests.eval.folders import Query, Shop, write_queries


@pytest.fixture
def queries(tmp_path: Path) -> DomainQueries:
    shop = Shop([f"T{i}" for i in range(60)], [Query("u0", [1, 2], 9), Query("u1", [4], 7, query_ts=300)],
                n_train=[0] * 30 + [1] * 29 + [400], first_ts=[0] * 50 + [400] * 10)
    return load_queries(write_queries(tmp_path / "q", {"food": shop}), "food")


@pytest.mark.parametrize(("text", "kind", "n"), [("full", "full", 0), ("uniform-19", "uniform", 19),
                                                 ("beam-20", "beam", 20)])
def test_names_of_protocols(text: str, kind: str, n: int) -> None:
    assert parse_protocol(text) == Protocol(kind, n)
    assert str(parse_protocol(text)) == text


@pytest.mark.parametrize(("text", "named"), [("uniform", "in uniform-19"), ("full-3", "in uniform-19"),
                                             ("beem-3", "in uniform-19"), ("choice-26", "at most 25 negatives")])
def test_other_names_are_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_protocol(text)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_negatives_are_other_candidates_and_the_same_for_every_model(queries: DomainQueries, kind: str) -> None:
    for i, target in ((0, 9), (1, 7)):
        drawn = negatives(Protocol(kind, 19), queries, i, seed=3)
        assert len(set(drawn.tolist())) == 19 and target not in drawn
        assert queries.candidates(i)[drawn].all()
        assert drawn.tolist() == negatives(Protocol(kind, 19), queries, i, seed=3).tolist()
        assert drawn.tolist() != negatives(Protocol(kind, 19), queries, i, seed=4).tolist()
        mask = sampled(Protocol(kind, 19), queries, i, seed=3)
        assert mask[target] and mask.sum() == 20


def test_multiple_choice_has_the_negatives_of_the_uniform_protocol(queries: DomainQueries) -> None:
    for i in range(2):
        uniform, choice, popular = (negatives(Protocol(kind, 19), queries, i, seed=3).tolist()
                                    for kind in ("uniform", "choice", "popularity"))
        assert choice == uniform != popular


def test_orders_of_options_are_the_users_wherever_the_query_stands(queries: DomainQueries, tmp_path: Path) -> None:
    alone = load_queries(write_queries(tmp_path / "alone", {"food": Shop(
        [f"T{i}" for i in range(60)], [Query("u1", [4], 7, query_ts=300)])}), "food")
    options = np.arange(9)
    second, only, first = (np.stack(orders(options, q, i, n=4, seed=3)).tolist()
                           for q, i in ((queries, 1), (alone, 0), (queries, 0)))
    assert second == only != first and all(sorted(order) == options.tolist() for order in second)
    assert len({tuple(order) for order in second}) == 4


def test_popular_items_are_drawn_first_and_unsold_ones_last(queries: DomainQueries) -> None:
    first = [int(negatives(Protocol("popularity", 1), queries, 0, seed=s)[0]) for s in range(200)]
    # item 59 has 400 of 429 events: 186 of 200 draws are expected, 5 standard deviations are 18
    assert 168 <= first.count(59) <= 200 and min(first) >= 30


def test_fewer_candidates_than_negatives_are_all_drawn(queries: DomainQueries) -> None:
    assert len(negatives(Protocol("uniform", 99), queries, 0, seed=1)) == 57  # 60 without two seen and the target


@pytest.mark.parametrize("rank", [1.0, 4.0, 4.5, 40.0])
def test_the_expectation_is_the_mean_over_many_draws(rank: float) -> None:
    rng, n_candidates, m = np.random.default_rng(0), 50, 9
    for name, value_at in (("hr", partial(hits_at, 1)), ("ndcg", partial(ndcg_at, 5))):
        drawn = []
        for _ in range(20_000):
            n_better = int(np.floor(rank) if rng.random() < 0.5 else np.ceil(rank)) - 1
            drawn.append(1 + (rng.permutation(n_candidates - 1)[:m] < n_better).sum())
        found = expected_metric(value_at, rank, n_candidates, m)
        assert found == pytest.approx(value_at(np.array(drawn, dtype=float)).mean(), abs=0.015), name


def test_one_negative_is_better_with_the_share_of_better_candidates() -> None:
    # the one negative of 10 others is among the 3 better ones with probability 3 / 10
    assert expected_metric(partial(hits_at, 1), 4.0, 11, 1) == pytest.approx(0.7)
