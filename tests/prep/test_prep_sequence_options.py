"""Which events become histories: ratings, sessions, repeats and caps, in tables worked out by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import ConfigError, DataError
from cprec.format import PackedCorpus, read_queries_manifest
from data_prep.config import SequenceSettings
from data_prep.pipeline import prepare
from data_prep.sequences import cut_windows, mark_events

EVENTS = pa.schema([("user_id", pa.string()), ("domain", pa.string()), ("item", pa.int32()), ("ts_ms", pa.int64()),
                    ("rating", pa.float32()), ("h", pa.string())])
S = 1000  # ms in a second


def mark(folder: Path, rows: list[tuple[Any, ...]], *, is_train: bool = True, min_domains: int = 1,
         **settings: Any) -> list[tuple[Any, ...]]:
    """(ts_ms, session, dropped) of one user's events (domain, item, ts_ms, rating[, h]), in order of time."""
    full = [("u", *r, f"{i:032x}") if len(r) == 4 else ("u", *r) for i, r in enumerate(rows)]
    pq.write_table(pa.table({n: [r[i] for r in full] for i, n in enumerate(EVENTS.names)}, schema=EVENTS),
                   folder / "events.parquet")
    engine = shops.engine(folder)
    marked = mark_events(engine.read(folder / "events.parquet"), SequenceSettings(**settings), is_train=is_train,
                         min_domains=min_domains)
    found = engine.rows(marked.events.order_by(["ts_ms", "h"]))
    assert {r["dropped"] for r in found} - {""} <= set(marked.reasons)
    engine.close()
    return [(r["ts_ms"], r["session"], r["dropped"]) for r in found]


def kept(marked: list[tuple[Any, ...]]) -> list[int]:
    return [ts for ts, _, dropped in marked if not dropped]


def test_events_rated_below_are_left_out_and_events_without_a_rating_stay(tmp_path: Path) -> None:
    rows = [("a", 1, 1, 3.5), ("a", 2, 2, 3.6), ("a", 3, 3, None), ("a", 4, 4, 5.0), ("a", 5, 5, 1.0)]
    marked = mark(tmp_path, rows, min_rating=3.6)  # 3.6 as float32 is below 3.6, and yet not dropped
    assert kept(marked) == [2, 3, 4]
    assert {d for _, _, d in marked} == {"", "rated below 3.6"}


def test_a_session_starts_after_a_pause_longer_than_the_gap(tmp_path: Path) -> None:
    # pauses of 10 s (no longer than the gap), 11 s, 0 s, 10.001 s
    rows = [("a", i, ts, None) for i, ts in enumerate([0, 10 * S, 21 * S, 21 * S, 31 * S + 1])]
    assert [session for _, session, _ in mark(tmp_path, rows, session_gap_s=10)] == [0, 0, 1, 1, 2]
    assert [session for _, session, _ in mark(tmp_path, rows)] == [0] * 5


def test_a_dropped_event_does_not_bridge_two_sessions(tmp_path: Path) -> None:
    rows = [("a", 1, 0, 5.0), ("a", 2, 8 * S, 1.0), ("a", 3, 16 * S, 5.0)]
    marked = mark(tmp_path, rows, session_gap_s=10, min_rating=3)
    assert [(ts, session) for ts, session, dropped in marked if not dropped] == [(0, 0), (16 * S, 1)]


@pytest.mark.parametrize(("repeats", "expected"), [
    ("keep", [1, 2, 3, 4, 5, 6, 7]),
    ("consecutive", [1, 3, 4, 6]),  # A A B A A C C: the first of each run
    ("first", [1, 3, 6]),
])
def test_repeats_are_kept_or_only_the_first_of_a_run_or_of_an_item(tmp_path: Path, repeats: str,
                                                                   expected: list[int]) -> None:
    rows = [("a", item, 1 + i, None) for i, item in enumerate([7, 7, 8, 7, 7, 9, 9])]
    assert kept(mark(tmp_path, rows, repeats=repeats)) == expected


