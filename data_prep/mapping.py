"""A source's table in the one schema: columns under our names, time in milliseconds.

reads: the columns that hold numbers, once, for what is in them. writes: nothing; tables stay lazy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ibis

from cprec.errors import DataError, nearest
from data_prep.config import Columns
from data_prep.engine import Table
from data_prep.records import Counts
from data_prep.sources import Field, Reader


def event_fields(columns: Columns, **usual: tuple[str, ...]) -> tuple[Field, ...]:
    """The fields of an interactions file: the user's names, or else a parser's `usual` ones, or else our own."""
    return tuple(_field(columns, name, usual, kind=kind, is_required=needed) for name, kind, needed in (
        ("user_id", "text", True), ("item_id", "text", True), ("timestamp", "number", True),
        ("rating", "number", columns.rating is not None)))


def item_fields(columns: Columns, **usual: tuple[str, ...]) -> tuple[Field, ...]:
    """The fields of an items file, likewise."""
    return tuple(_field(columns, name, usual, kind=kind, is_required=needed) for name, kind, needed in (
        ("item_id", "text", True), ("title", "text", True), ("brand", "text", columns.brand is not None),
        ("category", "path", columns.category is not None)))


def _field(columns: Columns, name: str, usual: dict[str, tuple[str, ...]], *, kind: Any, is_required: bool) -> Field:
    given = getattr(columns, name)
    return Field(name=name, of=(given,) if given else usual.get(name, (name,)), kind=kind, is_required=is_required)


def need_columns(reader: Reader, columns: Sequence[str], *, source: str) -> None:
    """Raise DataError naming the file, every required field of which it has no column, and the config's key."""
    missing = [f"{' or '.join(map(repr, f.of))} (for {f.name}); {nearest(f.of[0], columns)}".removesuffix("; ")
               for f in reader.fields if f.is_required and not any(name in columns for name in f.of)]
    if missing:
        raise DataError(f"{source} has no column {' and no column '.join(missing)}\n"
                        f"  its columns: {', '.join(columns)}; correct {reader.key}")


def chosen(table: Table, reader: Reader, *, source: str) -> Table:
    """The table's fields under our names; null where the source lacks an optional one, and for an empty text.

    DataError: see need_columns; or a column is of a type that does not hold its kind.
    """
    need_columns(reader, table.columns, source=source)

    def column(field: Field) -> Any:
        found = [_as_kind(table[name], field, source=source) for name in field.of if name in table.columns]
        missing = ibis.null("float64" if field.kind == "number" else "string")
        return ibis.coalesce(*found) if len(found) > 1 else found[0] if found else missing

    return table.select(**{field.name: column(field) for field in reader.fields})


def _as_kind(column: Any, field: Field, *, source: str) -> Any:
    """The column as text or number; the rules are those of text files (`data_prep.readers`), whatever the engine."""
    kind = column.type()
    if field.kind == "path" and kind.is_array():
        return _path(column, source=source).nullif("")
    if kind.is_nested() or kind.is_binary():
        wanted = "a number or time" if field.kind == "number" else "text"
        raise _unreadable(column, wanted, source=source)
    if field.kind == "number":
        return column.nullif("") if kind.is_string() else column
    return _name(column).nullif("")


def _path(column: Any, *, source: str) -> Any:
    """The parts joined, but those that are null or empty; of several paths the first."""
    several = column.type().value_type.is_array()
    first = ibis.ifelse(column.length() > 0, column, ibis.null(column.type()))[0] if several else column
    part = first.type().value_type
    if not (part.is_string() or part.is_integer()):
        raise _unreadable(column, "a path of texts", source=source)
    return ibis.literal(" > ").join(first.cast("array<string>").filter(lambda text: text != ""))


def _unreadable(column: Any, wanted: str, *, source: str) -> DataError:
    return DataError(f"{source}: column {column.get_name()!r} of type {column.type()} cannot be read as {wanted}; "
                     f"convert it, or name another in the dataset's `columns`")


def map_interactions(events: Table, *, unit: str, source: str, domain: str | None, counts: Counts) -> Table:
    """Events with our names (`event_fields`) in the one schema; without a `domain` it is their column's.

    Times and ratings that are no finite number become null and are counted.
    """
    met = _met(events)
    if met["n_lost"]:
        counts.add(f"{source}: values that are no number, taken as missing", met["n_lost"])
    return events.select(
        user_id=events.user_id, domain=ibis.literal(domain) if domain is not None else events.domain,
        item_id=events.item_id,
        ts_ms=_milliseconds(events.timestamp, unit=unit, source=source, met=met, counts=counts),
        rating=_rating(events.rating))


def map_items(items: Table, *, domain: str | None) -> Table:
    """Items with our names (`item_fields`) in the one schema; without a `domain` it is their column's."""
    return items.select(domain=ibis.literal(domain) if domain is not None else items.domain, item_id=items.item_id,
                        title=items.title, brand=items.brand, category=items.category)


