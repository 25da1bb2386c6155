"""A run that stands still says where, on every rank, and ends with an exit code of its own, to be started again.

A hung collective holds up all ranks, so each watches itself: from a thread, it writes down its Python stacks and waits
until the others have; then the lowest of them says who stands where, and who has not answered: a process that is
stopped, or whose machine is gone. writes: `run/hang/<start>/rank_00000.txt` of every rank, `summary.txt`. Costs: a
store of two numbers per part of a step, a thread that wakes a few times per `timeout_s`.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from cprec import dist
from cprec.errors import EXIT_HANG, n_of
from cprec.format import write_atomically
from cprec.log import get_logger

log = get_logger(__name__)
LONG = 6.0
"""The first steps (compilation, tuning of kernels) and checkpoints may take so many times as long as all else."""
FIRST_STEPS = 3
STDERR = 2
_PACKAGE = Path(__file__).parents[1]


class Watchdog:
    """Ends this process when it has given no sign of life for `timeout_s` seconds; None: never. Used as a context."""

    def __init__(self, run_dir: Path, *, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._poll_s = min(timeout_s / 5, 5.0) if timeout_s else 0.0
        self._n_steps, self._step = 0, 0
        self._done = threading.Event()
        self._run_dir = run_dir
        self.expect_long()

    def __enter__(self) -> Self:
        """Collective: every rank learns where the others are."""
        found = dist.gather_texts([time.strftime("%Y%m%d-%H%M%S"), socket.gethostname()])
        self._folder, self._hosts = self._run_dir / "hang" / found[0], found[1::2]
        self.expect_long()
        if self._timeout_s is not None:
            self._arm()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._timeout_s is not None:
            self._thread.join()

    def beat(self) -> None:
        """A sign of life."""
        self._limit_s = (self._timeout_s or 0.0) * (1.0 if self._n_steps >= FIRST_STEPS else LONG)
        self._beat_at = time.monotonic()

    def step_done(self, step: int) -> None:
        """A sign of life, and that the run has made `step` steps."""
        self._n_steps, self._step = self._n_steps + 1, step
        self.beat()

    def expect_long(self) -> None:
        """A sign of life; the next may take LONG times as long."""
        self._limit_s = (self._timeout_s or 0.0) * LONG
        self._beat_at = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(self._poll_s):
            self._arm()
            silent_s = time.monotonic() - self._beat_at
            if silent_s > self._limit_s:
                faulthandler.cancel_dump_traceback_later()
                self._end(silent_s)
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Code that holds the interpreter's lock stops the watching thread too; a timer in C does not need the lock. It
        dumps the stacks to standard error and exits with 1, unless it is armed again before."""
        faulthandler.dump_traceback_later(self._limit_s + 4 * self._poll_s, exit=True, file=STDERR)

    def _end(self, silent_s: float) -> None:
        try:
            self._dump(silent_s)
            seen = self._wait_for_others(time.monotonic() + 10.0 + 4 * self._poll_s)
            if dist.rank() == min(seen):
                summary = summarize(seen, self._hosts, step=self._step, silent_s=silent_s, folder=self._folder)
                log.error("%s", summary)
                write_atomically(self._folder / "summary.txt", summary + "\n")
        except OSError as e:
            log.error("rank %d made no step for %.0f s, and cannot write its stacks: %s", dist.rank(), silent_s, e)
            faulthandler.dump_traceback(STDERR)
        finally:
            sys.stderr.flush()
            os._exit(EXIT_HANG)  # the main thread waits for something that does not come: nothing gentler ends it

    def _dump(self, silent_s: float) -> None:
        """This rank's file, complete as soon as it is there; its first line is where the main thread stands."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = _file_of(self._folder, dist.rank())
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as f:
            f.write(f"{where(sys._current_frames()[threading.main_thread().ident or 0])}\n"
                    f"rank {dist.rank()} on {socket.gethostname()}, process {os.getpid()}: no sign of life for "
                    f"{silent_s:.0f} s after step {self._step}\n\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)
        partial.replace(path)

    def _wait_for_others(self, until: float) -> dict[int, str]:
        """Where each rank stands that has written it down by then."""
        files = {rank: _file_of(self._folder, rank) for rank in range(len(self._hosts))}
        while not all(f.is_file() for f in files.values()) and time.monotonic() < until:
            time.sleep(0.1)
        return {rank: f.read_text(encoding="utf-8").partition("\n")[0] for rank, f in files.items() if f.is_file()}


def summarize(places: Mapping[int, str], hosts: Sequence[str], *, step: int, silent_s: float, folder: Path) -> str:
    """Who stands where: ranks without an answer first, then the places by how few ranks are there. `hosts` by rank."""
    lines = [f"no step for {silent_s:.0f} s after step {step}: the run hangs and is ended with exit code {EXIT_HANG}; "
             f"stacks of its ranks are in {folder}"]
    gone = [rank for rank in range(len(hosts)) if rank not in places]
    if gone:
        lines.append(f"  {_named(gone, hosts)}: no answer: stopped, or gone with the machine")
    by_place = defaultdict(list)
    for rank, place in places.items():
        by_place[place].append(rank)
    lines += [f"  {_named(ranks, hosts)}: {place}" for place, ranks in sorted(by_place.items(), key=_n_ranks)]
    return "\n".join(lines)


def where(frame: FrameType) -> str:
    """The innermost line of ours in a stack, and what it has called: `train/loop.py:125 in _run, in recv.py: read`."""
    inner, ours = frame, frame
    while not _tells(Path(ours.f_code.co_filename)) and ours.f_back:
        ours = ours.f_back
    path = Path(ours.f_code.co_filename)
    name = path.relative_to(_PACKAGE) if _PACKAGE in path.parents else path.name
    place = f"{name}:{ours.f_lineno} in {ours.f_code.co_name}"
    if inner is ours:
        return place
    return f"{place}, in {Path(inner.f_code.co_filename).name}: {inner.f_code.co_name}"


def _tells(path: Path) -> bool:
    """Whether a file is ours, and not the one through which all collectives go."""
    return _PACKAGE in path.parents and path != Path(dist.__file__)


def _n_ranks(item: tuple[str, list[int]]) -> tuple[int, int]:
    return len(item[1]), item[1][0]


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 3 on node-b`, or how many there are and the first few."""
    first = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks[:8])
    return f"rank {first}" if len(ranks) == 1 else f"{n_of(len(ranks), 'rank')} ({first}{', ...' if ranks[8:] else ''})"


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.txt"
