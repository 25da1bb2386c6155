"""Text files as tables: delimited text, JSON lines, lines of Python literals; what is malformed is set aside, counted.

reads: one file, streamed, in blocks of 8 MiB. writes: nothing. Keeps a few blocks in memory. No Python runs per line
but for lines that pyarrow refuses and for Python literals; either way the values are the same.
"""

from __future__ import annotations

import ast
import bisect
import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
from pydantic import BaseModel, ConfigDict

from cprec.errors import DataError
from data_prep.mapping import need_columns
from data_prep.sources import PIECE, Field, Reader, broken, empty

N_QUOTED = 5
"""Malformed lines that are quoted, per file."""
QUOTED_CHARS = 120
BY_LINE_BYTES = 1 << 16
"""A piece that pyarrow refuses is cut until it is this small, then read line by line."""
HOPELESS_FROM = 1000
"""Lines after which a file is given up that is mostly malformed so far; it is another format than the config says."""
LINE_LIMIT = 1 << 28
"""A longer line is no line."""
FEWEST_SWALLOWED = 3
"""So many lines inside a quoted value, its first and last apart, show whether they are rows."""
SHARE_SWALLOWED = 0.9
"""Of the lines inside a quoted value: if so many have the delimiters of a row, it has swallowed rows."""
SEPARATOR = "\x1f"
"""Stands for a delimiter of two characters, which pyarrow does not know."""


class Malformed(BaseModel):
    """A line that could not be read: its number from 1, its text, cut, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text!r} ({self.why})"


@dataclass
class Tally:
    """What was met while reading one file."""

    n_lines: int = 0
    n_malformed: int = 0
    first_malformed: list[Malformed] = field(default_factory=list)
    """Those with the smallest numbers, ascending."""
    n_repaired: int = 0
    """Texts with bytes that are no text in the file's encoding, or half a surrogate pair."""
    n_not_numbers: int = 0
    n_inner_lines: int = 0
    """Of delimited text: lines that begin no row, inside a quoted value or blank."""

    def add(self, other: Tally) -> None:
        """Count what `other` did, but for malformed lines."""
        self.n_lines += other.n_lines
        self.n_repaired += other.n_repaired
        self.n_not_numbers += other.n_not_numbers

    def add_swallowed(self, n: int) -> None:
        """Count lines that a malformed row has swallowed by a quote that is not closed: lost, so malformed."""
        self.n_lines += n
        self.n_malformed += n

    def set_aside(self, line: int, text: str, why: str) -> None:
        """Count a malformed line, told in any order; those that come first in the file are kept."""
        self.n_malformed += 1
        if len(self.first_malformed) < N_QUOTED or line < self.first_malformed[-1].line:
            cut = text if len(text) <= QUOTED_CHARS else text[:QUOTED_CHARS] + "..."
            bisect.insort(self.first_malformed, Malformed(line=line, text=cut, why=why), key=lambda m: m.line)
            del self.first_malformed[N_QUOTED:]


def schema_of(reader: Reader) -> pa.Schema:
    """What the tables hold: every field by our name; null where the source has no value or an empty text."""
    return pa.schema([(f.name, pa.float64() if f.kind == "number" else pa.string()) for f in reader.fields])


def read_tables(file: Any, reader: Reader, *, label: str, tally: Tally) -> Iterator[pa.Table]:
    """Yield the rows of an unpacked text file, in its order, as tables of `schema_of(reader)`.

    Raises DataError where it cannot be read at all, lacks a required field, or is mostly malformed.
    """
    tables = READERS[reader.kind](file, reader, label, tally)
    while True:
        try:
            table = next(tables, None)
        except pa.ArrowInvalid as e:
            hint = (f": after {tally.n_lines:,} lines a row of more than {PIECE:,} bytes; is a quote not closed?"
                    if "straddling" in str(e) else "")
            raise DataError(f"{label}: not readable as {reader.kind} text: {e}{hint}; correct the file") from None
        except UnicodeDecodeError as e:
            raise DataError(f"{label} is no {reader.encoding} text: {e}; set the dataset's `encoding`") from None
        except OSError as e:
            raise broken(label, e) from None
        if 2 * tally.n_malformed > tally.n_lines and (table is None or tally.n_lines >= HOPELESS_FROM):
            raise malformed_error(label, tally.n_malformed, tally.n_lines, tally.first_malformed)
        if table is None:
            return
        yield table


