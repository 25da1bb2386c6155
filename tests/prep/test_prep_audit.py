"""The audit finds every kind of leak that is planted into finished artifacts, and says so in the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from cprec.format import Audit, PackedCorpus, file_hash, read_manifest, write_manifest
from data_prep.audit import _shows_titles, _titles, audit
from data_prep.config import PrepConfig
from data_prep.pack import Part
from data_prep.pipeline import Preparation, prepare
from data_prep.records import Layout
from data_prep.split import read_split
from data_prep.templates import TEMPLATES
from data_prep.workers import Workers

Change = Callable[[dict[str, Any]], None]


def config_of(out: Path, **change: Any) -> PrepConfig:
    return shops.config(shops.config_values(Path("raw"), out) | change)


def run_audit(out: Path, **change: Any) -> None:
    """Audit the shops prepared in `out`, with these settings changed."""
    layout, config = Layout(out), config_of(out, **change)
    engine = shops.engine(out)
    # the sources are not looked for: only their hashes would be needed, for a manifest
    preparation = Preparation(config)
    preparation.__dict__["source_hashes"] = {}
    try:
        audit(engine, layout, config, split=read_split(layout), corpora=preparation.packed_corpora(),
              workers=Workers(1))
    finally:
        engine.close()


def read_audit(path: Path) -> dict[str, Audit]:
    return {name: Audit.model_validate(found) for name, found in json.loads(path.read_text()).items()}


def failed_checks(out: Path, corpus: str) -> set[str]:
    """Checks that the written audit says failed; manifest and audit.json must agree."""
    written = read_manifest(out / "packed" / corpus).audit
    assert written is not None and written == read_audit(out / "audit.json")[corpus]
    failed = {name for name, finding in written.checks.items() if finding.startswith("FAILED")}
    assert written.passed is not bool(failed)
    return failed


def change_rows(path: Path, change: Change) -> None:
    """Alter the first row of a Parquet file."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def item_of(out: Path, domain: str) -> int:
    rows = pq.read_table(out / "catalogue.parquet").to_pylist()
    return next(int(r["item"]) for r in rows if r["domain"] == domain)


def test_a_clean_preparation_passes_every_check(prepared: Path) -> None:
    found = read_audit(prepared / "audit.json")
    assert all(a.passed for a in found.values()) and len(found) == 8
    assert set(found["mixed"].checks) == {
        "every document once", "every event in a document, or counted as dropped", "inside the clock",
        "no held-out event", "no unseen item or title",
        "titles shared with an unseen domain are listed", "rows are their documents' tokens",
        "decoded documents are their items' text", "no decoded title is unseen"}
    assert not [p for p in prepared.iterdir() if "partial" in p.name]


def test_a_title_shared_with_an_unseen_domain_that_is_not_listed_is_found(copy_of_prepared: Path) -> None:
    path = copy_of_prepared / "duplicates.parquet"
    table = pq.read_table(path)
    assert {r["domain"] for r in table.to_pylist()} == {"books", "garden"}
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="titles shared with an unseen domain are listed: FAILED: 1 of"):
        run_audit(copy_of_prepared)
    assert failed_checks(copy_of_prepared, "mixed") == {"titles shared with an unseen domain are listed"}


def test_a_held_out_event_in_a_history_is_found(copy_of_prepared: Path) -> None:
    out = copy_of_prepared
    t_test = json.loads((out / "split.json").read_text())["t_test"]
    events = pq.read_table(out / "interactions" / "clean.parquet").to_pylist()
    event = next(e for e in events if e["ts_ms"] >= t_test and e["domain"] == "books")
    numbers = {r["item_id"]: r["item"] for r in pq.read_table(out / "catalogue.parquet").to_pylist()
               if r["domain"] == "books"}

    def plant(row: dict[str, Any]) -> None:
        row["user_id"] = event["user_id"]
        row["items"][0], row["ts"][0] = numbers[event["item_id"]], event["ts_ms"]

    change_rows(out / "histories" / "specific" / "books.parquet", plant)
    with pytest.raises(DataError, match=r"audit of .* failed(.|\n)*specific/books: no held-out event: FAILED: 1 of"):
        run_audit(out)
    assert {"no held-out event", "inside the clock"} <= failed_checks(out, "specific/books")
    assert failed_checks(out, "mixed") == set()


