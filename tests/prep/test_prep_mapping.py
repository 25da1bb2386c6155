"""What becomes of ids, times and ratings that are written in odd ways."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from data_prep.config import Columns
from data_prep.mapping import chosen, event_fields, map_interactions
from data_prep.records import Counts
from data_prep.sources import Reader


def mapped(folder: Path, column: str, values: pa.Array) -> list[Any]:
    """What the schema's column of that meaning holds, where the source's column holds `values`."""
    return mapped_and_counted(folder, column, values)[0]


def mapped_and_counted(folder: Path, column: str, values: pa.Array) -> tuple[list[Any], dict[str, int]]:
    """The same, with the counts."""
    n = len(values)
    source = {"user_id": ["u"] * n, "item_id": ["i"] * n, "timestamp": [5] * n, "rating": [1.0] * n} | {column: values}
    pq.write_table(pa.table(source), folder / "source.parquet")
    engine = shops.engine(folder)
    reader = Reader(kind="parquet", fields=event_fields(Columns()))
    events = chosen(engine.read(folder / "source.parquet"), reader, source="source")
    counts = Counts("ingest")
    rows = engine.rows(map_interactions(events, unit="ms", source="source", domain="books", counts=counts))
    engine.close()
    return [row["ts_ms" if column == "timestamp" else column] for row in rows], counts.by_reason


def test_the_fraction_of_a_second_is_kept_and_never_rounded_up_to_a_whole_one(tmp_path: Path) -> None:
    times = pa.array([datetime(1970, 1, 1, 0, 0, 1, 600_000), datetime(1970, 1, 1, 0, 0, 1, 400_000)])
    assert mapped(tmp_path, "timestamp", times) == [1600, 1400]


@pytest.mark.parametrize("n_rows", [3, 1500])
def test_a_time_that_is_no_finite_number_is_missing(tmp_path: Path, n_rows: int) -> None:
    # Parquet's statistics of this column are 5 to 5: they do not show the others
    values = [float("nan"), float("inf"), -1e300] + [5.0] * (n_rows - 2)
    assert mapped(tmp_path, "timestamp", pa.array(values)) == [None, None, None] + [5] * (n_rows - 2)


def test_a_rating_is_a_finite_number_or_missing_and_there_is_one_zero(tmp_path: Path) -> None:
    texts = ["4.5", " 3 ", ".5", "+5", "1e1", "-0.0", "nan", "inf", "1e400", "5f", "0x1p3", "1_0", "", None]
    expected = [4.5, 3.0, 0.5, 5.0, 10.0, 0.0, *[None] * 8]
    assert mapped(tmp_path, "rating", pa.array(texts)) == expected
    assert str(mapped(tmp_path, "rating", pa.array([-0.0]))) == "[0.0]"
    assert mapped(tmp_path, "rating", pa.array([float("nan"), float("-inf"), 2.5])) == [None, None, 2.5]


@pytest.mark.parametrize(("column", "values", "n_lost"), [
    ("timestamp", pa.array(["5", "soon", None, "1_0", "7"]), 2),
    ("timestamp", pa.array([5.0, float("nan"), None, float("inf")]), 2),
    ("rating", pa.array(["4.5", "good", "", None, "nan"]), 2),  # an empty text is no value, as in text files
    ("rating", pa.array([1.0, None]), None),
    ("timestamp", pa.array([datetime(1970, 1, 1, 0, 0, 1), None]), None),
])
def test_values_of_parquet_that_are_no_number_are_counted(
        tmp_path: Path, column: str, values: pa.Array, n_lost: int | None) -> None:
    _, counts = mapped_and_counted(tmp_path, column, values)
    assert counts.get("source: values that are no number, taken as missing") == n_lost


def test_whole_numbers_are_ids_whatever_their_type(tmp_path: Path) -> None:
    assert mapped(tmp_path, "item_id", pa.array([7.0, float("nan"), None, 1e10, 1.5])) == [
        "7", None, None, "10000000000", None]
    assert mapped(tmp_path, "user_id", pa.array([7, 2**63], pa.uint64())) == ["7", "9223372036854775808"]


@pytest.mark.parametrize(("column", "values", "message"), [
    ("user_id", pa.array([b"u"]), "source: column 'user_id' of type binary cannot be read as text; convert it, or"),
    ("item_id", pa.array([["x"]]), "column 'item_id' of type array<string> cannot be read as text"),
    ("rating", pa.array([{"stars": 5}]), r"column 'rating' of type struct<stars: int64> cannot be read as a number"),
])
def test_a_column_of_a_type_that_holds_no_such_value_is_named(
        tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mapped(tmp_path, column, values)
