"""Compares finished evaluations of the same queries: metrics with intervals, slices, paired tests, as one report.

    python launch/leaderboard.py base=runs/base/eval cprec=runs/a/eval --reference base --out report
    python launch/leaderboard.py sasrec=... cprec=runs/a/eval,runs/b/eval,runs/c/eval --reference sasrec --out report
    python launch/leaderboard.py --users 5000

Several folders of one name are its seeds: of training, or of preparations that order tied events anew; then each model
has as many, in the same order, or one. reads: evaluation folders and the queries that they name. writes: `--out`
(report.md, report.html, report.json, pictures). `--users` alone prints the smallest difference that so many could show.
"""

from __future__ import annotations

from cprec import cli
from cprec.errors import ConfigError


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("evaluations", nargs="*", metavar="NAME=FOLDER[,FOLDER...]", help="what launch/rank.py wrote")
    parser.add_argument("--reference", help="the name that all others are held against; default: no differences")
    parser.add_argument("--out", help="folder for the report")
    parser.add_argument("--users", type=int, help="print what so many users could show, before anything is run")
    args = parser.parse_args()
    if args.users:
        from cprec.eval.stats import power_line

        print(power_line(args.users))
        return
    if not args.evaluations or not args.out:
        raise ConfigError("give evaluations as NAME=FOLDER and a folder for the report as --out, or --users")
    folders = _folders(args.evaluations)
    from cprec.eval.comparison import make_report
    from cprec.eval.report import to_text, write_report

    report = make_report(folders, reference=args.reference)
    write_report(report, args.out)
    print(to_text(report))


def _folders(entries: list[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for entry in entries:
        name, _, listed = entry.partition("=")
        if not name or not listed or name in folders:
            raise ConfigError(f"{entry}: not of the form NAME=FOLDER[,FOLDER...] with a name of its own")
        folders[name] = listed.split(",")
    return folders


if __name__ == "__main__":
    cli.run(main)
