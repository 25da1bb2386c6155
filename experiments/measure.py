"""Loss of an exported model on packed corpora: plain text that was held out, and validation histories of every shop.

    python -m experiments.measure --model work/.../hf --packed FOLDER [FOLDER ...] --corpora 'valid/*' --rows 16 --out F

reads: a model folder, packed corpora. writes: `--out`, JSON: nats per predicted token by corpus. One process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cprec import cli
from cprec.data.sampler import matching
from cprec.errors import ConfigError, did_you_mean
from cprec.format import PackedCorpus, list_corpora, write_atomically
from cprec.train.average import validation_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--packed", required=True, type=Path, nargs="+")
    parser.add_argument("--corpora", required=True, nargs="+", help="names or patterns")
    parser.add_argument("--rows", required=True, type=int, help="of each corpus, the same ones every time")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    places = {name: folder / name for folder in args.packed for name in list_corpora(folder)}
    names = sorted({name for pattern in args.corpora for name in matching(pattern, places)})
    if not names:
        raise ConfigError(f"--corpora {' '.join(args.corpora)}: none is there; {did_you_mean(args.corpora[0], places)}")
    loss = validation_loss(args.model, {name: PackedCorpus(places[name]) for name in names}, args.rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(loss.by_corpus, indent=1) + "\n")
    print(json.dumps(loss.by_corpus))


if __name__ == "__main__":
    cli.run(main)
