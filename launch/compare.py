"""Compare runs: the tree that they are, what they differ in, their losses per domain, their ranking, in one picture.

    python launch/compare.py runs/base                      # with all branches that are found beside it
    python launch/compare.py runs/base-sqrt-1000 runs/other/base-linear-500 --out report

Prints the Markdown, and writes it with the picture, and as one HTML file, into --out. Runs may be unfinished or moved.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cprec import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; parents and branches are found")
    parser.add_argument("--out", help="folder of the comparison; default: the first run's with -compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object and write nothing")
    args = parser.parse_args()
    from cprec.compare import compare, summarize

    if args.json:
        print(json.dumps([asdict(s) for s in summarize([Path(r) for r in args.runs])]))
        return
    out = Path(args.out or f"{Path(args.runs[0])}-compare")
    print(compare([Path(r) for r in args.runs], out))
    print(f"written: {', '.join(str(out / f'compare.{kind}') for kind in ('md', 'html', 'png'))}")


if __name__ == "__main__":
    cli.run(main)
