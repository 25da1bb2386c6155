"""What the stages ask of a relational engine, and the one way in which tables become files.

reads: Parquet. writes: Parquet with a fixed row order, row-group size and writer, so that the same rows give the same
bytes on every engine and with any number of threads. Both engines (`data_prep.engines`) work out of core: memory stays
below a limit, the rest spills to a folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.format import replacing
from data_prep.disk import name_a_full_disk

ROW_GROUP_ROWS = 1 << 16
ROW_GROUP_TEXT_BYTES = 1 << 26
"""Row groups are kept in memory, by who writes and who reads them; a row may be a whole document."""
Table = Any
"""An Ibis table expression (Ibis ships no types that mypy can follow)."""


class Engine(ABC):
    """A connection; `table`s are lazy until `write`, `batches`, `rows` or `count` runs them.

    Whatever its own library raises becomes a ConfigError (too little memory) or a DataError (an unreadable source, a
    full disk).
    """

    @abstractmethod
    def close(self) -> None:
        """Give memory and spill files back."""

    @abstractmethod
    def read(self, path: str | Path | Sequence[Path]) -> Table:
        """Rows of one Parquet file, or of several with the same columns. Characters like `*` mean themselves."""

    @abstractmethod
    def rows(self, table: Table) -> list[dict[str, Any]]:
        """All rows as Python values; for small results only."""

    @abstractmethod
    def batches(self, table: Table) -> Iterator[pa.RecordBatch]:
        """Stream the rows in order, never holding all of them."""

    @abstractmethod
    def errors_named(self) -> AbstractContextManager[None]:
        """Inside, whatever its library raises becomes a ConfigError or DataError: for code that runs a table itself."""

    def union(self, tables: Sequence[Table]) -> Table:
        """All rows of tables with the same columns."""
        return ibis.union(*tables) if len(tables) > 1 else tables[0]

    def count(self, table: Table) -> int:
        """Number of rows."""
        return int(self.rows(table.agg(n=table.count()))[0]["n"])

    def write(self, table: Table, path: Path, *, schema: pa.Schema, order_by: Sequence[str],
              number: str | None = None, last_of: str | None = None) -> int:
        """Write the rows, cast to `schema`, sorted by `order_by` (nulls first); returns how many. By rename.

        `last_of` names a column; of neighbours with one value in it only the last is written. Rows are sorted anyhow,
        and a sort spills at any size, where grouping by as many keys as there are rows needs memory in the end.

        `number` names a column of `schema` that is the row's place in that order, from 0: counted while writing, where
        a window over all rows would have one task number them all.
        """
        keys = [ibis.asc(table[k], nulls_first=True) for k in order_by]
        columns = dict.fromkeys([n for n in schema.names if n != number] + list(order_by))
        batches = self.batches(table.select(*columns).order_by(keys))
        if last_of is not None:
            batches = last_of_each(batches, last_of)
        return write_parquet(batches if number is None else numbered(batches, number), path, schema=schema)


def numbered(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """The batches with a further column `name`: the number of the row, from 0."""
    n = 0
    for batch in batches:
        yield batch.append_column(name, pa.array(np.arange(n, n + batch.num_rows)))
        n += batch.num_rows


def last_of_each(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """The rows without those that have the value of the next row in column `name`, which has no null."""
    held: pa.RecordBatch | None = None  # the last row so far: the next batch may begin with its value
    for batch in batches:
        if held is not None and batch.num_rows:
            if held[name][0] != batch[name][0]:
                yield held
            held = None
        if batch.num_rows:
            differs = pc.not_equal(batch[name].slice(1), batch[name].slice(0, batch.num_rows - 1))
            yield batch.slice(0, batch.num_rows - 1).filter(differs)
            held = batch.slice(batch.num_rows - 1)
    if held is not None:
        yield held


def in_order(value: Any, *, by: Any, where: Any = None) -> Any:
    """Aggregates to the list of `value`, of the rows with `where`, sorted by the integer `by`, which has no ties.

    Lists of pairs that are sorted are what all engines have; lists that are collected in an order are not.
    """
    pairs = ibis.struct({"by": by, "value": value}).collect(where=where).sort()
    return pairs.map(lambda pair: pair["value"])


def write_parquet(batches: Iterable[pa.RecordBatch], path: Path, *, schema: pa.Schema,
                  group_rows: int | None = None) -> int:
    """Write the columns of `schema` as one Parquet file with row groups of `group_rows` (default `ROW_GROUP_ROWS`)
    rows, or of fewer where their texts reach `ROW_GROUP_TEXT_BYTES`; returns the rows.

    By rename; a full disk is a DataError. The bytes depend on the rows only, not on how they were cut into batches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_a_full_disk(path.parent), replacing(path) as partial:
        return _write_row_groups(batches, partial, schema, group_rows or ROW_GROUP_ROWS)


def _write_row_groups(batches: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema, group_rows: int) -> int:
    n_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        tables = (pa.table(batch).select(schema.names).cast(schema) for batch in batches)
        for group in _row_groups(tables, group_rows):
            writer.write_table(group, row_group_size=group_rows)
            n_rows += group.num_rows
    return n_rows


def _row_groups(tables: Iterable[pa.Table], group_rows: int) -> Iterator[pa.Table]:
    """The rows cut anew: a group ends with its row number `group_rows`, or the one with which its texts reach
    `ROW_GROUP_TEXT_BYTES`."""
    waiting: list[pa.Table] = []
    n_waiting = n_bytes = 0
    for table in tables:
        up_to = np.cumsum(_text_bytes(table))  # up_to: (rows,) bytes of texts in rows 0 to i
        start = before = 0
        while start < table.num_rows:
            n_fit = int(np.searchsorted(up_to[start:], before + ROW_GROUP_TEXT_BYTES - n_bytes)) + 1
            n = min(n_fit, group_rows - n_waiting, table.num_rows - start)
            waiting.append(table.slice(start, n))
            start += n
            n_waiting, n_bytes, before = n_waiting + n, n_bytes + int(up_to[start - 1]) - before, int(up_to[start - 1])
            if n_waiting == group_rows or n_bytes >= ROW_GROUP_TEXT_BYTES:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting, n_waiting, n_bytes = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _text_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """Bytes of each row's texts: (rows,)."""
    n_bytes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        if pa.types.is_string(column.type):
            n_bytes += pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return n_bytes


def event_hash(table: Table, *, seed: int) -> Table:
    """Name of each event: md5 of its seed, user, domain, item and time, as 32 hex digits; also breaks ties of time."""
    parts = [ibis.literal(str(seed)), table.user_id, table.domain, table.item_id, table.ts_ms.cast("string")]
    return ibis.literal("\x1f").join(parts).hexdigest("md5")
