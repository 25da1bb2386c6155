"""Averages of exported models: uniform, or greedy by validation loss (model soups, Wortsman et al. 2022,
arXiv:2203.05482).

reads: Hugging Face folders of one architecture and tokenizer, such as the exports of branches from one trunk; for the
greedy one packed corpora. writes: a folder of the same kind, by rename, in the first model's shards and dtype. Costs:
memory of one shard, summed in float32 tensor by tensor; the greedy one reads each model's weights once per candidate,
and holds one model to evaluate it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cprec import dist
from cprec.attention import select
from cprec.data.collate import collate
from cprec.data.corpora import find_corpora
from cprec.data.sampler import matching, permute
from cprec.errors import ConfigError, DataError, did_you_mean, raise_all
from cprec.format import PackedCorpus
from cprec.log import get_logger, progress
from cprec.model import load_for_training
from cprec.storage import is_url
from cprec.tokenizer import load_tokenizer
from cprec.train.checkpoint import AVERAGED
from cprec.train.disk import name_refused_writes, replacing_folder
from cprec.train.model_card import front_matter, licence_files, read_card

log = get_logger(__name__)
MAY_DIFFER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Fields of a model's config.json that do not decide what its weights mean."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Corpora:
    """What validation loss is measured on: corpora below a packed folder by pattern, and how many rows of each."""

    packed: str
    pattern: str = "valid/*"
    rows: int = 64


@dataclass(frozen=True)
class Loss:
    """Nats per predicted token, over all corpora and by corpus."""

    loss: float
    by_corpus: dict[str, float]


@dataclass(frozen=True)
class _Weights:
    """Which file of a model folder holds a tensor, and the tensor's shape, by its name."""

    folder: Path
    file_of: dict[str, str]
    shape_of: dict[str, tuple[int, ...]]