NUMBER = "^[ \\t\\r\\n]*[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?[ \\t\\r\\n]*$"
"""What every engine reads as a number. Some also take `1_000`, `0x1p3`, `5f` or `inf`."""


def _number(column: Table) -> Table:
    """The column as float64, null where it is text that is no number."""
    if column.type().is_string():
        column = ibis.ifelse(column.re_search(NUMBER), column, ibis.null("string"))
    return column.try_cast("float64")


def _is_finite(number: Table) -> Table:
    """Whether a number is neither null, NaN nor infinite (nor beyond int64). Asked by a cast: DuckDB
    answers `isnan` and comparisons from Parquet's statistics, which leave NaN out."""
    return number.try_cast("int64").notnull()


def _rating(column: Table) -> Table:
    """The column as float32 with one zero, null where it is no finite number."""
    number = _number(column)
    return ibis.cases((~_is_finite(number), ibis.null("float32")), (number == 0, ibis.literal(0, "float32")),
                      else_=number.try_cast("float32"))


def _name(column: Table) -> Table:
    """The id as text. Whole numbers in a floating point column (what pandas makes of ids where some are missing) are
    written as such; every engine writes the others differently, and they are no ids: null."""
    if not column.type().is_floating():
        return column.cast("string")
    whole = column.try_cast("int64")
    return ibis.ifelse(whole.cast("float64") == column, whole.cast("string"), ibis.null("string"))


MS_FROM = 10**11
"""Time stamps from here on are milliseconds (1973 as ms, the year 5138 as s)."""
S_FROM = 10**8
"""Among milliseconds, time stamps from here (1973 as s) to `MS_FROM` are seconds: as ms they would be of 1970-73."""
YEAR_2200 = 7_258_118_400_000


def _met(events: Table) -> dict[str, int]:
    """What one pass over the times and ratings finds: `n_lost` values that are there but no finite number; and, of time
    stamps that are numbers, how many are finite (`n_timestamp`), the `largest` (none: null) and `n_seconds`, those from
    `S_FROM` to `MS_FROM`."""
    numbers = {name: _number(events[name]) for name in ("timestamp", "rating")
               if not events[name].type().is_timestamp()}
    asked = {f"n_{name}": _n_where(_is_finite(number)) for name, number in numbers.items()}
    # counted, for to Ibis a NaN is null on Spark alone
    asked |= {f"there_{name}": events[name].count() for name in numbers}
    if "timestamp" in numbers:
        stamp = numbers["timestamp"]
        asked |= {"largest": stamp.try_cast("int64").max(),
                  "n_seconds": _n_where((stamp >= S_FROM) & (stamp < MS_FROM))}
    met: dict[str, int] = events.agg(**asked).to_pyarrow().to_pylist()[0] if asked else {}
    return met | {"n_lost": sum(met[f"there_{name}"] - (met[f"n_{name}"] or 0) for name in numbers)}


def _n_where(condition: Any) -> Any:
    return condition.cast("int64").sum()


def _milliseconds(column: Any, *, unit: str, source: str, met: dict[str, int], counts: Counts) -> Any:
    """The column as int64 milliseconds, null where it is no finite number.

    `auto` decides by the largest finite value (`met`: see `_met`); where that is in milliseconds, a value from `S_FROM`
    to `MS_FROM` is seconds all the same. What is read as milliseconds, and what as seconds among them, is counted.
    """
    if column.type().is_timestamp():
        # an engine may round the half second up: the whole seconds are taken first
        return column.truncate("s").epoch_seconds().cast("int64") * 1000 + column.millisecond().cast("int64")
    number, largest = _number(column), met["largest"]
    if largest is None:
        raise DataError(f"{source}: column {column.get_name()!r} ({column.type()}) holds no number; time stamps are "
                        f"seconds or milliseconds since 1970, or a timestamp column: convert it")
    may_be_mixed = unit == "auto" and largest >= MS_FROM
    if unit == "auto":
        unit = "ms" if may_be_mixed else "s"
    if largest * (1000 if unit == "s" else 1) >= YEAR_2200:
        raise DataError(f"{source}: column {column.get_name()!r} read in {unit} goes to {largest}, beyond the year "
                        f"2200; set columns.timestamp_unit to its unit (s or ms), or convert it")
    if unit == "s":
        ms = number * 1000
    else:
        n_seconds = met["n_seconds"] if may_be_mixed else 0
        counts.add(f"{source}: time stamps read as milliseconds", met["n_timestamp"] - n_seconds)
        if n_seconds:
            counts.add(f"{source}: time stamps in seconds among milliseconds, read as seconds", n_seconds)
        is_seconds = (number >= S_FROM) & (number < MS_FROM)
        ms = ibis.ifelse(is_seconds, number * 1000, number) if n_seconds else number
    return ibis.ifelse(_is_finite(ms), ms, ibis.null("float64")).round().cast("int64")
