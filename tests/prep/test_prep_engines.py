"""The engines: the same bytes from each and from any number of threads, and what they say when there is no room."""

from __future__ import annotations

import importlib.util
import itertools
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import ConfigError, DataError
from data_prep.config import Dataset
from data_prep.engine import Engine, in_order, last_of_each, write_parquet
from data_prep.engines.duckdb import DuckDBEngine
from data_prep.ingest import DatasetTasks, parse
from data_prep.mapping import chosen
from data_prep.parsers.registry import PARSERS
from data_prep.pipeline import prepare
from data_prep.records import Counts
from data_prep.sources import Field, Reader
from data_prep.staging import tasks_of

Connect = Callable[[Path], Engine]


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Spark session of two local threads, started once: every Spark engine of these tests uses it."""
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("pyspark is not installed: pip install 'cprec[spark]'")
    if shutil.which("java") is None:
        pytest.skip("there is no java on the PATH")
    from data_prep.engines.spark import start_session

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")  # hundreds of tiny queries: compile fast
        session = start_session(memory_limit="1GB", threads=2, master=None, spill=tmp_path_factory.mktemp("spark"))
    session.conf.set("spark.sql.shuffle.partitions", "2")
    yield session
    session.stop()


@pytest.fixture(params=["duckdb", "spark"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Each engine."""
    made: Engine = DuckDBEngine(memory_limit="200MB", threads=2, spill=tmp_path / "spill")
    if request.param == "spark":
        request.getfixturevalue("spark")
        from data_prep.engines.spark import SparkEngine

        made = SparkEngine(memory_limit="1GB", threads=2, master=None, spill=tmp_path / "spill")
    yield made
    made.close()


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nasty")
    shops.write_nasty_shop(folder)
    return folder


def prepared_by(engine: dict[str, Any], raw: Path, out: Path) -> dict[str, bytes]:
    prepare(shops.config(shops.nasty_values(raw, out, engine)))
    return shops.bytes_below(out)


@pytest.fixture(scope="module")
def by_one_thread(nasty: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "out"
    return prepared_by({"memory_limit": "500MB", "threads": 1}, nasty, out)


def test_one_two_and_four_threads_of_duckdb_give_the_same_bytes_from_many_row_groups(
        nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine", "engines.duckdb", "pack"):
        monkeypatch.setattr(f"data_prep.{module}.ROW_GROUP_ROWS", 64)  # threads share the work by row groups
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("events.parquet", "items.parquet"):
        pq.write_table(pq.read_table(nasty / name), raw / name, row_group_size=16)
    made = [prepared_by({"memory_limit": "500MB", "threads": n}, raw, tmp_path / f"by_{n}") for n in (1, 2, 4)]
    for name in ("ingested", "clean", "train"):
        assert pq.ParquetFile(tmp_path / f"by_1/interactions/{name}.parquet").num_row_groups > 4
    assert made[0] == made[1] == made[2]


@pytest.mark.usefixtures("spark")
def test_spark_gives_the_bytes_of_duckdb(nasty: Path, by_one_thread: dict[str, bytes], tmp_path: Path) -> None:
    made = prepared_by({"name": "spark", "memory_limit": "1GB", "threads": 2}, nasty, tmp_path / "out")
    assert sorted(made) == sorted(by_one_thread)
    assert [name for name in made if made[name] != by_one_thread[name]] == []
    assert not (tmp_path / "out" / ".spill").exists()


def test_a_file_whose_name_looks_like_a_pattern_or_hidden_is_read_as_it_is(engine: Engine, tmp_path: Path) -> None:
    names = ["a [b] {c,d} * ?.parquet", "_hidden.parquet", ".dot.parquet", "b.parquet"]
    for n, name in enumerate(names):
        pq.write_table(pa.table({"n": [n]}), tmp_path / name)
    assert [engine.rows(engine.read(tmp_path / name)) for name in names] == [[{"n": n}] for n in range(4)]
    assert engine.count(engine.read([tmp_path / name for name in names])) == 4


def test_rows_are_numbered_in_their_order_and_nulls_come_first(engine: Engine, tmp_path: Path) -> None:
    pq.write_table(pa.table({"k": ["b", None, "é", "a", "B", ""]}), tmp_path / "in.parquet")
    schema = pa.schema([("n", pa.int32()), ("k", pa.string())])
    n_rows = engine.write(engine.read(tmp_path / "in.parquet"), tmp_path / "out.parquet", schema=schema,
                          order_by=["k"], number="n")
    written = pq.read_table(tmp_path / "out.parquet")
    assert n_rows == 6 and written.schema == schema
    assert written.to_pylist() == [{"n": n, "k": k} for n, k in enumerate([None, "", "B", "a", "b", "é"])]


def test_lists_are_collected_in_order_and_without_the_rows_left_out(engine: Engine, tmp_path: Path) -> None:
    pq.write_table(pa.table({"by": [3, 1, 2, 4], "value": ["c", "a", None, "d"]}), tmp_path / "in.parquet")
    table = engine.read(tmp_path / "in.parquet")
    (row,) = engine.rows(table.agg(x=in_order(table.value, by=table.by, where=table.by < 4)))
    assert row == {"x": ["a", None, "c"]}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "int96"])
