"""Continue the pre-training of a language model on packed behaviour sequences.

    deepspeed launch/pretrain.py --config launch/configs/qwen2.5-1.5b.yaml [key.subkey=value ...] [--dry-run]

The same command again goes on from the newest checkpoint. `--dry-run` prints the resolved config and what follows from
it, and starts nothing. Exit code 75: stopped by SIGTERM or SIGUSR1 after saving; start again to go on.
"""

from __future__ import annotations

import argparse

from cprec import cli, dist
from cprec.config import RunConfig
from cprec.errors import EXIT_REQUEUE
from cprec.settings import dump_settings, load_settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run config, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its plan, start nothing")
    parser.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    config = load_settings(RunConfig, args.config, args.overrides)
    if args.dry_run:
        from cprec.train.plan import build_plan

        plan = build_plan(config, args.world_size or dist.world_size())
        if dist.rank() == 0:
            print(dump_settings(plan.config))
            print(plan.text())
        return 0
    from cprec.train.loop import train

    try:
        return 0 if train(config) else EXIT_REQUEUE
    finally:
        dist.shutdown()


if __name__ == "__main__":
    cli.run(main)
