"""What a preparation would read and make, from a bounded look into its sources; the check of its column mappings.

reads: sizes of all source files, of at most `FILES` files per dataset their first rows, the tokenizer. writes: nothing
but a temporary folder. Every number that is not exact is called about.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError, did_you_mean, raise_all
from cprec.format import Template
from cprec.tokenizer import Tokenizer, load_tokenizer
from data_prep.clean import clean_title
from data_prep.config import EngineSettings, PrepConfig
from data_prep.engine import Engine
from data_prep.engines.registry import connect
from data_prep.ingest import DatasetTasks, Staging, parse
from data_prep.mapping import need_columns
from data_prep.records import INTERACTIONS, ITEMS, Counts
from data_prep.sources import Input, Reader, Source, seekable, stored, unpacked
from data_prep.staging import Task, sample, tasks_of

FILES = 8
"""Files of a dataset's events, and of its items, that are looked into; the others are judged by their bytes."""
EVENTS, ITEM_ROWS = 20_000, 200_000
"""Rows that are looked at, per dataset."""
TITLES = 2_000
"""Titles that are tokenized, per dataset."""
HEAD_BYTES = 1 << 20
CHARS_PER_TOKEN = 2.6
"""Of a tokenizer that is yet to be trained: as of Complete Journey's, with 2,048 pieces."""
ITEMS_PER_HISTORY = 10
"""Assumed, for the share of the lead-ins."""
EVENT_BYTES = 60
"""On disk per event in all tables of stages 1 to 4 together; Complete Journey: 47."""


@dataclass(frozen=True)
class Rows:
    """How many rows files have: by their metadata, or judged by the part that was looked at."""

    n: int
    is_exact: bool

    def __str__(self) -> str:
        return f"{'' if self.is_exact else 'about '}{self.n:,} rows"


@dataclass(frozen=True)
class Look:
    """What was seen of one dataset."""

    name: str
    events: Rows
    items: Rows
    n_sampled: int
    by_domain: dict[str, int]
    """Domain -> sampled events."""
    n_titles: int
    tokens_per_event: float
    """Mean tokens of the line of a sampled title, by how often it occurs among the sampled events where it does."""


