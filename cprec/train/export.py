"""A checkpoint as an ordinary Hugging Face folder: safetensors, config, tokenizer and a model card.

reads: a checkpoint (ranks' shares, memory-mapped) and the folder or hub name that the run started from. writes:
`run/hf/` by rename of a finished folder; of a run with adapters the model with them merged, or the adapters alone as
peft keeps them. Costs: memory of the largest tensor, twice in another precision, not of the model or a shard.
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
from cprec.errors import CheckpointError
from cprec.log import get_logger, progress
from cprec.model import load_config, load_transformers_tokenizer
from cprec.train.checkpoint import EXPORTED, Checkpoint, read_run_config, verify_checkpoint
from cprec.train.disk import name_refused_writes, replacing_folder
from cprec.train.lora import adapter_tensors, merged, write_adapter_config
from cprec.train.model_card import licence_files, model_card
from cprec.train.partitions import DTYPES, SavedWeights

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
    with name_refused_writes(out), replacing_folder(out) as partial:
        for licence in licence_files(config.model.path):
            shutil.copyfile(licence, partial / licence.name)
        weights = SavedWeights(checkpoint.folder)
        if adapter_only:
            _write_adapter(partial, weights, config, dtype)
        else:
            _write_model(partial, weights, config, dtype)
        load_transformers_tokenizer(config.model.path).save_pretrained(partial)
        (partial / "README.md").write_text(model_card(config, checkpoint), encoding="utf-8")
        (partial / EXPORTED).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    log.info("exported step %d of %s to %s", checkpoint.state.step, checkpoint.run_dir, out)


def _write_model(folder: Path, weights: SavedWeights, config: RunConfig, dtype: torch.dtype) -> None:
    lora = config.model.lora
    _write_safetensors(folder, _cast(merged(weights, lora) if lora else weights.items(), dtype), at_most=len(weights))
    model_config = load_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
    model_config.dtype = dtype
    tokens = load_transformers_tokenizer(config.model.path).get_vocab().values()
    model_config.vocab_size = max(model_config.vocab_size, 1 + max(tokens))  # as in training
    model_config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(_generation_config(config, model_config), encoding="utf-8")


def _generation_config(config: RunConfig, model_config: Any) -> str:
    """The base model's, as it is; of a model without one what its config says of tokens."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(config.model.path)
    except OSError:
        found = GenerationConfig.from_model_config(model_config)
    text: str = found.to_json_string()
    return text


def _write_adapter(folder: Path, weights: SavedWeights, config: RunConfig, dtype: torch.dtype) -> None:
    assert config.model.lora is not None
    save_file(dict(_cast(adapter_tensors(weights), dtype)), str(folder / "adapter_model.safetensors"),
              metadata={"format": "pt"})
    write_adapter_config(folder, config.model.lora, base_model=config.model.path)


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    return ((name, t.to(dtype) if t.is_floating_point() else t) for name, t in tensors)


def _check_same(out: Path, origin: dict[str, Any]) -> None:
    marker = out / EXPORTED
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    if found != origin:
        raise CheckpointError(f"{out} exists and holds {found or 'something that is no export'}, not {origin}; give "
                              f"--out another folder")


def _write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, at_most: int) -> None:
    """Write tensors, `at_most` so many, in shards of at most SHARD_BYTES (a larger one alone), with the index that
    transformers reads."""
    shards = [_Shard(folder / "part-0.safetensors", at_most)]
    for name, tensor in progress(tensors, total=at_most, label="export", unit="tensor"):
        if shards[-1].names and shards[-1].n_bytes + tensor.nbytes > SHARD_BYTES:
            shards[-1].close()
            shards.append(_Shard(folder / f"part-{len(shards)}.safetensors", at_most))
        shards[-1].add(name, tensor)
    shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / final)
        weight_map.update(dict.fromkeys(shard.names, final))
    index = {"metadata": {"total_size": sum(s.n_bytes for s in shards)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class _Shard:
    """A safetensors file that is written tensor by tensor, each forgotten at once: room is left for the header, which
    the format lets end in spaces."""

    def __init__(self, path: Path, at_most: int) -> None:
        self.path, self.n_bytes = path, 0
        self.names: dict[str, Any] = {}
        self._room = 1024 + 512 * at_most
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        self.names[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                            "data_offsets": [self.n_bytes, self.n_bytes + tensor.nbytes]}
        array: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        self._file.write(memoryview(array))
        self.n_bytes += tensor.nbytes

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.names}).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
