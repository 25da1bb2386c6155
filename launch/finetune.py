"""Fine-tune an exported model on one domain: on the targets of k of its documents, or of all.

    deepspeed launch/finetune.py --model runs/base-sqrt/hf --packed prepared/toys/packed --corpus specific/toys \\
        --shots 256 --run-dir runs/toys-256 [--epochs 5] [--seed 0] [key.subkey=value ...] [--dry-run]
    python launch/export.py --from runs/toys-256 && torchrun --nproc_per_node 8 launch/rank.py \\
        --model runs/toys-256/hf --queries prepared/toys/queries --out runs/toys-256/eval

The corpus is prepared with `template: supervised` (one document per history, loss on its last item), with the clock of
the pre-training and the model's tokenizer. Fewer shots are among more of the same seed. `--shots 0` is the model as it
is: rank it. The same trainer, checkpoints and exit codes as launch/pretrain.py; the same command again goes on. The
rest of the config is launch/configs/finetune.yaml.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from cprec import cli
from cprec.errors import ConfigError, did_you_mean, raise_all
from cprec.log import get_logger

if TYPE_CHECKING:
    from cprec.config import RunConfig
    from cprec.format import Manifest

log = get_logger(__name__)
CONFIG = Path(__file__).parent / "configs/finetune.yaml"


def main() -> int:
    args = _arguments()
    from cprec import dist
    from cprec.train.loop import run

    if args.shots == 0:
        log.info("0 shots: %s is the model to rank, nothing is trained", args.model)
        return 0
    if not args.dry_run:
        dist.init()
    return run(_config(args, _manifest(args), args.world_size or dist.world_size()), dry_run=args.dry_run,
               planned_world_size=args.world_size)


def _manifest(args: argparse.Namespace) -> Manifest:
    """Of the corpus to learn from: `--corpus`, or the shots that rank 0 draws from it."""
    from cprec import dist
    from cprec.format import list_corpora, read_manifest
    from data_prep.shots import draw_shots

    known = list_corpora(args.packed)
    if args.corpus not in known:
        raise ConfigError(f"--corpus {args.corpus} is not in {args.packed}; {did_you_mean(args.corpus, known)}")
    folder = Path(args.packed) / args.corpus
    manifest = read_manifest(folder)
    if not manifest.has_loss_mask:
        raise ConfigError(f"{folder} was packed with template {manifest.template and manifest.template.name!r}, whose "
                          f"loss is on every item; prepare it with template: supervised")
    if args.shots is None:
        return manifest
    problems = []
    if dist.rank() == 0:
        try:
            draw_shots(folder, _shots_folder(args) / _name(args), n_shots=args.shots, seed=args.seed, name=_name(args))
        except ConfigError as e:
            problems.append(str(e))
    raise_all(dist.gather_texts(problems), of="--shots")  # every rank has waited for the first one
    return read_manifest(_shots_folder(args) / _name(args))


def _shots_folder(args: argparse.Namespace) -> Path:
    return Path(args.run_dir) / "packed"


def _name(args: argparse.Namespace) -> str:
    return f"shots/{Path(args.corpus).name}-{args.shots}"


def _config(args: argparse.Namespace, manifest: Manifest, world_size: int) -> RunConfig:
    """The file's values, with what the command line and the number of rows decide."""
    from cprec.config import RunConfig
    from cprec.settings import load_settings

    packed = [args.packed] if args.shots is None else [str(_shots_folder(args)), args.packed]
    given = [f"run_dir={args.run_dir}", f"model.path={args.model}", f"data.packed={json.dumps(packed)}",
             f"data.mix.stable={json.dumps({manifest.corpus: 1})}", f"data.seed={args.seed}", *args.overrides]
    config = load_settings(RunConfig, CONFIG, given)
    unit = config.batch.micro_batch_size * world_size
    most = max(manifest.n_rows // 4 // unit, 1) * unit
    batch = min(config.batch.global_batch_size, most)
    if batch < config.batch.global_batch_size:
        log.info("%d rows: batch.global_batch_size is %d, not %d", manifest.n_rows, batch,
                 config.batch.global_batch_size)
    n_steps = math.ceil(args.epochs * manifest.n_rows / batch)
    return load_settings(RunConfig, CONFIG, [f"schedule.total={{steps: {n_steps}}}", *given,
                                             f"batch.global_batch_size={batch}"])


def _shots(text: str) -> int | None:
    """A number, `1k`, or None for all."""
    if text == "all":
        return None
    n = int(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)
    if n < 0:
        raise ValueError(text)
    return n


def _arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--packed", required=True, help="packed corpora, prepared with template: supervised")
    parser.add_argument("--corpus", required=True, help="the one to learn from, such as specific/toys")
    parser.add_argument("--shots", required=True, type=_shots, help="documents to learn from: 64, 256, 1k, ..., or all")
    parser.add_argument("--run-dir", required=True, help="folder of the run")
    parser.add_argument("--epochs", type=float, default=5, help="how often each document is read; default 5")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the order; default 0")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")
    plan = parser.add_argument_group("without training")
    plan.add_argument("--dry-run", action="store_true",
                      help="draw the shots, print the resolved config and its plan, start nothing")
    plan.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
