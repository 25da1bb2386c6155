"""A bounded look into the sources: their first rows, parsed as a preparation would, and what these tell.

reads: of at most `FILES` files per dataset their first rows. writes: these as Parquet, into a folder that is given. A
file that was read to its end within that is looked at wholly, and what is said of it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError, n_of
from cprec.template import Template
from cprec.tokenizer import Tokenizer
from data_prep.clean import clean_title
from data_prep.engine import Engine, Table
from data_prep.ingest import DatasetTasks, parse
from data_prep.mapping import need_columns
from data_prep.records import INTERACTIONS, ITEMS, Counts
from data_prep.replay import TEXT, replay_texts
from data_prep.sources import Input, Reader, Source, empty, seekable, stored, unpacked
from data_prep.staging import Task, sample, tasks_of

FILES = 8
"""Files of a dataset's events, and of its items, that are looked into; the others are judged by their bytes."""
EVENTS, ITEM_ROWS, TEXTS = 20_000, 200_000, 200
"""Rows that are looked at, per dataset; documents, per replay corpus."""
TITLES = 2_000
"""Titles that are tokenized, per dataset."""
HEAD_BYTES = 1 << 20
CHARS_PER_TOKEN = 2.6
"""Of a tokenizer that is yet to be trained: as of Complete Journey's, with 2,048 pieces."""


@dataclass(frozen=True)
class Rows:
    """How many rows files have, and what was met in the part that was looked at."""

    n: int
    is_exact: bool
    """By the files' metadata, or read to their ends; else judged by the part that was looked at."""
    is_whole: bool = False
    """Every row was looked at."""
    n_lines: int = 0
    """Of text files, looked at."""
    n_malformed: int = 0
    staged_bytes: float = 0.0
    """Of all files, staged as Parquet; 0 where they stay in place."""

    def __str__(self) -> str:
        malformed = f" ({self.n_malformed:,} of {n_of(self.n_lines, 'line')} looked at malformed, " \
                    f"{self.n_malformed / self.n_lines:.2%})" if self.n_lines else ""
        return f"{'' if self.is_exact else 'about '}{n_of(self.n, 'row')}{malformed}"


@dataclass(frozen=True)
class Look:
    """What was seen of one dataset."""

    name: str
    events: Rows
    items: Rows
    times: Mapping[str, npt.NDArray[np.int64]]
    """Domain -> time (ms) of each of its events that was looked at, ascending."""
    n_titles: int
    tokens_per_event: float
    """Mean tokens of the line of a sampled title, by how often it occurs among the sampled events where it does."""
    bytes_per_event: float
    """On disk, in one table."""
    bytes_per_item: float
    at: Path
    """Folder of `e.parquet` and `i.parquet`, what was looked at in the one schema."""

    @property
    def n_sampled(self) -> int:
        return sum(map(len, self.times.values()))

    @property
    def per_sampled(self) -> float:
        """Events for each that was looked at."""
        return self.events.n / max(self.n_sampled, 1)


@dataclass(frozen=True)
class TextLook:
    """What was seen of one replay corpus."""

    name: str
    texts: Rows
    tokens_per_text: float
    bytes_per_text: float


def look_at(tasks: DatasetTasks, folder: Path, *, engine: Engine, template: Template, tokenizer: Tokenizer | None,
            max_title_chars: int) -> Look:
    """What is seen of one dataset. Raises DataError where its columns or time stamps do not fit the config."""
    events, n_events = _sample_files(tasks.events, EVENTS, folder / "events")
    items, n_items = _sample_files(tasks.items, ITEM_ROWS, folder / "items")
    found, titled = parse(engine, DatasetTasks(tasks.dataset, events=events, items=items), Counts("estimate"))
    n_found = engine.write(found, folder / "e.parquet", schema=INTERACTIONS, order_by=["user_id", "ts_ms"])
    n_titled = engine.write(titled, folder / "i.parquet", schema=ITEMS, order_by=ITEMS.names)
    found, titled = engine.read(folder / "e.parquet"), engine.read(folder / "i.parquet")
    lines = _lines(engine, found, titled, template, max_title_chars)
    total = sum(_n_tokens([line], tokenizer, before=template.any_line) * n for line, n in lines.items())
    return Look(
        tasks.dataset.path, n_events, n_items, _times(engine, found), len(lines), total / max(sum(lines.values()), 1),
        bytes_per_event=(folder / "e.parquet").stat().st_size / max(n_found, 1),
        bytes_per_item=(folder / "i.parquet").stat().st_size / max(n_titled, 1), at=folder)


