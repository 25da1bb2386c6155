"""The clock, the regimes, and how events become histories of bounded length."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from data_prep.clean import clean
from data_prep.config import CleanSettings, SequenceSettings, SplitSettings
from data_prep.records import Corpora, Counts, Layout, Split
from data_prep.sequences import cut_windows, write_catalogue, write_histories
from data_prep.split import split
from data_prep.templates import TEMPLATES

CORPORA = Corpora(pretrain=("books", "toys"), unseen=("garden",))
EVENTS = [
    ("u1", "books", "b1", 1), ("u1", "toys", "t1", 2), ("u1", "books", "b2", 3), ("u1", "garden", "g1", 4),
    ("u2", "books", "b1", 5), ("u2", "books", "b2", 6), ("u1", "toys", "t2", 7), ("u2", "toys", "t1", 8),
    ("u2", "books", "b3", 9), ("u2", "garden", "g1", 10), ("u1", "books", "b3", 11),
]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Cleaned events and items of three shops."""
    at = Layout(tmp_path)
    ids = sorted({(domain, item) for _, domain, item, _ in EVENTS})
    shops.write_items(at.raw_items, [(domain, item, f"Title {item}") for domain, item in ids])
    shops.write_events(at.raw_interactions, EVENTS)
    engine = shops.engine(tmp_path)
    clean(engine, at, CleanSettings(), corpora=CORPORA, seed=1)
    engine.close()
    return at


def run_split(layout: Layout, settings: SplitSettings, regime: str) -> Split:
    engine = shops.engine(layout.out)
    made = split(engine, layout, settings, corpora=CORPORA, regime=regime, counts=Counts("split"))
    engine.close()
    return made


def train_times(layout: Layout) -> list[int]:
    return sorted(pq.read_table(layout.train)["ts_ms"].to_pylist())


def test_one_clock_over_all_domains_is_at_the_quantiles_of_all_times(layout: Layout) -> None:
    # 11 events at 1..11: share 0.8 of 10 steps is place 8, time 9; 0.9 is time 10
    made = run_split(layout, SplitSettings(), "overlap")
    assert (made.t_valid, made.t_test) == (9, 10)
    assert made.counts == {"train": 8, "valid": 1, "test": 2}
    assert train_times(layout) == [1, 2, 3, 5, 6, 7, 8]  # 4 is the unseen garden's
    assert pq.read_table(layout.holdout).num_rows == 3


def test_the_disjoint_regime_takes_out_users_with_later_events_in_unseen_domains(layout: Layout) -> None:
    run_split(layout, SplitSettings(t_valid=9, t_test=11), "disjoint")  # u2 is in the garden at 10
    assert train_times(layout) == [1, 2, 3, 7]  # u1's


def test_a_clock_that_leaves_a_part_empty_is_an_error(layout: Layout) -> None:
    with pytest.raises(DataError, match="no event falls into valid with t_valid=12 "):
        run_split(layout, SplitSettings(t_valid=12, t_test=20), "overlap")


def test_histories_hold_catalogue_numbers_in_order_of_time(layout: Layout) -> None:
    made = run_split(layout, SplitSettings(t_valid=9, t_test=11), "overlap")
    engine = shops.engine(layout.out)
    counts = Counts("sequences")
    write_catalogue(engine, layout, template=TEMPLATES["cprec"], split=made, counts=counts)
    # (domain, item_id) order: books b1 b2 b3 = 0 1 2, garden g1 = 3, toys t1 t2 = 4 5
    catalogue = pq.read_table(layout.catalogue).select(["item", "item_id", "n_train", "first_ts", "line"]).to_pylist()
    assert catalogue[0] == {"item": 0, "item_id": "b1", "n_train": 2, "first_ts": 1, "line": "Title b1\n"}
    assert catalogue[2] == {"item": 2, "item_id": "b3", "n_train": 0, "first_ts": 9, "line": "Title b3\n"}
    assert [row["item_id"] for row in catalogue] == ["b1", "b2", "b3", "g1", "t1", "t2"]
    write_histories(engine, layout, SequenceSettings(min_items=2, max_items=3), corpora=CORPORA, split=made,
                    counts=counts)

    def rows(corpus: str) -> list[tuple[object, ...]]:
        return [tuple(r.values()) for r in pq.read_table(layout.histories(corpus)).to_pylist()]

    assert rows("specific/books") == [(0, "u1", [0, 1], [1, 3]), (1, "u2", [0, 1], [5, 6])]
    assert rows("specific/toys") == [(0, "u1", [4, 5], [2, 7])]  # u2 has one toy: dropped
    assert counts.by_reason["specific/toys: events in histories of fewer than 2 items, dropped"] == 1
    # four events of u1 are cut into two windows of two, not three and one
    assert rows("mixed") == [(0, "u1", [0, 4], [1, 2], ["books", "toys"]), (1, "u1", [1, 5], [3, 7], ["books", "toys"]),
                             (2, "u2", [0, 1, 4], [5, 6, 8], ["books", "toys"])]
    assert rows("valid/garden") == []