@dataclass(frozen=True)
class Estimate:
    """What the preparation would read and make."""

    looks: list[Look]
    n_events: dict[str, float]
    """Chosen domain -> events before cleaning."""
    n_tokens: float
    """Of the specific training histories; the mixed ones have as many again where everyone is in several domains."""
    packed_bytes: float
    staged_bytes: float
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The estimate for people."""
        yield "estimate, from a look at the first rows; cleaning, k-core and sequence options will leave less:"
        for look in self.looks:
            yield (f"  {look.name}: events {look.events}, items {look.items}; columns fit; from {look.n_sampled:,} "
                   f"events and {look.n_titles:,} titles: {look.tokens_per_event:.1f} tokens per event")
        for domain, n in self.n_events.items():
            yield f"  {domain}: about {_round(n):,} events"
        yield (f"  training corpora: about {_round(self.n_tokens):,} tokens in specific histories, "
               f"at most as many again in mixed ones")
        tables = EVENT_BYTES * sum(self.n_events.values())
        total = tables + self.packed_bytes + self.staged_bytes
        yield (f"  disk: at most about {_size(total)} (tables {_size(tables)}, packed rows "
               f"{_size(self.packed_bytes)}, sources staged as Parquet {_size(self.staged_bytes)})")
        yield from (f"  {note}" for note in self.notes)


def estimate(config: PrepConfig, staging: Staging, *, template: Template) -> Estimate:
    """Look into every dataset. Raises one DataError naming all whose columns or time stamps do not fit the config.

    The embedded engine looks, whatever the config's, in a temporary folder: a preparation may be at work in `out`.
    """
    tokenizer = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
    looks: list[Look] = []
    problems: list[str] = []
    staged_bytes = 0.0
    with (tempfile.TemporaryDirectory(prefix="cprec-") as folder,
          closing(connect(EngineSettings(), spill=Path(folder) / "spill")) as engine):
        for i, tasks in enumerate(staging.datasets):
            at = Path(folder) / str(i)
            at.mkdir()
            try:
                look, n_bytes = _look(tasks, at, engine=engine, template=template, tokenizer=tokenizer, config=config)
            except DataError as e:
                problems.append(str(e))
                continue
            looks.append(look)
            staged_bytes += n_bytes
    raise_all(problems, of="datasets", error=DataError)
    return _sum_up(config, looks, template, tokenizer, staged_bytes)


def _sum_up(config: PrepConfig, looks: list[Look], template: Template, tokenizer: Tokenizer | None,
            staged_bytes: float) -> Estimate:
    chosen = sorted([*config.domains.pretrain, *config.domains.unseen])
    n_events = dict.fromkeys(chosen, 0.0)
    n_tokens = 0.0
    frame = len(tokenizer.encode_start(template.lead_in)) if tokenizer else len(template.lead_in) / CHARS_PER_TOKEN
    lead_in = frame / ITEMS_PER_HISTORY
    train = config.split.quantiles[0] if config.split.t_valid is None else 1.0
    for look in looks:
        for domain, n in look.by_domain.items():
            if domain in n_events:
                events = look.events.n * n / look.n_sampled
                n_events[domain] += events
                is_learned = domain in config.domains.pretrain
                n_tokens += train * is_learned * events * (look.tokens_per_event + lead_in)
    seen = {d for look in looks for d in look.by_domain}
    notes = [f"note: no sampled event is of domain {d!r}; {did_you_mean(d, seen)}" for d in chosen if not n_events[d]]
    if tokenizer is None:
        notes.append(f"note: the tokenizer is yet to be trained; {CHARS_PER_TOKEN:g} characters are taken for a token")
    if config.split.t_valid is not None:
        notes.append("note: the share of events before split.t_valid is not known yet; all are counted as training")
    if config.replay:
        notes.append(f"note: not in the estimate: replay of {', '.join(r.name for r in config.replay)}")
    n_ids = tokenizer.vocab_size if tokenizer else config.tokenizer.train_vocab_size or 0
    return Estimate(looks, n_events, n_tokens, packed_bytes=2 * n_tokens * (2 if n_ids <= 1 << 16 else 4),
                    staged_bytes=staged_bytes, notes=notes)


def _look(tasks: DatasetTasks, folder: Path, *, engine: Engine, template: Template, tokenizer: Tokenizer | None,
          config: PrepConfig) -> tuple[Look, float]:
    """What is seen of one dataset, and about how many bytes its text files take as Parquet."""
    events, n_events, event_bytes = _sample_files(tasks.events, EVENTS, folder / "events")
    items, n_items, item_bytes = _sample_files(tasks.items, ITEM_ROWS, folder / "items")
    found, titled = parse(engine, DatasetTasks(tasks.dataset, events=events, items=items), Counts("estimate"))
    engine.write(found, folder / "e.parquet", schema=INTERACTIONS, order_by=["user_id", "ts_ms"])
    engine.write(titled, folder / "i.parquet", schema=ITEMS, order_by=ITEMS.names)
    found, titled = engine.read(folder / "e.parquet"), engine.read(folder / "i.parquet")
    by_domain = {str(r["domain"]): int(r["n"]) for r in engine.rows(
        found.group_by("domain").agg(n=found.count()).order_by("domain"))}
    fields = ["domain", "title", "brand", "category"]
    named = titled.filter(titled.title.notnull())
    bought = found.select("domain", "item_id").inner_join(named, ["domain", "item_id"])
    texts = bought if engine.count(bought) else named
    counted = engine.rows(texts.group_by(fields).agg(n=texts.count()).order_by(fields))
    every = max(len(counted) // TITLES, 1)
    lines = {_line(row, template, config): int(row["n"]) for row in counted[::every]}
    total = sum(_n_tokens([line], tokenizer, before=template.any_line) * n for line, n in lines.items())
    n_sampled = sum(by_domain.values())
    return Look(tasks.dataset.path, n_events, n_items, n_sampled, by_domain, len(lines),
                total / max(sum(lines.values()), 1)), event_bytes + item_bytes


def _line(row: dict[str, str | None], template: Template, config: PrepConfig) -> str:
    fields = {"domain": row["domain"] or ""}
    for name in ("title", "brand", "category"):
        text = clean_title(row[name] or "", max_chars=config.clean.max_title_chars)
        fields[name] = text.text if text else ""
    return template.line(fields)


def _n_tokens(lines: Sequence[str], tokenizer: Tokenizer | None, *, before: str) -> float:
    if tokenizer is None:
        return sum(len(line) for line in lines) / CHARS_PER_TOKEN
    return sum(len(ids) for ids in tokenizer.encode_after(before, lines))


def _sample_files(tasks: Sequence[Task], n_rows: int, folder: Path) -> tuple[tuple[Task, ...], Rows, float]:
    """The first rows of some of the files as tasks of their own; rows of all; bytes of all staged as Parquet."""
    folder.mkdir()
    chosen = [tasks[i * len(tasks) // FILES] for i in range(FILES)] if len(tasks) > FILES else list(tasks)
    places = tasks_of([t.input for t in chosen], folder)
    samples = [_sample(t, place.at, -(-n_rows // len(chosen))) for t, place in zip(chosen, places, strict=True)]
    all_bytes = sum(t.input.source.n_bytes for t in tasks)
    looked_bytes = sum(t.input.source.n_bytes for t in chosen)
    share = all_bytes / max(looked_bytes, 1)
    rows = Rows(round(sum(s.rows.n for s in samples) * share),
                is_exact=len(chosen) == len(tasks) and all(s.rows.is_exact for s in samples))
    staged = sum(s.staged_bytes for s in samples) * share
    return tuple(s.task for s in samples), rows, staged


@dataclass(frozen=True)
class _Sample:
    task: Task
    rows: Rows
    staged_bytes: float


def _sample(task: Task, at: Path, n_rows: int) -> _Sample:
    source, reader = task.input.source, task.input.reader
    if reader.kind == "parquet":
        n = _first_of_parquet(source, reader, at, n_rows)
        local = Task(Input(Source(source.label, str(at)), reader), at)
        return _Sample(local, Rows(n, is_exact=True), staged_bytes=source.n_bytes if source.is_remote else 0)
    table = sample(task.input, n_rows)
    pq.write_table(table, at, compression="zstd")
    rows = _rows_of_text(source)
    return _Sample(Task(task.input, at), rows, staged_bytes=at.stat().st_size * rows.n / max(table.num_rows, 1))


def _first_of_parquet(source: Source, reader: Reader, at: Path, n_rows: int) -> int:
    """Write the first rows of a Parquet file to `at`; returns how many it has."""
    with seekable(source) as raw:
        try:
            file = pq.ParquetFile(raw)
            names = file.schema_arrow.names
            need_columns(reader.fields, names, source=source.label)
            wanted = [n for n in names if any(n in f.of for f in reader.fields)]
            first = next(file.iter_batches(batch_size=n_rows, columns=wanted), None)
        except (pa.ArrowInvalid, OSError) as e:
            raise DataError(f"{source.label}: not readable as Parquet: {str(e).splitlines()[0]}; replace the file, or "
                            f"name another") from None
        schema = pa.schema([file.schema_arrow.field(n) for n in wanted])
        table = schema.empty_table() if first is None else pa.table(first)
        pq.write_table(table, at)
        return int(file.metadata.num_rows)


def _rows_of_text(source: Source) -> Rows:
    """Lines of a text file, judged by its first MiB: exact when that is all of it."""
    with stored(source) as stream:
        head: bytes = unpacked(stream, source).read(HEAD_BYTES)
        n_read = stream.n_read
    n_lines = head.count(b"\n") + (not head.endswith(b"\n") and bool(head))
    if len(head) < HEAD_BYTES:
        return Rows(n_lines, is_exact=False)  # a header or a malformed line may be among them
    return Rows(round(n_lines * source.n_bytes / max(n_read, 1)), is_exact=False)


def _round(n: float) -> int:
    """Two digits, so that it looks like what it is."""
    return int(float(f"{n:.2g}"))


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")
