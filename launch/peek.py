"""Look into packed data: rows as text with document borders, manifests, lengths, hashes; and into a run's steps.

    python launch/peek.py prepared/complete_journey/packed              # all corpora in a table
    python launch/peek.py prepared/complete_journey/packed/mixed        # one: its manifest, its lengths
    python launch/peek.py prepared/complete_journey/packed/mixed --row 0
    python launch/peek.py prepared/complete_journey/packed --verify     # every shard's hash; exit code 3 if one differs
    python launch/peek.py runs/base --step 8123 --rank 5                # rows, documents, domains of a step

--step N is the step that makes the run's step count N, as `metrics.jsonl` and checkpoints count: the first step is 1.
It need not have been run yet. RUN is a run folder, with its config.yaml.

reads: packed corpora; for --row the tokenizer that their manifest names; for --step a run's config.yaml and data.json.
writes: nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from cprec import cli
from cprec.data import peek
from cprec.format import read_manifest


def main() -> None:
    """Read the command line and print what is asked for."""
    parser = cli.Parser(__doc__)
    parser.add_argument("packed", metavar="PACKED|RUN",
                        help="folder of a packed corpus or of several; with --step, of a run")
    shown = parser.add_argument_group("what is shown of packed data")
    shown.add_argument("--row", type=int, metavar="N", help="show row N as text")
    shown.add_argument("--tokenizer", metavar="PATH", help="default: the one that the manifest names")
    shown.add_argument("--lengths", action="store_true", help="only the histograms of lengths and fill")
    shown.add_argument("--verify", action="store_true", help="compare every shard's hash with the manifest's")
    shown.add_argument("--json", action="store_true", help="instead: one JSON object per corpus and line, its manifest")
    step = parser.add_argument_group("what is shown of a run")
    step.add_argument("--step", type=int, metavar="N", help="show what the step reads that makes RUN's step count N")
    step.add_argument("--rank", type=int, metavar="R", help="with --step: only what this rank reads")
    step.add_argument("--world-size", type=int, metavar="W",
                      help="with --step: dealt to so many ranks; default: those of the newest checkpoint, else 1")
    args = parser.parse_args()
    if args.step is None and (args.rank, args.world_size) != (None, None):
        parser.error("--rank and --world-size belong to --step")
    if args.json and (args.verify, args.row, args.lengths, args.step) != (False, None, False, None):
        parser.error("--json shows manifests; it goes with no other of these")
    if args.step is not None:
        show(show_step(args.packed, args.step, rank=args.rank, world_size=args.world_size))
    elif args.json:
        show(read_manifest(folder).model_dump_json() for folder in peek.find_corpora(args.packed))
    elif args.verify:
        print(peek.verify(peek.find_corpora(args.packed)))
    elif args.row is not None:
        corpus = peek.one_corpus(args.packed)
        ink = peek.Ink(has_colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        show(peek.show_row(corpus, args.row, tokenizer=peek.tokenizer_of(corpus, args.tokenizer), ink=ink))
    elif args.lengths:
        show(peek.show_lengths(peek.one_corpus(args.packed)))
    elif len(folders := peek.find_corpora(args.packed)) > 1:
        show(peek.show_corpora(folders))
    else:
        corpus = peek.one_corpus(folders[0])
        show(peek.show_manifest(corpus.manifest))
        show(peek.show_lengths(corpus))


def show_step(run: str, step: int, *, rank: int | None, world_size: int | None) -> Iterator[str]:
    from cprec.train import steps  # brings torch in, which the rest can do without

    return steps.show_step(steps.open_run(Path(run), step=step, world_size=world_size), step, rank=rank)


def show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    cli.run(main)
