"""What every launch script does around its work: logging, errors as one clear message, exit codes.

Exit codes: 0 done, 1 other error, 2 bad config, 3 bad data, 4 bad checkpoint, 5 diverged, 6 bad machine, 75 stopped by
a signal, start again to go on, 76 hung, start again, 77 stopped by launch/stop.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from cprec.errors import ConfigError, CPRecError, did_you_mean
from cprec.launcher import ALONE, adopt
from cprec.log import setup_logging
from cprec.process import end_with, stop_with_launcher

END_WITH = "CPREC_END_WITH"
"""Environment variable: a process id; whatever was started with it, however indirectly, ends when that process does."""


class Parser(argparse.ArgumentParser):
    """Arguments of a script, whose docstring, examples first, is its help as it stands. An option that it does not have
    is answered with the nearest that it has."""

    def __init__(self, description: str | None = None, **rest: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **rest)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As of argparse; ends the process with exit code 2 for an unknown option."""
        found, rest = super().parse_known_args(args, namespace)
        unknown = [a.partition("=")[0] for a in rest if a.startswith("--")]
        if unknown:
            self.error("; ".join(f"there is no option {a}: {did_you_mean(a, self._option_string_actions)}"
                                 for a in unknown))
        return found, rest


def weights(entries: Iterable[str]) -> dict[str, float] | None:
    """`CORPUS=WEIGHT,...` entries of the command line as weights by name; None when there are none.

    Raises ConfigError for one that is not of that form.
    """
    found = {}
    for entry in (e for several in entries for e in several.split(",")):
        name, _, weight = entry.rpartition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"--mix {entry}: not of the form CORPUS=WEIGHT, such as 'specific/*=1'")
    return found or None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with what it returns (None is 0); a CPRecError becomes its message and its exit code."""
    place = adopt()
    setup_logging(place.rank)
    if place != ALONE:  # a launcher that is killed would leave its ranks behind: they save and stop
        stop_with_launcher()
    if END_WITH in os.environ:
        end_with(int(os.environ[END_WITH]))
    try:
        code = main() or 0
    except CPRecError as e:
        if place.rank == 0 or e.on_one_rank:
            print(f"\n{type(e).__name__}: {e}", file=sys.stderr)
        code = e.exit_code
    except KeyboardInterrupt:
        code = 130
    for number in (signal.SIGTERM, signal.SIGUSR1):  # launchers send it once the first rank is gone: no other exit code
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
