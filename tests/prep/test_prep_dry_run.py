"""--dry-run: the check of column mappings, the look at the sources, and how near the estimate comes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import ConfigError, DataError
from cprec.format import list_corpora, read_manifest
from data_prep import look as module
from data_prep.estimate import Estimate, estimate
from data_prep.pipeline import Preparation, prepare


@pytest.fixture
def values(raw: Path, tmp_path: Path) -> dict[str, Any]:
    return shops.config_values(raw, tmp_path / "out")


def look(values: dict[str, Any]) -> Estimate:
    config = shops.config(values)
    preparation = Preparation(config)
    return estimate(config, preparation.staging, template=preparation.template)


def test_events_are_counted_and_tokens_estimated_without_writing_anything(
        values: dict[str, Any], prepared: Path, tmp_path: Path) -> None:
    values["tokenizer"] = {"path": str(prepared / "tokenizer")}
    found = look(values)
    assert {d: (rows.n, rows.is_exact) for d, rows in found.n_events.items()} == {
        shop: (60 * n, True) for shop, n in shops.SHOPS.items()}
    assert all(seen.events.is_exact and seen.items.is_exact for seen in found.looks)
    made = sum(read_manifest(prepared / "packed" / name).n_tokens for name in list_corpora(prepared / "packed")
               if name.startswith("specific/"))
    assert 0.85 * made < found.n_tokens < 1.3 * made
    disk = {made.name: made.n_bytes for made in found.disk}
    assert set(disk) == {"staged", "interactions", "items", "texts", "histories", "segments", "packed", "queries",
                         "report and others"}
    for name in ("interactions", "histories", "packed"):
        of = [name, "holdout.parquet"] if name == "interactions" else [name]
        on_disk = sum(p.stat().st_size for n in of for p in [*(prepared / n).rglob("*"), prepared / n] if p.is_file())
        assert 0.5 * on_disk < disk[name] < 2 * on_disk, name
    assert disk["staged"] == disk["texts"] == 0  # local Parquet stays in place
    assert not (tmp_path / "out").exists()


def test_what_is_to_be_written_is_all_that_a_preparation_leaves(values: dict[str, Any], prepared: Path) -> None:
    said = Preparation(shops.config(values)).written()
    left = {str(p.relative_to(prepared)) for p in prepared.rglob("*") if p.is_file()}
    assert {f for f in left if f not in said and not any(f.startswith(s) for s in said if s.endswith("/"))} == set()
    assert [s for s in said if not any(f == s or (s.endswith("/") and f.startswith(s)) for f in left)] == []


def test_every_mapping_that_names_no_column_is_told_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    values["datasets"][0]["columns"]["user_id"] = "usr_id"
    values["datasets"][1]["columns"]["title"] = "nome"
    with pytest.raises(DataError, match="2 problems") as e:
        look(values)
    assert "books.parquet has no column 'usr_id' (for user_id); did you mean 'user_id'?" in str(e.value)
    assert "games.items.parquet has no column 'nome' (for title)\n" in str(e.value)
    assert str(e.value).count("item_id, title") == 1, "the columns are listed once"


def test_a_text_source_is_judged_by_its_beginning(values: dict[str, Any], raw: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = tmp_path / "toys.csv", tmp_path / "garden.csv.gz"
    pyarrow.csv.write_csv(pq.read_table(raw / "toys.parquet"), plain)
    pyarrow.csv.write_csv(pq.read_table(raw / "garden.parquet"), tmp_path / "garden.csv")
    packed.write_bytes(gzip.compress((tmp_path / "garden.csv").read_bytes()))
    values["datasets"][2]["path"], values["datasets"][3]["path"] = str(plain), str(packed)
    found = look(values)
    for seen, n in ((found.looks[2], 60 * 36), (found.looks[3], 60 * 20)):  # read to their ends: nothing is guessed
        assert (seen.events.n, seen.n_sampled, seen.events.n_lines, seen.events.n_malformed) == (n, n, n, 0)
        assert seen.events.is_exact and seen.events.is_whole and seen.events.staged_bytes > 0
    assert found.disk[0].name == "staged" and found.disk[0].n_bytes > 0
    monkeypatch.setattr(module, "HEAD_BYTES", 4096)  # of 54,000 bytes
    monkeypatch.setattr(module, "EVENTS", 100)
    found = look(values)
    seen = found.looks[2]
    assert not seen.events.is_exact and seen.events.n == pytest.approx(60 * 36, rel=0.02) and seen.n_sampled == 100
    assert not found.n_events["toys"].is_exact and "toys: about 2,200 events" in "\n".join(found.lines())


def test_of_many_files_some_are_looked_into(values: dict[str, Any], raw: Path, tmp_path: Path) -> None:
    table = pq.read_table(raw / "toys.parquet")
    (tmp_path / "toys").mkdir()
    for i in range(20):
        pq.write_table(table.slice(108 * i, 108), tmp_path / "toys" / f"{i:02d}.parquet")
    values["datasets"][2]["path"] = str(tmp_path / "toys")
    found = look(values).looks[2].events
    assert not found.is_exact and found.n == pytest.approx(60 * 36, rel=0.02) and str(found).startswith("about 2,1")


def test_a_domain_that_the_sample_lacks_and_what_is_assumed_are_noted(values: dict[str, Any], tmp_path: Path) -> None:
    values["domains"]["unseen"] = ["gardn"]
    notes = "\n".join(look(values).lines())
    assert "no looked-at event is of domain 'gardn'; did you mean 'garden'" in notes
    assert "2.6 characters are taken for a token" in notes and "columns fit" in notes


def test_an_unknown_key_of_a_dataset_is_answered_with_the_known_ones(values: dict[str, Any]) -> None:
    values["datasets"][1]["columns"]["tittle"] = "name"
    values["datasets"][1]["colums"] = {}
    with pytest.raises(ConfigError) as e:
        shops.config(values)
    assert "datasets.1.columns.tittle: unknown key; did you mean 'title'" in str(e.value)
    assert "datasets.1.colums: unknown key; did you mean 'columns'" in str(e.value)


def test_malformed_lines_that_were_seen_are_said_and_that_they_are_too_many(
        values: dict[str, Any], raw: Path, tmp_path: Path) -> None:
    plain = tmp_path / "toys.csv"
    pyarrow.csv.write_csv(pq.read_table(raw / "toys.parquet"), plain)
    plain.write_bytes(plain.read_bytes() + b"odd\n" * 40)
    values["datasets"][2]["path"] = str(plain)
    said = "\n".join(look(values).lines())
    assert "events 2,160 rows (40 of 2,200 lines looked at malformed, 1.82%)" in said
    assert "toys.csv: 40 of 2,200 lines looked at malformed, more than ingest.max_malformed=0.001 allows" in said


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_replay_is_looked_at_too_and_a_wrong_column_told(
        values: dict[str, Any], tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"notes.{kind}"
    texts = ["a text of 26 letters, twice"] * 20 + [""] * 20
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    else:
        pq.write_table(pa.table({"body": texts}), path)
    values["datasets"][0]["columns"]["user_id"] = "usr_id"
    values["replay"] = [{"name": "notes", "path": str(path)}]
    with pytest.raises(DataError, match=r"2 problems(.|\n)*usr_id(.|\n)*body; correct `text` of replay notes"):
        look(values)
    values["datasets"][0]["columns"] = {}
    values["replay"][0]["text"] = "body"
    found = look(values)
    (seen,) = found.texts
    assert (seen.texts.n, seen.texts.is_exact) == (40, True)
    assert seen.tokens_per_text == pytest.approx((27 / 2.6 + 2) / 2)  # half of them are empty; begin and end
    assert {made.name: made.n_bytes > 0 for made in found.disk}["texts"]


def test_a_domain_that_the_clock_would_leave_without_a_part_is_said_beforehand(
        values: dict[str, Any], raw: Path, tmp_path: Path) -> None:
    table = pq.read_table(raw / "toys.parquet")
    early = table.filter(pc.less(table["timestamp"], pc.quantile(table["timestamp"], 0.4)[0]))
    pq.write_table(early, tmp_path / "toys.parquet")
    values["datasets"][2]["path"] = str(tmp_path / "toys.parquet")
    found = look(values)
    assert found.clock is not None and found.clock.learned["toys"] == 1.0
    (note,) = found.clock.notes
    assert note.startswith("domain toys would have no event in test, by those looked at: from 2017-07-")
    with pytest.raises(DataError, match=r"test begins at t_test = .* \((\d+) ms\)") as e:
        prepare(shops.config(values))
    assert f"({found.clock.t_test} ms)" in str(e.value), "all was looked at: the clock is that of the run"


def test_ids_that_are_in_no_item_file_are_said_where_all_was_looked_at(
        values: dict[str, Any], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pq.read_table(raw / "toys.parquet")
    other = table.set_column(table.schema.get_field_index("item_id"), "item_id",
                             pc.binary_join_element_wise(table["item_id"].cast("string"), ".0", ""))
    pq.write_table(other, tmp_path / "toys.parquet")
    values["datasets"][2]["path"] = str(tmp_path / "toys.parquet")
    said = "\n".join(look(values).lines())
    assert "domain toys: none of the 36 item ids of its events is among its 36 items; correct columns.item_id" in said
    assert said.count("none of the") == 1
    monkeypatch.setattr(module, "EVENTS", 100)
    assert "none of the" not in "\n".join(look(values).lines()), "not known"
