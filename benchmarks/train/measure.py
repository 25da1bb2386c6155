"""Runs the ranks of a side as processes, one side after the other, and gathers what they measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.train.job import Answer, Job
from cprec.launcher import free_port

REPO = Path(__file__).parents[2]
LIMIT_S = 600
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "trl", "datasets", "numpy")
UNTIMED_STEPS = 2
"""First steps, in which buffers are allocated and kernels chosen."""


@dataclass
class Result:
    """All repeats of one setup."""

    label: str
    answers: list[list[Answer]] = field(default_factory=list)
    """Of every repeat: one per rank."""
    losses: list[float] = field(default_factory=list)
    """Of every repeat: held-out nats per token of the last weights."""
    failed: str | None = None

    @property
    def rates(self) -> list[float]:
        """Useful tokens per second of every repeat, over all ranks."""
        return [rate(ranks) for ranks in self.answers]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def padding(self) -> float:
        """Share of the positions computed on that hold no token of a document."""
        return 1 - sum(sum(a.useful) for a in self.answers[0]) / sum(sum(a.slots) for a in self.answers[0])


def rate(ranks: Sequence[Answer]) -> float:
    """Useful tokens per second over the ranks of one run, which end their steps together."""
    tokens = sum(sum(a.useful[UNTIMED_STEPS:]) for a in ranks)
    return tokens / max(a.seconds(UNTIMED_STEPS) for a in ranks)


def ranks_of(job: Job, world_size: int, *, first_core: int = 0) -> list[Job]:
    """The job for each rank, every rank on a core of its own where there are enough."""
    cores, port = sorted(os.sched_getaffinity(0)), int(free_port())
    own = cores[first_core:first_core + world_size]
    return [job.model_copy(update={"rank": r, "world_size": world_size, "port": port,
                                   "cores": [own[r]] if len(own) == world_size else []})
            for r in range(world_size)]


@contextlib.contextmanager
def own_extensions() -> Iterator[None]:
    """A folder of this benchmark's own for what deepspeed compiles at its first start: whoever is killed while it
    compiles leaves a lock in the common one, and every later start waits there for ever."""
    with tempfile.TemporaryDirectory(prefix="cprec-extensions-") as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        yield


def run(wanted: list[Job]) -> list[Answer]:
    """Start a process per job and wait for all. Raises RuntimeError with the last lines of one that fails."""
    with _started(wanted) as processes, ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(_answer, processes))


@contextlib.contextmanager
def _started(wanted: list[Job]) -> Iterator[list[subprocess.Popen[str]]]:
    for folder in {job.out for job in wanted}:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train.worker"]
    processes = [subprocess.Popen([*command, job.model_dump_json()], cwd=REPO, text=True, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                  env=os.environ | {"PYTHONPATH": str(REPO)}) for job in wanted]
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answer(process: subprocess.Popen[str]) -> Answer:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer after {LIMIT_S} s") from None
    lines = [line for line in out.splitlines() if line.startswith("{\"step_ends_s\"")]
    if process.returncode or not lines:
        raise RuntimeError(f"ended with {process.returncode}: {err.strip()[-1500:]}")
    return Answer.model_validate_json(lines[-1])


def versions() -> dict[str, str]:
    """Of the packages that matter for speed."""
    known = {}
    for package in PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    return known
