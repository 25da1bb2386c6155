"""Runs processes of the benchmark, one side after the other, and gathers what they measured.

Every measurement is a fresh process: libraries imported and timed apart, then opening and the first batch, then reading
for a while, then memory. Sides take turns in every repeat. reads: corpora. writes: nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.reader.corpora import Corpus
from benchmarks.reader.job import Answer, Job
from benchmarks.reader.pages import cached_share, drop, files_below, warm
from benchmarks.reader.records import RECORDS, checksum, finish, mapped
from benchmarks.reader.rivals import MEMMAP, REFERENCES

REPO = Path(__file__).parents[2]
LIMIT_S = 300


@dataclass(frozen=True)
class Setup:
    """One side in one of its ways."""

    side: str
    workers: int = 0

    @property
    def label(self) -> str:
        return self.side + (f", {self.workers} DataLoader worker" if self.workers else "")


@dataclass(frozen=True)
class Case:
    """What is asked of a setup."""

    corpus: str
    processes: int = 1
    cold: bool = False
    resume: bool = False

    @property
    def label(self) -> str:
        return (f"{self.corpus}, {self.processes} process{'es' * (self.processes > 1)}, "
                f"{'cold' if self.cold else 'warm'}{', resumed at 90 %' if self.resume else ''}")


@dataclass
class Result:
    """All repeats of one setup in one case."""

    setup: Setup
    case: Case
    answers: list[list[Answer]] = field(default_factory=list)
    """Of every repeat: one per rank."""
    cached: list[float] = field(default_factory=list)
    """Share of the side's files in the page cache before each repeat."""
    failed: str | None = None

    @property
    def rows_per_s(self) -> float:
        """Median over repeats of the sum over ranks."""
        return statistics.median(sum(a.rows / a.seconds for a in ranks) for ranks in self.answers)

    @property
    def first_batch_ms(self) -> float:
        """Of the slowest rank."""
        return 1000 * statistics.median(max(a.first_batch_s for a in ranks) for ranks in self.answers)

    @property
    def imports_s(self) -> float:
        return statistics.median(max(a.imports_s for a in ranks) for ranks in self.answers)

    def mb(self, field_name: str) -> float:
        """Median of a memory field, per process."""
        return statistics.median(getattr(a, field_name) for ranks in self.answers for a in ranks)


@dataclass(frozen=True)
class Limits:
    """How much is read."""

    micro_batch_size: int
    global_batch_size: int
    seconds: float
    most_rows: int
    repeats: int
    seed: int


def race(corpora: dict[str, Corpus], setups: Iterable[Setup], case: Case, limits: Limits) -> list[Result]:
    """Every setup in this case, `repeats` times in turn. A setup that fails is left out of later repeats and says why.
    """
    results = [Result(setup, case) for setup in setups]
    for _ in range(limits.repeats):
        for result in (r for r in results if r.failed is None):
            try:
                _once(corpora[case.corpus], result, limits)
            except RuntimeError as e:
                result.failed = str(e)
    return results


def files_of(corpus: Corpus, side: str) -> list[Path]:
    """What a side reads."""
    own = files_below(corpus.folder / side.replace(" ", "-"))
    return [corpus.folder / RECORDS, *own] if side == MEMMAP or side in REFERENCES else own


def _once(corpus: Corpus, result: Result, limits: Limits) -> None:
    files = files_of(corpus, result.setup.side)
    (drop if result.case.cold else warm)(files)
    result.cached.append(cached_share(files))
    result.answers.append(run(jobs(corpus, result.setup, result.case, limits)))


def jobs(corpus: Corpus, setup: Setup, case: Case, limits: Limits) -> list[Job]:
    """One job per rank."""
    n, port = case.processes, free_port()
    in_steps = corpus.shape.n_rows // limits.global_batch_size
    return [Job(side=setup.side, workers=setup.workers, folder=corpus.folder, shape=corpus.shape,
                micro_batch_size=limits.micro_batch_size, global_batch_size=limits.global_batch_size,
                seed=limits.seed, rank=rank, world_size=n, port=port,
                first_row=in_steps * 9 // 10 * limits.global_batch_size if case.resume else 0,
                most_rows=1 if case.resume else limits.most_rows, seconds=limits.seconds)
            for rank in range(n)]


def run(wanted: list[Job]) -> list[Answer]:
    """Start a process per job, let all begin together when all have imported, and wait for their answers.

    Raises RuntimeError with the last lines of one that fails.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reader.worker"]
    started = [subprocess.Popen([*command, job.model_dump_json()], cwd=REPO, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                env=os.environ | {"PYTHONPATH": str(REPO)}) for job in wanted]
    try:
        for process in started:
            assert process.stdout is not None and process.stdin is not None
            for line in process.stdout:
                if line.strip() == "ready":
                    break
        for process in started:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it failed: its answer says why
                process.stdin.write("go\n")
                process.stdin.flush()
        return [_answer(process) for process in started]
    finally:
        for process in started:
            _end(process)


def _answer(process: subprocess.Popen[str]) -> Answer:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer after {LIMIT_S} s") from None
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise RuntimeError(f"ended with {process.returncode}: {err.strip()[-1500:]}")
    return Answer.model_validate_json(lines[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and what it started, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def same_rows(corpus: Corpus, setups: Iterable[Setup], limits: Limits) -> dict[str, dict[str, bool | str]]:
    """Whether an epoch of each setup, with one and with two ranks, holds the rows of the corpus, each once (their
    number and checksum are those of the records read in order), and whether an epoch that is resumed at 90 % holds
    as many as are left. A setup that fails says why."""
    expected = expected_checksum(corpus)
    left = jobs(corpus, Setup(""), Case("", resume=True), limits)[0].first_row
    found: dict[str, dict[str, bool | str]] = {}
    for setup in setups:
        found[setup.label] = {}
        cases = {"1 rank": Case(""), "2 ranks": Case("", 2), "resumed": Case("", resume=True)}
        for name, case in list(cases.items())[:1 if setup.workers else None]:  # a worker reads what the process would
            wanted = [job.model_copy(update={"check": True, "most_rows": None, "seconds": 1e9})
                      for job in jobs(corpus, setup, case, limits)]
            try:
                answers = run(wanted)
            except RuntimeError as e:
                found[setup.label][name] = str(e)
                continue
            seen = sum(a.checked_rows for a in answers), sum(a.checksum for a in answers) % 2**64
            found[setup.label][name] = seen[0] == corpus.shape.n_rows - left if case.resume else seen == expected
    return found


def expected_checksum(corpus: Corpus) -> tuple[int, int]:
    """Rows and checksum of the corpus's records in order."""
    whole, n, total = mapped(corpus.folder, corpus.shape), 0, 0
    for first in range(0, corpus.shape.n_rows, 64):
        one = checksum(finish(whole[first:first + 64], corpus.shape.seq_len), corpus.shape.seq_len)
        n, total = n + one[0], (total + one[1]) % 2**64
    return n, total
