"""Ranks the queries of every domain with one model or baseline, and prints its table.

    python   launch/rank.py --model runs/base-sqrt/hf --queries prepared/queries --out runs/base-sqrt/eval
    torchrun --nproc_per_node 8 launch/rank.py --model ... --queries ... --out ...
    python   launch/rank.py --baseline sasrec --queries prepared/queries --out runs/sasrec/eval
    python   launch/rank.py --model runs/base/hf --control shuffled-history --queries ... --out runs/base/control
    python   launch/rank.py --model runs/base/hf --protocol uniform-99 --full runs/base/eval --queries ... --out ...

reads: an exported model, a queries folder. writes: `--out` (results per domain, report.md, report.html, report.json).
The same command again goes on where it was stopped, with any number of processes; finished, it only prints the table.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from cprec import cli, dist
from cprec.eval.baselines import BASELINES
from cprec.eval.comparison import make_report, short_name
from cprec.eval.controls import CONTROLS
from cprec.eval.rankers import DTYPES
from cprec.eval.report import to_text, write_report
from cprec.eval.run import EvalOptions, evaluate, expectation, refuse_full
from cprec.process import only_writer

LONGEST_WAIT = timedelta(days=30)
"""For the process with the most to rank: whoever has finished only waits. A lost one ends the others with torchrun, or
`srun --kill-on-bad-exit`; with gloo by itself."""


def parse_arguments() -> tuple[EvalOptions, str | None]:
    """Options from the command line, and the folder to compare with."""
    parser = cli.Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of an exported model (or a hub name)")
    what.add_argument("--baseline", help=f"instead of a model: {', '.join(BASELINES)}")
    parser.add_argument("--queries", required=True, help="folder of prepared queries")
    parser.add_argument("--out", required=True, help="folder for the results")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--domains", help="comma-separated; default: all")
    asked.add_argument("--limit", type=int, help="only the first N queries of each domain")
    asked.add_argument("--seen", choices=("exclude", "include"), help="whether items had before are candidates; "
                       "default: as the queries were frozen")
    asked.add_argument("--items", choices=("all", "warm"), default="all", help="warm: only items of the training "
                       "window; default all")
    asked.add_argument("--control", help=f"make the queries worse on purpose: {', '.join(CONTROLS)}")
    how = parser.add_argument_group("how it is answered")
    how.add_argument("--protocol", default="full", help="full (default), uniform-M, popularity-M, choice-M with M "
                     "negatives, beam-W or open-W with beams of width W")
    how.add_argument("--full", help="of a uniform-M protocol: the folder of the same model's full ranking, whose "
                     "expectation is printed beside")
    how.add_argument("--scoring", default="sum", help="sum (default), mean-A (per length^A) or pmi-W (minus W times "
                     "the log-probability without a history)")
    how.add_argument("--rank-up-to", type=int, help="do not tell ranks beyond this one apart (faster)")
    how.add_argument("--top-k", type=int, default=10, help="how many of the best to list; default 10")
    how.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)}; default float32")
    how.add_argument("--seed", type=int, default=0, help="of a baseline that is trained; default 0")
    a = parser.parse_args()
    options = EvalOptions(queries=a.queries, out=a.out, model=a.model, baseline=a.baseline, limit=a.limit,
                          dtype=a.dtype, domains=None if a.domains is None else a.domains.split(","), top_k=a.top_k,
                          protocol=a.protocol, scoring=a.scoring, rank_up_to=a.rank_up_to, seen=a.seen, items=a.items,
                          control=a.control, seed=a.seed)
    return options, a.full


def main() -> None:
    """Evaluate, write the report, print it."""
    options, full = parse_arguments()
    if full is not None:
        refuse_full(options, full)
    if "RANK" in os.environ:
        dist.init(timeout=LONGEST_WAIT)
    try:
        with dist.name_lost_ranks(), only_writer(Path(options.out)) if dist.rank() == 0 else nullcontext():
            manifest = evaluate(options)
        if dist.rank() == 0:
            report = make_report({short_name(manifest): options.out})
            write_report(report, options.out)
            print(to_text(report))
            if full is not None:
                print(expectation(full, options.out))
    finally:
        dist.shutdown()


if __name__ == "__main__":
    cli.run(main)
