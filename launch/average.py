"""Average the weights of exported models, such as the branches of one trunk (model soup): one model, no further cost.

    python launch/average.py runs/sqrt/hf runs/linear/hf runs/mixed/hf --out runs/soup
    python launch/average.py runs/*/hf --out runs/soup --greedy --packed prepared/packed --corpora 'valid/*'

Uniform by default; `--greedy` takes the models by rising validation loss and keeps those with which the average gets no
worse. Architectures, tokenizers and shapes have to agree. One process, memory of one shard (greedy: of one model too).
"""

from __future__ import annotations

from pathlib import Path

from cprec import cli
from cprec.errors import ConfigError


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="exported models")
    parser.add_argument("--out", required=True, help="folder of the average")
    parser.add_argument("--greedy", action="store_true", help="keep only models that the average gains by")
    parser.add_argument("--packed", help="with --greedy: folder of packed corpora")
    parser.add_argument("--corpora", default="valid/*", help="with --greedy: which of them; default: valid/*")
    parser.add_argument("--rows", type=int, default=64, help="with --greedy: rows of each corpus; default: 64")
    args = parser.parse_args()
    if args.greedy != (args.packed is not None):
        raise ConfigError("--greedy needs --packed FOLDER, the corpora to choose by; without --greedy leave it out")
    from cprec.train.average import Corpora, greedy, uniform

    folders, out = [Path(m) for m in args.models], Path(args.out)
    if args.greedy:
        greedy(folders, out, Corpora(args.packed, args.corpora, args.rows))
    else:
        uniform(folders, out)


if __name__ == "__main__":
    cli.run(main)