def malformed_error(label: str, n_malformed: int, n_lines: int, first: Sequence[Malformed]) -> DataError:
    """The error for a file with too many malformed lines; it quotes the first."""
    quoted = "".join(f"\n  {m}" for m in first)
    return DataError(f"{label}: {n_malformed:,} of {n_lines:,} lines read are malformed ({n_malformed / n_lines:.2%}); "
                     f"repair the file or, if they may be left out, raise ingest.max_malformed{quoted}")


def _delimited(file: Any, reader: Reader, label: str, tally: Tally) -> Iterator[pa.Table]:
    head = file.read(PIECE)
    if not head:
        raise empty(label)
    first_row = 0
    names = list(reader.names or ())
    if not names:
        header, _, head = head.partition(b"\n")
        names, first_row = _header(header, reader), 1
    need_columns(reader, names, source=label)
    if len(set(names)) < len(names):
        raise DataError(f"{label}: two columns have one name: {', '.join(names)}; rename one")
    head = head or file.read(PIECE)
    if not head:
        return

    refused: list[int] = []  # numbers of rows from 1, told ahead of their batches; none of a batch that is done

    def set_aside(row: pa.csv.InvalidRow) -> str:
        refused.append(row.number)
        tally.n_lines += 1
        tally.set_aside(first_row + row.number, row.text, f"{row.actual_columns} columns, not {row.expected_columns}")
        tally.add_swallowed(row.text.count("\n"))
        return "skip"

    two = reader.delimiter if len(reader.delimiter) > 1 else ""
    wanted = list(dict.fromkeys(name for f in reader.fields for name in f.of if name in names))
    looked_at = names if reader.quote else wanted  # an open quote may be in any column
    text = _Joined(head, file, two)
    batches = pyarrow.csv.open_csv(
        pa.PythonFile(text, mode="r"),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=PIECE, column_names=names,
                                             encoding=reader.encoding),  # threads would not know a row's number
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=SEPARATOR if two else reader.delimiter, quote_char=reader.quote or False,
            newlines_in_values=reader.quote is not None, invalid_row_handler=set_aside),
        # as bytes: one that is no text must not cost its whole block
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(looked_at, pa.binary()), include_columns=looked_at,
            strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=True))
    last_number = 0  # of the row before the batch
    for batch in batches:
        tally.n_lines += batch.num_rows
        swallowing = _swallowing(batch, reader.delimiter) if reader.quote else {}
        for place, (value, n_swallowed) in swallowing.items():
            number = first_row + _number_of(place, refused, after=last_number)
            tally.set_aside(number, value, f"a quoted value of {n_swallowed + 1:,} lines: is its quote closed?")
            tally.add_swallowed(n_swallowed)
        last_number = _number_of(batch.num_rows - 1, refused, after=last_number)
        del refused[:bisect.bisect(refused, last_number)]
        if swallowing:
            batch = batch.filter(pa.array(np.isin(np.arange(batch.num_rows), list(swallowing), invert=True)))
        yield _with_our_names(reader, {n: batch[n] for n in wanted}, tally)
    tally.n_inner_lines = text.n_lines - tally.n_lines


