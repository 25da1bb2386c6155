"""Steps that need each other, run in order, several at a time if wanted; what is finished is not run again.

reads and writes: `<work>/<step>/`, where a step's commands leave what they make, their output in `log.txt`, and, last
of all, `done.json` with commands, seconds, commit, device, versions, time. costs: a process per command.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue

from cprec.errors import ConfigError, CPRecError, did_you_mean, n_of
from cprec.format import write_atomically
from cprec.log import get_logger
from cprec.process import die_with_parent

log = get_logger(__name__)
REPO = Path(__file__).resolve().parents[1]
DONE = "done.json"
LOG = "log.txt"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "duckdb")
"""Whose versions a step's marker says."""
Command = tuple[str, ...]


class StepError(CPRecError):
    """A command of a step ended with an exit code other than 0; its output is in the step's log."""


@dataclass(frozen=True)
class Step:
    """Some commands that make one folder. `python` stands for this interpreter."""

    name: str
    """Also its folder below the work folder."""
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    claims: frozenset[int] = frozenset()
    """Which of the claims read what it makes; of others' needs see `select`."""
    seconds: float = 0.0
    """About how long it takes."""
    scratch: tuple[str, ...] = ()
    """Folders, relative to its own, that nothing needs once it is done."""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


def in_order(steps: Iterable[Step]) -> list[Step]:
    """Every step after those that it needs, otherwise as given. Raises ConfigError for a need that is no step."""
    by_name = {s.name: s for s in steps}
    missing = sorted({f"{s.name} needs {n}" for s in by_name.values() for n in s.needs if n not in by_name})
    if missing:
        raise ConfigError(f"no such step: {'; '.join(missing)}")
    placed: dict[str, Step] = {}

    def place(step: Step) -> None:
        for need in step.needs:
            if need not in placed:
                place(by_name[need])
        placed.setdefault(step.name, step)

    TopologicalSorter({s.name: s.needs for s in by_name.values()}).prepare()  # raises CycleError
    for step in by_name.values():
        place(step)
    return list(placed.values())


def select(steps: Sequence[Step], wanted: Iterable[str]) -> list[Step]:
    """The wanted steps and everything that they need, in order. Raises ConfigError for a name that is no step's."""
    by_name, left, kept = {s.name: s for s in steps}, list(wanted), set[str]()
    unknown = next((name for name in left if name not in by_name), None)
    if unknown is not None:
        raise ConfigError(f"no step is called {unknown}; {did_you_mean(unknown, by_name)}")
    while left:
        name = left.pop()
        if name not in kept:
            kept.add(name)
            left += by_name[name].needs
    return [s for s in in_order(steps) if s.name in kept]


def is_done(step: Step, work: Path) -> bool:
    """Whether its marker is there. Raises ConfigError when other commands left it."""
    path = work / step.name / DONE
    if not path.is_file():
        return False
    commands = [list(c) for c in step.commands]
    if json.loads(path.read_text(encoding="utf-8"))["commands"] != commands:
        raise ConfigError(f"{path.parent} was made by other commands (see {DONE} in it); delete it, and what was made "
                          f"from it, or give another --work")
    return True


def run_steps(steps: Sequence[Step], work: Path, *, jobs: int = 1, minutes: float | None = None) -> list[Step]:
    """Run what is not done, `jobs` steps at a time, each on its share of the cores; what is left is given back.

    With `minutes` no step is started that is estimated to end later. A step that fails stops only those that need it;
    raises StepError at the end, which names every one that failed.
    """
    place = {s.name: i for i, s in enumerate(in_order(steps))}
    by_name, slots = {s.name: s for s in steps}, SimpleQueue[list[int]]()
    for cores in share_cores(sorted(os.sched_getaffinity(0)), jobs):
        slots.put(cores)
    sorter = TopologicalSorter({s.name: s.needs for s in steps})
    sorter.prepare()
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    ready, done, failed, running = list[str](), set[str](), list[StepError](), dict[Future[None], str]()
    with ThreadPoolExecutor(jobs) as pool:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
            while len(running) < jobs and (name := _first_in_time(ready, by_name, work, end)) is not None:
                ready.remove(name)
                running[pool.submit(_run_step, by_name[name], work, slots)] = name
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    future.result()
                except StepError as e:
                    failed.append(e)
                    log.error("%s failed; what does not need it goes on", name)
                    continue
                done.add(name)
                log.info("%d of %d: %s is done", len(done), len(steps), name)
                sorter.done(name)
    left = [s for s in steps if s.name not in done]
    if failed:
        raise StepError("\n\n".join(map(str, failed)) + f"\n\n{n_of(len(failed), 'step')} failed, {len(left)} of "
                        f"{len(steps)} are left with those that need them")
    return left


