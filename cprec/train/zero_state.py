"""A rank's weights, moments and update counts, out of DeepSpeed's ZeRO optimizers and back into them, by name.

reads: the optimizers of ZeRO stages 1, 2 and 3 (deepspeed 0.19.8), which keep a rank's part of a parameter group in
flat float32 tensors. gives: `Share`s, which are views, no copies. Hyperparameters are not part of it: they are the run
config's, for every group. Loading reads, per rank, its own shares and, under stages 1 and 2, the whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cprec import dist
from cprec.errors import CheckpointError
from cprec.train.partitions import FROZEN, MOMENTS, WEIGHT, Layout, Place, SavedState, Share, equal_share


@dataclass(frozen=True)
class _Fragment:
    """A stretch of a parameter that this rank updates."""

    name: str
    place: Place
    at: int
    """Where it lies in the flat tensor."""
    n: int


@dataclass(frozen=True)
class _Swapped:
    """Calls to bring a flat tensor and its moments from NVMe, to write them back, and to forget them unchanged."""

    bring: Callable[[], None]
    write: Callable[[], None]
    forget: Callable[[], None]


@dataclass(frozen=True)
class _Flat:
    """A flat tensor of master weights: a parameter group's part on this rank, or under stage 3 a piece of it."""

    group: str
    weights: Tensor
    fragments: list[_Fragment]
    optimizer: torch.optim.Optimizer
    on_nvme: _Swapped | None = None

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.optimizer.state.get(self.weights, {})
        return found


class ZeroState:
    """What a checkpoint holds of a model under ZeRO, on this rank."""

    def __init__(self, module: nn.Module, zero_optimizer: Any) -> None:
        self._module, self._zero = module, zero_optimizer
        self._is_stage3 = hasattr(zero_optimizer, "fp32_partitioned_groups_flat")
        self._parameters: dict[str, Tensor] = dict(module.named_parameters())
        names = {id(p): name for name, p in self._parameters.items()}
        self._flats = list((_flats_of_stage3 if self._is_stage3 else _flats_of_stage1_or_2)(zero_optimizer, names))
        trained = {id(p) for group in _groups(zero_optimizer) for p in group}
        self._frozen = {n: p for n, p in self._parameters.items() if id(p) not in trained}
        self._frozen |= _persistent_buffers(module)

    @property
    def updates(self) -> dict[str, int]:
        """How often each parameter group has been updated, without those that never were."""
        return {f.group: int(f.state["step"]) for f in self._flats if "step" in f.state}

    def layout(self) -> Layout:
        """This rank's shares: views of live memory, good until the next update."""
        shares = [s for flat in self._flats for s in _shares(flat)]
        return Layout([*shares, *self._frozen_shares()], self.updates)

    def load(self, saved: SavedState) -> None:
        """Take everything from a checkpoint, whatever ranks and stage saved it. Raises CheckpointError naming the
        tensors that do not fit this model."""
        self._check_fits(saved)
        for flat in self._flats:
            _fill(flat, saved)
        if self._is_stage3:
            self._zero.checkpoint_event_prologue()  # parameters that are held whole are made anew from their parts
            for i in range(len(self._flats)):
                self._zero._reassign_or_swap_out_partitioned_parameters(i)
        else:
            self._zero._hp_optimizer_states_linked = False
            _fill_whole(self._parameters, saved)
        for name, tensor in self._frozen.items():
            _fill_frozen(tensor, saved, f"{FROZEN}/{name}")
        if self._is_stage3:
            self._zero.checkpoint_event_epilogue()

    def _frozen_shares(self) -> Iterator[Share]:
        for name, tensor in self._frozen.items():
            data, place = _own_stretch(tensor)
            if data.numel() == 0 and place.start < torch.Size(place.shape).numel():
                raise CheckpointError(f"{name} lies on NVMe, from where frozen weights cannot be saved; offload to cpu")
            if data.numel():
                yield Share(FROZEN, name, place, data)

    def _check_fits(self, saved: SavedState) -> None:
        trained = {n: p for n, p in self._parameters.items() if n not in self._frozen}
        ours = {f"{kind}/{name}": torch.Size(getattr(t, "ds_shape", t.shape))
                for kind, tensors in ((WEIGHT, trained), (FROZEN, self._frozen)) for name, t in tensors.items()}
        theirs = {k: s for k, s in saved.shapes.items() if k.startswith((f"{WEIGHT}/", f"{FROZEN}/"))}
        if ours == theirs:
            return
        differing = [f"{k}: {tuple(theirs[k]) if k in theirs else 'not'} in the checkpoint, "
                     f"{tuple(ours[k]) if k in ours else 'not'} in the model"
                     for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
        raise CheckpointError(f"{saved.folder} is of another model; {len(differing)} tensors differ: "
                              f"{'; '.join(differing[:5])}")


def _groups(zero: Any) -> list[list[Tensor]]:
    """The trained parameters in DeepSpeed's groups."""
    for name in ("fp16_groups", "bit16_groups", "bf16_groups"):  # stage 3; stages 1 and 2; stage 1 in bfloat16
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise AssertionError(f"{type(zero).__name__} is none of the ZeRO optimizers that are known here")


def _flats_of_stage3(zero: Any, names: dict[int, str]) -> Iterator[_Flat]:
    for i, (flat, group) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
        fragments = []
        for p in group:
            _, at, n = zero.grad_position[zero.get_param_id(p)]
            start = min(dist.rank() * n, p.ds_numel)  # behind the last number there is padding
            place = Place(start=start, shape=list(p.ds_shape))
            fragments.append(_Fragment(names[id(p)], place, at, min(n, p.ds_numel - start)))
        on_gpu = zero.offload_optimizer and zero.subgroup_to_device[i] != "cpu"  # of a partial offload the other part
        optimizer = zero.backup_optimizer if on_gpu else zero.optimizer
        name = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]["name"]
        on_nvme = _Swapped(partial(zero._optimizer_states_and_gradient_swap_in, i),
                           partial(zero._optimizer_states_and_gradient_swap_out, i),
                           partial(zero._release_swap_buffers, i)) if zero._swappable_optimizer_subgroup(i) else None
        yield _Flat(name, flat, fragments, optimizer, on_nvme)


