"""What the stages ask of a relational engine, and the one way in which tables become files.

reads: Parquet. writes: Parquet with a fixed row order, row-group size and writer, so that the same rows give the same
bytes on every engine and with any number of threads. Both engines (`data_prep.engines`) work out of core: memory stays
below a limit, the rest spills to a folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import ConfigError
from data_prep.disk import name_a_full_disk

ROW_GROUP_ROWS = 1 << 16
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

    def read_text(self, paths: Sequence[Path], *, delimiter: str, quote: str) -> Table:
        """Rows of delimited text files with a header; every column is text, an empty field is null."""
        raise ConfigError(f"engine.name: only duckdb reads text files such as {paths[0]}; convert it to Parquet")

    def union(self, tables: Sequence[Table]) -> Table:
        """All rows of tables with the same columns."""
        return ibis.union(*tables) if len(tables) > 1 else tables[0]

    def count(self, table: Table) -> int:
        """Number of rows."""
        return int(self.rows(table.agg(n=table.count()))[0]["n"])

    def write(self, table: Table, path: Path, *, schema: pa.Schema, order_by: Sequence[str],
              number: str | None = None) -> int:
        """Write the rows, cast to `schema`, sorted by `order_by` (nulls first); returns how many. By rename.

        `number` names a column of `schema` that is the row's place in that order, from 0: counted while writing, where
        a window over all rows would have one task number them all.
        """
        keys = [ibis.asc(table[k], nulls_first=True) for k in order_by]
        columns = dict.fromkeys([n for n in schema.names if n != number] + list(order_by))
        batches = self.batches(table.select(*columns).order_by(keys))
        return write_parquet(batches if number is None else numbered(batches, number), path, schema=schema)


def numbered(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """The batches with a further column `name`: the number of the row, from 0."""
    n = 0
    for batch in batches:
        yield batch.append_column(name, pa.array(np.arange(n, n + batch.num_rows)))
        n += batch.num_rows


def in_order(value: Any, *, by: Any, where: Any = None) -> Any:
    """Aggregates to the list of `value`, of the rows with `where`, sorted by the integer `by`, which has no ties.

    Lists of pairs that are sorted are what all engines have; lists that are collected in an order are not.
    """
    pairs = ibis.struct({"by": by, "value": value}).collect(where=where).sort()
    return pairs.map(lambda pair: pair["value"])


def write_parquet(batches: Iterable[pa.RecordBatch], path: Path, *, schema: pa.Schema,
                  group_rows: int | None = None) -> int:
    """Write the columns of `schema` as one Parquet file with row groups of `group_rows` (default `ROW_GROUP_ROWS`)
    rows; returns the rows.

    By rename; a full disk is a DataError. The bytes depend on the rows only, not on how they were cut into batches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with name_a_full_disk(path.parent):
            n_rows = _write_row_groups(batches, partial, schema, group_rows or ROW_GROUP_ROWS)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk, its room is what the next attempt needs
        raise
    return n_rows


def _write_row_groups(batches: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema, group_rows: int) -> int:
    waiting: list[pa.Table] = []
    n_waiting = n_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        for batch in batches:
            waiting.append(pa.table(batch).select(schema.names).cast(schema))
            n_waiting += batch.num_rows
            n_rows += batch.num_rows
            while n_waiting >= group_rows:
                rows = pa.concat_tables(waiting)
                writer.write_table(rows.slice(0, group_rows).combine_chunks(), row_group_size=group_rows)
                waiting, n_waiting = [rows.slice(group_rows)], n_waiting - group_rows
        if n_waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=group_rows)
    return n_rows


def event_hash(table: Table, *, seed: int) -> Table:
    """Name of each event: md5 of its seed, user, domain, item and time, as 32 hex digits; also breaks ties of time."""
    parts = [ibis.literal(str(seed)), table.user_id, table.domain, table.item_id, table.ts_ms.cast("string")]
    return ibis.literal("\x1f").join(parts).hexdigest("md5")