@pytest.mark.parametrize("repeats", ["consecutive", "first"])
def test_an_item_may_come_again_in_the_next_session(tmp_path: Path, repeats: str) -> None:
    rows = [("a", 7, 0, None), ("a", 7, 1 * S, None), ("a", 7, 100 * S, None)]
    assert kept(mark(tmp_path, rows, repeats=repeats, session_gap_s=10)) == [0, 100 * S]


def test_a_badly_rated_event_does_not_part_a_run(tmp_path: Path) -> None:
    rows = [("a", 7, 1, 5.0), ("a", 8, 2, 1.0), ("a", 7, 3, 5.0)]
    assert kept(mark(tmp_path, rows, repeats="consecutive", min_rating=3)) == [1]


def test_a_cap_keeps_the_latest_and_ties_of_time_go_by_the_hash(tmp_path: Path) -> None:
    rows = [("a", i, ts, None) for i, ts in enumerate([1, 2, 2, 3])]  # hashes rise along the list
    marked = mark(tmp_path, rows, max_events=2)
    assert [dropped == "" for _, _, dropped in marked] == [False, False, True, True]
    assert marked[0][2] == "beyond a user's 2 (by: latest)"


def test_repeats_do_not_use_up_the_cap(tmp_path: Path) -> None:
    rows = [("a", item, 1 + i, None) for i, item in enumerate([5, 6, 7, 7, 7])]
    assert kept(mark(tmp_path, rows, repeats="consecutive", max_events=2)) == [2, 3]


def test_a_drawn_cap_keeps_the_smallest_products_of_age_and_lot(tmp_path: Path) -> None:
    # lot = 1 + the hash's hex digits 16 to 22, lowest first. time: 1 2 3 4, age: 4 3 2 1
    lots = [1, 3, 17, 5]  # products: 4, 9, 34, 5
    digits = ["0000000", "2000000", "0100000", "4000000"]
    rows = [("a", i, 1 + i, None, "f" * 16 + d + "f" * 9) for i, d in enumerate(digits)]
    products = sorted((4 - i) * lot for i, lot in enumerate(lots))
    assert products == [4, 5, 9, 34]
    assert kept(mark(tmp_path, rows, min_items=1, max_events=1, max_events_by="draw")) == [1]
    assert kept(mark(tmp_path, rows, max_events=2, max_events_by="draw")) == [1, 4]
    assert kept(mark(tmp_path, rows, max_events=3, max_events_by="draw")) == [1, 2, 4]


def test_a_mixed_history_needs_its_domains_after_all_other_rules(tmp_path: Path) -> None:
    rows = [("a", 1, 0, 5.0), ("b", 2, 1 * S, 1.0), ("a", 3, 100 * S, 5.0), ("b", 4, 101 * S, 5.0)]
    marked = mark(tmp_path, rows, session_gap_s=10, min_rating=3, min_domains=2)
    assert [d for _, _, d in marked] == ["in histories of fewer than 2 domains", "rated below 3", "", ""]


def test_held_out_events_are_parted_into_sessions_and_all_stay(tmp_path: Path) -> None:
    rows = [("a", 7, 0, 1.0), ("a", 7, 1 * S, 1.0), ("a", 7, 100 * S, 1.0)]
    marked = mark(tmp_path, rows, is_train=False, session_gap_s=10, min_rating=3, repeats="first", max_events=2)
    assert marked == [(0, 0, ""), (1 * S, 0, ""), (100 * S, 1, "")]


def test_a_window_never_reaches_over_two_sessions(tmp_path: Path) -> None:
    rows = [("u", "a", i, i + (1000 if i >= 5 else 0), None, f"{i:032x}") for i in range(12)]
    pq.write_table(pa.table({n: [r[i] for r in rows] for i, n in enumerate(EVENTS.names)}, schema=EVENTS),
                   tmp_path / "events.parquet")
    engine = shops.engine(tmp_path)
    events = engine.read(tmp_path / "events.parquet")
    parted = events.mutate(session=(events.ts_ms >= 1000).cast("int64"))
    windows = engine.rows(cut_windows(parted, max_items=4, min_items=2, by=("user_id", "session")))
    engine.close()
    found = sorted(w["items"] for w in windows)
    assert sorted(i for items in found for i in items) == list(range(12))
    assert all(max(items) < 5 or min(items) >= 5 for items in found) and all(len(items) <= 4 for items in found)


