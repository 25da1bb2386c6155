"""Duplicates over domains, and the report with its pictures, counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from cprec.format import list_corpora, read_manifest
from data_prep import pictures
from data_prep.clean import clean
from data_prep.config import CleanSettings
from data_prep.duplicates import Shared, count_duplicates, write_duplicates
from data_prep.pipeline import prepare, read_stamp
from data_prep.records import STAGES, Corpora, Counts, Layout, title_key
from data_prep.report import _spread, count_events, count_lengths, count_shared, write_report
from data_prep.split import read_split

CORPORA = Corpora(pretrain=("books", "toys"), unseen=("garden",))
ITEMS = [
    ("books", "b1", "Red Lamp"), ("books", "b2", "red lamp!"), ("books", "b3", "Rope"), ("books", "b4", "Kite"),
    ("toys", "t1", "Kite"), ("toys", "t2", "RED LAMP"), ("toys", "t3", "Drum"), ("toys", "t3", "Drum"),
    ("garden", "g1", "Red Lamp"), ("garden", "g2", "Spade"), ("other", "o1", "Spade"),
]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    at = Layout(tmp_path)
    shops.write_items(at.raw_items, ITEMS)
    shops.write_events(at.raw_interactions, [("u", d, i, 5) for d, i, _ in ITEMS])
    engine = shops.engine(tmp_path)
    clean(engine, at, CleanSettings(), corpora=CORPORA, seed=1)
    engine.close()
    return at


def test_items_that_share_a_title_are_listed_and_counted_per_pair_of_domains(layout: Layout) -> None:
    engine = shops.engine(layout.out)
    counts = Counts("clean")
    write_duplicates(engine, layout, corpora=CORPORA, counts=counts)
    listed = [tuple(r.values()) for r in pq.read_table(layout.duplicates).to_pylist()]
    # t3 is one item twice; o1 is of a domain that was not chosen
    assert listed == [
        ("kite", "books", "b4", "Kite"), ("kite", "toys", "t1", "Kite"),
        ("redlamp", "books", "b1", "Red Lamp"), ("redlamp", "books", "b2", "red lamp!"),
        ("redlamp", "garden", "g1", "Red Lamp"), ("redlamp", "toys", "t2", "RED LAMP")]
    assert all(key == title_key(title) for key, _, _, title in listed)
    assert list(counts.by_reason.values()) == [6, 2, 2]
    assert count_duplicates(engine, layout) == {
        ("books", "books"): Shared(normalised=1, exact=0),  # red lamp, of two items
        ("books", "garden"): Shared(1, 1), ("garden", "books"): Shared(1, 1),
        ("books", "toys"): Shared(2, 1), ("toys", "books"): Shared(2, 1),  # red lamp and kite; kite to the letter
        ("garden", "toys"): Shared(1, 0), ("toys", "garden"): Shared(1, 0)}
    engine.close()


def test_users_that_domains_share_are_counted_once_each(tmp_path: Path) -> None:
    rows = [("u1", "a"), ("u1", "a"), ("u1", "b"), ("u2", "a"), ("u3", "c"), ("u4", "a"), ("u4", "b"), ("u4", "c")]
    pq.write_table(pa.table({"user_id": [u for u, _ in rows], "domain": [d for _, d in rows]}), tmp_path / "e.parquet")
    engine = shops.engine(tmp_path)
    shared = count_shared(engine, engine.read(tmp_path / "e.parquet"), "user_id", ["a", "b", "c", "none"])
    engine.close()
    assert shared.tolist() == [[3, 2, 1, 0], [2, 2, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]


def test_events_are_counted_by_part_and_day(prepared: Path) -> None:
    layout = Layout(prepared)
    split = read_split(layout)
    engine = shops.engine(prepared)
    events = count_events(engine, layout, split, ["books", "games", "garden", "toys"])
    engine.close()
    for part, n in split.counts.items():
        assert sum(events.n(d, part) for d in events.counted) == n, part
    days = [ms // 86_400_000 for ms, d in zip(*(pq.read_table(layout.interactions)[c].to_pylist()
                                                for c in ("ts_ms", "domain")), strict=True) if d == "toys"]
    assert events.by_day("toys") == {day: days.count(day) for day in set(days)}


def test_lengths_are_summed_up_from_their_counts(prepared: Path) -> None:
    # 3 histories of 2, 1 of 5, 2 of 9 items
    assert _spread({2: 3, 5: 1, 9: 2}) == (6, 29, 2, 2, "4.8", 9)
    engine = shops.engine(prepared)
    counted = count_lengths(engine, Layout(prepared), "mixed")
    engine.close()
    lengths = [len(items) for items in pq.read_table(prepared / "histories" / "mixed.parquet")["items"].to_pylist()]
    assert counted == {n: lengths.count(n) for n in sorted(set(lengths))}


def test_the_report_names_every_corpus_domain_and_count_and_its_pictures_are_there(prepared: Path) -> None:
    text = (prepared / "report.md").read_text()
    for name in list_corpora(prepared / "packed"):
        assert re.search(rf"^\| {name} .* \| {read_manifest(prepared / 'packed' / name).n_tokens:,} \|", text, re.M)
    counts = json.loads((prepared / "report.json").read_text())
    for stage, reasons in counts.items():
        for reason, n in reasons.items():
            assert f"| {stage} | {reason} | {n:,} |" in text
    assert "| garden | unseen | 20 |" in text and "Passed. Every finding" in text
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(shown) == 4
    for name in shown:
        assert (prepared / name).read_bytes().startswith(b"\x89PNG")


def test_a_report_that_is_that_of_the_stages_is_not_written_again(copy_of_prepared: Path, raw: Path) -> None:
    config = shops.config(shops.config_values(raw, copy_of_prepared))
    before = (copy_of_prepared / "report.md").stat().st_mtime_ns
    prepare(config)
    assert (copy_of_prepared / "report.md").stat().st_mtime_ns == before
    (copy_of_prepared / "report.md").unlink()
    prepare(config)
    assert (copy_of_prepared / "report.md").is_file()


def test_a_preparation_that_stops_reports_what_it_knows(raw: Path, tmp_path: Path) -> None:
    values = shops.config_values(raw, tmp_path / "out") | {"sequences": {"min_items": 400, "max_items": 900}}
    with pytest.raises(DataError, match="no training history"):
        prepare(shops.config(values))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Not finished: sequences, encode, pack, queries, audit." in text
    assert "| clean | events kept |" in text and "## Domains and the clock" in text and "## Tokens" not in text


def test_an_audit_of_what_is_being_made_anew_is_not_reported(copy_of_prepared: Path) -> None:
    layout = Layout(copy_of_prepared)
    stamps = {stage: read_stamp(layout, stage) for stage in STAGES if stage not in ("pack", "audit")}
    engine = shops.engine(copy_of_prepared)
    write_report(engine, layout, corpora=Corpora(("books", "games", "toys"), ("garden",)), stamps=stamps)
    engine.close()
    text = (copy_of_prepared / "report.md").read_text()
    assert layout.audit.is_file() and "Not finished: pack, audit." in text and "The audit" not in text


def test_names_with_signs_of_formulas_and_many_domains_are_drawn(tmp_path: Path) -> None:
    domains = [f"_{i}$x^$" for i in range(20)]
    pictures.draw_times({d: {100 + i: 3, 9000: 1} for i, d in enumerate(domains)},
                        {"t_valid": 10**11, "t_test": 2 * 10**11}, tmp_path / "a.png")
    pictures.draw_lengths({d: {2: 3} for d in domains}, tmp_path / "b.png")
    shared = np.eye(20, dtype=np.int64)
    pictures.draw_overlap(domains, {"users": shared, "titles": shared * 0}, tmp_path / "c.png")
    for name in "abc":
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
