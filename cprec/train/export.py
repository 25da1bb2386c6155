"""A checkpoint as an ordinary Hugging Face folder: safetensors, config, tokenizer and a model card.

reads: a checkpoint (ZeRO partitions, memory-mapped) and the folder or hub name that the run started from. writes:
`run/hf/` by rename of a finished folder; of a run with adapters the model with them merged, or the adapters alone as
peft keeps them. Costs: memory of one output shard, not of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cprec.config import RunConfig
from cprec.data.corpora import read_data_record
from cprec.errors import CheckpointError
from cprec.log import get_logger
from cprec.model import load_config, load_transformers_tokenizer
from cprec.template import Template
from cprec.train.checkpoint import EXPORTED, Checkpoint, read_run_config, verify_checkpoint
from cprec.train.lora import adapter_tensors, merged, write_adapter_config
from cprec.train.metrics import read_metrics
from cprec.train.partitions import SavedWeights

log = get_logger(__name__)
SHARD_BYTES = 4 << 30


def export(checkpoint: Checkpoint, out: Path, *, dtype: torch.dtype, adapter_only: bool = False) -> None:
    """Write `checkpoint` to the new folder `out` in `dtype`; a finished export of the same checkpoint is left as it is.

    `adapter_only`: write a run's LoRA adapters for `PeftModel.from_pretrained`, not the model with them merged. Raises
    CheckpointError when `out` holds something else, the checkpoint was altered, or it has no adapters to write.
    """
    origin = {"run": str(checkpoint.run_dir), "step": checkpoint.state.step, "state_hash": checkpoint.state_hash,
              "dtype": str(dtype).removeprefix("torch."), **({"adapter_only": True} if adapter_only else {})}
    config = read_run_config(checkpoint.run_dir)
    if adapter_only and config.model.lora is None:
        raise CheckpointError(f"{checkpoint.run_dir} was trained without model.lora, so it has no adapter; export it "
                              f"without --adapter-only")
    if out.exists():
        _check_same(out, origin)
        log.info("%s already holds this export", out)
        return
    verify_checkpoint(checkpoint)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = SavedWeights(checkpoint.folder)
    if adapter_only:
        _write_adapter(partial, weights, config, dtype)
    else:
        _write_model(partial, weights, config, dtype)
    load_transformers_tokenizer(config.model.path).save_pretrained(partial)
    (partial / "README.md").write_text(model_card(config, checkpoint), encoding="utf-8")
    (partial / EXPORTED).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    partial.rename(out)
    log.info("exported step %d of %s to %s", checkpoint.state.step, checkpoint.run_dir, out)


def _write_model(folder: Path, weights: SavedWeights, config: RunConfig, dtype: torch.dtype) -> None:
    lora = config.model.lora
    _write_safetensors(folder, _cast(merged(weights, lora) if lora else weights.items(), dtype))
    model_config = load_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
    model_config.dtype = dtype
    tokens = load_transformers_tokenizer(config.model.path).get_vocab().values()
    model_config.vocab_size = max(model_config.vocab_size, 1 + max(tokens))  # as in training
    model_config.save_pretrained(folder)


def _write_adapter(folder: Path, weights: SavedWeights, config: RunConfig, dtype: torch.dtype) -> None:
    assert config.model.lora is not None
    save_file(dict(_cast(adapter_tensors(weights), dtype)), str(folder / "adapter_model.safetensors"),
              metadata={"format": "pt"})
    write_adapter_config(folder, config.model.lora, base_model=config.model.path)


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    return ((name, t.to(dtype) if t.is_floating_point() else t) for name, t in tensors)


def model_card(config: RunConfig, checkpoint: Checkpoint) -> str:
    """Model card of an export: base model, data, tokens, schedule, lineage and last losses, as measured."""
    s = checkpoint.state
    data = read_data_record(checkpoint.run_dir)
    lineage = f"branch of {config.parent.run_dir} at step {config.parent.step:,}" if config.parent else "trunk"
    lora = config.model.lora
    schedule = (f"peak {config.optimizer.peak_lr:g}, warm-up {config.schedule.warmup.steps} steps, "
                f"{config.schedule.text()}")
    validation = [r for r in read_metrics(checkpoint.run_dir) if r["kind"] == "valid" and r["step"] <= s.step]
    last = validation[-1]["loss_by_corpus"] if validation else {}
    losses = [f"| {name} | {loss:.4f} |" for name, loss in last.items()]
    rows = [f"| {name} | {c.n_documents:,} | {c.n_tokens:,} |" for name, c in data.corpora.items()]
    return "\n".join([
        "---", f"base_model: {config.model.path}", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [recommendation, continual-pretraining, cprec]", "---", "", f"# {checkpoint.run_dir.name}", "",
        f"Continual pre-training of `{config.model.path}` on behaviour sequences of {len(data.corpora)} corpora with "
        f"CPRec (after arXiv:2504.08949).", "",
        f"- step {s.step:,}, {s.tokens_seen:,} tokens seen, {s.phase} phase next, {lineage}",
        f"- learning rate: {schedule}",
        *([f"- LoRA adapters: r={lora.r}, alpha={lora.alpha:g}, on {lora.target_modules}"] if lora else []),
        f"- prompt template {data.template.name!r}: {_shape(data.template)}" if data.template else "- plain text only",
        f"- leak audit of the training data: {'passed' if data.is_audited else 'not passed'}",
        "", "| training corpus | documents | tokens |", "|---|---:|---:|", *rows, "",
        "| validation corpus | nats per token |", "|---|---:|", *losses, "",
    ])


def _shape(template: Template) -> str:
    """The template in words."""
    target = ("" if template.before_target is None else
              f", {template.before_target!r} before the last item, which alone (with what follows) carries loss")
    tail = f", {template.tail!r}" if template.tail else ""
    return f"{template.lead_in!r}, then {template.item!r} per item{target}{tail}"


def _check_same(out: Path, origin: dict[str, Any]) -> None:
    marker = out / EXPORTED
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    if found != origin:
        raise CheckpointError(f"{out} exists and holds {found or 'something that is no export'}, not {origin}; give "
                              f"--out another folder")


def _write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors in shards of at most SHARD_BYTES (a larger one alone), with the index that transformers reads."""
    shards = list(_save_shards(folder, tensors))
    total = sum(size for _, names in shards for size in names.values())
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _save_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Path, dict[str, int]]]:
    """Files written, each with its tensors' names and sizes in bytes; holds one shard."""
    held: dict[str, Tensor] = {}
    n_files = 0

    def flush() -> tuple[Path, dict[str, int]]:
        path = folder / f"part-{n_files:05d}.safetensors"
        save_file(held, str(path), metadata={"format": "pt"})
        return path, {name: t.nbytes for name, t in held.items()}

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            yield flush()
            held, n_files = {}, n_files + 1
        held[name] = tensor
    yield flush()
