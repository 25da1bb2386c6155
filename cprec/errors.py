"""Errors that a user can cause, and the exit codes that scripts and schedulers act on.

reads: nothing. writes: nothing. Invariants that only we can break are `assert`, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CPRecError(Exception):
    """Base of every error whose cause and remedy lie with the user; `launch/` prints it without a traceback."""

    exit_code = 1
    on_one_rank = False
    """Set on an error that the other ranks cannot see; otherwise rank 0 alone tells it."""


class ConfigError(CPRecError):
    """A configuration that cannot run: names every field at fault, its value and the way out."""

    exit_code = 2


class DataError(CPRecError):
    """Input data or a prepared artifact that cannot be used: names the file, the column or the row."""

    exit_code = 3


class CheckpointError(CPRecError):
    """A checkpoint or run folder that cannot be used: names the folder and what is wrong with it."""

    exit_code = 4


class DivergedError(CPRecError):
    """Training that no longer makes sense (non-finite losses beyond the limit): names the step and its rows."""

    exit_code = 5


class ClusterError(CPRecError):
    """A machine that cannot take part in a run: names the host and what is wrong with it."""

    exit_code = 6


class LostRankError(CPRecError):
    """Another rank has gone: names what its neighbour saw of that; the cause is told where the other one ran."""

    on_one_rank = True


EXIT_REQUEUE = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop by a signal, saved, and wants to be started again."""
EXIT_HANG = 76
"""Exit code of a rank that its watchdog ended; the run goes on from its newest checkpoint when it is started again."""
EXIT_STOPPED = 77
"""Exit code of a run that launch/stop.py asked to stop: it has saved, and nothing is to start it again by itself."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest known names, or all of them when none is near."""
    known = sorted(known)
    return nearest(name, known) or (f"known: {', '.join(known)}" if known else "none is known")


def nearest(name: str, known: Iterable[str]) -> str:
    """`did_you_mean`, but empty when no known name is near: for a message that lists them all anyway."""
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def n_of(n: int, noun: str) -> str:
    """`1 event`, `2,160 events`: a count as it reads in a sentence; the noun takes an s."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def raise_all(problems: list[str], *, of: str, error: type[CPRecError] = ConfigError) -> None:
    """Raise one `error` that lists every problem found, or return when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"{of}: {problems[0]}")
    listed = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
    raise error(f"{of}: {len(problems)} problems\n{listed}")
