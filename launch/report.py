"""One HTML page about a run: lineage, config, data, curves, speed, bad steps, starts, checkpoints, ranking.

    python launch/report.py runs/base                     # writes runs/base/report.html, which needs nothing else
    python launch/report.py runs/base --out base.html
    python launch/report.py runs/base --watch             # the same at http://127.0.0.1:8080/ while the run goes on

The run may go on, have ended, or not have logged yet. From another machine: ssh -L 8080:127.0.0.1:8080 HOST.
"""

from __future__ import annotations

from pathlib import Path

from cprec import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    live = parser.add_argument_group("while the run goes on")
    live.add_argument("--watch", action="store_true", help="serve the page to this machine instead, until Ctrl-C")
    live.add_argument("--port", type=int, default=8080, help="with --watch; 0: a free one; default: %(default)s")
    live.add_argument("--every", type=float, default=10.0, metavar="SECONDS",
                      help="with --watch: how often an open page asks anew; default: %(default)s")
    args = parser.parse_args()
    from cprec.format import write_atomically
    from cprec.report.page import run_page

    if args.watch:
        watch(args.run, args.port, args.every)
        return
    out = args.out or args.run / "report.html"
    page = run_page(args.run)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    print(f"written: {out}")


def watch(run: Path, port: int, every_s: float) -> None:
    """Serve the page until Ctrl-C. Raises CheckpointError when the folder is no run's, ConfigError for a wrong port or
    interval."""
    from cprec.errors import ConfigError
    from cprec.report.live import PageServer, page_of
    from cprec.train.checkpoint import read_run_config

    if every_s < 1:
        raise ConfigError(f"--every {every_s:g}: give at least 1 second")
    read_run_config(run)
    with PageServer(page_of(run, refresh_s=every_s), port=port) as server:
        print(f"{run} at {server.url}; Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