def test_an_event_after_the_clock_is_found(copy_of_prepared: Path) -> None:
    t_valid = json.loads((copy_of_prepared / "split.json").read_text())["t_valid"]

    def plant(row: dict[str, Any]) -> None:
        row["ts"][-1] = t_valid

    change_rows(copy_of_prepared / "histories" / "mixed.parquet", plant)
    with pytest.raises(DataError, match="mixed: inside the clock: FAILED: 1 of"):
        run_audit(copy_of_prepared)
    assert failed_checks(copy_of_prepared, "mixed") == {"inside the clock"}


def test_an_item_of_an_unseen_domain_is_found(copy_of_prepared: Path) -> None:
    garden = item_of(copy_of_prepared, "garden")

    def plant(row: dict[str, Any]) -> None:
        row["items"][0] = garden

    change_rows(copy_of_prepared / "histories" / "mixed.parquet", plant)
    with pytest.raises(DataError, match="mixed: no unseen item or title: FAILED: 1 of"):
        run_audit(copy_of_prepared)


def test_an_unseen_title_under_another_domains_item_is_found(copy_of_prepared: Path) -> None:
    rows = pq.read_table(copy_of_prepared / "catalogue.parquet").to_pylist()
    title = next(r["title"] for r in rows if r["domain"] == "garden")
    book = item_of(copy_of_prepared, "books")
    table = pq.read_table(copy_of_prepared / "catalogue.parquet")
    rows[book]["title"] = title.upper().replace(" ", "-")
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copy_of_prepared / "catalogue.parquet")
    with pytest.raises(DataError, match="no unseen item or title: FAILED: 1 of"):
        run_audit(copy_of_prepared)


def replace_shard(out: Path, corpus: str, change: Callable[[pa.RecordBatch], dict[str, pa.Array]], *,
                  number: int = 0) -> None:
    """Alter columns of a shard, and its size and hash where they are told, so that only the content is wrong."""
    folder = out / "packed" / corpus
    manifest = PackedCorpus(folder).manifest
    path = folder / manifest.shards[number].file
    with pa.ipc.open_file(path.read_bytes()) as reader:
        batch = reader.get_batch(0)
    columns = {name: batch[name] for name in batch.schema.names} | change(batch)
    altered = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, altered.schema) as writer:
        writer.write_batch(altered)
    shards = list(manifest.shards)
    shards[number] = shards[number].model_copy(update={"bytes": path.stat().st_size, "xxh3_128": file_hash(path)})
    write_manifest(folder, manifest.model_copy(update={"shards": shards}))
    record = folder / "parts" / "00000.json"
    part = Part.model_validate_json(record.read_text())
    record.write_text(part.model_copy(update={"shards": shards}).model_dump_json())


def test_an_unseen_title_written_into_a_row_is_found(copy_of_prepared: Path) -> None:
    from cprec.tokenizer import load_tokenizer

    out = copy_of_prepared
    rows = pq.read_table(out / "catalogue.parquet").to_pylist()
    line = next(r["line"] for r in rows if r["domain"] == "garden")
    ids = load_tokenizer(str(out / "tokenizer")).encode(["\n" + line])[0]

    def plant(batch: pa.RecordBatch) -> dict[str, pa.Array]:
        flat = batch["input_ids"].flatten().to_numpy().copy().reshape(batch.num_rows, -1)
        flat[:, 40:40 + len(ids)] = ids
        return {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])}

    replace_shard(out, "specific/toys", plant)
    with pytest.raises(DataError, match="specific/toys: no decoded title is unseen: FAILED"):
        run_audit(out)
    assert failed_checks(out, "specific/toys") == {
        "no decoded title is unseen", "decoded documents are their items' text", "rows are their documents' tokens"}