def look_at_texts(name: str, tasks: Sequence[Task], folder: Path, *, tokenizer: Tokenizer | None) -> TextLook:
    """What is seen of one replay corpus. Raises DataError where a file has no such column of text."""
    samples, n_texts = _sample_files(tasks, TEXTS, folder)
    files = [(t.parquet, t.input.reader.fields[0].of[0] if t.input.reader.kind == "parquet" else TEXT) for t in samples]
    texts = [text for some in replay_texts(files, name=name, counts=Counts("estimate")) for text in some]
    n_sampled = max(sum(pq.read_metadata(path).num_rows for path, _ in files), 1)
    pq.write_table(pa.table({TEXT: pa.array(texts, pa.string())}), folder / "texts.parquet", compression="zstd")
    ids = [len(t) / CHARS_PER_TOKEN for t in texts] if tokenizer is None else map(len, tokenizer.encode(texts))
    return TextLook(name, n_texts, tokens_per_text=(sum(ids) + 2 * len(texts)) / n_sampled,
                    bytes_per_text=(folder / "texts.parquet").stat().st_size / n_sampled)


def unmatched(engine: Engine, looks: Sequence[Look], domains: Sequence[str]) -> list[str]:
    """The domains none of whose events' item ids is among its items, with both counts; of those whose events, and of
    all items, every row was looked at."""
    if not looks or not all(look.items.is_whole for look in looks):
        return []
    events, items = (engine.union([engine.read(look.at / name) for look in looks]).select("domain", "item_id")
                     .distinct() for name in ("e.parquet", "i.parquet"))
    known = events.semi_join(items, ["domain", "item_id"])
    n_events, n_items, n_known = (
        {row["domain"]: int(row["n"]) for row in engine.rows(t.group_by("domain").agg(n=t.count()))}
        for t in (events.filter(events.item_id.notnull()), items, known))
    whole = [d for d in domains if all(look.events.is_whole for look in looks if d in look.times)]
    return [f"domain {d}: none of the {n_of(n_events[d], 'item id')} of its events is among its "
            f"{n_of(n_items.get(d, 0), 'item')}" for d in whole if n_events.get(d) and not n_known.get(d)]


def _times(engine: Engine, found: Table) -> dict[str, npt.NDArray[np.int64]]:
    found = found.filter(found.domain.notnull() & found.ts_ms.notnull())
    table = pa.Table.from_batches([*engine.batches(found.select("domain", "ts_ms"))],
                                  pa.schema([("domain", pa.string()), ("ts_ms", pa.int64())]))
    domain, times = table["domain"].combine_chunks().dictionary_encode(), table["ts_ms"].to_numpy()
    if not table.num_rows:
        return {}
    codes = domain.indices.to_numpy()
    return {name: np.sort(times[codes == code]) for code, name in enumerate(domain.dictionary.to_pylist())}