def test_time_columns_of_every_unit_are_times(engine: Engine, tmp_path: Path, unit: str) -> None:
    at = datetime(2020, 1, 1) if unit == "s" else datetime(2020, 1, 1, 0, 0, 1, 600_000)
    before = datetime(1970, 1, 1) - timedelta(milliseconds=0 if unit == "s" else 1600)
    times = pa.array([at, before, None], pa.timestamp("ns" if unit == "int96" else unit))
    pq.write_table(pa.table({"t": times}), tmp_path / "t.parquet", use_deprecated_int96_timestamps=unit == "int96")
    table = engine.read(tmp_path / "t.parquet")
    ms = table.t.truncate("s").epoch_seconds().cast("int64") * 1000 + table.t.millisecond().cast("int64")
    found = [row["ms"] for row in engine.rows(table.select(ms=ms))]
    assert found == ([1_577_836_800_000, 0, None] if unit == "s" else [1_577_836_801_600, -1600, None])


def test_texts_of_parquet_follow_the_rules_of_text_files(engine: Engine, tmp_path: Path) -> None:
    rows: list[tuple[Any, Any, Any, str | None]] = [  # a text, the parts of a path, several paths, the path then read
        ("", [], [], None), (" ", ["A", None, "", "B"], [["A", None, "", "B"], ["C"]], "A > B"),
        (None, None, None, None), ("x", ["A"], [["A"], None], "A"), ("y", [""], [[], ["C"]], None)]
    table = {"text": [r[0] for r in rows], "one": [r[1] for r in rows], "more": [r[2] for r in rows]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    fields = (Field(name="id", of=("text",)), Field(name="a", of=("one",), kind="path"),
              Field(name="b", of=("more",), kind="path"),
              Field(name="coarse", of=("one", "text"), kind="path"))
    reader = Reader(kind="parquet", fields=fields)
    found = engine.rows(chosen(engine.read(tmp_path / "in.parquet"), reader, source="in"))
    assert sorted((r["id"] or "", r["a"], r["b"]) for r in found) == sorted(
        (r[0] or "", r[3], r[3]) for r in rows)
    assert "" not in {r["id"] for r in found} and {r["coarse"] for r in found} == {None, "A > B", "A", "y"}


def test_a_damaged_column_of_times_is_an_error_of_the_source(engine: Engine, tmp_path: Path) -> None:
    n = 3000
    pq.write_table(pa.table({"timestamp": [f"{i * 7919 % 99_991:09d}" for i in range(n)], "user_id": ["u"] * n,
                             "item_id": ["x"] * n}), tmp_path / "e.parquet", compression="zstd", use_dictionary=False)
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"]}), tmp_path / "i.parquet")
    torn = bytearray((tmp_path / "e.parquet").read_bytes())
    torn[80:1000] = bytes(920)
    (tmp_path / "e.parquet").write_bytes(torn)
    dataset = Dataset(parser="tabular", domain="d", path=str(tmp_path / "e.parquet"), items=str(tmp_path / "i.parquet"))
    inputs = PARSERS["tabular"].inputs(dataset)
    tasks = tasks_of([*inputs.events, *inputs.items], tmp_path)
    with pytest.raises(DataError, match="cannot read a source"):
        parse(engine, DatasetTasks(dataset, events=(tasks[0],), items=(tasks[1],)), Counts("ingest"))


def test_a_row_group_ends_where_its_texts_reach_the_limit_however_the_rows_come(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.engine.ROW_GROUP_TEXT_BYTES", 10)
    # bytes 4 4 4 | 12 | 1 1 null 1 (four rows) | 9 1 | 2
    texts = ["a" * 4, "b" * 4, "c" * 4, "d" * 12, "e", "f", None, "g", "h" * 9, "i", "jj"]
    schema = pa.schema([("n", pa.int64()), ("t", pa.string())])
    table = pa.table({"n": range(11), "t": texts}, schema=schema)
    written = set()
    for size in (1, 3, 11):
        assert write_parquet(table.to_batches(size), tmp_path / "t.parquet", schema=schema, group_rows=4) == 11
        metadata = pq.read_metadata(tmp_path / "t.parquet")
        assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [3, 1, 4, 2, 1]
        assert pq.read_table(tmp_path / "t.parquet").equals(table)
        written.add((tmp_path / "t.parquet").read_bytes())
    assert len(written) == 1


def test_a_file_that_is_no_parquet_is_named(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("nonsense")
    for name in ("bad.parquet", "absent.parquet"):
        with pytest.raises(DataError, match=rf"{name}: not readable as Parquet: .*; replace the file"):
            engine.rows(engine.read(tmp_path / name))


def test_a_page_that_cannot_be_read_is_an_error_of_the_source(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "torn.parquet"
    pq.write_table(pa.table({"x": [str(i) * 9 for i in range(1000)]}), path, compression="zstd")
    torn = bytearray(path.read_bytes())
    torn[60:400] = bytes(340)
    path.write_bytes(torn)
    with pytest.raises(DataError, match="cannot read a source"):
        engine.rows(engine.read(path).agg(n=ibis._.x.length().sum()))


def test_too_little_memory_names_the_setting_wherever_it_is_met(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [f"{i:0200d}" for i in range(100_000)]}), tmp_path / "in.parquet")
    engine = DuckDBEngine(memory_limit="8MB", threads=1, spill=tmp_path / "spill")
    table = engine.read(tmp_path / "in.parquet")
    whole = table.agg(x=table.x.collect())  # one list cannot spill
    for run in (lambda: engine.rows(whole), lambda: engine.count(table.semi_join(whole.unnest("x"), "x")),
                lambda: engine.write(whole, tmp_path / "out.parquet", schema=pa.schema([("x", pa.list_(pa.string()))]),
                                     order_by=["x"])):
        with pytest.raises(ConfigError, match=r"engine\.memory_limit='8MB' is too small for this data"):
            run()
    engine.close()
    assert not list(tmp_path.glob("out.parquet*"))


def test_a_sort_of_more_than_the_memory_spills_and_is_right(tmp_path: Path) -> None:
    values = [f"{i * 7919 % 700_000:0100d}" for i in range(700_000)]  # 70 MB
    pq.write_table(pa.table({"x": values}), tmp_path / "in.parquet")
    engine = DuckDBEngine(memory_limit="50MB", threads=1, spill=tmp_path / "spill")
    engine.write(engine.read(tmp_path / "in.parquet"), tmp_path / "out.parquet", schema=pa.schema([("x", pa.string())]),
                 order_by=["x"])
    engine.close()
    assert pq.read_table(tmp_path / "out.parquet")["x"].to_pylist() == sorted(values)


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `n_bytes`: what a full disk does, where a test may not fill one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_clear_error_and_the_same_command_goes_on(
        prepared: Path, raw: Path, tmp_path: Path) -> None:
    values = shops.config_values(raw, tmp_path / "out")
    kept: list[int] = []
    for n_bytes in (5_000, 20_000):  # the first stage fails, then a later one
        with largest_file(n_bytes), pytest.raises(
                DataError, match=r"cannot write below .*out.*: File too large \([\d,]+ bytes are free.*goes on"):
            prepare(shops.config(values))
        kept.append(len(list((tmp_path / "out" / "stages").iterdir())))
        assert not list((tmp_path / "out").rglob("*.parquet.partial"))
    assert kept[0] < kept[1]
    prepare(shops.config(values))
    assert shops.bytes_below(tmp_path / "out") == shops.bytes_below(prepared)


def test_a_full_spill_folder_is_no_lack_of_memory(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [f"{i * 7919 % 200_000:0200d}" for i in range(200_000)]}), tmp_path / "in.parquet")
    engine = DuckDBEngine(memory_limit="25MB", threads=1, spill=tmp_path / "spill")
    with largest_file(1_000_000), pytest.raises(DataError, match=r"cannot write below .*spill: .* make room"):
        engine.write(engine.read(tmp_path / "in.parquet"), tmp_path / "out.parquet",
                     schema=pa.schema([("x", pa.string())]), order_by=["x"])
    engine.close()