def _first_in_time(ready: Sequence[str], by_name: Mapping[str, Step], work: Path, end: float) -> str | None:
    """The first in order, not the first that became ready, of those that will have ended in time."""
    return next((n for n in ready if time.monotonic() + by_name[n].seconds <= end or is_done(by_name[n], work)), None)


def share_cores(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """Cores of each of `jobs` jobs: equal shares, or all for everybody where there are fewer cores than jobs."""
    n = len(cores) // jobs
    return [list(cores[i * n:(i + 1) * n]) if n else list(cores) for i in range(jobs)]


def _run_step(step: Step, work: Path, slots: SimpleQueue[list[int]]) -> None:
    folder, started = work / step.name, time.monotonic()
    if is_done(step, work):
        _clear(step, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    cores = slots.get()
    try:
        for command in step.commands:
            _run(command, folder / LOG, cores, step.name)
    finally:
        slots.put(cores)
    write_atomically(folder / DONE, json.dumps({
        "commands": step.commands, "seconds": round(time.monotonic() - started, 1), "commit": commit(),
        "device": device(), "versions": {p: version(p) for p in PACKAGES}, "argv": sys.argv,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1) + "\n")
    _clear(step, folder)  # after the marker: a step cut off in between would lack what its commands go on from


def _clear(step: Step, folder: Path) -> None:
    for name in step.scratch:
        shutil.rmtree(folder / name, ignore_errors=True)


@cache
def device() -> str:
    """What steps run on: the GPU's name, else the processor's and how many cores of it."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{cpu[1] if cpu else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def _run(command: Command, log_file: Path, cores: Sequence[int], name: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "PYTHONPATH": str(REPO)}
    argv = [sys.executable if command[0] == "python" else command[0], *command[1:]]

    def begin() -> None:
        die_with_parent(signal.SIGKILL)
        os.sched_setaffinity(0, cores)

    with log_file.open("a", encoding="utf-8") as out:
        out.write(f"\n=== {shlex.join(command)}\n")
        out.flush()
        code = subprocess.run(argv, cwd=REPO, env=env, stdout=out, stderr=subprocess.STDOUT, preexec_fn=begin,
                              check=False).returncode
    if code:
        tail = "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise StepError(f"{name}: exit code {code} of {shlex.join(command)}\n{tail}\n  all of it: {log_file}; once "
                        f"that is mended, the same command goes on from here")


def commit() -> str:
    """Of the repository, with a + where files of it are changed; `unknown` outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=REPO, capture_output=True, text=True,
                              check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "--", "cprec", "data_prep",
                                  "launch", "experiments/*.py", "experiments/configs"], cwd=REPO, capture_output=True,
                                 text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changed.strip() else head


def total_seconds(steps: Iterable[Step], *, jobs: int) -> float:
    """About how long they take when `jobs` of them run at the same time."""
    return sum(s.seconds for s in steps) / jobs


def recorded(work: Path, names: Iterable[str]) -> Mapping[str, dict[str, object]]:
    """The markers of those of the steps that are done, by name."""
    found = {n: work / n / DONE for n in names}
    return {n: json.loads(p.read_text(encoding="utf-8")) for n, p in found.items() if p.is_file()}
