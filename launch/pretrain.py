"""Continue the pre-training of a language model on packed behaviour sequences.

    deepspeed launch/pretrain.py --config launch/configs/qwen2.5-1.5b.yaml [key.subkey=value ...] [--dry-run]

The same command again goes on from the newest checkpoint. `--dry-run` prints the resolved config and what follows from
it, and starts nothing. Exit code 75: stopped by SIGTERM or SIGUSR1 after saving; start again to go on.
"""

from __future__ import annotations

import argparse

from cprec import cli


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", required=True, help="run config, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    plan = parser.add_argument_group("without training, or with a trace")
    plan.add_argument("--dry-run", action="store_true", help="print the resolved config and its plan, start nothing")
    plan.add_argument("--world-size", type=sizes, metavar="N[,N...]", default=[],
                      help="with --dry-run: plan for this many ranks; of several, for the first that the global batch "
                           "can be shared out to")
    plan.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps by torch.profiler into run/profile/")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    from cprec.config import RunConfig, check_batch
    from cprec.settings import load_settings
    from cprec.train.loop import run

    config = load_settings(RunConfig, args.config, args.overrides)
    planned = next((n for n in args.world_size if not check_batch(config.batch, n)), next(iter(args.world_size), None))
    return run(config, dry_run=args.dry_run, planned_world_size=planned, profile=args.profile)


def sizes(text: str) -> list[int]:
    """`8,6,4` as numbers. Raises ValueError for anything but positive ones."""
    found = [int(n) for n in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


if __name__ == "__main__":
    cli.run(main)
