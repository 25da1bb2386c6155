"""The model's float32 weights out of a checkpoint's ZeRO partitions, tensor by tensor; stages 1, 2 and 3.

reads: DeepSpeed's files of a checkpoint, memory-mapped; they are pickles, so only of a run that is trusted. Costs: the
memory of one tensor, whatever the model's size; DeepSpeed's own `zero_to_fp32` holds the whole model.

    stage   trained: what a rank's flat tensors hold            frozen weights and buffers
    1, 2    its 1/n of each parameter group, laid end to end    whole, in the one file of model states
    3       its 1/n of every parameter, laid end to end         its 1/n of every weight; buffers whole
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cprec.errors import CheckpointError

PREFIX = "lm."
"""Of every name: the language model is a part of the `TrainingModel` that was trained."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the stretches of flat tensors that make it up, in order, and its shape."""

    pieces: Sequence[tuple[Sequence[Tensor], int, int]]
    """Flat tensors thought end to end, the first element there, how many."""
    shape: torch.Size


class SavedWeights(Mapping[str, Tensor]):
    """Parameters of a checkpoint by the names that transformers (and peft) give them; each is read when asked for.

    Trained ones are the float32 master weights; frozen ones have the precision that the model computed in. Tied
    parameters are there once, under their first name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ranks = _load_ranks(folder, "*_optim_states.pt")
        models = _load_ranks(folder, "*_model_states.pt")
        optimizers = [r["optimizer_state_dict"] for r in ranks]
        stage = int(optimizers[0].get("zero_stage", 1))
        saved_by = optimizers[0]["partition_count"]
        if (max(saved_by) if isinstance(saved_by, list) else saved_by) != len(ranks):
            raise CheckpointError(f"{folder} has optimizer states of {len(ranks)} ranks, but was saved by {saved_by}")
        places = _stage3(models, optimizers) if stage == 3 else _stage1_or_2(models, optimizers)
        self._places = {name.removeprefix(PREFIX): place for name, place in places}

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        parts = [part for flat, start, n in place.pieces for part in _stretch(flat, start, n)]
        if sum(p.numel() for p in parts) < place.shape.numel():
            raise CheckpointError(f"{self._folder} does not hold the whole of {name}: what ZeRO offloads to NVMe stays "
                                  f"in swap files, and cannot be exported")
        return torch.cat(parts)[:place.shape.numel()].view(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _load_ranks(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The files of all ranks, in the order of the ranks."""
    paths = sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    if not paths:
        raise CheckpointError(f"{folder} holds no {pattern}; give a complete checkpoint")
    return [torch.load(p, map_location="cpu", mmap=True, weights_only=False) for p in paths]


def _stage3(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Iterator[tuple[str, _Place]]:
    n_ranks = len(optimizers)
    flat = [o["fp32_flat_groups"] for o in optimizers]
    start = 0
    for shapes in models[0]["param_shapes"]:
        for name, shape in shapes.items():
            part = math.ceil(shape.numel() / n_ranks)
            yield name, _Place([(of_rank, start, part) for of_rank in flat], shape)
            start += part
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        fragments = [m["frozen_param_fragments"][name].flatten() for m in models]
        yield name, _Place([([f], 0, f.numel()) for f in fragments], shape)
    for name in models[0]["buffer_names"]:
        if name in models[0]["module"]:  # persistent ones
            yield name, _whole(models[0]["module"][name])


def _stage1_or_2(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Iterator[tuple[str, _Place]]:
    paddings = optimizers[0].get("param_alignment_paddings")
    for i, shapes in enumerate(models[0]["param_shapes"]):
        flat = [o["single_partition_of_fp32_groups"][i] for o in optimizers]
        start = 0
        for j, (name, shape) in enumerate(shapes.items()):
            yield name, _Place([(flat, start, shape.numel())], shape)
            start += shape.numel() + (paddings[i][j] if paddings else 0)
    trained = {name for shapes in models[0]["param_shapes"] for name in shapes}
    for name, tensor in models[0]["module"].items():
        if name not in trained and name not in models[0]["shared_params"]:
            yield name, _whole(tensor)


def _whole(tensor: Tensor) -> _Place:
    return _Place([([tensor.flatten()], 0, tensor.numel())], tensor.shape)


def _stretch(flat: Sequence[Tensor], start: int, n: int) -> Iterator[Tensor]:
    """Elements `start` to `start + n` of the tensors `flat` laid end to end, without laying them end to end."""
    for tensor in flat:
        if start < tensor.numel() and n > 0:
            part = tensor[start:start + n]
            yield part
            n -= part.numel()
        start = max(start - tensor.numel(), 0)