def test_a_window_of_a_mixed_history_needs_its_domains_too_and_what_it_loses_is_counted(tmp_path: Path) -> None:
    # u1: 11 books, then 12 toys: one window of 4 to 6 lies over the border; u2: both; u3: books alone; u4: too few
    rows = [("u1", "books", f"b{i:02d}", 1 + i) for i in range(11)]
    rows += [("u1", "toys", f"t{i:02d}", 12 + i) for i in range(12)]
    rows += [("u2", "books", "b00", 1), ("u2", "toys", "t00", 2), ("u2", "toys", "t01", 3)]
    rows += [("u3", "books", f"b{i:02d}", 1 + i) for i in range(3)]
    rows += [("u4", "books", "b00", 1), ("u4", "toys", "t00", 2)]
    rows += [("u5", domain, f"{domain[0]}00", time) for domain in ("books", "toys") for time in (100, 200)]
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, sorted({(d, i, f"Title {i}") for _, d, i, _ in rows}))
    shops.write_events(layout.raw_interactions, rows)
    corpora = Corpora(pretrain=("books", "toys"), unseen=())
    engine, counts = shops.engine(tmp_path), Counts("sequences")
    clean(engine, layout, CleanSettings(), corpora=corpora, seed=1)
    made = split(engine, layout, SplitSettings(t_valid=100, t_test=200), corpora=corpora, regime="overlap",
                 counts=Counts("split"))
    write_catalogue(engine, layout, template=TEMPLATES["cprec"], split=made, counts=counts)
    write_histories(engine, layout, SequenceSettings(min_items=3, max_items=6), corpora=corpora, split=made,
                    counts=counts)
    over, of_u2 = pq.read_table(layout.histories("mixed")).to_pylist()
    n_over = len(over["items"])
    assert (over["user_id"], over["domains"], of_u2["user_id"]) == ("u1", ["books", "toys"], "u2")
    assert n_over in (4, 5, 6)
    assert {reason: n for reason, n in counts.by_reason.items() if reason.startswith("mixed")} == {
        "mixed: histories": 2, "mixed: events in them": n_over + 3,
        "mixed: events in histories of fewer than 2 domains, dropped": 3,
        "mixed: events in windows of fewer than 2 domains, dropped": 23 - n_over,
        "mixed: events in histories of fewer than 3 items, dropped": 2}


def test_a_corpus_that_is_left_out_names_every_setting_that_may_empty_it(
        layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    made = run_split(layout, SplitSettings(), "overlap")
    engine = shops.engine(layout.out)
    write_catalogue(engine, layout, template=TEMPLATES["cprec"], split=made, counts=Counts("sequences"))
    settings = SequenceSettings(min_items=2, max_items=3, mixed_min_domains=3)  # nobody is in three
    write_histories(engine, layout, settings, corpora=CORPORA, split=made, counts=Counts("sequences"))
    engine.close()
    assert ("corpus mixed has no history of 2 or more items and 3 or more domains (sequences.mixed_min_domains) and is "
            "left out") in caplog.messages
    assert "corpus valid/garden has no history of 2 or more items and is left out" in caplog.messages


@pytest.mark.parametrize(("min_items", "max_items"), [(1, 7), (2, 7), (4, 7), (1, 1)])
def test_windows_lose_nothing_keep_the_order_and_differ_by_at_most_one(
        tmp_path: Path, min_items: int, max_items: int) -> None:
    n_events = {f"u{n:02d}": n for n in range(1, 31)}
    rows = [(user, "books", f"b{i:02d}", 100 + i) for user, n in n_events.items() for i in range(n)]
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [("books", f"b{i:02d}", f"Title {i}") for i in range(30)])
    shops.write_events(layout.raw_interactions, rows)
    engine = shops.engine(tmp_path)
    clean(engine, layout, CleanSettings(), corpora=Corpora(("books",), ()), seed=1)
    table = engine.read(layout.interactions)
    cut = cut_windows(table.mutate(item=table.item_id), max_items=max_items, min_items=min_items)
    windows = engine.rows(cut.order_by(["user_id", "window"]))
    for user, n in n_events.items():
        mine = [w for w in windows if w["user_id"] == user]
        assert [t for w in mine for t in w["ts"]] == [100 + i for i in range(n)]
        lengths = [len(w["items"]) for w in mine]
        assert max(lengths) <= max_items and max(lengths) - min(lengths) <= 1, user
        if n <= max_items:
            assert len(mine) == 1, "a history that fits is not cut"
        else:
            assert min(lengths) >= min_items, user


def test_ties_of_time_are_broken_by_the_hash_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    rows = [("u", "books", f"b{i}", 7) for i in range(9)]
    shops.write_items(layout.raw_items, [("books", item, f"Title {item}") for _, _, item, _ in rows])
    orders = set()
    engine = shops.engine(tmp_path)
    for seed in (1, 2):
        for events in (rows, rows[::-1]):  # file order does not matter, the seed does
            shops.write_events(layout.raw_interactions, events)
            clean(engine, layout, CleanSettings(), corpora=Corpora(("books",), ()), seed=seed)
            table = engine.read(layout.interactions)
            windows = cut_windows(table.mutate(item=table.item_id), max_items=50)
            (row,) = engine.rows(windows)
            hashes = {r["item_id"]: r["h"] for r in engine.rows(table)}
            assert row["items"] == sorted(hashes, key=lambda item: hashes[item])
            orders.add((seed, *row["items"]))
    assert len(orders) == 2