def uniform(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of the models in `folders` to the new folder `out`.

    Raises ConfigError listing what the models disagree in, or when `out` holds something else.
    """
    weights = _agreeing(folders)
    origin = {"kind": "uniform", "models": [_origin(f) for f in folders]}
    if not _is_there(out, origin):
        _write(weights, out, origin, losses={})


def greedy(folders: Sequence[Path], out: Path, corpora: Corpora) -> None:
    """Write the greedy average: models by rising loss on `corpora`, each kept if with it the mean's loss is no higher.

    Never worse on `corpora` than the best of the models. Raises ConfigError or DataError.
    """
    weights = _agreeing(folders)
    asked = {"kind": "greedy", "models": [_origin(f) for f in folders], "corpora": vars(corpora)}
    if _is_there(out, asked):
        return
    rows = _open_corpora(corpora, folders[0])
    losses = {w.folder: validation_loss(w.folder, rows, corpora.rows) for w in weights}
    for folder, found in losses.items():
        log.info("%s: validation loss %.5f", folder, found.loss)
    first, *rest = sorted(weights, key=lambda w: losses[w.folder].loss)
    kept, best = [first], losses[first.folder]
    for candidate in rest:
        found = _trial_loss([*kept, candidate], out, rows, corpora.rows)
        better = found.loss <= best.loss
        log.info("with %s: %.5f, %s", candidate.folder, found.loss, "kept" if better else "left out")
        if better:
            kept, best = [*kept, candidate], found
    origin = {**asked, "kept": [str(w.folder) for w in kept], "loss": best.loss, "loss_by_corpus": best.by_corpus}
    _write(kept, out, origin, losses=losses)


def _trial_loss(weights: Sequence[_Weights], out: Path, corpora: Mapping[str, PackedCorpus], n_rows: int) -> Loss:
    """Loss of the models' mean, which stands beside `out` meanwhile."""
    trial = out.with_name(out.name + ".trial")
    shutil.rmtree(trial, ignore_errors=True)
    try:
        with name_refused_writes(trial):
            trial.mkdir(parents=True)
            _write_weights(weights, trial)
        return validation_loss(trial, corpora, n_rows)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


@torch.no_grad()
def validation_loss(folder: Path, corpora: Mapping[str, PackedCorpus], n_rows: int) -> Loss:
    """Loss of the model in `folder` on `n_rows` rows of each corpus, the same ones every time; in one process."""
    device = dist.device()
    first = next(iter(corpora.values())).manifest
    model = load_for_training(
        str(folder), backend=select("auto", device, torch.float32), dtype=torch.float32, seq_len=first.seq_len,
        vocab_size=first.tokenizer.vocab_size, activation_checkpointing=False, trust_remote_code=False)
    model.to(device).eval()
    sums, counts = {}, {}
    for name, corpus in corpora.items():
        rows = permute(np.arange(min(n_rows, len(corpus))), len(corpus), key=(0, name, 0))
        batches = [collate([corpus[int(r)]], [0]) for r in rows]
        shown = progress(batches, total=len(batches), label=f"{folder} on {name}", unit="row")
        sums[name] = sum(float(model(b.to(device)).sum()) for b in shown)
        counts[name] = sum(b.n_valid for b in batches)
    return Loss(sum(sums.values()) / sum(counts.values()), {name: sums[name] / counts[name] for name in sums})


def _open_corpora(corpora: Corpora, model: Path) -> dict[str, PackedCorpus]:
    """The corpora that the pattern means. Raises DataError when there is none, or they are another tokenizer's."""
    if is_url(corpora.packed):
        raise DataError(f"--packed {corpora.packed}: give a local folder for the few corpora to choose by")
    places = find_corpora(corpora.packed)
    names = matching(corpora.pattern, places)
    if not names:
        raise DataError(f"--corpora {corpora.pattern}: no such corpus below {corpora.packed}; "
                        f"{did_you_mean(corpora.pattern, places)}")
    opened = {name: PackedCorpus(Path(places[name])) for name in names}
    own = load_tokenizer(str(model)).fingerprint
    other = [name for name, c in opened.items() if c.manifest.tokenizer.fingerprint != own]
    if other:
        raise DataError(f"{', '.join(other)} below {corpora.packed}: packed with another tokenizer than {model} has")
    return opened


def _agreeing(folders: Sequence[Path]) -> list[_Weights]:
    """The models' weights, after a look at whether a mean of them means anything."""
    if len(folders) < 2:
        raise ConfigError("an average is of two models or more; name their folders")
    if len({f.resolve() for f in folders}) < len(folders):
        raise ConfigError("a model is named twice; each counts once in an average")
    weights = [_weights_of(f) for f in folders]
    first = weights[0]
    problems: list[str] = []
    for other in weights[1:]:
        problems += _disagreements(first, other)
    raise_all(problems, of="average")
    return weights


def _disagreements(a: _Weights, b: _Weights) -> Iterator[str]:
    ours, theirs = (_config(w.folder) for w in (a, b))
    for field in sorted({*ours, *theirs}):
        if ours.get(field) != theirs.get(field):
            yield (f"{a.folder} and {b.folder} are different architectures: {field} is {ours.get(field)!r} and "
                   f"{theirs.get(field)!r}")
    if load_tokenizer(str(a.folder)).fingerprint != load_tokenizer(str(b.folder)).fingerprint:
        yield f"{a.folder} and {b.folder} have different tokenizers; a mean of their weights is of no use"
    only = sorted({*a.shape_of} ^ {*b.shape_of})
    if only:
        yield f"{a.folder} and {b.folder}: only one of them has {', '.join(only[:5])}{' ...' if only[5:] else ''}"
    for name in sorted({*a.shape_of} & {*b.shape_of}):
        if a.shape_of[name] != b.shape_of[name]:
            yield f"{name} has shape {a.shape_of[name]} in {a.folder}, {b.shape_of[name]} in {b.folder}"


def _config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {k: v for k, v in values.items() if k not in MAY_DIFFER}


def _weights_of(folder: Path) -> _Weights:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no model folder: it has no config.json; launch/export.py makes one of a "
                          f"checkpoint")
    index = folder / INDEX
    files = (sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}) if index.is_file()
             else ["model.safetensors"])
    file_of: dict[str, str] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 - not a mapping
                    file_of[key], shape_of[key] = name, tuple(f.get_slice(key).get_shape())
        except (OSError, SafetensorError) as e:
            raise ConfigError(f"{folder / name} cannot be read as safetensors: {e}; export the model again") from None
    return _Weights(folder, file_of, shape_of)


