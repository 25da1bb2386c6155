"""Ranks the queries of every domain with one model or baseline, and prints its table.

    python   launch/rank.py --model runs/base-sqrt/hf --queries prepared/queries --out runs/base-sqrt/eval
    torchrun --nproc_per_node 8 launch/rank.py --model ... --queries ... --out ...
    python   launch/rank.py --baseline sasrec --queries prepared/queries --out runs/sasrec/eval
    python   launch/rank.py --model runs/base/hf --control shuffled-history --queries ... --out runs/base/control

reads: an exported model, a queries folder. writes: `--out` (results per domain, report.md, report.json). The same
command again goes on where it was stopped, with the same number of processes; finished, it only prints the table.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from cprec import cli, dist
from cprec.eval.baselines import BASELINES
from cprec.eval.comparison import make_report, short_name
from cprec.eval.controls import CONTROLS
from cprec.eval.report import to_text, write_report
from cprec.eval.run import DTYPES, EvalOptions, evaluate
from cprec.process import only_writer


def parse_arguments() -> EvalOptions:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of an exported model (or a hub name)")
    what.add_argument("--baseline", help=f"instead of a model: {', '.join(BASELINES)}")
    parser.add_argument("--queries", required=True, help="folder of prepared queries")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--domains", help="comma-separated; default: all")
    parser.add_argument("--limit", type=int, help="only the first N queries of each domain")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)}; default float32")
    parser.add_argument("--control", help=f"make the queries worse on purpose: {', '.join(CONTROLS)}")
    parser.add_argument("--seed", type=int, default=0, help="of a baseline that is trained; default 0")
    a = parser.parse_args()
    return EvalOptions(queries=a.queries, out=a.out, model=a.model, baseline=a.baseline, limit=a.limit, dtype=a.dtype,
                       control=a.control, seed=a.seed,
                       domains=None if a.domains is None else a.domains.split(","))


def main() -> None:
    """Evaluate, write the report, print it."""
    options = parse_arguments()
    if "RANK" in os.environ:
        dist.init()
    try:
        with only_writer(Path(options.out)) if dist.rank() == 0 else nullcontext():
            manifest = evaluate(options)
        if dist.rank() == 0:
            report = make_report({short_name(manifest): options.out})
            write_report(report, options.out)
            print(to_text(report))
    finally:
        dist.shutdown()


if __name__ == "__main__":
    cli.run(main)
