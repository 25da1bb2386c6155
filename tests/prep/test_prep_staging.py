"""Sources and staging: paths of every kind, packed or not; malformed lines; restarts; the same values either way."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep.readers as readers
from cprec.errors import DataError
from cprec.format import file_hash
from data_prep.records import Counts
from data_prep.sources import Field, Input, Reader, Source, beside, find, first_lines
from data_prep.staging import Staged, count_staged, sample, stage, stage_all, tasks_of
from data_prep.workers import Workers

FIELDS = (Field(name="user_id", of=("user", "reviewer")), Field(name="item_id", of=("item",)),
          Field(name="timestamp", of=("t",), kind="number"),
          Field(name="category", of=("cat", "main_cat"), kind="path", is_required=False))
JSON = Reader(kind="json", fields=FIELDS)
PYTHON = Reader(kind="python", fields=FIELDS)
CSV = Reader(kind="delimited", fields=FIELDS, quote='"')
ROW = {"user_id": "u", "item_id": "x", "timestamp": 5.0, "category": None}


def staged(tmp_path: Path, source: Path | Source, reader: Reader) -> tuple[list[dict[str, Any]], Staged]:
    """The rows and the stamp of one staged file."""
    source = source if isinstance(source, Source) else Source(source.name, str(source))
    [task] = tasks_of([Input(source, reader)], tmp_path / "staged")
    stamp = stage(task)
    return pq.read_table(task.parquet).to_pylist(), stamp


def packed(text: str | bytes, name: str) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    codec = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    return raw if codec is None else gzip.compress(raw) if codec == "gzip" else pa.compress(raw, codec, asbytes=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_source_is_read_whatever_it_is_packed_in_and_hashed_as_stored(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(packed('{"user": "u", "item": "x", "t": 5}\n' * 3, name))
    rows, stamp = staged(tmp_path, tmp_path / name, JSON)
    assert rows == [ROW] * 3 and (stamp.n_rows, stamp.n_lines, stamp.n_malformed) == (3, 3, 0)
    assert stamp.hash == file_hash(tmp_path / name)


VALUES = [  # line, user_id, item_id, timestamp, category
    ('{"user": "u", "item": "x", "t": 5, "z": {"deep": [1, "a", null]}}', "u", "x", 5.0, None),
    ('{"user": null, "reviewer": "r", "item": "x", "t": null}', "r", "x", None, None),  # the first with a value
    ('{"user": "", "reviewer": "r", "item": "", "t": -1.5}', "r", None, -1.5, None),  # an empty text is none
    ('{"user": 12, "item": 9007199254740993, "t": 1529193600000}', "12", "9007199254740993", 1529193600000.0, None),
    ('{"user": 1.0, "item": true, "t": " 7 "}', "1.0", "true", 7.0, None),
    ('{"user": "u", "item": "x", "t": "soon"}', "u", "x", None, None),
    ('{"user": "u", "item": "x", "t": NaN}', "u", "x", float("nan"), None),
    ('{"user": "u", "item": "x", "t": 1, "cat": ["A", "B"], "main_cat": "M"}', "u", "x", 1.0, "A > B"),
    ('{"user": "u", "item": "x", "t": 1, "cat": [], "main_cat": "M"}', "u", "x", 1.0, "M"),
    ('{"user": "u", "item": "x", "t": 1, "cat": [["A", "B"], ["C"]]}', "u", "x", 1.0, "A > B"),
    ('{"user": "u", "item": "x", "t": 1, "cat": ["A", null, "", "B"]}', "u", "x", 1.0, "A > B"),
    ('{"user": "u", "item": "caf\\u00e9 \\ud83d\\ude42", "t": 1}', "u", "café 🙂", 1.0, None),
    ('{"user": "u", "item": "half \\ud83d", "t": 1}', "u", "half \ufffd", 1.0, None),
    ('{"user": "a", "user": "b", "item": "x", "t": 1}', "b", "x", 1.0, None),  # the last of two, as in Python
]


@pytest.mark.parametrize("others", [0, 3000])
@pytest.mark.parametrize("line", VALUES)
def test_a_json_value_is_the_same_alone_and_among_lines_of_another_kind(
        tmp_path: Path, line: tuple[Any, ...], others: int) -> None:
    usual = '{"user": "u", "item": "x", "t": 5}\n' * others
    (tmp_path / "a.json").write_text(f"{usual}{line[0]}\n{usual}")
    rows, stamp = staged(tmp_path, tmp_path / "a.json", JSON)
    assert len(rows) == stamp.n_lines == 2 * others + 1
    np.testing.assert_equal(list(rows[others].values()), list(line[1:]))
    assert all(row == ROW for row in rows[:others] + rows[others + 1:])
    assert stamp.n_repaired == ("half" in line[0]) and stamp.n_not_numbers == ("soon" in line[0])


ANY = st.one_of(st.none(), st.booleans(), st.integers(-10**20, 10**20), st.floats(), st.text(max_size=6),
                st.sampled_from(["7", " 1e3 ", "1_0", ""]),
                st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=3),
                st.dictionaries(st.text(max_size=2), st.integers(), max_size=2))
OBJECTS = st.dictionaries(st.sampled_from(["user", "reviewer", "item", "t", "cat", "main_cat", "other"]), ANY)


@settings(max_examples=300)
@given(objects=st.lists(OBJECTS, min_size=1, max_size=30), is_ascii=st.booleans())
def test_pyarrow_and_python_read_the_same_values_from_any_objects(
        objects: list[dict[str, Any]], is_ascii: bool) -> None:
    reader = JSON.model_copy(update={"fields": tuple(f.model_copy(update={"is_required": False}) for f in FIELDS)})
    lines = [json.dumps(o, ensure_ascii=is_ascii) for o in objects]
    block = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    tally, by_line = readers.Tally(), readers.Tally()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BY_LINE_BYTES", 200)  # pieces of a few lines by pyarrow, the rest line by line
        made = pa.concat_tables(readers.read_tables(io.BytesIO(block), reader, label="x", tally=tally))
    line_by_line = readers._by_line(block, 1, json.loads, reader, by_line)
    np.testing.assert_equal(made.to_pylist(), line_by_line.to_pylist())
    assert (tally.n_lines, tally.n_repaired, tally.n_not_numbers) == (len(objects), 0, by_line.n_not_numbers)


@pytest.mark.parametrize("bad", [
    '{"user": "u", "item": "x"', "nonsense", "[1, 2]", "5", '{"user": "u"} {"user": "v"}', '{"user": "\xff"}', "\x00"])
def test_a_malformed_line_is_set_aside_and_quoted_with_its_number_and_no_other_is_lost(
        tmp_path: Path, bad: str) -> None:
    usual = [f'{{"user": "u", "item": "{i}", "t": 5}}' for i in range(4000)]
    lines = [*usual[:2500], "", bad, *usual[2500:]]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress("\n".join(lines).encode("latin-1")))  # no newline at the end
    rows, stamp = staged(tmp_path, tmp_path / "a.json.gz", JSON)
    assert [r["item_id"] for r in rows] == [str(i) for i in range(4000)]
    assert (stamp.n_lines, stamp.n_malformed) == (4001, 1)
    assert stamp.first_malformed[0].line == 2502
    assert stamp.first_malformed[0].text == bad.encode("latin-1").decode(errors="replace")


def test_long_malformed_lines_are_set_aside_too(tmp_path: Path) -> None:
    good, long = b'{"user": "u", "item": "x", "t": 5}\n', b'{"user": "' + b"x" * 200_000
    for lines in ([good, good, long], [good, long + b"\n", good], [long + b"\n"] + [good] * 2):
        (tmp_path / "a.json").write_bytes(b"".join(lines))
        rows, stamp = staged(tmp_path, tmp_path / "a.json", JSON)
        assert len(rows) == 2 and stamp.n_malformed == 1 and len(stamp.first_malformed[0].text) < 200


def test_an_object_over_two_lines_is_two_malformed_lines(tmp_path: Path) -> None:
    usual = '{"user": "u", "item": "x", "t": 5}\n' * 9
    (tmp_path / "a.json").write_text(usual + '{"user": "u",\n "item": "x", "t": 5}\n')
    rows, stamp = staged(tmp_path, tmp_path / "a.json", JSON)
    assert len(rows) == 9 and [m.line for m in stamp.first_malformed] == [10, 11]


def test_lines_longer_than_a_block_and_borders_of_blocks_lose_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"user": "u" * n, "item": str(n), "t": n}) for n in (1, 5000, 2, 70, 300, 4)]
    (tmp_path / "a.json").write_text("\n".join(lines) + "\n")
    for piece in (7, 64, 4096):
        monkeypatch.setattr(readers, "PIECE", piece)
        rows, _ = staged(tmp_path / str(piece), tmp_path / "a.json", JSON)
        assert [(len(r["user_id"]), r["item_id"], r["timestamp"]) for r in rows] == [
            (n, str(n), float(n)) for n in (1, 5000, 2, 70, 300, 4)]


def test_python_literals_are_read_as_data_never_run(tmp_path: Path) -> None:
    lines = ["{'user': 'u', 'item': \"it's\", 't': 5, 'cat': [['A', 'B']]}", "{'user': print('run'), 'item': 'x'}",
             "{'user': 'u', 'item': 'a\\/b', 't': None}", "'user'", "(" * 2000]
    (tmp_path / "meta.json").write_text("\n".join(lines * 1 + lines[:1] * 3))
    rows, stamp = staged(tmp_path, tmp_path / "meta.json", PYTHON)
    first = {"user_id": "u", "item_id": "it's", "timestamp": 5.0, "category": "A > B"}
    assert rows == [first, {**ROW, "item_id": "a\\/b", "timestamp": None}, *[first] * 3]
    assert ast.literal_eval(lines[0])["cat"] == [["A", "B"]]
    assert [m.line for m in stamp.first_malformed] == [2, 4, 5]


def test_delimited_text_with_quotes_blank_lines_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfuser,item,t,cat,other\r\nu,"a ""b"", c",5,A,1\r\n\r\n'
                                     b'u,"two\nlines",,,2\n'
                                     b"u,x,5\nu,caf\xe9,soon,,3\nu,x,5,A,4,9\n\"\",5\" pipe, 6 ,,7\n")
    rows, stamp = staged(tmp_path, tmp_path / "a.csv", CSV)
    assert [tuple(r.values()) for r in rows] == [
        ("u", 'a "b", c', 5.0, "A"), ("u", "two\nlines", None, None), ("u", "caf\ufffd", None, None),
        (None, '5" pipe', 6.0, None)]
    assert (stamp.n_lines, stamp.n_malformed, stamp.n_repaired, stamp.n_not_numbers) == (6, 2, 1, 1)
    assert stamp.n_inner_lines == 2  # one blank, one inside a value
    assert [(m.text, m.why) for m in stamp.first_malformed] == [("u,x,5", "3 columns, not 5"),
                                                                ("u,x,5,A,4,9", "6 columns, not 5")]


def test_lines_that_an_open_quote_swallows_are_counted_each(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,t\n" + "u,x,5\n" * 90 + 'u,"x,5\n' + "u,x,5\n" * 9)
    with pytest.raises(DataError, match="100 lines read are malformed"):
        count_staged([staged(tmp_path, tmp_path / "a.csv", CSV)[1]], Counts("ingest"), max_malformed=0.05)
    (tmp_path / "b.csv").write_text("user,item,t,note\n" + "u,x,5,\n" * 90 + 'u,x,5,"x\n' + "u,x,5,\n" * 9)
    with pytest.raises(DataError, match="10 of 100 lines read are malformed"):
        count_staged([staged(tmp_path, tmp_path / "b.csv", CSV)[1]], Counts("ingest"), max_malformed=0.05)


def test_rows_that_a_quote_swallows_up_to_the_next_quoted_value_are_malformed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,t,note\n" + 'u,x,5,"n\n' + "u,x,5,\n" * 15 + 'u,x,5,"fine"\n'
                                    + "u,x,5,\n" * 900)
    rows, stamp = staged(tmp_path, tmp_path / "a.csv", CSV)
    assert len(rows) == 900 and (stamp.n_lines, stamp.n_malformed, stamp.n_inner_lines) == (917, 17, 0)


def test_the_malformed_lines_that_are_quoted_are_the_first_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,t,note\n" + "u,x,5,\n" * 10_000 + 'u,x,5,"note\n' + "u,x,5,\n" * 50
                                    + 'u,x,5,"\n' + "u,x\n" * 5 + "u,x,5,\n" * 10_000)
    _, stamp = staged(tmp_path, tmp_path / "a.csv", CSV)  # short rows are told ahead of the rest of their block
    assert stamp.n_malformed == 57
    assert [m.line for m in stamp.first_malformed] == [10_002, 10_003, 10_004, 10_005, 10_006]


def test_numbers_of_rows_count_those_that_were_refused_blocks_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = 'u,x,5,"note\n' + "u,x,5,\n" * 20 + 'u,x,5,"\n'
    (tmp_path / "a.csv").write_text("user,item,t,note\n" + ("u,x,5,\n" * 99 + "u,x\n") * 3 + ("u,x,5,\n" * 99 + opened))
    for piece in (256, 1 << 20):
        monkeypatch.setattr(readers, "PIECE", piece)
        _, stamp = staged(tmp_path / str(piece), tmp_path / "a.csv", CSV)
        assert [m.line for m in stamp.first_malformed] == [101, 201, 301, 401]


@pytest.mark.parametrize("column", ["t", "note"])  # one that is read, and one that is not
def test_rows_inside_a_quoted_value_stop_a_run_that_names_where_they_begin(tmp_path: Path, column: str) -> None:
    opened = {"t": 'u,x,"5,\n', "note": 'u,x,5,"note\n'}[column]
    closed = {"t": 'u,x,5",\n', "note": 'u,x,5,"\n'}[column]
    (tmp_path / "a.csv").write_text("user,item,t,note\nu,x\n" + "u,x,5,\n" * 40_000 + opened + "u,x,5,\n" * 50 + closed
                                    + "u,x,5,\n" * 9 + "u,x\n")
    rows, stamp = staged(tmp_path, tmp_path / "a.csv", CSV)
    assert len(rows) == 40_009 and (stamp.n_lines, stamp.n_malformed, stamp.n_inner_lines) == (40_063, 54, 0)
    assert [m.line for m in stamp.first_malformed] == [2, 40_003, 40_013]  # rows are numbered, not lines
    with pytest.raises(DataError, match=r"a\.csv: 54 of 40,063 lines.*malformed") as e:
        count_staged([stamp], Counts("ingest"), max_malformed=0.001)
    assert "line 40003: " in str(e.value) and "a quoted value of 52 lines: is its quote closed?" in str(e.value)


@pytest.mark.parametrize(("header", "row"), [
    ("user,item,t,note", 'u,x,5,"{}"'), ("user,item,t,note", 'u,"{}",5,'), ("item,note", 'x,"{}"'), ("note", '"{}"')])
@pytest.mark.parametrize("line", ["It fits, it is light.\n", "Roses, red\n", "Plain\n"])
def test_long_texts_of_many_lines_are_values_like_any_other(tmp_path: Path, header: str, row: str, line: str) -> None:
    fields = tuple(Field(name=name, of=(name,)) for name in header.split(","))
    text = line * 60
    (tmp_path / "a.csv").write_text(f"{header}\n" + row.format(text) + "\n" + row.format("short") + "\n")
    rows, stamp = staged(tmp_path, tmp_path / "a.csv", Reader(kind="delimited", fields=fields, quote='"'))
    assert text in rows[0].values() and len(rows) == 2
    assert (stamp.n_lines, stamp.n_malformed, stamp.n_inner_lines) == (2, 0, 60)


@pytest.mark.parametrize("text", [
    "One, two, three.\n" * 2 + "Four.",  # too few lines to tell
    "One, two, three.\n" * 30 + "Four, five."])  # the rest of a row closed there would be a fourth column
def test_texts_whose_lines_look_like_rows_are_values_where_no_row_could_go_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(f'user,item,note\nu,x,"{text}"\nu,x,short\n')
    rows, stamp = staged(tmp_path, tmp_path / "a.csv", Reader(kind="delimited", fields=FIELDS[:2], quote='"'))
    assert len(rows) == 2 and stamp.n_malformed == 0


def test_a_delimiter_of_two_characters_and_text_that_is_latin_1(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(kind="delimited", fields=FIELDS[:2], delimiter="::", names=("item", "user", "genres"),
                    fallback="latin-1")
    text = "1::Am\xe9lie: 2001::A|B\n2::caf\u00e9 ok::\n3::\"Q\" (x)::C\n"
    (tmp_path / "m.dat").write_bytes(text.replace("caf\u00e9", "caf\u00c3\u00a9").encode("latin-1") * 40)
    for piece in (128, 300, 1 << 20):
        monkeypatch.setattr(readers, "PIECE", piece)
        rows, stamp = staged(tmp_path / str(piece), tmp_path / "m.dat", reader)
        assert [(r["item_id"], r["user_id"]) for r in rows] == [
            ("1", "Amélie: 2001"), ("2", "café ok"), ("3", '"Q" (x)')] * 40
        assert stamp.n_repaired == 40 and stamp.n_malformed == 0


def test_an_encoding_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("user,item,t\nu,5 €,1\n".encode("cp1252"))
    rows, _ = staged(tmp_path, tmp_path / "a.csv", CSV.model_copy(update={"encoding": "cp1252"}))
    assert rows == [{**ROW, "item_id": "5 €", "timestamp": 1.0}]
    with pytest.raises(DataError, match=r"a\.csv is no utf-8-sig text.*set the dataset's `encoding`"):
        staged(tmp_path, tmp_path / "a.csv", CSV.model_copy(update={"encoding": "utf-8-sig"}))


@pytest.mark.parametrize(("name", "data", "reader", "message"), [
    ("a.csv", b"usr,item,t\n", CSV, r"a\.csv has no column 'user' or 'reviewer' \(for user_id\); did you mean 'usr'"),
    ("a.csv", b"", CSV, r"a\.csv is empty"),
    ("a.csv", b"user,item,t,user\n", CSV, "two columns have one name"),
    ("a.json", b'{"user": "u", "itm": 1, "t": 1}\n', JSON, r"a\.json has no column 'item'.*did you mean 'itm'"),
    ("a.json", b"{'user': 'u'}\n" * 9, JSON, r"a\.json: 9 of 9 lines read are malformed \(100\.00%\)"),
    ("a.json.gz", gzip.compress(b'{"user": "u", "item": "x", "t": 1}\n' * 999)[:-9], JSON,
     r"a\.json\.gz: broken, its compressed data end early or are damaged"),
    ("a.json.gz", b"no gzip at all", JSON, r"a\.json\.gz: broken"),
    ("a.csv.zst", pa.compress(b"user,item,t\n" * 999, "zstd", asbytes=True)[:-9], CSV, r"a\.csv\.zst: broken"),
])
def test_a_file_that_cannot_be_read_is_one_clear_error(
        tmp_path: Path, name: str, data: bytes, reader: Reader, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        staged(tmp_path, tmp_path / name, reader)
    assert not list((tmp_path / "staged").glob("*.json"))  # it is not taken for staged by the next start


def test_a_run_stops_when_more_lines_than_allowed_are_malformed_naming_file_share_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"user": "u", "item": "x", "t": 5}\n' * 99 + "nonsense " * 99 + "\n")
    _, stamp = staged(tmp_path, tmp_path / "a.json", JSON)
    with pytest.raises(DataError) as e:
        count_staged([stamp], Counts("ingest"), max_malformed=0.009)
    for part in ("a.json: 1 of 100 lines read are malformed (1.00%)", "raise ingest.max_malformed",
                 "line 100: 'nonsense nonsense", "..."):
        assert part in str(e.value)
    counts = Counts("ingest")
    count_staged([stamp], counts, max_malformed=0.01)
    quoted = [reason for reason in counts.by_reason if "line 100" in reason]
    assert counts.by_reason["a.json: malformed lines set aside"] == len(quoted) == 1


def test_only_a_file_that_is_missing_or_has_changed_is_staged_again_to_the_same_bytes(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.json.gz").write_bytes(gzip.compress(f'{{"user": "{n}", "item": "x", "t": 5}}\n'.encode()))
    inputs = [Input(s, JSON) for s in find(f"{tmp_path}/*.json.gz")]
    tasks = tasks_of(inputs, tmp_path / "staged")

    def state() -> list[tuple[int, bytes, bytes]]:
        return [(t.at.stat().st_ino, t.at.read_bytes(), t.stamp.read_bytes()) for t in tasks]

    stage_all(tasks, Workers(1))
    before = state()
    tasks[1].at.unlink()
    (tmp_path / "hold").write_bytes(b"")  # may take the freed inode number
    stage_all(tasks, Workers(1))
    after = state()
    assert [a[0] == b[0] for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert [a[1:] for a in before] == [a[1:] for a in after]
    (tmp_path / "2.json.gz").write_bytes(gzip.compress(b'{"user": "9", "item": "x", "t": 5}\n'))
    assert stage_all(tasks, Workers(1))[2].hash == file_hash(tmp_path / "2.json.gz")
    assert pq.read_table(tasks[2].at)["user_id"].to_pylist() == ["9"]
    other = tasks_of([Input(i.source, PYTHON) for i in inputs], tmp_path / "staged")
    assert stage(other[0]).reader == PYTHON  # another reader: read again


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for n in range(3):
        lines = [f'{{"user": "{n}", "item": "{i}", "t": {i}}}\n' for i in range(999)]
        (tmp_path / f"{n}.json").write_text("".join(lines))
    written = []
    for n in (1, 2):
        tasks = tasks_of([Input(s, JSON) for s in find(str(tmp_path), (".json",))], tmp_path / f"by{n}")
        workers = Workers(n)
        stage_all(tasks, workers)
        workers.close()
        written.append([(t.at.read_bytes(), t.stamp.read_bytes()) for t in tasks])
    assert written[0] == written[1]


def test_folders_globs_and_hidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("raw")
    for name in ("b.csv.gz", "a.csv", ".c.csv", "d.txt"):
        Path("raw", name).write_text("x")
    assert [s.label for s in find("raw", (".csv",))] == ["raw/a.csv", "raw/b.csv.gz"]
    assert [s.label for s in find("raw/*.csv*")] == ["raw/a.csv", "raw/b.csv.gz"]
    assert [s.label for s in find("raw/**/d*")] == ["raw/d.txt"]
    assert find("raw/a.csv")[0].n_bytes == 1 and find("raw/b.csv.gz")[0].suffix == ".csv"
    assert beside(find("raw/a.csv")[0], "b.csv").place.endswith("raw/b.csv.gz")


@pytest.mark.parametrize(("path", "message"), [
    ("no/such.csv", "does not exist; give an existing file"),
    ("no/*.csv", "matches no file"),
    ("s4://bucket/x.csv", "no storage is called s4://; known: .*s3"),
    ("memory://nowhere/x.csv", "no file, nor a folder or glob"),
    ("memory://nowhere/*.csv", "no file, nor a folder or glob"),
    ("package:no-such-package/x", "pip install --no-deps no-such-package"),
])
def test_a_path_that_means_nothing_is_one_clear_error(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(path)


@pytest.mark.skipif("gcsfs" in {d.name.lower() for d in __import__("importlib.metadata").metadata.distributions()},
                    reason="the package gcsfs is installed")
def test_a_url_of_a_storage_whose_package_is_missing_says_what_to_install() -> None:
    with pytest.raises(DataError, match=r"gs://b/x\.csv: .*run: pip install 'cprec\[gcs\]'"):
        find("gs://b/x.csv")


def test_a_url_is_streamed_hashed_and_kept_while_its_store_says_it_is_the_same(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/shop/1.jsonl.gz", gzip.compress(b'{"user": "u", "item": "x", "t": 5}\n' * 3))
    store.pipe("/shop/2.jsonl", b'{"user": "v", "item": "x", "t": 5}\n')
    found = find("memory://shop", (".jsonl",))
    assert [s.label for s in found] == ["memory:///shop/1.jsonl.gz", "memory:///shop/2.jsonl"]
    assert find("memory://shop/*.jsonl") == found[1:]
    assert first_lines(found[1]) == [b'{"user": "v", "item": "x", "t": 5}']
    rows, stamp = staged(tmp_path, found[0], JSON)
    (tmp_path / "1.gz").write_bytes(store.cat("/shop/1.jsonl.gz"))
    assert rows == [ROW] * 3 and stamp.hash == file_hash(tmp_path / "1.gz")
    inode = (tmp_path / "staged/00000.parquet").stat().st_ino
    assert staged(tmp_path, found[0], JSON)[1] == stamp
    assert (tmp_path / "staged/00000.parquet").stat().st_ino == inode
    store.pipe("/shop/1.jsonl.gz", gzip.compress(b'{"user": "w", "item": "x", "t": 5}\n'))
    assert staged(tmp_path, found[0], JSON)[0] == [{**ROW, "user_id": "w"}]


class Web(MemoryFileSystem):
    """As fsspec's own `http`: the key of a file is its address, and `info` holds what the server sends."""

    headers: ClassVar[dict[str, str]] = {}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {**super().info(path, **kwargs), **self.headers}

    def ukey(self, path: str) -> str:
        return path


