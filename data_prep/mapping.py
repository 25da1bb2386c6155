"""A source's table in the one schema: columns under our names, time in milliseconds.

reads: nothing but the largest time stamp of a column. writes: nothing; tables stay lazy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ibis

from cprec.errors import DataError, nearest
from data_prep.config import Columns
from data_prep.records import Counts
from data_prep.sources import Field

Table = Any
"""An Ibis table expression."""


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


def need_columns(fields: Iterable[Field], columns: Sequence[str], *, source: str) -> None:
    """Raise DataError naming the file and every required field of which it has no column."""
    missing = [f"{' or '.join(map(repr, f.of))} (for {f.name}); {nearest(f.of[0], columns)}".removesuffix("; ")
               for f in fields if f.is_required and not any(name in columns for name in f.of)]
    if missing:
        raise DataError(f"{source} has no column {' and no column '.join(missing)}\n"
                        f"  its columns: {', '.join(columns)}; correct the dataset's `columns`")


def chosen(table: Table, fields: Sequence[Field], *, source: str) -> Table:
    """The table's `fields` under our names; null where the source lacks an optional one. DataError: see need_columns.
    """
    need_columns(fields, table.columns, source=source)

    def column(field: Field) -> Any:
        found = [_as_kind(table[name], field) for name in field.of if name in table.columns]
        missing = ibis.null("float64" if field.kind == "number" else "string")
        return ibis.coalesce(*found) if len(found) > 1 else found[0] if found else missing

    return table.select(**{field.name: column(field) for field in fields})


def _as_kind(column: Any, field: Field) -> Any:
    if field.kind == "path" and column.type().is_array():
        return ibis.literal(" > ").join(column)
    return column if field.kind == "number" else column.cast("string")


def map_interactions(events: Table, *, unit: str, source: str, domain: str | None, counts: Counts) -> Table:
    """Events with our names (`event_fields`) in the one schema; without a `domain` it is their column's."""
    return events.select(
        user_id=events.user_id, domain=ibis.literal(domain) if domain is not None else events.domain,
        item_id=events.item_id, ts_ms=_milliseconds(events.timestamp, unit=unit, source=source, counts=counts),
        rating=events.rating.try_cast("float32"))


def map_items(items: Table, *, domain: str | None) -> Table:
    """Items with our names (`item_fields`) in the one schema; without a `domain` it is their column's."""
    return items.select(domain=ibis.literal(domain) if domain is not None else items.domain, item_id=items.item_id,
                        title=items.title, brand=items.brand, category=items.category)


MS_FROM = 10**11
"""Time stamps from here on are milliseconds (1973 as ms, the year 5138 as s)."""
S_FROM = 10**8
"""Among milliseconds, time stamps from here (1973 as s) to `MS_FROM` are seconds: as ms they would be of 1970-73."""
YEAR_2200 = 7_258_118_400_000


def _milliseconds(column: Any, *, unit: str, source: str, counts: Counts) -> Any:
    """The column as int64 milliseconds, null where it is no finite number.

    `auto` decides by the largest finite value; where that is in milliseconds, a value from `S_FROM` to `MS_FROM` is
    seconds all the same, and counted.
    """
    if column.type().is_timestamp():
        return column.epoch_seconds().cast("int64") * 1000 + column.millisecond().cast("int64")
    number = column.try_cast("float64")
    # the engine orders NaN above every number: it would be the largest
    number = ibis.ifelse(number.isnan() | number.isinf(), ibis.null("float64"), number)
    is_seconds = (number >= S_FROM) & (number < MS_FROM)
    found = ibis.struct({"largest": number.max(), "n": is_seconds.cast("int64").sum()}).to_pyarrow().as_py()
    largest = found["largest"]
    if largest is None:
        raise DataError(f"{source}: column {column.get_name()!r} ({column.type()}) holds no number; time stamps are "
                        f"seconds or milliseconds since 1970, or a timestamp column: convert it")
    is_mixed = unit == "auto" and largest >= MS_FROM and found["n"] > 0
    if unit == "auto":
        unit = "ms" if largest >= MS_FROM else "s"
    if largest * (1000 if unit == "s" else 1) >= YEAR_2200:
        raise DataError(f"{source}: column {column.get_name()!r} read in {unit} goes to {largest:.0f}, beyond the year "
                        f"2200; set columns.timestamp_unit to its unit (s or ms), or convert it")
    if is_mixed:
        counts.add(f"{source}: time stamps in seconds among milliseconds, read as seconds", int(found["n"]))
        return ibis.ifelse(is_seconds, number * 1000, number).round().cast("int64")
    return (number * (1000 if unit == "s" else 1)).round().cast("int64")
