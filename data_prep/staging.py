"""Every source file that is not local Parquet, read once into Parquet: engines read nothing else.

reads: the sources, each as one stream that is hashed on the way. writes: `staged/<n>.parquet` (the file's rows in its
order, wanted columns only; of remote Parquet a copy) and, last and by rename, `staged/<n>.json`, what was met.
A file whose source and reader are those of its stamp is kept. Keeps a few blocks of 8 MiB per worker in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cprec.errors import DataError, n_of, raise_all
from cprec.format import file_hash, write_atomically
from cprec.log import get_logger
from data_prep.engine import Engine, Table, write_parquet
from data_prep.mapping import chosen
from data_prep.readers import Malformed, Tally, malformed_error, read_tables, schema_of
from data_prep.records import Counts
from data_prep.sources import Input, Reader, empty, stored, unpacked
from data_prep.workers import Workers

log = get_logger(__name__)

MOST_SAMPLED = 10
"""A source whose bytes are all read is looked at wholly unless it has this many times the rows asked for."""


class Staged(BaseModel):
    """What became of one source file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    hash: str
    """Xxh3-128 of the source as stored."""
    version: str | None
    """What a remote store called it, if it did: see `Source.version`."""
    reader: Reader
    n_bytes: int
    """Of the Parquet file."""
    n_rows: int
    n_lines: int
    n_malformed: int
    first_malformed: tuple[Malformed, ...]
    n_repaired: int
    n_not_numbers: int
    n_inner_lines: int


@dataclass(frozen=True)
class Task:
    """One source file, and where it goes; local Parquet stays where it is."""

    input: Input
    at: Path

    @property
    def is_in_place(self) -> bool:
        return self.input.reader.kind == "parquet" and not self.input.source.is_remote

    @property
    def parquet(self) -> Path:
        """The file that an engine reads."""
        return self.input.source.path if self.is_in_place else self.at

    @property
    def stamp(self) -> Path:
        return self.at.with_suffix(".json")


def tasks_of(inputs: Sequence[Input], folder: Path) -> list[Task]:
    """The tasks of all source files, numbered in their order."""
    return [Task(i, folder / f"{n:05d}.parquet") for n, i in enumerate(inputs)]


def stage_all(tasks: Sequence[Task], workers: Workers) -> list[Staged]:
    """Stage every file that is not staged yet; the bytes do not depend on the number of workers. What an earlier
    config left in the folder is removed."""
    staged = list(workers.run(stage, tasks, n_tasks=len(tasks), label="read sources"))
    ours = {path for task in tasks if not task.is_in_place for path in (task.at, task.stamp)}
    for folder in {task.at.parent for task in tasks}:
        for path in sorted(folder.glob("*")):
            if path not in ours:
                path.unlink()
    return staged


def stage(task: Task) -> Staged:
    """Stage one file. Raises DataError when it cannot be read, or is mostly malformed."""
    standing = read_staged(task)
    if standing is not None and source_hash(task, standing) == standing.hash:
        log.debug("%s: staged earlier, kept", standing.label)
        return standing
    source, reader = task.input.source, task.input.reader
    version, tally = source.version, Tally()
    if task.is_in_place:
        source_digest, n_rows = file_hash(source.path), _n_rows(source.path, source.label)
    else:
        task.at.parent.mkdir(parents=True, exist_ok=True)
        task.stamp.unlink(missing_ok=True)
        with stored(source) as stream:
            if reader.kind == "parquet":
                _copy(stream.pieces(), task.at)
                n_rows = _n_rows(task.at, source.label)
            else:
                tables = read_tables(unpacked(stream, source), reader, label=source.label, tally=tally)
                n_rows = write_parquet((b for t in tables for b in t.to_batches()), task.at, schema=schema_of(reader))
            source_digest = stream.hash()
    staged = Staged(label=source.label, hash=source_digest, version=version, reader=reader,
                    n_bytes=task.parquet.stat().st_size, n_rows=n_rows, n_lines=tally.n_lines,
                    n_malformed=tally.n_malformed, first_malformed=tuple(tally.first_malformed),
                    n_repaired=tally.n_repaired, n_not_numbers=tally.n_not_numbers,
                    n_inner_lines=tally.n_inner_lines)
    if not task.is_in_place:
        write_atomically(task.stamp, staged.model_dump_json(indent=1))
    return staged