@pytest.mark.parametrize(("before", "after"), [
    ({"ETag": "1"}, {"ETag": "2"}), ({"Last-Modified": "Mon"}, {"Last-Modified": "Tue"}), ({}, {})])
def test_a_file_that_changed_on_a_web_server_is_read_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]) -> None:
    monkeypatch.setattr("data_prep.sources._filesystem", lambda url: (Web(), "/web/a.jsonl"))
    store, line = Web(), b'{"user": "%s", "item": "x", "t": 5}\n'
    monkeypatch.setattr(Web, "headers", before)
    store.pipe("/web/a.jsonl", line % b"u")
    source = Source("https://web/a.jsonl", "https://web/a.jsonl")
    assert staged(tmp_path, source, JSON)[0] == [ROW]
    made = (tmp_path / "staged/00000.parquet").stat().st_ino
    assert staged(tmp_path, source, JSON)[0] == [ROW]
    assert (tmp_path / "staged/00000.parquet").stat().st_ino == made  # without a mark, for its hash is the same
    monkeypatch.setattr(Web, "headers", after)
    store.pipe("/web/a.jsonl", line % b"v")  # as long as before
    assert staged(tmp_path, source, JSON)[0] == [{**ROW, "user_id": "v"}]


def test_parquet_at_a_url_is_copied_whole_and_local_parquet_is_left_where_it_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "x.parquet")
    reader = Reader(kind="parquet", fields=(Field(name="item_id", of=("a",)),))
    fsspec.filesystem("memory").pipe("/p/x.parquet", (tmp_path / "x.parquet").read_bytes())
    rows, stamp = staged(tmp_path, find("memory://p/x.parquet")[0], reader)
    assert rows == [{"a": 1, "b": 2}] and stamp.hash == file_hash(tmp_path / "x.parquet")
    (tmp_path / "staged/00000.parquet").unlink()
    [task] = tasks_of([Input(find(str(tmp_path / "x.parquet"))[0], reader)], tmp_path / "staged")
    assert stage(task).hash == stamp.hash and task.parquet == tmp_path / "x.parquet" and not task.at.exists()


def test_a_sample_is_the_first_rows_under_our_names_or_all_of_a_short_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"user": "u", "item": "x", "t": 5}\n' * 30)
    found = sample(Input(find(str(tmp_path / "a.json"))[0], JSON), n_rows=7)
    assert found.table.to_pylist() == [ROW] * 30 and found.is_whole and found.tally.n_lines == 30
    found = sample(Input(find(str(tmp_path / "a.json"))[0], JSON), n_rows=3)  # ten times as many: not looked at wholly
    assert found.table.to_pylist() == [ROW] * 3 and not found.is_whole
