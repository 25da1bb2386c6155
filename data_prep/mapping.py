"""A source's table in the one schema: columns by their names there, time in milliseconds.

reads: nothing but the largest time stamp of a column. writes: nothing; tables stay lazy.
"""

from __future__ import annotations

from typing import Any

import ibis

from cprec.errors import DataError, did_you_mean

Table = Any
"""An Ibis table expression."""


def need_columns(table: Table, wanted: dict[str, str], *, source: str) -> None:
    """Raise DataError naming the file and every column of `wanted` (meaning -> name) that it lacks."""
    missing = [f"{name!r} (for {meaning}); {did_you_mean(name, table.columns)}"
               for meaning, name in wanted.items() if name not in table.columns]
    if missing:
        raise DataError(f"{source} has no column {' and no column '.join(missing)}\n"
                        f"  its columns: {', '.join(table.columns)}; correct the dataset's `columns`")


def map_interactions(table: Table, names: dict[str, str], *, unit: str, source: str,
                     domain: str | None, domain_column: str | None, rating: str | None) -> Table:
    """The table's user, item, time (`names`) and rating in the one schema; the domain is given or a column's."""
    shop = ibis.literal(domain) if domain is not None else table[domain_column].cast("string")
    rated = rating or "rating"
    return table.select(
        user_id=table[names["user_id"]].cast("string"), domain=shop, item_id=table[names["item_id"]].cast("string"),
        ts_ms=_milliseconds(table[names["timestamp"]], unit=unit, source=source),
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


def _milliseconds(column: Table, *, unit: str, source: str) -> Table:
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