def _swallowing(batch: pa.RecordBatch, delimiter: str) -> dict[int, tuple[str, int]]:
    """Rows (places in the batch, which has all columns) with a value that has swallowed others: the value, and how many
    lines begin in it.

    The lines inside have the delimiters of a row each. The last, up to where the next quote closes the value, has at
    least those before the value's own column, or what follows would make the row too long; at the file's end it is
    empty. In fewer than three columns any text could be rows.
    """
    found: dict[int, tuple[str, int]] = {}
    n_delimiters = batch.num_columns - 1
    for place_of_column, column in enumerate(batch.columns if n_delimiters > 1 else []):
        data = column.buffers()[2]
        if data is None or not (np.frombuffer(data, np.uint8) == ord("\n")).any():
            continue
        n_ends, n_met = (pc.fill_null(pc.count_substring(column, text), 0).to_numpy(zero_copy_only=False)
                         for text in ("\n", delimiter))
        could_be = (n_ends > FEWEST_SWALLOWED) & (n_met >= SHARE_SWALLOWED * (n_ends - 1) * n_delimiters)
        for place in np.flatnonzero(could_be).tolist():
            value = column[place].as_py()
            _, *inside, last = (line.count(delimiter.encode()) for line in value.split(b"\n"))
            if (inside.count(n_delimiters) >= SHARE_SWALLOWED * len(inside)
                    and (last >= place_of_column or value.endswith(b"\n"))):
                found[place] = (value.decode(errors="replace"), value.removesuffix(b"\n").count(b"\n"))
    return found


def _number_of(place: int, refused: Sequence[int], *, after: int = 0) -> int:
    """The number, from 1, of the row that is `place` (from 0) among those behind number `after` that are not `refused`
    (numbers behind `after`, ascending).

    _number_of(2, [1, 4]) = 5: of the rows 1 to 5, 2, 3 and 5 are read.
    """
    number = after + place + 1
    for other in refused:
        if other > number:
            break
        number += 1
    return number


def _header(line: bytes, reader: Reader) -> list[str]:
    text = line.removeprefix(b"\xef\xbb\xbf").decode(reader.encoding, errors="replace").rstrip("\r")
    if len(reader.delimiter) > 1:
        names = text.split(reader.delimiter)
    else:
        rows = csv.reader([text], delimiter=reader.delimiter, quotechar=reader.quote,
                          quoting=csv.QUOTE_MINIMAL if reader.quote else csv.QUOTE_NONE)
        names = next(rows, [])
    return [n.partition(":")[0] for n in names] if reader.has_typed_header else names


class _Joined(io.RawIOBase):
    """`head` and then the rest of `file`; a delimiter of `two` characters becomes one."""

    def __init__(self, head: bytes, file: Any, two: str) -> None:
        self._head, self._file, self._two = io.BytesIO(head), file, two.encode()
        self._n_line_ends, self._is_ended = 0, True

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._two:
            return self._read(size)
        piece = self._read(max(size - 16, 1))  # never more than asked for
        while piece.endswith(self._two[:1]) and len(piece) < size and (more := self._read(1)):
            piece += more  # a delimiter may lie over the piece's end
        return piece.replace(self._two, SEPARATOR.encode())

    def _read(self, size: int) -> bytes:
        piece = self._head.read(size) or bytes(self._file.read(size))
        if piece:
            self._n_line_ends += piece.count(b"\n")
            self._is_ended = piece.endswith(b"\n")
        return piece

    @property
    def n_lines(self) -> int:
        """Lines read so far."""
        return self._n_line_ends + (not self._is_ended)


Types = dict[str, pa.DataType]
"""Arrow types of the JSON fields that are wanted, by their names in the source."""


def _json(file: Any, reader: Reader, label: str, tally: Tally) -> Iterator[pa.Table]:
    types: Types = {}
    for line, block in _blocks(file, label):
        if not types:
            values = _sample(block, json.loads)
            if values:
                need_columns(reader, sorted({key for v in values for key in v}), source=label)
            types = _types(values, reader)
        yield from _json_tables(block, line, types, reader, tally)


def _json_tables(block: bytes, line: int, types: Types, reader: Reader, tally: Tally) -> Iterator[pa.Table]:
    """The block's rows by pyarrow; where it refuses, those of ever smaller pieces, at last line by line."""
    counted = Tally()
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block), parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore"))
        if table.num_rows != _n_filled(block):  # two objects on one line, or one on two, are no JSON lines
            raise pa.ArrowInvalid("objects and lines differ")
        made = _with_our_names(reader, {n: table[n] for n in table.column_names}, counted)
    except pa.ArrowInvalid:
        if len(block) <= BY_LINE_BYTES or b"\n" not in block[:-1]:
            yield _by_line(block, line, json.loads, reader, tally)
            return
        for start, piece in _pieces(block):
            yield from _json_tables(piece, line + start, _types(_sample(piece, json.loads), reader), reader, tally)
        return
    counted.n_lines = table.num_rows
    tally.add(counted)
    yield made


