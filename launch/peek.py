"""Look into packed data: rows as text with document borders, the manifest, lengths and fill, hashes.

    python launch/peek.py prepared/complete_journey/packed              # all corpora in a table
    python launch/peek.py prepared/complete_journey/packed/mixed        # one: its manifest, its lengths
    python launch/peek.py prepared/complete_journey/packed/mixed --row 0
    python launch/peek.py prepared/complete_journey/packed --verify     # every shard's hash; exit code 3 if one differs

reads: packed corpora, and for --row the tokenizer that their manifest names. writes: nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator

from cprec import cli
from cprec.data import peek


def main() -> None:
    """Read the command line and print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", metavar="PACKED", help="folder of a packed corpus, or of several")
    parser.add_argument("--row", type=int, metavar="N", help="show row N as text")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one that the manifest names")
    parser.add_argument("--lengths", action="store_true", help="only the histograms of lengths and fill")
    parser.add_argument("--verify", action="store_true", help="compare every shard's hash with the manifest's")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    if args.verify:
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


def show(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)


if __name__ == "__main__":
    cli.run(main)
