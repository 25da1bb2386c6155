"""Examine every machine of a job before it starts: started as the run would be, with the run's config.

    torchrun --nproc_per_node 8 launch/preflight.py --config launch/configs/qwen2.5-1.5b.yaml [key=value ...] [--json]
    deepspeed --hostfile hosts launch/preflight.py --config ...        srun ... launch/preflight.py --config ...

Each rank: versions of packages and driver the same everywhere; all-reduce exact, with its bus bandwidth; a matrix
product's speed against the median rank's; free memory and disk; the clock; the run folder shared; data and newest
checkpoint readable; no lock left in TORCH_EXTENSIONS_DIR. Prints a table, and exits with 6 naming the bad hosts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cprec import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", required=True, help="run config, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("--min-speed", type=float, default=0.8, help="share of the median rank's product speed")
    parser.add_argument("--min-disk-gb", type=float, default=10.0, help="free in run and temporary folders")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    from cprec import dist
    from cprec.cluster import facts, preflight
    from cprec.config import RunConfig
    from cprec.settings import load_settings

    config = load_settings(RunConfig, args.config, args.overrides)
    dist.init()
    try:
        found = facts.gather(config)
        findings = preflight.judge(found, preflight.Limits(min_speed=args.min_speed, min_disk_gb=args.min_disk_gb))
        if dist.rank() == 0:
            values = {"ranks": [f.model_dump() for f in found], "findings": [asdict(f) for f in findings]}
            print(json.dumps(values) if args.json else preflight.table(found, findings), flush=True)
        preflight.require_fit(found, findings)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    cli.run(main)
