"""The engine of a cluster: Ibis on Spark, in this process with local threads, or wherever `master` or spark-submit say.

reads: Parquet, by every executor: sources, `out` and `spill` must lie on a file system that all nodes mount under the
same path. writes: sorted parts below `spill`, by every executor, which the driver streams into the one file of a
result, keeping a batch in memory; shuffles go to Spark's own local folders (`spill` in local mode). Starting costs
seconds and so does every query, on any data: it is for data that one machine cannot hold.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import ConfigError, DataError
from data_prep.disk import FULL_TEXTS, disk_full
from data_prep.engine import ROW_GROUP_ROWS, Engine, Table

try:
    from py4j.protocol import Py4JError, Py4JNetworkError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import expr
except ImportError as e:
    raise ConfigError(f"engine.name=spark needs pyspark ({e}); run: pip install 'cprec[spark]'") from None

LOGGING = """# errors only, without their stack traces: what a user can act on is raised
rootLogger.level = error
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = spark: %m%n%ex{0}
"""
LEAST_MB = 500
"""Spark does not start with a heap below 450 MiB."""
OUT_OF_MEMORY = ("OutOfMemoryError", "UNABLE_TO_ACQUIRE_MEMORY", "Java heap space", "GC overhead limit")
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
QUERY_SETTINGS = {
    "spark.sql.ansi.enabled": "true",  # a cast or sum that cannot be is an error, as in DuckDB, not null or wrapped
    "spark.sql.caseSensitive": "true",  # columns `id` and `ID` are two
    "spark.sql.legacy.parquet.nanosAsLong": "true",  # else such files cannot be read at all; `read` makes them times
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
}


class SparkEngine(Engine):
    """A Spark session. One that exists already is used as it is and left running; under spark-submit, its options
    count; otherwise `master` (default: this machine, `threads` of it), `memory_limit` per process and `spill` do."""

    def __init__(self, *, memory_limit: str, threads: int | None, master: str | None, spill: Path) -> None:
        self._spill = spill.absolute()
        self._memory_limit = memory_limit
        spill.mkdir(parents=True, exist_ok=True)
        existing = SparkSession.getActiveSession()
        session = existing or start_session(
            memory_limit=memory_limit, threads=threads, master=master, spill=self._spill)
        self._started = None if existing else session
        self._session = session.newSession()  # SQL settings of its own: somebody else's session stays as it was
        for name, value in QUERY_SETTINGS.items():
            self._session.conf.set(name, value)
        self._con = ibis.pyspark.connect(self._session)  # sets the time zone to UTC
        self._parts = self._spill / f"spark-{uuid.uuid4().hex}"

    def close(self) -> None:
        shutil.rmtree(self._parts, ignore_errors=True)
        if self._started is not None:
            self._started.stop()

    def read(self, path: str | Path | Sequence[Path]) -> Table:
        paths = [Path(p).absolute() for p in ([path] if isinstance(path, (str, Path)) else path)]
        try:
            times = _nanosecond_columns(paths[0])
            frame = self._session.read.parquet(*[self._url(p) for p in paths])
        except (PySparkException, Py4JError, OSError, pa.ArrowException) as e:
            raise DataError(f"{', '.join(map(str, paths))}: not readable as Parquet: {_first_line(e)}; replace the "
                            f"file, or name another") from None
        types = dict(frame.dtypes)
        for name in (t for t in times if types[t] == "bigint"):  # the older INT96 arrives as a time
            column = name.replace("`", "``")
            frame = frame.withColumn(name, expr(f"timestamp_micros((`{column}` - pmod(`{column}`, 1000)) div 1000)"))
        name = f"t{uuid.uuid4().hex}"
        frame.createOrReplaceTempView(name)
        return self._con.table(name)

    def rows(self, table: Table) -> list[dict[str, Any]]:
        with self.errors_named():
            return [row.asDict(recursive=True) for row in self._session.sql(self._con.compile(table)).collect()]

    def batches(self, table: Table) -> Iterator[pa.RecordBatch]:
        # the driver must not hold the result: executors write it in parts, range-partitioned where it is sorted
        folder = self._parts / uuid.uuid4().hex
        try:
            with self.errors_named():
                self._session.sql(self._con.compile(table)).write.parquet(f"file://{folder}")
            parts = sorted(folder.glob("part-*.parquet"), key=lambda p: int(p.name.split("-")[1]))
            for part in parts:
                with pq.ParquetFile(part) as file:
                    yield from file.iter_batches(ROW_GROUP_ROWS)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _url(self, path: Path) -> str:
        """The path as Spark has to be told it: its pattern characters escaped, and, as Spark reads no file whose name
        starts with `_` or `.`, through a link."""
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if path.name.startswith(("_", ".")) or ":" in path.name:
            self._parts.mkdir(exist_ok=True)
            link = self._parts / f"{uuid.uuid4().hex}.parquet"
            link.symlink_to(path)
            path = link
        return "file://" + re.sub(r"([{}\[\]*?\\,])", r"\\\1", str(path))

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except (PySparkException, Py4JError, ConnectionError) as e:
            said = str(e)
            full = next((text for text in FULL_TEXTS if text in said), None)
            if full:
                raise disk_full(self._spill, full) from None
            # a JVM that died of it answers no more
            if isinstance(e, (Py4JNetworkError, ConnectionError)) or any(text in said for text in OUT_OF_MEMORY):
                raise ConfigError(f"engine.memory_limit={self._memory_limit!r} (under spark-submit: its "
                                  f"--driver-memory or --executor-memory) is too small for this data, even with "
                                  f"spilling; raise it, or lower engine.threads: {_first_line(e)}") from None
            raise DataError(f"the engine cannot read a source: {_first_line(e)}") from None


def start_session(*, memory_limit: str, threads: int | None, master: str | None, spill: Path) -> SparkSession:
    """A new session. Raises ConfigError when Java is missing, or when Spark does not start with these settings."""
    if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
        raise ConfigError("engine.name=spark needs Java, and there is no `java` on the PATH; install a JDK (17 or 21), "
                          "or set JAVA_HOME to one")
    builder = SparkSession.builder.appName("cprec prepare")
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # not under spark-submit, which says all of these
        for name, value in _options(memory_limit, threads, master, spill).items():
            builder = builder.config(name, value)
    try:
        return builder.getOrCreate()
    except (PySparkException, Py4JError, RuntimeError) as e:
        raise ConfigError(f"engine: Spark does not start with master={master!r}, memory_limit={memory_limit!r}: "
                          f"{_first_line(e)}; see what Java said above") from None


def _options(memory_limit: str, threads: int | None, master: str | None, spill: Path) -> dict[str, str]:
    """How Spark is to start where nobody else has said it."""
    spill.mkdir(parents=True, exist_ok=True)
    logging = spill / "log4j2.properties"
    logging.write_text(LOGGING, encoding="utf-8")
    heap = f"{_megabytes(memory_limit)}m"
    options = {
        "spark.master": master or f"local[{threads or '*'}]", "spark.driver.memory": heap,
        "spark.executor.memory": heap, "spark.ui.showConsoleProgress": "false", "spark.log.level": "ERROR",
        "spark.driver.extraJavaOptions": f'"-Dlog4j2.configurationFile={logging.absolute()}"'}
    if master is None or master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # else it warns about the host's name
        options |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
                    "spark.ui.enabled": "false", "spark.local.dir": str(spill)}
    return options


def _megabytes(limit: str) -> int:
    """A size such as `2GB` or `1.5GiB` in MiB, as the JVM counts. Raises ConfigError for another, or one too small."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?B)\s*", limit.upper())
    if match is None:
        raise ConfigError(f"engine.memory_limit={limit!r} is no size; write e.g. 2GB")
    size = int(float(match[1]) * UNITS[match[2]] / 2**20)
    if size < LEAST_MB:
        raise ConfigError(f"engine.memory_limit={limit!r} is below what Spark starts with; give 600MB or more")
    return size


def _nanosecond_columns(path: Path) -> list[str]:
    """Names of the time stamp columns in nanoseconds, which Spark reads as plain numbers."""
    schema = pq.read_schema(path)
    return [f.name for f in schema if pa.types.is_timestamp(f.type) and f.type.unit == "ns"]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
