"""Stage 1 inside a preparation: text gives what Parquet gives, restarts redo what is missing; replay texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import ConfigError, DataError
from data_prep.ingest import ingest
from data_prep.pipeline import Preparation, finished_stages, prepare
from data_prep.records import Counts
from data_prep.replay import clean_text, replay_texts
from data_prep.workers import Workers

TEXTS = ["A first\r\ndocument. ", "", None, " \n\t", "with\x00 control\x07", "tab\there\x0cpage", "</s> is text"]
CLEAN = ["A first\ndocument.", "with control", "tab\there\npage", "</s> is text"]


def write_as_text(raw: Path, folder: Path) -> None:
    """The shops of `raw` as CSV, TSV and JSON lines, some packed; and texts for replay in two files."""
    folder.mkdir()
    for shop in shops.SHOPS:
        events, items = (pq.read_table(raw / f"{shop}{kind}.parquet") for kind in ("", ".items"))
        lines = "".join(json.dumps(row) + "\n" for row in events.to_pylist())
        (folder / f"{shop}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        pyarrow.csv.write_csv(items, folder / f"{shop}.items.csv")
    (folder / "texts").mkdir()
    (folder / "texts/1.jsonl").write_text("".join(json.dumps({"body": t, "n": 1}) + "\n" for t in TEXTS))
    pq.write_table(pa.table({"body": TEXTS}), folder / "texts/2.parquet")


def text_values(folder: Path, out: Path) -> dict[str, Any]:
    values = shops.config_values(folder, out)
    for dataset in values["datasets"]:
        dataset["path"] = str(folder / f"{dataset['domain']}.jsonl.gz")
        dataset["items"] = str(folder / f"{dataset['domain']}.items.csv")
    return values | {"replay": [{"name": "notes", "path": str(folder / "texts"), "text": "body"}]}


@pytest.fixture(scope="module")
def from_text(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    """The shops ingested from text."""
    folder = tmp_path_factory.mktemp("text")
    write_as_text(raw, folder / "raw")
    preparation = Preparation(shops.config(text_values(folder / "raw", folder / "out")))
    prepare(preparation.config)
    return preparation


def test_text_and_parquet_of_the_same_events_give_the_same_stages(from_text: Preparation, prepared: Path) -> None:
    ours, theirs = shops.bytes_below(from_text.layout.out), shops.bytes_below(prepared)
    names = [n for n in theirs if n.startswith(("interactions", "items", "histories", "catalogue", "queries/items"))]
    assert len(names) > 12 and all(ours[n] == theirs[n] for n in names)
    manifest = json.loads(ours["packed/mixed/manifest.json"])
    assert len(manifest["sources"]) == 2 * len(shops.SHOPS) + 2
    assert all(len(h) == 32 for h in manifest["sources"].values())


def test_a_lost_staged_file_alone_is_read_again_to_the_same_bytes(from_text: Preparation) -> None:
    out = from_text.layout.out
    before = shops.bytes_below(out)
    staged = {p: p.stat().st_mtime_ns for p in sorted(from_text.layout.staged.glob("*"))}
    assert len(staged) == 2 * (2 * len(shops.SHOPS) + 1)  # files and stamps; Parquet stays where it is
    (out / "staged/00003.parquet").unlink()
    (out / "staged/left-over.parquet").write_bytes(b"of an earlier config")
    (out / "stages/ingest.json").unlink()
    (out / "interactions/ingested.parquet").unlink()
    prepare(from_text.config)
    again = {p: p.stat().st_mtime_ns for p in sorted(from_text.layout.staged.glob("*"))}
    assert [p.name for p in staged if staged[p] != again[p]] == ["00003.json", "00003.parquet"]
    assert shops.bytes_below(out) == before and again.keys() == staged.keys()


def test_a_lost_replay_text_is_staged_again(from_text: Preparation) -> None:
    lost = [t for t in from_text.staging.replay["notes"] if not t.is_in_place]
    assert len(lost) == 1
    hidden = lost[0].at.rename(lost[0].at.with_suffix(".hidden"))
    assert "ingest" not in finished_stages(from_text, from_text.stages())
    hidden.rename(lost[0].at)
    assert "ingest" in finished_stages(from_text, from_text.stages())


def test_replay_gives_every_document_cleaned_in_order_and_counts_the_empty_ones(from_text: Preparation) -> None:
    counts = Counts("pack")
    batches = list(replay_texts(from_text.staging.replay_files("notes"), name="notes", counts=counts, n_docs=3))
    assert [t for batch in batches for t in batch] == CLEAN + CLEAN
    assert max(map(len, batches)) <= 3 and all(batches)
    assert counts.by_reason == {  # of the four that stay, twice, all but the last are changed
        "replay notes: documents read": 14, "replay notes: documents dropped: empty": 6,
        "replay notes: documents changed: line ends, control characters, a byte order mark or white space around": 6}


@pytest.mark.parametrize(("raw_text", "text"), [
    ("a\r\nb\rc\u0085d", "a\nb\nc\nd"), ("  indented\n  lines\n", "indented\n  lines"), ("\ufeffx", "x"),
    ("e\u0301 🙂 東京\u00a0!", "e\u0301 🙂 東京\u00a0!")])
def test_a_text_keeps_its_lines_and_letters(raw_text: str, text: str) -> None:
    assert clean_text(raw_text) == text


def test_replay_without_its_column_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; its columns: body, n; correct `text` of replay a"):
        list(replay_texts([(tmp_path / "a.parquet", "text")], name="a", counts=Counts("ingest")))


def test_replay_that_is_no_text_or_damaged_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [b"bytes"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' of type binary is no text; convert it to strings"):
        list(replay_texts([(path, "text")], name="a", counts=Counts("ingest")))
    pq.write_table(pa.table({"text": [str(i) * 9 for i in range(1000)]}), path, compression="zstd")
    torn = bytearray(path.read_bytes())
    torn[60:400] = bytes(340)
    path.write_bytes(torn)
    with pytest.raises(DataError, match=r"a\.parquet: damaged, column 'text' cannot be read to its end: "):
        list(replay_texts([(path, "text")], name="a", counts=Counts("ingest")))


@pytest.mark.parametrize(("replay", "error", "message"), [
    ([{"name": "a", "path": "nowhere.jsonl"}], DataError, "nowhere.jsonl does not exist"),
    ([{"name": "a", "path": __file__}], DataError, "neither Parquet nor JSON lines"),
    ([{"name": "a/b", "path": "x"}], ConfigError, "replay.0.name='a/b'"),
    ([{"name": "a", "path": "x"}, {"name": "a", "path": "y"}], ConfigError, "a named more than once"),
])
def test_replay_that_cannot_be_is_refused_before_anything_is_read(
        raw: Path, tmp_path: Path, replay: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(shops.config(shops.config_values(raw, tmp_path / "out") | {"replay": replay}))
    assert not (tmp_path / "out").exists()


def test_ingest_counts_files_rows_and_what_was_set_aside(raw: Path, tmp_path: Path) -> None:
    write_as_text(raw, tmp_path / "raw")
    books = tmp_path / "raw/books.jsonl.gz"
    books.write_bytes(gzip.compress(gzip.decompress(books.read_bytes()) + b'{"user_id": "|cut'))
    values = text_values(tmp_path / "raw", tmp_path / "out")
    config = shops.config(values | {"ingest": {"max_malformed": 0.0}})
    preparation = Preparation(config)
    with pytest.raises(DataError, match=r"books\.jsonl\.gz: 1 of 1,801 lines read are malformed \(0\.06%\)"):
        prepare(config)
    staged = preparation.staging.tasks[0].at
    made = staged.stat().st_mtime_ns
    ingested = ingest(preparation.engine, preparation.layout, shops.config(values), preparation.staging, Workers(1))
    preparation.close()
    assert staged.stat().st_mtime_ns == made  # the limit is no reason to read it again
    counts = ingested.counts.by_reason
    assert counts["source files read"] == 10 and counts["events"] == 60 * sum(shops.SHOPS.values())
    assert counts[f"{books}: malformed lines set aside"] == 1
    assert any("line 1801: '{\"user_id\": \"|cut'" in reason for reason in counts)
    prepare(shops.config(values))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "malformed line 1801: '{\"user_id\": \"\\|cut'" in report
