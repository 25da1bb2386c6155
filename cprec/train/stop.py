"""Who has asked a run to stop: a signal, or a stop file in the run folder, which works under every launcher.

reads: `RUN/stop`, at every step, on rank 0. writes: `RUN/stop` (launch/stop.py does), taken away once the run has
stopped. `asked` is what one rank knows; the ranks agree at a step's border, see `cprec.train.engine.Engine.step`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cprec import dist
from cprec.errors import EXIT_REQUEUE, EXIT_STOPPED
from cprec.train.checkpoint import read_run_config

STOP = "stop"
BY_FILE = 0
"""What stands for the stop file among the numbers of signals."""


@contextmanager
def signals_collected() -> Iterator[list[int]]:
    """While inside, SIGTERM and SIGUSR1 are collected in the yielded list instead of ending the process."""
    asked: list[int] = []
    old = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def ask_to_stop(run_dir: Path) -> Path:
    """Write the stop file of a run; raises CheckpointError when the folder is none of a run."""
    read_run_config(run_dir)
    path = run_dir / STOP
    path.touch()
    return path


def look_for_stop_file(run_dir: Path, asked: list[int]) -> None:
    """Note a stop file in `asked`, on rank 0: file systems show a new file to the nodes at different times."""
    if dist.rank() == 0 and BY_FILE not in asked and (run_dir / STOP).exists():
        asked.append(BY_FILE)


def exit_code_of(asked: Sequence[int]) -> int:
    """Exit code of a run that has stopped because some rank was asked to: a signal to any of them wins. Collective."""
    signals = [str(number) for number in asked if number != BY_FILE]
    return EXIT_REQUEUE if dist.gather_texts(signals) else EXIT_STOPPED


def remove_stop_file(run_dir: Path) -> None:
    """The run has ended; one that goes on is not to stop at once."""
    if dist.rank() == 0:
        (run_dir / STOP).unlink(missing_ok=True)
