"""Anneal one stable checkpoint in many ways: every shape with every length, mixture and seed, each in its own folder.

    python launch/sweep.py --from runs/base@20000 --steps 500,1000 --shape sqrt,linear --mix trunk --mix 'mixed=1' \\
        --launcher 'deepspeed --num_gpus 8'
    python launch/sweep.py --from runs/base@20000 --steps 1000 --seed 0,1,2 --launcher ranks --slurm submit

Runs the annealings one after the other (`--dry-run`: prints their commands), or hands them to SLURM as one array job.
What is finished is not run again; a failed one is named and the others go on; the same command again does what is left.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cprec import cli
from cprec.errors import EXIT_REQUEUE, ConfigError, CPRecError

if TYPE_CHECKING:
    from cprec.train.sweep import Grid

SCRIPT = Path(__file__).resolve().with_name("anneal.py")


def main() -> int:
    args = _arguments()
    from cprec.train import sweep
    from cprec.train.branch import find_parent

    parent = find_parent(args.source)
    out = Path(args.out or f"{parent.run_dir}-sweep").absolute()
    jobs = sweep.plan_sweep(parent, _grid(args), out)
    if args.dry_run:
        for job in jobs:
            print(f"{'# finished: ' if job.is_finished else ''}{sweep.command_of(job, args.launcher, SCRIPT)}")
        return 0
    if not all(job.is_finished for job in jobs):
        sweep.keep_parent(parent, out)
    if args.slurm:
        arguments = sweep.write_commands(jobs, args.launcher, SCRIPT, out)
        options = shlex.split(args.sbatch)
        print(shlex.join(sweep.submission(arguments, options)) if arguments else "all annealings are finished")
        if args.slurm == "submit" and arguments:
            print(sweep.submit(arguments, options))
        return 0
    outcomes = list(sweep.run_sweep(jobs, args.launcher, SCRIPT))
    print(sweep.summary(outcomes))
    failed = [o.job.name for o in outcomes if o.state == "failed"]
    if failed:
        raise CPRecError(f"{len(failed)} of {len(jobs)} annealings failed: {', '.join(failed)}; their logs say why; "
                         f"the same command runs them again")
    return EXIT_REQUEUE if any(o.state == "stopped" for o in outcomes) else 0


def _grid(args: argparse.Namespace) -> Grid:
    from cprec.config import Length
    from cprec.settings import parse_settings
    from cprec.train.sweep import TRUNK, Grid

    unit = next(u for u in ("steps", "tokens", "share") if getattr(args, u) is not None)
    lengths = [parse_settings(Length, {unit: n}, source=f"--{unit}")
               for n in _numbers(getattr(args, unit), f"--{unit}")]
    seeds = _seeds(args.seed) if args.seed else [None]
    return Grid(lengths, args.shape.split(","), args.mix or [TRUNK], seeds, args.final_lr_ratio, args.packed,
                args.overrides)


def _seeds(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seed {text}: give whole numbers, with commas between them") from None


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(n) for n in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers, with commas between them") from None


def _arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="RUN[@STEP]", help="stable checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", metavar="N,...", help="lengths of the annealings in optimizer steps")
    length.add_argument("--tokens", metavar="N,...", help="... in tokens of packed rows")
    length.add_argument("--share", metavar="X,...", help="... as shares of the parent's steps")
    grid = parser.add_argument_group("the grid: every combination")
    grid.add_argument("--shape", default="sqrt", metavar="SHAPE,...", help="default: sqrt")
    grid.add_argument("--mix", action="append", metavar="CORPUS=WEIGHT,...",
                      help="one mixture, or `trunk` for the trunk's own; give several times; default: trunk")
    grid.add_argument("--seed", metavar="K,...", help="orders of the rows the trunk has not read; default: its own")
    parser.add_argument("--final-lr-ratio", type=float, default=0.1, help="last rate as a share of the stable one")
    parser.add_argument("--packed", action="append", default=[], metavar="FOLDER",
                        help="packed corpora besides the trunk's, for mixtures that name them")
    parser.add_argument("--out", help="folder of the branches; default: the trunk's with -sweep")
    start = parser.add_argument_group("how they are run")
    start.add_argument("--launcher", default="deepspeed", help="what starts launch/anneal.py; default: deepspeed")
    start.add_argument("--slurm", choices=["write", "submit"],
                       help="write OUT/commands-HASH.txt for an array job (launch/slurm/sweep.sbatch), with --launcher "
                            "ranks for a rank per task; and submit it, from the repository")
    start.add_argument("--sbatch", default="", metavar="OPTIONS", help="further options of sbatch")
    start.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of launch/anneal.py, for all of them")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
