"""Compare runs: the tree that they are, what they differ in, their losses per domain, their ranking, in one picture.

    python launch/compare.py runs/base                      # with all branches that are found beside it
    python launch/compare.py runs/base-sqrt-1000 runs/other/base-linear-500 --out report

Prints the Markdown, and writes it with the picture, and as one HTML file, into --out. Runs may be unfinished or moved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cprec import cli


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; parents and branches are found")
    parser.add_argument("--out", help="folder of the comparison; default: the first run's with -compare")
    args = parser.parse_args()
    from cprec.compare import compare

    out = Path(args.out or f"{Path(args.runs[0])}-compare")
    print(compare([Path(r) for r in args.runs], out))
    print(f"written: {', '.join(str(out / f'compare.{kind}') for kind in ('md', 'html', 'png'))}")


if __name__ == "__main__":
    cli.run(main)