def _n_filled(block: bytes) -> int:
    """Lines of the block that are not blank; quickly, where all begin with an object's brace, as they mostly do."""
    characters = np.frombuffer(block, np.uint8)
    starts = np.flatnonzero(characters[:-1] == ord("\n")) + 1
    if block.startswith(b"{") and bool((characters[starts] == ord("{")).all()):
        return len(starts) + 1
    return sum(1 for line in block.split(b"\n") if line.strip())


def _python(file: Any, reader: Reader, label: str, tally: Tally) -> Iterator[pa.Table]:
    is_first = True
    for line, block in _blocks(file, label):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\/" in a literal: kept as it is, as Python does
            if is_first and (values := _sample(block, ast.literal_eval)):
                need_columns(reader, sorted({key for v in values for key in v}), source=label)
            is_first = False
            yield _by_line(block, line, ast.literal_eval, reader, tally)


READERS: dict[str, Callable[[Any, Reader, str, Tally], Iterator[pa.Table]]] = {
    "delimited": _delimited, "json": _json, "python": _python}


def _blocks(file: Any, label: str) -> Iterator[tuple[int, bytes]]:
    """(number of the first line from 1, whole lines) of the file, a piece at a time. DataError when it is empty."""
    line, rest, n_bytes = 1, b"", 0
    while piece := file.read(PIECE):
        n_bytes += len(piece)
        head, newline, tail = piece.rpartition(b"\n")
        if not newline:
            rest += piece
            if len(rest) > LINE_LIMIT:
                raise DataError(f"{label}: line {line:,} is longer than {LINE_LIMIT:,} bytes; the file has no lines")
            continue
        block = b"".join((rest, head, newline))
        yield line, block
        line, rest = line + block.count(b"\n"), tail
    if not n_bytes:
        raise empty(label)
    if rest.strip():
        yield line, rest


def _pieces(block: bytes, n: int = 8) -> Iterator[tuple[int, bytes]]:
    """(lines before it, whole lines) of up to about `n` pieces of a block of two lines or more; at least two."""
    start = line = 0
    while start < len(block):
        end = block.find(b"\n", min(start + len(block) // n, len(block) - 1)) + 1 or len(block)
        if end - start == len(block):  # short lines and then a long one, which is a piece of its own
            end = block.rfind(b"\n", 0, len(block) - 1) + 1
        yield line, block[start:end]
        line += block.count(b"\n", start, end)
        start = end


def _sample(block: bytes, parse: Callable[[str], Any], n: int = 1000) -> list[dict[str, Any]]:
    """The objects of the block's first `n` lines."""
    found = []
    for text in block[:PIECE // 8].split(b"\n")[:n]:
        try:
            value = parse(text.decode("utf-8-sig"))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _types(values: list[dict[str, Any]], reader: Reader) -> Types:
    """The type in which pyarrow is to read each field: by the first value met; rows that differ go line by line."""
    types: Types = {}
    for f in reader.fields:
        for name in f.of:
            first = next((v[name] for v in values if v.get(name) not in (None, [])), None)
            if f.kind == "number":
                types[name] = pa.string() if isinstance(first, str) else pa.float64()
            elif f.kind == "path":
                types[name] = pa.string() if isinstance(first, str) else pa.list_(pa.string())
            else:
                types[name] = pa.int64() if type(first) is int else pa.string()
    return types


def _by_line(block: bytes, line: int, parse: Callable[[str], Any], reader: Reader, tally: Tally) -> pa.Table:
    columns: dict[str, list[Any]] = {f.name: [] for f in reader.fields}
    for number, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), line):
        if not raw.strip():
            continue
        tally.n_lines += 1
        try:
            value = parse(raw.decode("utf-8-sig").strip())
            if not isinstance(value, dict):
                raise ValueError("it is no object")
        except (ValueError, SyntaxError, MemoryError, RecursionError) as e:
            tally.set_aside(number, raw.decode(errors="replace").strip(), str(e).splitlines()[0] if str(e) else "")
            continue
        for f in reader.fields:
            made = (_value(value.get(name), f, tally) for name in f.of)
            columns[f.name].append(next((v for v in made if v is not None), None))
    schema = schema_of(reader)
    return pa.table([_text_array(columns[n], tally) if t == pa.string() else pa.array(columns[n], t)
                     for n, t in zip(schema.names, schema.types, strict=True)], schema=schema)


def _value(value: Any, f: Field, tally: Tally) -> Any:
    """One value of a line as the field's kind; null where there is none, or no number."""
    if value is None or value == "":
        return None
    if f.kind == "number":
        return _number(value, tally)
    if f.kind == "path" and isinstance(value, list):
        inner = value[0] if value and isinstance(value[0], list) else value  # of several paths the first
        return " > ".join(str(part) for part in inner if part not in (None, "")) or None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any, tally: Tally) -> float | None:
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError("no number")
        return float(value)
    except (ValueError, TypeError, OverflowError):
        tally.n_not_numbers += 1
        return None