def _lines(engine: Engine, found: Table, titled: Table, template: Template, max_chars: int) -> dict[str, int]:
    """Some of the items' lines -> how many of the events are theirs."""
    fields = ["domain", "title", "brand", "category"]
    named = titled.filter(titled.title.notnull())
    bought = found.select("domain", "item_id").inner_join(named, ["domain", "item_id"])
    texts = bought if engine.count(bought) else named
    counted = engine.rows(texts.group_by(fields).agg(n=texts.count()).order_by(fields))
    every = max(len(counted) // TITLES, 1)
    return {_line(row, template, max_chars): int(row["n"]) for row in counted[::every]}


def _line(row: dict[str, str | None], template: Template, max_chars: int) -> str:
    fields = {"domain": row["domain"] or ""}
    for name in ("title", "brand", "category"):
        text = clean_title(row[name] or "", max_chars=max_chars)
        fields[name] = text.text if text else ""
    return template.line(fields)


def _n_tokens(lines: Sequence[str], tokenizer: Tokenizer | None, *, before: str) -> float:
    if tokenizer is None:
        return sum(len(line) for line in lines) / CHARS_PER_TOKEN
    return sum(len(ids) for ids in tokenizer.encode_after(before, lines))


def _sample_files(tasks: Sequence[Task], n_rows: int, folder: Path) -> tuple[tuple[Task, ...], Rows]:
    """The first rows of some of the files as tasks of their own; the rows of all."""
    folder.mkdir(parents=True)
    chosen = [tasks[i * len(tasks) // FILES] for i in range(FILES)] if len(tasks) > FILES else list(tasks)
    places = tasks_of([t.input for t in chosen], folder)
    samples = [_sample(t, place.at, -(-n_rows // len(chosen))) for t, place in zip(chosen, places, strict=True)]
    all_bytes = sum(t.input.source.n_bytes for t in tasks)
    looked_bytes = sum(t.input.source.n_bytes for t in chosen)
    share, is_all = all_bytes / max(looked_bytes, 1), len(chosen) == len(tasks)
    rows = [s.rows for s in samples]
    return tuple(s.task for s in samples), Rows(
        round(sum(r.n for r in rows) * share), is_exact=is_all and all(r.is_exact for r in rows),
        is_whole=is_all and all(r.is_whole for r in rows), n_lines=sum(r.n_lines for r in rows),
        n_malformed=sum(r.n_malformed for r in rows), staged_bytes=sum(r.staged_bytes for r in rows) * share)


@dataclass(frozen=True)
class _Sample:
    task: Task
    rows: Rows


def _sample(task: Task, at: Path, n_rows: int) -> _Sample:
    source, reader = task.input.source, task.input.reader
    if reader.kind == "parquet":
        n = _first_of_parquet(source, reader, at, n_rows)
        local = Task(Input(Source(source.label, str(at)), reader), at)
        return _Sample(local, Rows(n, is_exact=True, is_whole=n <= n_rows,
                                   staged_bytes=source.n_bytes if source.is_remote else 0))
    seen = sample(task.input, n_rows)
    pq.write_table(seen.table, at, compression="zstd")
    n = seen.table.num_rows if seen.is_whole else _lines_of_text(source)
    return _Sample(Task(task.input, at), Rows(
        n, is_exact=seen.is_whole, is_whole=seen.is_whole, n_lines=seen.tally.n_lines,
        n_malformed=seen.tally.n_malformed, staged_bytes=at.stat().st_size * n / max(seen.table.num_rows, 1)))


def _first_of_parquet(source: Source, reader: Reader, at: Path, n_rows: int) -> int:
    """Write the first rows of a Parquet file to `at`; returns how many it has."""
    if not source.n_bytes:
        raise empty(source.label)
    with seekable(source) as raw:
        try:
            file = pq.ParquetFile(raw)
            names = file.schema_arrow.names
            need_columns(reader, names, source=source.label)
            wanted = [n for n in names if any(n in f.of for f in reader.fields)]
            first = next(file.iter_batches(batch_size=n_rows, columns=wanted), None)
        except (pa.ArrowInvalid, OSError) as e:
            raise DataError(f"{source.label}: not readable as Parquet: {str(e).splitlines()[0]}; replace the file, or "
                            f"name another") from None
        schema = pa.schema([file.schema_arrow.field(n) for n in wanted])
        table = schema.empty_table() if first is None else pa.table(first)
        pq.write_table(table, at)
        return int(file.metadata.num_rows)


def _lines_of_text(source: Source) -> int:
    """Lines of a text file, judged by its first MiB."""
    with stored(source) as stream:
        head: bytes = unpacked(stream, source).read(HEAD_BYTES)
        n_read = stream.n_read
    return round(head.count(b"\n") * source.n_bytes / max(n_read, 1))
