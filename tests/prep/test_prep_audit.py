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
from cprec.format import PackedCorpus, file_hash, read_manifest, write_manifest
from data_prep.audit import audit, read_audit
from data_prep.pipeline import prepare
from data_prep.records import Corpora, Layout
from data_prep.split import read_split

CORPORA = Corpora(("books", "games", "toys"), ("garden",))
Change = Callable[[dict[str, Any]], None]


def run_audit(out: Path, regime: str = "overlap") -> None:
    layout = Layout(out)
    engine = shops.engine(out)
    try:
        audit(engine, layout, corpora=CORPORA, split=read_split(layout), tokenizer=str(layout.tokenizer),
              regime=regime, seed=17)
    finally:
        engine.close()


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
        "every document once", "inside the clock", "no held-out event", "no unseen item or title",
        "decoded lines are the items' lines", "no decoded line is an unseen title"}


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


def replace_shard(out: Path, corpus: str, change: Callable[[pa.RecordBatch], dict[str, pa.Array]]) -> None:
    """Alter columns of the first shard, and its size and hash in the manifest so that only the content is wrong."""
    folder = out / "packed" / corpus
    manifest = PackedCorpus(folder).manifest
    path = folder / manifest.shards[0].file
    with pa.ipc.open_file(path.read_bytes()) as reader:
        batch = reader.get_batch(0)
    columns = {name: batch[name] for name in batch.schema.names} | change(batch)
    altered = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, altered.schema) as writer:
        writer.write_batch(altered)
    info = manifest.shards[0].model_copy(update={"bytes": path.stat().st_size, "xxh3_128": file_hash(path)})
    write_manifest(folder, manifest.model_copy(update={"shards": [info, *manifest.shards[1:]]}))


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
    with pytest.raises(DataError, match="specific/toys: no decoded line is an unseen title: FAILED"):
        run_audit(out)
    assert failed_checks(out, "specific/toys") == {"no decoded line is an unseen title",
                                                   "decoded lines are the items' lines"}


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
    path = copy_of_prepared / "packed" / "mixed" / "shard-00000.arrow"
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
