"""What a preparation says, early, of data that will not do: no part of the clock, no item, no query."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shops
from ingesting import ingested, parse

from cprec.errors import ConfigError, DataError, n_of
from data_prep.clean import clean
from data_prep.config import CleanSettings, QuerySettings, SplitSettings
from data_prep.pipeline import prepare
from data_prep.queries import write_queries
from data_prep.records import Corpora, Counts, Layout, Split, utc
from data_prep.split import require_parts, split
from data_prep.templates import TEMPLATES
from data_prep.vocabulary import train_tokenizer

DAY = shops.DAY_MS
CORPORA = Corpora(pretrain=("books", "toys"), unseen=("garden",))


@pytest.fixture
def values(raw: Path, tmp_path: Path) -> dict[str, Any]:
    return shops.config_values(raw, tmp_path / "out")


ITEMS = [("books", "b", "Dune"), ("toys", "t", "Kite"), ("garden", "g", "Spade")]


def cleaned(tmp_path: Path, events: list[tuple[str, str, str, int]]) -> Layout:
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [*ITEMS])
    shops.write_events(layout.raw_interactions, events)
    engine = shops.engine(tmp_path)
    try:
        clean(engine, layout, CleanSettings(), corpora=CORPORA, seed=1)
    finally:
        engine.close()
    return layout


def clocked(layout: Layout, settings: SplitSettings) -> Split:
    engine = shops.engine(layout.out)
    try:
        made = split(engine, layout, settings, corpora=CORPORA, regime="overlap", counts=Counts("split"))
        require_parts(engine, layout, settings, made=made, corpora=CORPORA)
    finally:
        engine.close()
    return made


def test_one_is_singular_and_other_numbers_are_not() -> None:
    assert [n_of(n, "event") for n in (0, 1, 2, 1234)] == ["0 events", "1 event", "2 events", "1,234 events"]
    assert utc(1_500_000_000_000) == "2017-07-14 02:40:00" and utc(10**18) == f"{10**18} ms"


def test_every_domain_that_the_clock_leaves_without_a_part_is_told_in_dates(tmp_path: Path) -> None:
    events = [("u", "toys", "t", DAY * 2), ("u", "garden", "g", DAY)]
    layout = cleaned(tmp_path, [*events, *(("u", "books", "b", DAY * d) for d in (1, 5, 9))])
    with pytest.raises(DataError) as e:
        clocked(layout, SplitSettings(t_valid=DAY * 4, t_test=DAY * 6))
    said = str(e.value)
    assert "2 domains without events in a part of the clock" in said and "1970-01-05" in said and "1970-01-07" in said
    assert "toys (pretrain) has no event in test; its 1 event: 1970-01-03 00:00:00\n" in said
    assert "garden (unseen) has no event in test; its 1 event: 1970-01-02 00:00:00\n" in said
    assert "split.t_valid" in said and "split.quantiles" in said and "leave out garden, toys" in said
    assert "books" not in said


def test_a_domain_that_starts_late_has_no_training_events_and_an_unseen_one_needs_none(tmp_path: Path) -> None:
    events = [("u", "books", "b", DAY * d) for d in (1, 5, 9)] + [("u", "toys", "t", DAY * d) for d in (7, 8)]
    layout = cleaned(tmp_path, [*events, ("u", "garden", "g", DAY * 8)])
    with pytest.raises(DataError, match="1 domain without") as e:
        clocked(layout, SplitSettings(t_valid=DAY * 4, t_test=DAY * 6))
    assert "toys (pretrain) has no event in train; its 2 events: from 1970-01-08 00:00:00 to 1970-01-09" in str(e.value)
    assert "garden" not in str(e.value)


def test_a_domain_without_validation_events_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = [("u", d, i, DAY * t) for d, i, _ in ITEMS for t in (1, 9)] + [("u", "books", "b", DAY * 5)]
    with caplog.at_level(logging.WARNING):
        clocked(cleaned(tmp_path, events), SplitSettings(t_valid=DAY * 4, t_test=DAY * 6))
    assert [r.getMessage().partition(" has")[0] for r in caplog.records] == ["split: garden", "split: toys"]


def test_a_domain_without_test_events_stops_the_run_at_the_split(values: dict[str, Any], raw: Path,
                                                                 tmp_path: Path) -> None:
    table = pq.read_table(raw / "toys.parquet")
    early = table.filter(pc.less(table["timestamp"], pc.quantile(table["timestamp"], 0.4)[0]))
    pq.write_table(early, tmp_path / "toys.parquet")
    values["datasets"][2]["path"] = str(tmp_path / "toys.parquet")
    with pytest.raises(DataError, match=r"toys \(pretrain\) has no event in test"):
        prepare(shops.config(values))
    assert {p.stem for p in (tmp_path / "out" / "stages").iterdir()} == {"ingest", "clean"}


def test_a_domain_whose_ids_are_not_in_the_items_is_told_at_cleaning(tmp_path: Path) -> None:
    events = [("u", "books", "b", 5), ("u", "toys", "T1", 6), ("u", "toys", "T2", 7), ("u", "garden", "g", 8)]
    with pytest.raises(DataError) as e:
        cleaned(tmp_path, events)
    assert str(e.value) == (
        "clean: domain 'toys': no event is left after cleaning: 2 events dropped: the catalogue has no such item; of "
        "2 item ids in its events 0 are in its item file, not so 'T1', 'T2': correct columns.item_id or the dataset's "
        "`items`, or write the ids of both files alike")


@pytest.mark.parametrize(("n_lost", "warns"), [(1, True), (0, False)])
def test_a_tenth_of_a_domains_events_lost_for_want_of_items_is_a_warning(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, n_lost: int, warns: bool) -> None:
    events = [("u", d, i, 5 + n) for d, i, _ in ITEMS for n in range(9 if d == "toys" else 11)]
    events += [("u", "toys", "lost", 90)] * n_lost + [("u", "books", "lost", 90)]  # one of 10, and one of 12
    with caplog.at_level(logging.WARNING):
        cleaned(tmp_path, events)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == int(warns)
    if warns:
        assert "1 of 10 events of domain toys (10.0 %) dropped" in said[0]
        assert "of 2 item ids in its events 1 are in its item file, not so 'lost'" in said[0]


@pytest.mark.parametrize(("seen", "offered"), [("exclude", True), ("include", False)])
def test_no_query_left_offers_to_rank_what_was_seen_where_it_is_not(tmp_path: Path, seen: Any, offered: bool) -> None:
    events = [("u", d, i, DAY * t) for d, i, _ in ITEMS for t in (1, 2, 9)]
    layout = cleaned(tmp_path, events)
    made = Split(t_valid=DAY * 4, t_test=DAY * 6, counts={}, hash="")
    catalogue = pa.table({"item": pa.array(range(3), pa.int32()), "domain": ["books", "garden", "toys"],
                          "item_id": ["b", "g", "t"], "title": ["a", "b", "c"], "line": ["a\n", "b\n", "c\n"],
                          "n_train": [2, 2, 2], "first_ts": [DAY, DAY, DAY]})
    pq.write_table(catalogue, layout.catalogue)
    engine = shops.engine(tmp_path)
    with pytest.raises(DataError, match=r"no ranking query in books, garden, toys: .*1970-01-07") as e:
        write_queries(engine, layout, QuerySettings(seen=seen, min_history=2 if seen == "exclude" else 3),
                      corpora=CORPORA, split=made, template=TEMPLATES["cprec"], regime="overlap", seed=1)
    engine.close()
    assert ("set queries.seen: include" in str(e.value)) is offered


@pytest.mark.parametrize("name", ["events.csv", "events.jsonl", "events.parquet", "events.csv.gz"])
def test_an_empty_source_file_is_named_with_the_way_out(
        values: dict[str, Any], raw: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    values["datasets"][1]["path"] = str(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is empty; fetch or write it again, or leave it out"):
        prepare(shops.config(values))


@pytest.mark.parametrize(("events", "items"), [("meta.json", "events.csv"), ("events.csv", "meta.json")])
def test_an_empty_file_of_amazon_is_named(tmp_path: Path, events: str, items: str) -> None:
    (tmp_path / "events.csv").write_text("" if events == "events.csv" else "A1,B000000001,5,1300000000\n")
    (tmp_path / "meta.json").write_text("")
    with pytest.raises(DataError, match=r"(events.csv|meta.json) is empty"):
        parse(tmp_path / "staged", parser="amazon", path=str(tmp_path / "events.csv"),
              items=str(tmp_path / "meta.json"), domain="toys")


def test_files_without_a_row_are_named_with_their_dataset(values: dict[str, Any], raw: Path, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(raw / "toys.parquet").slice(0, 0), tmp_path / "toys.parquet")
    values["datasets"][2]["path"] = str(tmp_path / "toys.parquet")
    with pytest.raises(DataError, match=r"no row of events in .*toys.parquet; fetch or write them again, or take the"):
        prepare(shops.config(values))


@pytest.mark.parametrize(("name", "text"), [
    ("reviews.json", '{"reviewerID": "A1", "asin": "B000000001", "unixReviewTime": 1300000000}\n'),
    ("reviews.csv", "user_id,parent_asin,rating,timestamp\nA1,B000000001,5,1300000000\n"),
])
def test_a_layout_where_amazons_files_name_their_columns_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "meta.json").write_text('{"asin": "B000000001", "title": "Kite"}\n')
    with pytest.raises(ConfigError, match=rf"layout=user_item is of ratings without a header, but .*{name} is"):
        parse(tmp_path / "staged", parser="amazon", path=str(tmp_path / name), items=str(tmp_path / "meta.json"),
              domain="toys", layout="user_item")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_wrong_column_of_replay_is_told_by_its_own_key(values: dict[str, Any], tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        (tmp_path / "notes.jsonl").write_text('{"body": "A text."}\n')
    else:
        pq.write_table(pa.table({"body": ["A text."]}), tmp_path / "notes.parquet")
    values["replay"] = [{"name": "notes", "path": str(tmp_path / f"notes.{kind}")}]
    with pytest.raises(DataError, match=r"notes.* has no column 'text'(.|\n)*body; correct `text` of replay notes"):
        prepare(shops.config(values))


def test_a_vocabulary_too_small_is_told_with_the_size_that_would_do(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_vocab_size=300 is below 512"):
        shops.config(values | {"tokenizer": {"train_vocab_size": 300}})
    layout = Layout(tmp_path)
    lines = [f"{chr(0x4e00 + 2 * i)}{chr(0x4e01 + 2 * i)}\n" for i in range(300)]  # 600 characters, each in one title
    pq.write_table(pa.table({"domain": ["toys"] * 300, "line": lines, "n_train": [1] * 300}), layout.catalogue)
    with pytest.raises(DataError, match=r"tokenizer.train_vocab_size=512 does not do: .* raise it to \d+ at the very"):
        train_tokenizer(layout, vocab_size=512, template=TEMPLATES["cprec"], corpora=CORPORA)


def test_of_a_files_malformed_lines_the_log_quotes_one_and_the_report_five(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = "".join(f"u{i},b{i},5\n" for i in range(50))
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + good + "odd\n" * 7)
    (tmp_path / "i.csv").write_text("item_id,title\nb1,Dune\n")
    with caplog.at_level(logging.WARNING):
        _, _, counts = ingested(tmp_path, max_malformed=0.5, parser="tabular", path=str(tmp_path / "e.csv"),
                                items=str(tmp_path / "i.csv"), domain="books")
    (said,) = caplog.messages
    assert "e.csv: 7 of 57 lines malformed, set aside; report.md quotes the first 5: line 52: 'odd'" in said
    assert sum("malformed line " in reason for reason in counts) == 5
