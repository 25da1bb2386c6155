"""Every start of a run and how it ended: what metrics.jsonl, which reads as if the run had never stopped, leaves out.

reads, writes: `run/starts.jsonl`, on rank 0: a line when training begins and one when it ends. Who is killed or hangs
writes no second line, which is how that is known. Costs: two lines per start.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cprec import dist
from cprec.launcher import NAME
from cprec.log import get_logger

log = get_logger(__name__)
STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """One life of a run, from `step` on. `how` it ended, at `end_step`: `complete`, `stopped` (told to, and saved), an
    error's name, or None: it goes on, or was killed, or hung. Times are seconds since 1970."""

    step: int
    time_s: float
    world_size: int
    host: str
    launcher: str
    how: str | None = None
    end_step: int | None = None
    end_time_s: float | None = None


@contextmanager
def recorded_start(run_dir: Path, *, step: Callable[[], int], last_step: int) -> Iterator[None]:
    """While inside, the run trains; `step()` is how far it has come of `last_step`. Rank 0 writes."""
    if dist.rank() != 0:
        yield
        return
    _append(run_dir, asdict(Start(step(), time.time(), dist.world_size(), socket.gethostname(),
                                  os.environ.get(NAME, "no launcher"))))
    try:
        yield
    except BaseException as e:
        with suppress(OSError):  # a full disk may be what ended it, and that error is the one to be seen
            _append(run_dir, _end(type(e).__name__, step()))
        raise
    _append(run_dir, _end("complete" if step() >= last_step else "stopped", step()))


def read_starts(run_dir: Path) -> list[Start]:
    """Every start of the run in order; none for a run that never began. A line that a crash cut is left out."""
    path, starts = run_dir / STARTS, list[Start]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: dropped a line that a crash cut short: %.80s", path, line)
            continue
        if "how" in values and values["how"] is not None:
            starts[-1:] = [Start(**{**asdict(start), **values}) for start in starts[-1:]]
        else:
            starts.append(Start(**values))
    return starts


def _end(how: str, step: int) -> dict[str, object]:
    return {"how": how, "end_step": step, "end_time_s": time.time()}


def _append(run_dir: Path, values: dict[str, object]) -> None:
    path = run_dir / STARTS
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as f:
        f.write("\n" * cut + json.dumps({k: v for k, v in values.items() if v is not None}) + "\n")
