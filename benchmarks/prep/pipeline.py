"""Benchmark 2: raw files to packed rows, the whole line, against `datasets` and `datatrove` as users write them.

reads: resampled raw files. writes: below the work folder, removed after every run. Every side is a program of its own,
started from nothing, on the same cores. Ours does more (queries, leak audit): its clock is read when the last row is
packed, and once more at its end. Rates are tokens in rows per second; events and tokens of the sides are compared.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.prep import inputs
from benchmarks.prep.growth import measured
from benchmarks.prep.preparation import Run, prepare, run_measured

OURS, RIVALS = "ours", ("datasets", "datatrove")


@dataclass
class Line:
    """One side: tokens in its rows, and its runs."""

    name: str
    tokens: int = 0
    events: int | None = None
    """Events in its documents; None for ours, which cuts the same events at row length too."""
    seconds: list[float] = field(default_factory=list)
    all_seconds: list[float] = field(default_factory=list)
    """To the end of everything; ours only differs."""
    peak_mb: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of the median run."""
        return self.tokens / statistics.median(self.seconds)


@dataclass
class Pipelines:
    """All sides from the same raw files."""

    n_events: int
    lines: dict[str, Line] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str) -> float | None:
        """Our rate over that side's; None where it did not run."""
        return self.lines[OURS].rate / self.lines[name].rate if name in self.lines else None


@dataclass(frozen=True)
class Setup:
    """What is run where."""

    raw: Path
    n_events: int
    domains: tuple[str, ...]
    tokenizer: Path
    work: Path
    seq_len: int
    cores: int
    repeats: int
    memory_limit: str


def measure(setup: Setup) -> Pipelines:
    """Run every installed side `repeats` times in turn."""
    found = Pipelines(setup.n_events)
    found.skipped = {name: "not installed" for name in RIVALS if not importlib.util.find_spec(name)}
    for _ in range(setup.repeats):
        for name in (OURS, *(n for n in RIVALS if n not in found.skipped)):
            line = found.lines.setdefault(name, Line(name))
            shutil.rmtree(setup.work, ignore_errors=True)
            run = _ours(setup, line) if name == OURS else _rival(setup, name, line)
            line.all_seconds.append(run.seconds)
            line.peak_mb = max(line.peak_mb, run.peak_mb)
    shutil.rmtree(setup.work)
    return found


def _ours(setup: Setup, line: Line) -> Run:
    config = inputs.write_config(
        setup.work / "config.yaml", out=setup.work / "out", datasets=inputs.resampled_dataset(setup.raw),
        domains=setup.domains, tokenizer=setup.tokenizer, seq_len=setup.seq_len, cores=setup.cores,
        memory_limit=setup.memory_limit)
    run = prepare(config)
    line.tokens = measured(setup.work, setup.n_events, run).n_tokens
    line.seconds.append(run.packed_s)
    return run


def _rival(setup: Setup, name: str, line: Line) -> Run:
    out = setup.work / name
    run = run_measured([
        sys.executable, "-m", "benchmarks.prep.pipeline_rivals", name, "--raw", str(setup.raw), "--out", str(out),
        "--tokenizer", str(setup.tokenizer), "--seq-len", str(setup.seq_len), "--cores", str(setup.cores)])
    counts = json.loads((out / "counts.json").read_text())
    line.tokens, line.events = counts["tokens"], counts["events"]
    line.seconds.append(run.seconds)
    return run
