"""Turn a checkpoint into a Hugging Face folder: safetensors, config, tokenizer, model card.

    python launch/export.py --from runs/base@20000 --out runs/base/hf [--dtype bfloat16] [--adapter-only]
    python launch/export.py --from runs/base-sqrt-1000 --push-to me/shops-1.5b     (after: hf auth login)

`--from`: RUN (its newest checkpoint), RUN@STEP, or a checkpoint folder. One process, memory of the largest tensor. LoRA
adapters are merged into the model; with `--adapter-only` they are written alone, as peft reads them.
"""

from __future__ import annotations

from pathlib import Path

from cprec import cli


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="RUN[@STEP]", help="what to export")
    parser.add_argument("--out", help="new folder; default: RUN/hf, of adapters alone RUN/adapter")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    parser.add_argument("--adapter-only", action="store_true", help="the LoRA adapters, without the model")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="then upload the folder to this repository of the "
                        "Hugging Face hub; a new one is private")
    args = parser.parse_args()
    import torch

    from cprec.train.branch import find_checkpoint
    from cprec.train.export import export
    from cprec.train.hub import check_can_push, push

    if args.push_to:
        check_can_push(args.push_to)
    checkpoint = find_checkpoint(args.source)
    out = Path(args.out) if args.out else checkpoint.run_dir / ("adapter" if args.adapter_only else "hf")
    export(checkpoint, out, dtype=getattr(torch, args.dtype), adapter_only=args.adapter_only)
    if args.push_to:
        message = f"Step {checkpoint.state.step:,} of {checkpoint.run_dir.name}, by CPRec"
        print(f"pushed: {push(out, args.push_to, message=message)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