def retitle(raw: Path, folder: Path, titles: dict[tuple[str, int], str]) -> Path:
    """The shops' logs in `folder`, with other titles of some items (shop, place)."""
    folder.mkdir()
    for path in raw.iterdir():
        table = pq.read_table(path)
        if path.name.endswith(".items.parquet"):
            mine = {i: title for (shop, i), title in titles.items() if path.name.startswith(shop)}
            column = [mine.get(i, title) for i, title in enumerate(table["title"].to_pylist())]
            table = table.set_column(table.schema.get_field_index("title"), "title", pa.array(column))
        pq.write_table(table, folder / path.name)
    return folder


def test_a_title_with_the_mark_that_ends_an_item_is_no_leak_of_its_second_half_and_replay_text_is_looked_at(
        raw: Path, tmp_path: Path, tiny_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.audit.SAMPLED_ROWS", 10_000)
    logs = retitle(raw, tmp_path / "raw", {("books", 5): "Shampoo; Soap", ("garden", 1): "Soap"})
    (tmp_path / "notes.jsonl").write_text(json.dumps({"text": "On washing.\n\nSOAP!\nIt cleans."}) + "\n")
    change = {"template": "compact", "tokenizer": {"path": tiny_tokenizer},
              "replay": [{"name": "notes", "path": str(tmp_path / "notes.jsonl")}]}
    prepare(shops.config(shops.config_values(logs, tmp_path / "out") | change))
    found = read_audit(tmp_path / "out" / "audit.json")
    assert found["mixed"].passed and found["mixed"].checks["no decoded title is unseen"].startswith("not checked: ")
    finding = found["replay/notes"].checks["no line of the text is an unseen title"]
    assert finding == "NOTED: 1 of 3 lines in 1 rows of 1 are"
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["audit"]
    assert counts["replay/notes: sampled lines that are titles of an unseen domain"] == 1


def test_only_titles_are_taken_for_titles() -> None:
    shown = {name for name, template in TEMPLATES.items() if _shows_titles(template)}
    assert shown == {"cprec", "supervised"}
    lines = ["Chosen lamp\n", "Oak desk\n"]
    supervised = TEMPLATES["supervised"]
    assert _titles(supervised.render(lines), supervised) == ["Chosen lamp", "Oak desk"]
    with_tail = TEMPLATES["cprec"].model_copy(update={"tail": "Done.\n"})
    assert _titles(with_tail.render(lines), with_tail) == ["Chosen lamp", "Oak desk"]


def swap_two_tokens(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """The shard's last row with its third token from the start and the next different one exchanged."""
    ids = batch["input_ids"].flatten().to_numpy().copy().reshape(batch.num_rows, -1)
    row = ids[-1]
    other = 3 + int(np.flatnonzero(row[3:] != row[2])[0])
    row[[2, other]] = row[[other, 2]]
    return {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), ids.shape[1])}


