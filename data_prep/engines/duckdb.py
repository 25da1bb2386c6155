"""The engine of one machine: Ibis on DuckDB, embedded in this process.

reads: Parquet. writes: what does not fit below the memory limit, into the spill folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa

from cprec.errors import ConfigError, DataError
from data_prep.disk import FULL_TEXTS, disk_full
from data_prep.engine import ROW_GROUP_ROWS, Engine, Table


class DuckDBEngine(Engine):
    """DuckDB with a memory limit; `threads` None means all cores."""

    def __init__(self, *, memory_limit: str, threads: int | None, spill: Path) -> None:
        self._spill = spill
        self._memory_limit = memory_limit
        try:
            self._con = ibis.duckdb.connect(
                memory_limit=memory_limit, temp_directory=str(spill),
                **({} if threads is None else {"threads": threads}))
        except duckdb.Error as e:
            raise ConfigError(f"engine: DuckDB refuses memory_limit={memory_limit!r}, threads={threads}: {e}") from None

    def close(self) -> None:
        self._con.disconnect()

    def read(self, path: str | Path | Sequence[Path]) -> Table:
        paths = [str(p) for p in ([path] if isinstance(path, (str, Path)) else path)]
        try:
            return self._con.read_parquet([_literally(p) for p in paths])
        except duckdb.Error as e:
            raise DataError(f"{', '.join(paths)}: not readable as Parquet: {str(e).splitlines()[0]}; replace "
                            f"the file, or name another") from None

    def rows(self, table: Table) -> list[dict[str, Any]]:
        return [row for batch in self.batches(table) for row in batch.to_pylist()]

    def batches(self, table: Table) -> Iterator[pa.RecordBatch]:
        # Ibis 12's own to_pyarrow_batches calls a method that DuckDB 2.0 renamed
        with self.errors_named():
            yield from self._con.con.sql(self._con.compile(table)).to_arrow_reader(ROW_GROUP_ROWS)

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError) as e:  # what DuckDB meets while its rows are streamed, Arrow makes an OSError
            said = str(e)
            # DuckDB calls it "out of memory" too when the spill folder may not grow any further
            if any(text in said for text in (*FULL_TEXTS, "max_temp_directory_size")):
                raise disk_full(self._spill, said.splitlines()[0]) from None
            if isinstance(e, duckdb.OutOfMemoryException) or "Out of Memory Error" in said:
                raise ConfigError(f"engine.memory_limit={self._memory_limit!r} is too small for this data, even with "
                                  f"spilling; raise it, or lower engine.threads: {said.splitlines()[0]}") from None
            raise DataError(f"the engine cannot read a source: {said}") from None


def _literally(path: str) -> str:
    """The path with the characters that DuckDB would take for a pattern made to mean themselves."""
    return re.sub(r"([*?\[])", r"[\1]", path)
