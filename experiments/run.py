"""The paper's claims, tested: every step from raw logs to the report, each resumable, in the order that they need.

    python experiments/run.py --form cpu                        # the Complete Journey, from PyPI
    python experiments/run.py --form cpu --data FOLDER          # Amazon, Steam, MovieLens: see experiments/README.md
    python experiments/run.py --form gpu --data FOLDER --only claim1 [--list] [--dry-run] [--publish]
    python experiments/run.py --form gpu --data FOLDER --steps trunk/0      # these, and what they need

Stopped at any point, the same command goes on with what is not done. `--list`: the steps, their state and about how
long they take; `--dry-run`: their commands too, which can be typed one by one. A step that fails stops only those that
need it. With `--minutes 9`, for a machine lent for ten, it starts nothing that is estimated to end later. Ends with a
report once all is done.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cprec import cli
from cprec.errors import ConfigError, n_of

if TYPE_CHECKING:
    from experiments.steps import Step

REPO = Path(__file__).resolve().parents[1]
CLAIMS = [f"claim{n}" for n in range(1, 6)]


def main() -> None:
    args = _arguments()
    sys.path[0] = str(REPO)  # a script's own folder stands there, and `experiments` is found beside it
    if args.publish and (args.only or args.steps):
        raise ConfigError("--publish replaces the whole published report, and --only or --steps make a part of one; "
                          "leave them or --publish out")
    data = str(Path(args.data).resolve()) if args.data else None
    os.chdir(REPO)
    from cprec.process import only_writer
    from experiments.arms import Line
    from experiments.claims import tables
    from experiments.forms import load_form, load_world
    from experiments.steps import is_done, run_steps, select

    world = "amazon" if data else "journey"
    form, work = load_form(args.form), Path(args.work or f"work/experiments/{args.form}-{world}")
    line = Line(args.form, form, world, load_world(data), data, work)
    tables(line)
    claims = {int(c.removeprefix("claim")) for c in args.only or CLAIMS}
    steps = select(list(line.steps.values()),
                   args.steps or [s.name for s in line.steps.values() if s.claims & claims])
    done = {s.name for s in steps if is_done(s, work)}
    if args.list or args.dry_run:
        _show(steps, done, jobs=form.jobs, with_commands=args.dry_run)
        return
    long = [s.name for s in steps if s.name not in done and args.minutes and s.seconds > 60 * args.minutes]
    if long:
        raise ConfigError(f"--minutes {args.minutes:g}: {n_of(len(long), 'step')} would never start, being estimated "
                          f"to take longer ({', '.join(long[:3])}{', ...' * (len(long) > 3)}; see --list); give more "
                          f"minutes, or leave --minutes out")
    with only_writer(work, wait_s=5):
        left = run_steps(steps, work, jobs=args.jobs or form.jobs, minutes=args.minutes)
    if left:
        print(f"{len(left)} of {len(steps)} steps are left; the same command goes on")
    if left or args.steps:
        return
    report = [sys.executable, "-m", "experiments.report", "--form", args.form, "--world", world, "--work", str(work)]
    report += ["--only", *(str(c) for c in sorted(claims))] if args.only else []
    os.execve(sys.executable, report + ["--publish"] * args.publish, {**os.environ, "PYTHONPATH": str(REPO)})


def _show(steps: list[Step], done: set[str], *, jobs: int, with_commands: bool) -> None:
    from experiments.steps import total_seconds

    for step in steps:
        state = "done" if step.name in done else f"about {step.seconds / 60:.1f} min"
        claims = ",".join(str(c) for c in sorted(step.claims)) or "-"
        print(f"{step.name:44} {state:15} claims {claims:8} needs {', '.join(step.needs) or 'nothing'}")
        for command in step.commands if with_commands else ():
            print(f"    {shlex.join(command)}")
    left = [s for s in steps if s.name not in done]
    print(f"{len(steps)} steps, {len(left)} to do: about {total_seconds(left, jobs=jobs) / 60:.0f} minutes with {jobs} "
          f"at a time; the longest about {max((s.seconds for s in steps), default=0) / 60:.1f}")


def _arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    forms = sorted(p.stem for p in (REPO / "experiments/configs").glob("*.yaml")
                   if p.stem not in ("amazon", "journey", "pretrain"))
    parser.add_argument("--form", required=True, choices=forms, help="one of experiments/configs/")
    parser.add_argument("--data", help="folder with interactions/ and items/; without it: the Complete Journey")
    parser.add_argument("--work", help="default: work/experiments/<form>-<world>")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", choices=CLAIMS, nargs="+", metavar="claimN", help="only what these claims need")
    some.add_argument("--steps", nargs="+", metavar="STEP", help="only these steps and what they need; no report")
    parser.add_argument("--jobs", type=int, help="steps at a time; default: the form's")
    parser.add_argument("--minutes", type=float, help="start no step that is estimated to end later than that")
    parser.add_argument("--list", action="store_true", help="the steps and their state, nothing is run")
    parser.add_argument("--dry-run", action="store_true", help="the same with every command")
    parser.add_argument("--publish", action="store_true", help="copy the report to experiments/results and docs")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
