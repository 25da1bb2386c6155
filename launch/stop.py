"""Have a run save and exit at its next step, whatever started it; it exits with code 77, and nothing starts it again.

    python launch/stop.py runs/base

For a launcher that signals do not get through, and to end a SLURM job or chain that would come back by itself. The
run's own command goes on from there. SIGTERM and SIGUSR1 to the ranks do the same with exit code 75: start me again.
"""

from __future__ import annotations

from pathlib import Path

from cprec import cli


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    args = parser.parse_args()
    from cprec.train.stop import ask_to_stop

    path = ask_to_stop(args.run)
    print(f"wrote {path}: the run saves and exits after its next step; remove the file to let it run on")
    return 0


if __name__ == "__main__":
    cli.run(main)