def read_staged(task: Task) -> Staged | None:
    """The stamp of a file that was staged with this reader from a source of this name; None where there is none."""
    if task.is_in_place or not task.stamp.is_file():
        return None
    try:
        staged = Staged.model_validate_json(task.stamp.read_text(encoding="utf-8"))
    except ValidationError:  # of another version of this program
        return None
    is_whole = task.at.is_file() and task.at.stat().st_size == staged.n_bytes
    is_same = staged.label == task.input.source.label and staged.reader == task.input.reader
    return staged if is_whole and is_same else None


def source_hash(task: Task, standing: Staged | None) -> str:
    """Hash of the source as it is now; of a remote one that has still the version of `standing`, the hash there."""
    source = task.input.source
    if not source.is_remote:
        return file_hash(source.path)
    if standing is not None and standing.version is not None and standing.version == source.version:
        return standing.hash
    if standing is not None and standing.version is None:
        log.warning("%s: the server tells no version of it (ETag, Last-Modified), so it is read again to see whether "
                    "it is the same; a local copy spares that", source.label)
    with stored(source) as stream:
        return stream.hash()


def as_table(engine: Engine, tasks: Sequence[Task]) -> Table:
    """The rows of staged files that are read alike, as one lazy table with our names."""
    reader, label = tasks[0].input.reader, tasks[0].input.source.label
    table = engine.read([t.parquet for t in tasks])
    return chosen(table, reader, source=label) if reader.kind == "parquet" else table


@dataclass(frozen=True)
class Sample:
    """The beginning of a text source."""

    table: pa.Table
    is_whole: bool
    """It was read to its end, and the table has all its rows."""
    tally: Tally


def sample(task_input: Input, n_rows: int = 1000) -> Sample:
    """The first rows of a text source, under our names, from its first block; all of a source that ends within it.
    Raises DataError as staging would."""
    source, reader, tally = task_input.source, task_input.reader, Tally()
    with stored(source) as stream:
        tables = read_tables(unpacked(stream, source), reader, label=source.label, tally=tally)
        found = [*islice(tables, 1)]
        is_whole = not found
        while found and stream.n_read >= source.n_bytes and sum(t.num_rows for t in found) < MOST_SAMPLED * n_rows:
            table = next(tables, None)
            if table is None:
                is_whole = True
                break
            found.append(table)
    rows = pa.concat_tables([schema_of(reader).empty_table(), *found])
    return Sample(rows if is_whole else rows.slice(0, n_rows), is_whole, tally)


def count_staged(staged: Sequence[Staged], counts: Counts, *, max_malformed: float) -> None:
    """Count what was met in each file and quote the first malformed lines; of each file one in the log too.

    Raises one DataError naming every file of whose lines more than `max_malformed` (a share) are malformed.
    """
    problems: list[str] = []
    counts.add("source files read", len(staged))
    counts.add("rows read from them", sum(file.n_rows for file in staged))
    for file in staged:
        repaired = f"read as {file.reader.fallback}" if file.reader.fallback else "with broken characters, repaired"
        if file.n_malformed > max_malformed * file.n_lines:
            problems.append(str(malformed_error(file.label, file.n_malformed, file.n_lines, file.first_malformed)))
        for what, n in (("malformed lines set aside", file.n_malformed),
                        (f"texts {repaired}", file.n_repaired),
                        ("values that are no number, taken as missing", file.n_not_numbers),
                        ("lines inside quoted values, or blank", file.n_inner_lines)):
            if n:
                counts.add(f"{file.label}: {what}", n)
        if file.n_malformed:
            log.warning("%s: %s of %s malformed, set aside; report.md quotes the first %d: %s", file.label,
                        f"{file.n_malformed:,}", n_of(file.n_lines, "line"), len(file.first_malformed),
                        file.first_malformed[0])
        for line in file.first_malformed:
            counts.add(f"{file.label}: malformed {line}", 1)
    raise_all(problems, of="sources", error=DataError)


def _copy(pieces: Iterator[bytes], at: Path) -> None:
    partial = at.with_name(at.name + ".partial")
    with partial.open("wb") as f:
        for piece in pieces:
            f.write(piece)
    partial.replace(at)


def _n_rows(path: Path, label: str) -> int:
    if not path.stat().st_size:
        raise empty(label)
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"{label}: not readable as Parquet: {str(e).splitlines()[0]}; replace the file, or name "
                        f"another") from None