def _write(weights: Sequence[_Weights], out: Path, origin: Mapping[str, Any], losses: Mapping[Path, Loss]) -> None:
    with name_refused_writes(out), replacing_folder(out) as partial:
        _write_weights(weights, partial)
        (partial / "README.md").write_text(_model_card(weights, out.name, origin, losses), encoding="utf-8")
        (partial / AVERAGED).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    log.info("wrote the average of %d models to %s", len(weights), out)


def _write_weights(weights: Sequence[_Weights], folder: Path) -> None:
    """The mean of the models in the new folder, in the first one's shards, with its config, tokenizer and licence."""
    first = weights[0]
    for path in licence_files(str(first.folder)):
        shutil.copyfile(path, folder / path.name)
    for path in first.folder.iterdir():
        if path.suffix in (".json", ".model", ".jinja", ".txt") and not path.name.startswith("cprec_"):
            shutil.copyfile(path, folder / path.name)
    by_file = sorted(first.file_of.items(), key=lambda item: item[1])
    shards = groupby(by_file, key=lambda item: item[1])
    for name, entries in progress(shards, total=len({*first.file_of.values()}), label="average", unit="shard"):
        shard = {key: _mean(weights, key) for key, _ in entries}
        save_file(shard, str(folder / name), metadata={"format": "pt"})


def _mean(weights: Sequence[_Weights], key: str) -> Tensor:
    """Mean of one tensor over the models, summed in float32 (float64 stays), in the first one's dtype."""
    total, dtype = None, torch.float32
    for w in weights:
        with safe_open(w.folder / w.file_of[key], framework="pt") as f:
            part: Tensor = f.get_tensor(key)
        if total is None:
            dtype, total = part.dtype, torch.zeros(part.shape, dtype=torch.promote_types(part.dtype, torch.float32))
        total += part
    assert total is not None
    return (total / len(weights)).to(dtype)


def _origin(folder: Path) -> dict[str, Any]:
    """Where a model comes from: its folder, and what its export or average says of itself."""
    said = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("cprec_*.json"))}
    return {"folder": str(folder), **{k: v for values in said.values() for k, v in values.items()}}


def _is_there(out: Path, origin: Mapping[str, Any]) -> bool:
    """Whether `out` is finished from before. Raises ConfigError when it holds something else."""
    if not out.exists():
        return False
    marker = out / AVERAGED
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    if any(found.get(k) != v for k, v in origin.items()):
        raise ConfigError(f"{out} exists and does not hold this average; give --out another folder")
    log.info("%s already holds this average", out)
    return True


def _model_card(weights: Sequence[_Weights], name: str, origin: Mapping[str, Any], losses: Mapping[Path, Loss]) -> str:
    """Model card: what was averaged, how it was chosen, what it gives on the corpora it was chosen by; with the base
    model, licence and language of the first model's card."""
    first, folder_of_first = _origin(weights[0].folder), str(weights[0].folder)
    kept = [w.folder for w in weights]
    lines = [front_matter(folder_of_first, base_model=read_card(folder_of_first).get("base_model"),
                          tags=["model-soup"]), "", f"# {name}", "",
             f"The {origin['kind']} average of the weights of {len(kept)} models (model soup, arXiv:2203.05482)"
             + (f"; the first is step {first['step']:,} of `{first['run']}`." if "run" in first else "."), "",
             "| model | run | step | in the average | validation loss |", "|---|---|---:|---|---:|"]
    for model in origin["models"]:
        folder = Path(model["folder"])
        loss = f"{losses[folder].loss:.4f}" if folder in losses else "-"
        lines.append(f"| {folder} | {model.get('run', '-')} | {model.get('step', '-')} | "
                     f"{'yes' if folder in kept else 'no'} | {loss} |")
    if "loss_by_corpus" in origin:
        by = origin["corpora"]
        lines += ["", f"Chosen by the loss on `{by['pattern']}` ({by['rows']} rows of each), which is therefore no "
                  f"estimate for data it has not seen: {origin['loss']:.4f} nats per token.", "",
                  "| corpus | nats per token |", "|---|---:|",
                  *(f"| {corpus} | {loss:.4f} |" for corpus, loss in origin["loss_by_corpus"].items())]
    return "\n".join(lines) + "\n"
