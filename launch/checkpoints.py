"""A run's checkpoints: what there is, how big, why each is kept; whether they are sound; which would be pruned.

    python launch/checkpoints.py runs/base                     # the list; nothing is read but each state.json
    python launch/checkpoints.py runs/base --verify            # every file's hash; exit code 4 if one is not sound
    python launch/checkpoints.py runs/base --prune --dry-run   # what --prune would remove
    python launch/checkpoints.py runs/base --prune checkpoint.keep_last=1

A run prunes by itself after every save, as its `checkpoint` block says; `--prune` does it once, with other numbers if
given. Parents of living branches are never removed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cprec import cli


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="checkpoint.KEY=VALUE", help="instead of what the run says")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    parser.add_argument("--prune", action="store_true", help="remove what nothing keeps")
    parser.add_argument("--dry-run", action="store_true", help="with --prune: only say what would go")
    parser.add_argument("--json", action="store_true", help="one JSON object: `checkpoints` as they were found, and "
                        "`pruned`, `unsound` where asked for")
    args = parser.parse_intermixed_args()  # the numbers may stand behind the options
    from cprec.process import only_writer
    from cprec.settings import load_settings
    from cprec.train.checkpoint import CONFIG, read_run_config
    from cprec.train.inventory import take_inventory, unsound, write_table
    from cprec.train.retention import prunable, prune

    run_dir = Path(args.run)
    config = read_run_config(run_dir)
    if args.overrides:
        config = load_settings(type(config), run_dir / CONFIG, args.overrides)
    inventory = take_inventory(run_dir, config.checkpoint)
    pruned = None
    if args.prune and args.dry_run:
        pruned = prunable(run_dir, config.checkpoint)
    elif args.prune:
        with only_writer(run_dir, wait_s=0.0):
            pruned = prune(run_dir, config.checkpoint)
    problems = unsound(run_dir) if args.verify else None
    if args.json:
        print(json.dumps({**asdict(inventory), "pruned": pruned, "unsound": problems}))
    else:
        show(write_table(run_dir, inventory), pruned, problems, dry_run=args.dry_run)
    return 4 if problems else 0


def show(table: Iterator[str], pruned: list[str] | None, problems: list[str] | None, *, dry_run: bool) -> None:
    for line in table:
        print(line)
    if pruned is not None:
        print("would be pruned:" if dry_run else "pruned:", ", ".join(pruned) or "nothing")
    for problem in problems or []:
        print("NOT SOUND:", problem)
    if problems == []:
        print("every file has its hash")


if __name__ == "__main__":
    cli.run(main)
