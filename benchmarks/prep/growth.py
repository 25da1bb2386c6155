"""Benchmark 3: the same preparation at growing numbers of events: seconds, peak memory, bytes of every artifact.

reads: resampled raw files. writes: one prepared folder per size below the work folder, kept for the other benchmarks
and the constants of docs/scale.md. Costs what the preparations cost, each run once: 1 million events take seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.prep.preparation import Run
from cprec.format import list_corpora, read_manifest
from data_prep.engine import ROW_GROUP_ROWS, write_parquet

ARTIFACTS = {
    "raw files": ("raw",), "interactions as ingested": ("out", "interactions", "ingested.parquet"),
    "interactions, clean": ("out", "interactions", "clean.parquet"),
    "interactions, training": ("out", "interactions", "train.parquet"), "histories": ("out", "histories"),
    "packed": ("out", "packed"), "queries": ("out", "queries"), "catalogue": ("out", "catalogue.parquet"),
    "segments": ("out", "segments.arrow")}
WRITER_BATCHES = 16
PER_ITEM = ("catalogue", "segments")
"""Artifacts that grow with the catalogue, all others grow with the events."""


@dataclass(frozen=True)
class Size:
    """One preparation of `n_events`: its run, and what it left."""

    n_events: int
    n_items: int
    n_tokens: int
    """In all packed corpora; an event is in its domain's corpus and in the mixed one."""
    run: Run
    artifact_bytes: dict[str, int]
    writer_us_per_event: float
    """What the one process that writes an artifact of stages 1-4 spends on an event, the engine's work aside."""


def measured(folder: Path, n_events: int, run: Run) -> Size:
    """What the preparation in `folder` left: its raw files in `raw`, its output in `out`."""
    packed = folder / "out" / "packed"
    return Size(
        n_events=n_events, n_items=pq.ParquetFile(folder / "out" / "catalogue.parquet").metadata.num_rows,
        n_tokens=sum(read_manifest(packed / name).n_tokens for name in list_corpora(packed)), run=run,
        artifact_bytes={name: bytes_of(folder.joinpath(*inside)) for name, inside in ARTIFACTS.items()},
        writer_us_per_event=writer_us(folder / "out" / "interactions" / "clean.parquet", folder / "again.parquet"))


def writer_us(path: Path, again: Path) -> float:
    """Microseconds per row of writing the first rows of `path` once more, read before the clock starts."""
    file = pq.ParquetFile(path)
    batches = list(islice(file.iter_batches(ROW_GROUP_ROWS), WRITER_BATCHES))
    begin_s = time.perf_counter()
    n_rows = write_parquet(batches, again, schema=file.schema_arrow)
    seconds = time.perf_counter() - begin_s
    again.unlink()
    return seconds / n_rows * 1e6


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def exponent(sizes: Sequence[Size]) -> float | None:
    """Least-squares slope of log seconds over log events: 1 is linear. None of fewer than two sizes."""
    if len(sizes) < 2:
        return None
    x = [math.log(s.n_events) for s in sizes]
    y = [math.log(s.run.seconds) for s in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)
