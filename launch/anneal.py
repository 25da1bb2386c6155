"""Anneal a stable checkpoint in a run of its own; the parent stays untouched, so try as many as you like.

    deepspeed launch/anneal.py --from runs/base --steps 1000 --shape sqrt
    deepspeed launch/anneal.py --from runs/base@20000 --share 0.1 --mix 'mixed=1,specific/*=2' --control
    deepspeed launch/anneal.py --from runs/base --steps 500 --packed prepared/new/packed --mix 'new/*=1' \\
        data.max_epochs='{new/*: 2}' checkpoint.every=100
    deepspeed launch/anneal.py --from runs/base-sqrt-1000 --rewarm 100 --steps 20000     # back to the stable rate

`--from`: RUN (its newest stable checkpoint), RUN@STEP, RUN@latest-stable, or a checkpoint folder; with --rewarm an
annealed one, or an exported folder. The same command again goes on from where the branch stands. `--dry-run` prints the
resolved config and its plan. Exit codes as in launch/pretrain.py; docs/annealing.md says what is guaranteed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cprec import cli
from cprec.errors import ConfigError
from cprec.schedule import SHAPES

if TYPE_CHECKING:
    from cprec.config import RunConfig


def main() -> int:
    args = _arguments()
    from cprec import dist
    from cprec.train.loop import run, train
    from cprec.train.profile import parse_steps
    from cprec.train.stop import signals_collected

    configs, traced = _configs(args), parse_steps(args.profile)
    if args.dry_run:
        for config in configs:
            run(config, dry_run=True, planned_world_size=args.world_size)
        return 0
    with signals_collected() as asked:
        try:  # a control after its branch, in one process group: DeepSpeed keeps what it made of the first
            codes = (train(config, traced=traced, asked=asked) for config in configs)
            return next((code for code in codes if code), 0)
        finally:
            dist.shutdown()


def _configs(args: argparse.Namespace) -> list[RunConfig]:
    """The branch's config, and its control's if asked for."""
    from cprec import dist
    from cprec.config import Length
    from cprec.settings import parse_settings
    from cprec.train import branch as b
    from cprec.train.checkpoint import EXPORTED

    units = {"steps": args.steps, "tokens": args.tokens, "share": args.share}
    length = parse_settings(Length, {k: v for k, v in units.items() if v is not None}, source="anneal.py --")
    rewarms = args.rewarm is not None
    common = {"length": length, "run_dir": args.run_dir, "seed": args.seed, "overrides": args.overrides,
              "pinned": b.is_pinned(args.source)}
    _refuse_mixed_up(args, rewarms)
    dist.init()
    if rewarms and (Path(args.source) / EXPORTED).is_file():
        return [b.restarting_config(Path(args.source), b.Rewarming(**common, rewarm_steps=args.rewarm))]
    # a trunk that trains on may have moved between two ranks' looks
    found = dist.gather_texts([str(b.find_parent(args.source, annealed=rewarms).folder)])[0]
    parent = b.find_parent(found, annealed=rewarms)
    if rewarms:
        return [b.rewarming_config(
            parent, b.Rewarming(**common, rewarm_steps=args.rewarm, from_zero=args.from_zero))]
    config = b.annealing_config(parent, b.Annealing(
        **common, shape=args.shape, final_lr_ratio=args.final_lr_ratio, final_lr=args.final_lr,
        mix=cli.weights(args.mix), packed=args.packed))
    return [config, b.control_config(config)] if args.control else [config]


def _refuse_mixed_up(args: argparse.Namespace, rewarms: bool) -> None:
    """Options that mean nothing together."""
    only_annealing = {"--mix": args.mix, "--packed": args.packed, "--control": args.control,
                      "--shape": args.shape_given, "--final-lr": args.final_lr is not None}
    given = [name for name, value in only_annealing.items() if value]
    if rewarms and given:
        raise ConfigError(f"{', '.join(given)}: these are of an annealing; with --rewarm the run goes on at the stable "
                          f"rate with the trunk's mixture, and annealings can branch from it")
    if rewarms and args.rewarm < 0:
        raise ConfigError(f"--rewarm {args.rewarm}: give the number of steps of the way back, 0 for at once")
    if args.from_zero and not rewarms:
        raise ConfigError("--from-zero says where --rewarm begins; give --rewarm too, or leave it out")


def _arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="RUN[@STEP]", help="stable checkpoint")
    length = parser.add_argument_group("how long (one of them)").add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of the branch in optimizer steps")
    length.add_argument("--tokens", type=float, help="... in tokens of packed rows")
    length.add_argument("--share", type=float, help="... as a share of the parent's steps")
    rate = parser.add_argument_group("learning rate")
    rate.add_argument("--shape", help=f"{', '.join(sorted(SHAPES))}; default: sqrt (1-sqrt)")
    final = rate.add_mutually_exclusive_group()
    final.add_argument("--final-lr", type=float, metavar="X", help="last learning rate")
    final.add_argument("--final-lr-ratio", type=float, default=0.1, metavar="X",
                       help="... as a share of the stable one; default: 0.1")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--mix", action="append", default=[], metavar="CORPUS=WEIGHT,...",
                      help="weights of corpora or patterns in the annealing; default: the trunk's")
    rows.add_argument("--packed", action="append", default=[], metavar="FOLDER",
                      help="packed corpora that the annealing reads besides the trunk's; give them a weight by --mix")
    rows.add_argument("--seed", type=int, help="another order of the rows that the trunk has not read")
    rows.add_argument("--control", action="store_true",
                      help="afterwards the same annealing on the trunk's mixture too, in RUN_DIR-control")
    back = parser.add_argument_group("instead of an annealing")
    back.add_argument("--rewarm", type=int, metavar="N", help="back to the stable rate over N steps")
    back.add_argument("--from-zero", action="store_true", help="with --rewarm: from rate 0, not from the last one")
    parser.add_argument("--run-dir", help="folder of the branch; default: the trunk's with -SHAPE-STEPS")
    plan = parser.add_argument_group("without training, or with a trace")
    plan.add_argument("--dry-run", action="store_true", help="print the resolved config and its plan, start nothing")
    plan.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    plan.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps by torch.profiler into run/profile/")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the trunk's, where a "
                        "branch may have its own: checkpoint, validation, log_every, data.max_epochs ...")
    args = parser.parse_args()
    args.shape_given, args.shape = args.shape is not None, args.shape or "sqrt"
    return args


if __name__ == "__main__":
    cli.run(main)
