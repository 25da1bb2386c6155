"""Anneal a stable checkpoint in a run of its own; the parent stays untouched, so try as many as you like.

    deepspeed launch/anneal.py --from runs/base --steps 1000 --shape sqrt
    deepspeed launch/anneal.py --from runs/base@20000 --share 0.1 --shape linear --mix mixed=1 --run-dir runs/mixed
    deepspeed launch/anneal.py --from runs/base --steps 500 --data prepared/new/packed --mix mixed=1 --mix 'new/*=2'

`--from`: RUN (its newest stable checkpoint), RUN@STEP, or a checkpoint folder. The same command again goes on from
where the branch stands. Exit codes as in launch/pretrain.py.
"""

from __future__ import annotations

import argparse

from cprec import cli
from cprec.errors import ConfigError
from cprec.schedule import SHAPES


def main() -> int:
    args = _arguments()
    from cprec import dist
    from cprec.config import Length
    from cprec.settings import parse_settings
    from cprec.train.branch import branch_config, find_parent
    from cprec.train.loop import run

    units = {"steps": args.steps, "tokens": args.tokens, "share": args.share}
    length = parse_settings(Length, {k: v for k, v in units.items() if v is not None}, source="anneal.py --")
    dist.init()
    found = dist.gather_texts([str(find_parent(args.source).folder)])[0]  # a trunk that trains on may have moved
    config = branch_config(find_parent(found), length=length, shape=args.shape, run_dir=args.run_dir,
                           final_lr_ratio=args.final_lr_ratio, mix=_mix(args.mix), data=args.data)
    return run(config, dry_run=args.dry_run, planned_world_size=args.world_size, profile=args.profile)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, metavar="RUN[@STEP]", help="stable checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of the annealing in optimizer steps")
    length.add_argument("--tokens", type=float, help="... in tokens of packed rows")
    length.add_argument("--share", type=float, help="... as a share of the parent's steps")
    parser.add_argument("--shape", default="sqrt", choices=sorted(SHAPES), help="default: sqrt (1-sqrt)")
    parser.add_argument("--final-lr-ratio", type=float, default=0.1, help="last rate as a share of the stable one")
    parser.add_argument("--mix", action="append", default=[], metavar="CORPUS=WEIGHT",
                        help="weight of a corpus or pattern in the annealing; default: the trunk's weights")
    parser.add_argument("--data", action="append", default=[], metavar="FOLDER",
                        help="packed corpora that the annealing reads besides the trunk's; give them a weight by --mix")
    parser.add_argument("--run-dir", help="folder of the branch; default: the trunk's with -SHAPE-STEPS")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its plan, start nothing")
    parser.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps by torch.profiler into run/profile/")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def _mix(entries: list[str]) -> dict[str, float] | None:
    mix = {}
    for entry in entries:
        name, _, weight = entry.rpartition("=")
        try:
            mix[name] = float(weight)
        except ValueError:
            raise ConfigError(f"--mix {entry}: not of the form CORPUS=WEIGHT, such as 'specific/*=1'") from None
    return mix or None


if __name__ == "__main__":
    cli.run(main)