def _flats_of_stage1_or_2(zero: Any, names: dict[int, str]) -> Iterator[_Flat]:
    in_bf16 = hasattr(zero, "bf16_groups")
    flats = zero.fp32_groups_flat_partition if in_bf16 else zero.single_partition_of_fp32_groups
    for flat, group, settings in zip(flats, _groups(zero), zero.optimizer.param_groups, strict=True):
        fragments = []
        for p in group:
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]  # None where all of it is another rank's
            if mapping is not None:
                place = Place(start=mapping.lp_fragment_address.start, shape=list(p.shape))
                address = mapping.get_hp_fragment_address()
                fragments.append(_Fragment(names[id(p)], place, address.start, address.numel))
        yield _Flat(settings["name"], flat, fragments, zero.optimizer)


def _shares(flat: _Flat) -> list[Share]:
    if flat.on_nvme:
        flat.on_nvme.bring()
    tensors = {WEIGHT: flat.weights, **{kind: flat.state[kind] for kind in MOMENTS if kind in flat.state}}
    if flat.on_nvme:  # copies, then: the buffers that it was brought into are the next one's
        tensors = {kind: t.detach().clone() for kind, t in tensors.items()}
        flat.on_nvme.forget()
    return [Share(kind, f.name, f.place, t.data[f.at:f.at + f.n])
            for f in flat.fragments if f.n for kind, t in tensors.items()]


def _fill(flat: _Flat, saved: SavedState) -> None:
    """Weights, moments and the count of updates; what is padding in the flat tensor stays zero."""
    if flat.on_nvme:
        flat.on_nvme.bring()
    for f in flat.fragments:
        if f.n:
            flat.weights.data[f.at:f.at + f.n].copy_(saved.read(f"{WEIGHT}/{f.name}", f.place.start, f.n))
    state = flat.optimizer.state[flat.weights]
    state.clear()
    if flat.group in saved.updates:
        count = saved.updates[flat.group]
        # torch's AdamW counts in a tensor, which no two flat tensors may share; DeepSpeed's for the host in a number
        state["step"] = torch.tensor(float(count), device=flat.weights.device) \
            if isinstance(flat.optimizer, torch.optim.AdamW) else count
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat.weights.data)
            for f in flat.fragments:
                if f.n:
                    state[kind][f.at:f.at + f.n].copy_(saved.read(f"{kind}/{f.name}", f.place.start, f.n))
    if flat.on_nvme:
        flat.on_nvme.write()


def _fill_whole(parameters: dict[str, Tensor], saved: SavedState) -> None:
    """The trained weights that the model computes with, each whole on every rank."""
    for name, p in parameters.items():
        if f"{WEIGHT}/{name}" in saved.shapes:
            p.data.copy_(saved.read(f"{WEIGHT}/{name}").view(p.shape))


def _fill_frozen(tensor: Tensor, saved: SavedState, key: str) -> None:
    if not hasattr(tensor, "ds_tensor"):
        tensor.data.copy_(saved.read(key).view(tensor.shape))
        return
    n = tensor.ds_tensor.numel()
    start = min(dist.rank() * n, tensor.ds_numel)  # type: ignore[attr-defined]
    mine = min(n, tensor.ds_numel - start)  # type: ignore[attr-defined]
    tensor.ds_tensor.data.flatten()[:mine].copy_(saved.read(key, start, mine))


def _own_stretch(tensor: Tensor) -> tuple[Tensor, Place]:
    """This rank's stretch of a tensor that is partitioned by stage 3, or that every rank has whole."""
    part = getattr(tensor, "ds_tensor", None)
    if part is None:
        start, n = equal_share(tensor.numel(), dist.rank(), dist.world_size())
        return tensor.data.flatten()[start:start + n], Place(start=start, shape=list(tensor.shape))
    numel: int = tensor.ds_numel  # type: ignore[attr-defined]
    start = min(dist.rank() * part.ds_numel, numel)
    place = Place(start=start, shape=list(tensor.ds_shape))  # type: ignore[attr-defined]
    return part.data.flatten()[:min(part.ds_numel, numel - start)], place


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's weights, by name."""
    return {f"{prefix}{'.' if prefix else ''}{name}": buffer for prefix, m in module.named_modules()
            for name, buffer in m._buffers.items() if buffer is not None and name not in m._non_persistent_buffers_set}
