"""The one place where the relational engine (Ibis on DuckDB) comes in.

reads: Parquet, CSV. writes: Parquet with a fixed row order, row-group size and writer, so that the same rows give
the same bytes whatever the number of threads. Works out of core: memory stays below the engine's limit, the rest
spills to a folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import ConfigError, DataError

ROW_GROUP_ROWS = 1 << 16
Table = Any
"""An Ibis table expression (Ibis ships no types that mypy can follow)."""


class Engine:
    """A connection; `table`s are lazy until `write`, `rows` or `count` runs them."""

    def __init__(self, *, memory_limit: str, threads: int | None, spill: Path) -> None:
        try:
            self._con = ibis.duckdb.connect(
                memory_limit=memory_limit, temp_directory=str(spill),
                **({} if threads is None else {"threads": threads}))
        except duckdb.Error as e:
            raise ConfigError(f"engine: DuckDB refuses memory_limit={memory_limit!r}, threads={threads}: {e}") from None

    def close(self) -> None:
        """Give memory and spill files back."""
        self._con.disconnect()

    def read(self, path: str | Path | Sequence[Path]) -> Table:
        """Rows of one Parquet file, or of several with the same columns."""
        paths = [str(p) for p in path] if isinstance(path, (list, tuple)) else [str(path)]
        try:
            return self._con.read_parquet(paths)
        except duckdb.Error as e:
            raise DataError(f"{', '.join(paths)}: not readable as Parquet: {str(e).splitlines()[0]}; replace "
                            f"the file, or name another") from None

    def read_text(self, paths: Sequence[Path], *, delimiter: str, quote: str) -> Table:
        """Rows of delimited text files with a header; every column is text, an empty field is null."""
        names = [str(p) for p in paths]
        try:
            return self._con.read_csv(names, all_varchar=True, delim=delimiter, quote=quote, header=True)
        except duckdb.Error as e:
            raise DataError(f"{', '.join(names)}: not readable as text with a header: {e}") from None

    def union(self, tables: Sequence[Table]) -> Table:
        """All rows of tables with the same columns."""
        return ibis.union(*tables) if len(tables) > 1 else tables[0]

    def count(self, table: Table) -> int:
        """Number of rows."""
        return int(table.count().to_pyarrow().as_py())

    def rows(self, table: Table) -> list[dict[str, Any]]:
        """All rows as Python values; for small results only."""
        found: list[dict[str, Any]] = table.to_pyarrow().to_pylist()
        return found

    def batches(self, table: Table, *, n_rows: int = ROW_GROUP_ROWS) -> Iterator[pa.RecordBatch]:
        """Stream the rows in order, never holding all of them."""
        # Ibis 12's own to_pyarrow_batches calls a method that DuckDB 2.0 renamed
        try:
            yield from self._con.con.sql(self._con.compile(table)).to_arrow_reader(n_rows)
        except duckdb.OutOfMemoryException as e:
            raise ConfigError(f"engine.memory_limit is too small for this data, even with spilling: {e}") from None
        except duckdb.Error as e:  # a malformed row or page is met only while reading
            raise DataError(f"the engine cannot read a source: {e}") from None

    def write(self, table: Table, path: Path, *, schema: pa.Schema, order_by: Sequence[str]) -> int:
        """Write the rows, cast to `schema`, sorted by `order_by` (nulls first); returns how many. By rename."""
        keys = [ibis.asc(table[k], nulls_first=True) for k in order_by]
        ordered = table.select(*schema.names).order_by(keys)
        return write_parquet(self.batches(ordered), path, schema=schema)


def write_parquet(batches: Iterable[pa.RecordBatch], path: Path, *, schema: pa.Schema) -> int:
    """Write `batches` as one Parquet file with row groups of `ROW_GROUP_ROWS` rows; returns the rows. By rename.

    The bytes depend on the rows only, not on how they were cut into batches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    waiting: list[pa.Table] = []
    n_waiting = n_rows = 0
    with pq.ParquetWriter(partial, schema, compression="zstd", store_schema=False) as writer:
        for batch in batches:
            waiting.append(pa.table(batch).cast(schema))
            n_waiting += batch.num_rows
            n_rows += batch.num_rows
            while n_waiting >= ROW_GROUP_ROWS:
                rows = pa.concat_tables(waiting)
                writer.write_table(rows.slice(0, ROW_GROUP_ROWS).combine_chunks(), row_group_size=ROW_GROUP_ROWS)
                waiting, n_waiting = [rows.slice(ROW_GROUP_ROWS)], n_waiting - ROW_GROUP_ROWS
        if n_waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=ROW_GROUP_ROWS)
    partial.replace(path)
    return n_rows


def event_hash(table: Table, *, seed: int) -> Table:
    """Name of each event: md5 of its seed, user, domain, item and time, as 32 hex digits; also breaks ties of time."""
    parts = [ibis.literal(str(seed)), table.user_id, table.domain, table.item_id, table.ts_ms.cast("string")]
    return ibis.literal("\x1f").join(parts).hexdigest("md5")
