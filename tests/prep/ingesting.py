"""Stage 1 for one dataset, for tests: its files staged and parsed, as tables of the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import shops

from cprec.settings import parse_settings
from data_prep.config import Dataset
from data_prep.ingest import DatasetTasks
from data_prep.ingest import parse as parse_dataset
from data_prep.parsers.registry import PARSERS
from data_prep.records import INTERACTIONS, ITEMS, Counts
from data_prep.staging import count_staged, stage_all, tasks_of
from data_prep.workers import Workers


def parse(tmp_path: Path, **values: Any) -> tuple[pa.Table, pa.Table]:
    """(interactions, items) as tables of the schema."""
    events, items, _ = ingested(tmp_path, **values)
    return events, items


def ingested(tmp_path: Path, *, max_malformed: float = 0.001,
             **values: Any) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """(interactions, items, counts) of one dataset, staged and parsed."""
    dataset = parse_settings(Dataset, values, source="test")
    found = PARSERS[dataset.parser].inputs(dataset)
    all_tasks = tasks_of([*found.events, *found.items], tmp_path / "staged")
    n = len(found.events)
    counts = Counts("ingest")
    count_staged(stage_all(all_tasks, Workers(1)), counts, max_malformed=max_malformed)
    engine = shops.engine(tmp_path)
    interactions, items = parse_dataset(engine, DatasetTasks(dataset, tuple(all_tasks[:n]), tuple(all_tasks[n:])),
                                        counts)
    tables = (interactions.to_pyarrow().cast(INTERACTIONS), items.to_pyarrow().cast(ITEMS))
    engine.close()
    return *tables, counts.by_reason


def events_of(table: pa.Table) -> list[tuple[Any, ...]]:
    """Sorted (user, domain, item, ts_ms, rating)."""
    return sorted(tuple(r[n] for n in ("user_id", "domain", "item_id", "ts_ms", "rating")) for r in table.to_pylist())


def items_of(table: pa.Table) -> list[tuple[Any, ...]]:
    """Sorted (domain, item, title, brand, category)."""
    return sorted(tuple(r[n] for n in ITEMS.names) for r in table.to_pylist())
