"""Ranking queries: which event is the target, what is its history, what counts as seen or cold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from cprec.format import read_queries_manifest
from data_prep.clean import clean
from data_prep.config import CleanSettings, QuerySettings
from data_prep.queries import write_queries
from data_prep.records import Corpora, Counts, Layout, Split
from data_prep.sequences import write_catalogue
from data_prep.templates import TEMPLATES

CORPORA = Corpora(pretrain=("books",), unseen=("garden",))
SPLIT = Split(t_valid=50, t_test=100, counts={}, hash="x")
EVENTS = [
    # items of books in order of id: a 0, b 1, c 2, d 3, e 4
    *[("u1", "books", item, ts) for item, ts in
      [("a", 10), ("b", 20), ("a", 60), ("b", 110), ("c", 120), ("d", 130)]],  # b again in the test part
    *[("u2", "books", item, ts) for item, ts in [("a", 10), ("e", 110)]],  # too little before the target
    *[("u3", "books", item, ts) for item, ts in [("a", 10), ("b", 20), ("c", 30), ("e", 105)]],  # e is new: cold
    *[("u1", "garden", item, ts) for item, ts in [("x", 10), ("y", 20), ("z", 30), ("w", 100)]],
]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    at = Layout(tmp_path)
    shops.write_items(at.raw_items, [(d, i, f"Title {i}") for d, i in sorted({(d, i) for _, d, i, _ in EVENTS})])
    shops.write_events(at.raw_interactions, EVENTS)
    engine = shops.engine(tmp_path)
    clean(engine, at, CleanSettings(), corpora=CORPORA, seed=1)
    write_catalogue(engine, at, template=TEMPLATES["cprec"], split=SPLIT, counts=Counts("sequences"))
    engine.close()
    return at


def queries(layout: Layout, settings: QuerySettings) -> dict[str, dict[str, Any]]:
    """The books' queries by user."""
    engine = shops.engine(layout.out)
    write_queries(engine, layout, settings, corpora=CORPORA, split=SPLIT, template=TEMPLATES["cprec"],
                  regime="overlap", seed=1)
    engine.close()
    read_queries_manifest(layout.queries)
    rows = pq.read_table(layout.queries / "books.parquet").to_pylist()
    return {row.pop("user_id"): row for row in rows}


def test_the_first_new_item_is_the_target_and_everything_before_it_is_history(layout: Layout) -> None:
    assert queries(layout, QuerySettings()) == {
        "u1": {"history": [0, 1, 0, 1], "seen": [0, 1], "target": 2, "query_ts": 120, "is_repeat": False,
               "is_cold": False},  # u3 had c at 30
        "u3": {"history": [0, 1, 2], "seen": [0, 1, 2], "target": 4, "query_ts": 105, "is_repeat": False,
               "is_cold": True},
    }


def test_with_seen_included_a_repeated_item_can_be_the_target(layout: Layout) -> None:
    found = queries(layout, QuerySettings(seen="include"))
    assert found["u1"] == {"history": [0, 1, 0], "seen": [0, 1], "target": 1, "query_ts": 110, "is_repeat": True,
                           "is_cold": False}


def test_successive_targets_each_have_all_before_them_as_history(layout: Layout) -> None:
    engine = shops.engine(layout.out)
    write_queries(engine, layout, QuerySettings(target="successive", seen="include"), corpora=CORPORA, split=SPLIT,
                  template=TEMPLATES["cprec"], regime="overlap", seed=1)
    engine.close()
    rows = pq.read_table(layout.queries / "books.parquet").select(["user_id", "history", "target"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("u1", [0, 1, 0], 1), ("u1", [0, 1, 0, 1], 2), ("u1", [0, 1, 0, 1, 2], 3), ("u3", [0, 1, 2], 4)]
    assert read_queries_manifest(layout.queries).target == "successive"


def test_leave_one_out_asks_for_the_last_new_item_whatever_the_clock(layout: Layout) -> None:
    found = queries(layout, QuerySettings(target="leave_one_out", min_history=1))
    assert {user: row["target"] for user, row in found.items()} == {"u1": 3, "u2": 4, "u3": 4}
    late = SPLIT.model_copy(update={"t_test": 1000})
    engine = shops.engine(layout.out)
    write_queries(engine, layout, QuerySettings(target="leave_one_out"), corpora=CORPORA, split=late,
                  template=TEMPLATES["cprec"], regime="overlap", seed=1)
    engine.close()
    assert pq.read_table(layout.queries / "books.parquet")["user_id"].to_pylist() == ["u1", "u3"]


def test_the_last_target_has_the_longest_history(layout: Layout) -> None:
    found = queries(layout, QuerySettings(target="last", max_history=3))
    assert found["u1"] == {"history": [0, 1, 2], "seen": [0, 1, 2], "target": 3, "query_ts": 130, "is_repeat": False,
                           "is_cold": True}


def test_history_keeps_its_last_items_while_seen_keeps_all(layout: Layout) -> None:
    found = queries(layout, QuerySettings(min_history=2, max_history=2))
    assert (found["u3"]["history"], found["u3"]["seen"]) == ([1, 2], [0, 1, 2])


def test_a_sample_of_users_is_the_same_each_time(layout: Layout) -> None:
    one = queries(layout, QuerySettings(max_per_domain=1))
    assert len(one) == 1 and queries(layout, QuerySettings(max_per_domain=1)) == one


def test_a_domain_without_queries_is_an_error_with_the_way_out(layout: Layout) -> None:
    with pytest.raises(DataError, match=r"no ranking query in garden: .* 4 events .* lower queries.min_history"):
        queries(layout, QuerySettings(min_history=4))
