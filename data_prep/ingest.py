"""Stage 1, ingest: the files of all datasets, staged, parsed, and joined in one schema.

reads: what the config's `datasets` and `replay` name. writes: `staged/`, `interactions/ingested.parquet`,
`items/ingested.parquet`, `texts/<name>.parquet`. Text is read by the worker pool, one file per worker; the rest is the
engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cprec.errors import DataError, did_you_mean, raise_all
from data_prep.config import Dataset, PrepConfig
from data_prep.engine import Engine, Table
from data_prep.parsers.registry import PARSERS
from data_prep.records import INTERACTIONS, ITEMS, Counts, Layout
from data_prep.replay import TEXT, replay_inputs, write_texts
from data_prep.sources import Input, Source
from data_prep.staging import Task, as_table, count_staged, read_staged, source_hash, stage_all, tasks_of
from data_prep.workers import Workers


@dataclass(frozen=True)
class DatasetTasks:
    """Where the files of one dataset are staged."""

    dataset: Dataset
    events: tuple[Task, ...]
    items: tuple[Task, ...]


@dataclass(frozen=True)
class Staging:
    """Where every source file is staged: by dataset, and by name of a replay corpus."""

    datasets: tuple[DatasetTasks, ...]
    replay: dict[str, tuple[Task, ...]]

    @property
    def tasks(self) -> list[Task]:
        """All of them, in the order of their numbers."""
        of_datasets = [t for d in self.datasets for t in (*d.events, *d.items)]
        return of_datasets + [t for tasks in self.replay.values() for t in tasks]

    @property
    def sources(self) -> dict[str, Source]:
        """Every source file, by the name that manifests give it."""
        return {t.input.source.label: t.input.source for t in self.tasks}

    def replay_files(self, name: str) -> list[tuple[Path, str]]:
        """(Parquet file, name of the column with the documents) of a replay corpus, for `replay_texts`."""
        return [(t.parquet, t.input.reader.fields[0].of[0] if t.input.reader.kind == "parquet" else TEXT)
                for t in self.replay[name]]

    @property
    def outputs(self) -> list[Path]:
        """The staged files that later stages read."""
        return [t.at for tasks in self.replay.values() for t in tasks if not t.is_in_place]

    def source_hashes(self) -> dict[str, str]:
        """Hash of every source file as it is now."""
        return {t.input.source.label: source_hash(t, read_staged(t)) for t in self.tasks}


def plan_staging(config: PrepConfig, folder: Path) -> Staging:
    """Find every source file and number it. Raises one DataError naming all datasets that lack a file."""
    problems: list[str] = []
    inputs: list[Input] = []

    def tasks(found: Sequence[Input]) -> tuple[Task, ...]:
        inputs.extend(found)
        return tuple(tasks_of(inputs, folder)[len(inputs) - len(found):])

    datasets: list[DatasetTasks] = []
    for dataset in config.datasets:
        try:
            found = PARSERS[dataset.parser].inputs(dataset)
            datasets.append(DatasetTasks(dataset, events=tasks(found.events), items=tasks(found.items)))
        except DataError as e:
            problems.append(str(e))
    replay: dict[str, tuple[Task, ...]] = {}
    for corpus in config.replay:
        try:
            replay[corpus.name] = tasks(replay_inputs(corpus))
        except DataError as e:
            problems.append(str(e))
    raise_all(problems, of="datasets", error=DataError)
    return Staging(tuple(datasets), replay)


@dataclass(frozen=True)
class Ingested:
    """What the stage has to report, and the sources' hashes, taken while they were read."""

    counts: Counts
    source_hashes: dict[str, str]


def ingest(engine: Engine, layout: Layout, config: PrepConfig, staging: Staging, workers: Workers) -> Ingested:
    """Run the stage; every line that is set aside and every value that is repaired is in the counts."""
    counts = Counts("ingest")
    staged = stage_all(staging.tasks, workers)
    count_staged(staged, counts, max_malformed=config.ingest.max_malformed)
    parsed = [parse(engine, tasks, counts) for tasks in staging.datasets]
    interactions = engine.union([p[0] for p in parsed])
    items = engine.union([p[1] for p in parsed])
    _require_domains(engine, interactions, items, config)
    counts.add("events", engine.write(interactions, layout.raw_interactions, schema=INTERACTIONS,
                                      order_by=["user_id", "ts_ms", "domain", "item_id", "rating"]))
    counts.add("items", engine.write(items, layout.raw_items, schema=ITEMS, order_by=ITEMS.names))
    for name in staging.replay:
        write_texts(layout.texts(name), staging.replay_files(name), counts=counts)
    return Ingested(counts, {file.label: file.hash for file in staged})


def parse(engine: Engine, tasks: DatasetTasks, counts: Counts) -> tuple[Table, Table]:
    """(interactions, items) of one staged dataset, in the one schema, lazy but for the largest time stamp.

    Raises DataError where all its files together have no row.
    """
    for what, files in (("events", tasks.events), ("items", tasks.items)):
        if not any(pq.read_metadata(t.parquet).num_rows for t in files):
            named = ", ".join(t.input.source.label for t in files[:3])
            raise DataError(f"dataset {tasks.dataset.path}: no row of {what} in {named}{', ...' if files[3:] else ''}; "
                            f"fetch or write them again, or take the dataset out")
    with engine.errors_named():
        return PARSERS[tasks.dataset.parser].parse(
            tasks.dataset, as_table(engine, tasks.events), as_table(engine, tasks.items), counts)


def _require_domains(engine: Engine, interactions: Table, items: Table, config: PrepConfig) -> None:
    """Raise one DataError naming every configured domain without events, or without items."""
    problems: list[str] = []
    for what, table in (("events", interactions), ("items", items)):
        found = {row["domain"] for row in engine.rows(table.select("domain").distinct())} - {None}
        problems += [f"domain {d!r}: no dataset has {what} of it; {did_you_mean(d, found)}"
                     for d in (*config.domains.pretrain, *config.domains.unseen) if d not in found]
    raise_all(problems, of="domains", error=DataError)