def test_a_master_without_spark_is_refused(raw: Path, tmp_path: Path) -> None:
    values = shops.config_values(raw, tmp_path / "out") | {"engine": {"master": "yarn"}}
    with pytest.raises(ConfigError, match="master='yarn' is Spark's; set name: spark"):
        shops.config(values)


def test_spark_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.errors", None)
    monkeypatch.delitem(sys.modules, "data_prep.engines.spark", raising=False)
    with pytest.raises(ConfigError, match=r"engine.name=spark needs pyspark .*pip install 'cprec\[spark\]'"):
        importlib.import_module("data_prep.engines.spark")


def test_spark_without_java_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pyspark", reason="pyspark is not installed: pip install 'cprec[spark]'")
    from data_prep.engines.spark import start_session

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"engine\.name=spark needs Java"):
        start_session(memory_limit="1GB", threads=1, master=None, spill=tmp_path)


@pytest.mark.parametrize(("limit", "message"), [("2", "is no size"), ("400MB", "give 600MB or more")])
def test_spark_refuses_a_memory_limit_that_it_cannot_start_with(tmp_path: Path, limit: str, message: str) -> None:
    pytest.importorskip("pyspark", reason="pyspark is not installed: pip install 'cprec[spark]'")
    if shutil.which("java") is None:
        pytest.skip("there is no java on the PATH")
    from data_prep.engines.spark import start_session

    with pytest.raises(ConfigError, match=message):
        start_session(memory_limit=limit, threads=1, master=None, spill=tmp_path)


def test_of_neighbours_with_one_value_the_last_is_written_wherever_batches_end() -> None:
    rows = [("a", 1), ("a", 2), ("b", 3), ("c", 4), ("c", 5), ("c", 6), ("d", 7)]
    for ends in ([7], [1, 7], [2, 7], [2, 2, 4, 5, 7], [*range(8)]):
        batches = [pa.record_batch({"h": [h for h, _ in rows[a:b]], "n": [n for _, n in rows[a:b]]},
                                   schema=pa.schema([("h", pa.string()), ("n", pa.int64())]))
                   for a, b in itertools.pairwise([0, *ends])]
        assert [n for batch in last_of_each(batches, "h") for n in batch["n"].to_pylist()] == [2, 3, 6, 7]
    assert list(last_of_each([], "h")) == []