def rated(raw: Path, folder: Path) -> None:
    """The shops' logs with ratings 1 to 5."""
    for shop in shops.SHOPS:
        table = pq.read_table(raw / f"{shop}.parquet")
        ratings = pa.array([1.0 + i % 5 for i in range(table.num_rows)])
        pq.write_table(table.append_column("rating", ratings), folder / f"{shop}.parquet")
        (folder / f"{shop}.items.parquet").write_bytes((raw / f"{shop}.items.parquet").read_bytes())


@pytest.fixture(scope="module")
def with_all_options(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shops, rated, with every option on."""
    folder = tmp_path_factory.mktemp("options")
    rated(raw, folder)
    options = {"min_rating": 2, "session_gap_s": 10 * 86400, "repeats": "consecutive", "max_events": 25,
               "max_events_by": "draw", "min_items": 2, "max_items": 12}
    prepare(shops.config(shops.config_values(folder, folder / "out") | {"sequences": options}))
    return folder / "out"


def test_with_every_option_each_training_event_is_in_a_history_or_counted(with_all_options: Path) -> None:
    counts = json.loads((with_all_options / "report.json").read_text())["sequences"]
    train = pq.read_table(with_all_options / "interactions" / "train.parquet")
    domains = train["domain"].to_pylist()
    n_of = {f"specific/{d}": domains.count(d) for d in set(domains)} | {"mixed": len(domains)}
    for corpus, n_events in n_of.items():
        dropped = {k: n for k, n in counts.items() if k.startswith(f"{corpus}: ") and k.endswith("dropped")}
        assert counts[f"{corpus}: events in them"] + sum(dropped.values()) == n_events, corpus
        assert sum("rated below 2" in k or "repeating" in k or "beyond" in k for k in dropped) == 3, dropped


def test_options_leave_what_is_held_out_as_it_is(with_all_options: Path, prepared: Path) -> None:
    # the same files but for the ratings, which no query shows
    made, plain = (read_queries_manifest(out / "queries") for out in (with_all_options, prepared))
    assert made.files == plain.files
    events = [sorted(t for ts in pq.read_table(out / "histories/valid/toys.parquet")["ts"].to_pylist() for t in ts)
              for out in (with_all_options, prepared)]
    assert len(events[0]) > 0.9 * len(events[1])  # less only what ended in a session of one event
    assert set(events[0]) <= set(events[1])


def test_with_every_option_the_audit_passes_and_histories_are_ordered_and_bounded(with_all_options: Path) -> None:
    for corpus in ("specific/books", "mixed", "valid/garden"):
        audit = PackedCorpus(with_all_options / "packed" / corpus).manifest.audit
        assert audit is not None and audit.passed
        times = pq.read_table(with_all_options / "histories" / f"{corpus}.parquet")["ts"].to_pylist()
        assert all(ts == sorted(ts) and 2 <= len(ts) <= 12 for ts in times), corpus
        if corpus.startswith("valid/"):  # where nothing is left out, no pause is longer than the gap
            assert all(b - a <= 10 * shops.DAY_MS for ts in times for a, b in pairwise(ts))


def test_a_rating_asked_of_logs_without_ratings_is_an_error(raw: Path, tmp_path: Path) -> None:
    values = shops.config_values(raw, tmp_path / "out") | {"sequences": {"min_rating": 4, "max_items": 12}}
    with pytest.raises(DataError, match=r"min_rating=4.0, but no training event has a rating; name the datasets'"):
        prepare(shops.config(values))


@pytest.mark.parametrize(("sequences", "message"), [
    ({"max_events": 1}, "max_events=1 is below min_items=2"),
    ({"max_events_by": "draw"}, "set max_events"),
    ({"repeats": "collapse"}, "'keep', 'consecutive' or 'first'"),
    ({"min_rating": float("nan")}, "finite"),
    ({"session_gap_s": 0}, "greater than or equal to 1"),
])
def test_options_that_cannot_work_are_refused(raw: Path, tmp_path: Path, sequences: dict[str, Any],
                                              message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shops.config(shops.config_values(raw, tmp_path / "out") | {"sequences": sequences})
