"""Runs that are made to die: real training processes, started cheaply, and killed at a chosen moment.

A process that has imported torch and DeepSpeed waits and forks (Python's fork server); each child runs
launch/pretrain.py as a process of its own, with its own pid, ranks and end. That takes the seconds of imports out of a
start and changes nothing else. Moments are chosen from outside: by time, or by `moments.c`, a preloaded library that
counts file operations; the trainer knows nothing of either.
reads: gcc, for that library. writes: what each life says, to a log.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

import psutil

from cprec.cli import END_WITH
from cprec.dist import free_port
from cprec.process import die_with_parent

REPO = Path(__file__).parents[2]
PRETRAIN = REPO / "launch" / "pretrain.py"
KILLED = -signal.SIGKILL
HUNG_AFTER_S = 400.0
"""No life of the worlds used here lasts so long, on a machine that does much else."""


@dataclass(frozen=True)
class Moment:
    """Just before the `count`-th file operation (from 1) on a path that contains `under`."""

    operation: str
    """mkdir, write, fsync, rename (by its new name) or unlink (also of a folder)."""
    under: str
    count: int = 1
    signal: int = signal.SIGKILL
    """What is sent; SIGKILL when half of a write is done."""

    def env(self) -> dict[str, str]:
        """What `moments.c` reads."""
        return {"FAULT_OPERATION": self.operation, "FAULT_UNDER": self.under, "FAULT_COUNT": str(self.count),
                "FAULT_SIGNAL": str(int(self.signal))}


class Life(Protocol):
    """One start of a run."""

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank, or to every process."""

    def signal(self, number: int) -> None:
        """A signal to every rank."""

    def is_over(self) -> bool:
        """Whether every process has ended."""

    def end(self) -> list[int | None]:
        """Exit codes, once every process has ended: -9 is SIGKILL, None is one that hung and was killed for it."""

    def said(self) -> str:
        """Everything that was printed."""


@dataclass
class ForkedLife:
    """Ranks that the waiting process has forked."""

    ranks: list[ForkServerProcess]
    log: Path

    def kill(self, rank: int | None = None) -> None:
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            process.kill()

    def signal(self, number: int) -> None:
        for process in self.ranks:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    def is_over(self) -> bool:
        return not any(process.is_alive() for process in self.ranks)

    def end(self) -> list[int | None]:
        deadline_s = time.monotonic() + HUNG_AFTER_S
        for process in self.ranks:
            process.join(max(0.0, deadline_s - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        for process in self.ranks:
            process.join()
        return codes

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class LaunchedLife:
    """Ranks that the `deepspeed` command has started."""

    launcher: subprocess.Popen[bytes]
    log: Path

    def kill(self, rank: int | None = None) -> None:
        everything = [*self._children(), psutil.Process(self.launcher.pid)]
        for process in everything if rank is None else self._ranks()[rank:rank + 1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.launcher.pid).children(recursive=True)

    def _ranks(self) -> list[psutil.Process]:
        """Rank 0 first: it is started first. The launcher's own processes name the script later in their command."""
        found = []
        for process in self._children():
            with suppress(psutil.NoSuchProcess):
                if str(PRETRAIN) in process.cmdline()[:3]:
                    found.append(process)
        return sorted(found, key=lambda p: p.pid)

    def signal(self, number: int) -> None:
        for process in self._ranks():
            process.send_signal(number)

    def is_over(self) -> bool:
        return self.launcher.poll() is not None

    def end(self) -> list[int | None]:
        try:
            return [self.launcher.wait(HUNG_AFTER_S)]
        except subprocess.TimeoutExpired:
            self.kill()
            self.launcher.wait()
            return [None]

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def build_moments(folder: Path) -> Path:
    """The compiled `moments.c`. Raises FileNotFoundError where there is no gcc."""
    library = folder / "moments.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("moments.c")),
                    "-ldl"], check=True)
    return library


def stand_by(library: Path) -> None:
    """Start the process that waits and forks, with `library` preloaded: once, before the first `fork`."""
    changed = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1",
               "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.faults.standby"])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def fork(config: Path, log: Path, *, ranks: int = 1, moment: Moment | None = None, dying_rank: int = 0,
         env: dict[str, str] | None = None) -> ForkedLife:
    """Start `pretrain.py --config CONFIG` on `ranks` forked processes; `dying_rank` meets `moment`."""
    log.unlink(missing_ok=True)
    port, processes = free_port(), []
    for rank in range(ranks):
        values = dict(env or {})
        if ranks > 1:
            values |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if moment and rank == dying_rank:
            values |= moment.env()
        process = multiprocessing.get_context("forkserver").Process(target=_live, args=(config, values, log))
        process.start()
        processes.append(process)
    return ForkedLife(processes, log)


def _live(config: Path, env: dict[str, str], log: Path) -> None:
    die_with_parent(signal.SIGKILL)
    os.environ.update(env)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(env.get("WORLD_SIZE", "1"))])  # a core per rank
    sys.argv = [str(PRETRAIN), "--config", str(config)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def launch(config: Path, log: Path, *, ranks: int = 2) -> LaunchedLife:
    """Start `deepspeed launch/pretrain.py --config CONFIG` as a user does."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks), "--master_port",
               free_port(), str(PRETRAIN), "--config", str(config)]
    env = {**os.environ, END_WITH: str(os.getpid()), "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with log.open("wb") as f:
        return LaunchedLife(subprocess.Popen(command, stdout=f, stderr=f, env=env, start_new_session=True), log)