def _text_array(values: list[str | None], tally: Tally) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # half a surrogate pair, as "\ud83d" in JSON
        whole = [None if v is None else v.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                 for v in values]
        tally.n_repaired += sum(a != b for a, b in zip(values, whole, strict=True))
        return pa.array(whole, pa.string())


def _with_our_names(reader: Reader, found: dict[str, Any], tally: Tally) -> pa.Table:
    """The columns as `schema_of(reader)`. Raises ArrowInvalid for JSON text that only `_by_line` can read."""
    n_rows = len(next(iter(found.values()))) if found else 0
    columns = []
    for f in reader.fields:
        made = [_column(found[name], f, reader, tally) for name in f.of if name in found]
        missing = pa.nulls(n_rows, pa.float64() if f.kind == "number" else pa.string())
        columns.append(pc.coalesce(*made) if len(made) > 1 else made[0] if made else missing)
    return pa.table(columns, schema=schema_of(reader))


def _column(values: Any, f: Field, reader: Reader, tally: Tally) -> Any:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_floating(values.type):
        return values
    if pa.types.is_list(values.type):
        parts = pc.list_flatten(values)
        if parts.null_count or (len(parts) and pc.any(pc.equal(parts, "")).as_py()):
            raise pa.ArrowInvalid("a path with gaps")
        values = pc.binary_join(values, " > ")
    if pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    text = _decoded(values, reader, tally) if pa.types.is_binary(values.type) else values.view(pa.binary()).cast(
        pa.string())  # pyarrow's JSON does not look whether a text is UTF-8; the cast does
    text = pc.replace_with_mask(text, pc.equal(text, ""), pa.scalar(None, pa.string())) if _has_empty(text) else text
    return _numbers(text, tally) if f.kind == "number" else text


def _has_empty(text: Any) -> bool:
    return bool(pc.any(pc.equal(text, "")).as_py())


def _decoded(values: Any, reader: Reader, tally: Tally) -> Any:
    """Bytes as text: as UTF-8 or, one by one where that fails, in the fallback encoding."""
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        for raw in values.to_pylist():
            try:
                texts.append(None if raw is None else raw.decode())
            except UnicodeDecodeError:
                tally.n_repaired += 1
                texts.append(raw.decode(reader.fallback) if reader.fallback else raw.decode(errors="replace"))
        return pa.array(texts, pa.string())


def _numbers(text: Any, tally: Tally) -> Any:
    try:
        return pc.utf8_trim_whitespace(text).cast(pa.float64())
    except pa.ArrowInvalid:
        found = [None if t is None else _number(t, tally) for t in text.to_pylist()]
        return pa.array(found, pa.float64())