def test_one_row_of_other_tokens_is_found_whether_or_not_it_is_in_the_decoded_sample(
        copy_of_prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.audit.SAMPLED_ROWS", 0)
    replace_shard(copy_of_prepared, "mixed", swap_two_tokens)
    n_rows = len(PackedCorpus(copy_of_prepared / "packed" / "mixed"))
    with pytest.raises(DataError, match=rf"mixed: rows are their documents' tokens: FAILED: 1 of {n_rows:,} rows, all"):
        run_audit(copy_of_prepared)
    assert failed_checks(copy_of_prepared, "mixed") == {"rows are their documents' tokens"}
    assert failed_checks(copy_of_prepared, "specific/books") == set()


def test_a_row_that_is_right_but_for_the_border_between_two_documents_is_found(copy_of_prepared: Path) -> None:
    def plant(batch: pa.RecordBatch) -> dict[str, pa.Array]:
        lens = batch["doc_lens"].flatten().to_numpy().copy()
        offsets = batch["doc_lens"].offsets
        first = next(o for o, ids in zip(offsets.to_pylist(), batch["doc_ids"].to_pylist(), strict=False)
                     if len(ids) > 1)
        lens[first:first + 2] += np.array([1, -1], np.int32)
        return {"doc_lens": pa.ListArray.from_arrays(offsets, pa.array(lens))}

    # rows of several documents come last in a window: the longest documents are packed first
    replace_shard(copy_of_prepared, "mixed", plant, number=-1)
    with pytest.raises(DataError, match="mixed: rows are their documents' tokens: FAILED: 1 of"):
        run_audit(copy_of_prepared)


@pytest.mark.parametrize("doc_id", [-1, 1_000_000])
def test_a_row_of_a_document_that_is_not_there_is_counted_as_wrong(copy_of_prepared: Path, doc_id: int) -> None:
    def plant(batch: pa.RecordBatch) -> dict[str, pa.Array]:
        ids = batch["doc_ids"].flatten().to_numpy().copy()
        ids[0] = doc_id
        return {"doc_ids": pa.ListArray.from_arrays(batch["doc_ids"].offsets, pa.array(ids))}

    # no row is decoded: decoding needs documents that exist
    replace_shard(copy_of_prepared, "mixed", plant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.audit.SAMPLED_ROWS", 0)
        with pytest.raises(DataError, match="mixed: rows are their documents' tokens: FAILED: 1 of"):
            run_audit(copy_of_prepared)
    assert failed_checks(copy_of_prepared, "mixed") == {"rows are their documents' tokens", "every document once"}


def test_rows_of_documents_tokenized_whole_are_compared_with_those(
        raw: Path, tmp_path: Path, tiny_tokenizer: str) -> None:
    out, slow = tmp_path / "out", {"tokenizer": {"path": tiny_tokenizer, "exact": "slow"}}
    prepare(shops.config(shops.config_values(raw, out) | slow))
    n_rows = len(PackedCorpus(out / "packed" / "mixed"))
    finding = read_audit(out / "audit.json")["mixed"].checks["rows are their documents' tokens"]
    assert finding.startswith(f"ok: 0 of {n_rows:,} rows, all compared")
    replace_shard(out, "mixed", swap_two_tokens)
    with pytest.raises(DataError, match="mixed: rows are their documents' tokens: FAILED: 1 of"):
        run_audit(out, **slow)


def test_the_id_of_an_unseen_item_is_found_where_ids_are_shared_also_when_that_item_has_no_title(
        copy_of_prepared: Path) -> None:
    out = copy_of_prepared
    table = pq.read_table(out / "catalogue.parquet")
    rows = table.to_pylist()
    book = rows[pq.read_table(out / "histories" / "specific" / "books.parquet")["items"].to_pylist()[0][0]]
    titled = pq.read_table(out / "items" / "titled.parquet")
    untitled = {"domain": "garden", "item_id": book["item_id"]}
    pq.write_table(pa.Table.from_pylist([*titled.to_pylist(), untitled], schema=titled.schema),
                   out / "items" / "titled.parquet")
    run_audit(out)  # chance, where every shop numbers its own items
    with pytest.raises(DataError, match=r"no unseen item or title: FAILED: 1 of .* or an id of its catalogue"):
        run_audit(out, clean={"shared_item_ids": True})


def test_a_document_packed_twice_is_found(copy_of_prepared: Path) -> None:
    def plant(batch: pa.RecordBatch) -> dict[str, pa.Array]:
        ids = batch["doc_ids"].flatten().to_numpy().copy()
        ids[0] = ids[1]
        offsets = pa.array(np.asarray(batch["doc_ids"].offsets))
        return {"doc_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))}

    replace_shard(copy_of_prepared, "specific/games", plant)
    with pytest.raises(DataError, match="specific/games: every document once: FAILED"):
        run_audit(copy_of_prepared)


def test_altered_bytes_of_a_shard_are_found(copy_of_prepared: Path) -> None:
    path = copy_of_prepared / "packed" / "mixed" / "shard-00000-000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="its bytes were altered"):
        run_audit(copy_of_prepared)


def test_users_of_both_sides_are_found_in_the_disjoint_regime_and_are_absent_when_prepared_so(
        copy_of_prepared: Path, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mixed: users disjoint: FAILED"):  # prepared as overlap
        run_audit(copy_of_prepared, regime="disjoint")
    values = shops.config_values(raw, tmp_path / "disjoint") | {"regime": "disjoint"}
    values["split"] = {"quantiles": [0.985, 0.9925]}  # late: most of the 40 people have garden events near the end
    prepare(shops.config(values))
    checks = read_audit(tmp_path / "disjoint" / "audit.json")["mixed"].checks
    assert checks["users disjoint"].startswith("ok: 0 of ")
