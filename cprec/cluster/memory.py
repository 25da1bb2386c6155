"""What a run takes of each device, by part, from the model's config.json alone: no weights, no device.

reads: the model's config, the DeepSpeed JSON. Activations are counted by running the model's own forward on torch's
meta device, where tensors have shapes and no content: what autograd keeps for the backward pass is then known to the
byte, for any architecture. The rest follows from what DeepSpeed 0.19.8 allocates (docs/plan.md has formulas, and how
far they are from measured runs). Costs: a second or two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from cprec import loss
from cprec.config import ModelConfig, load_deepspeed_config
from cprec.model import ModelShape, TrainingModel, decoder_blocks, describe
from cprec.train.lora import add_lora


@dataclass(frozen=True)
class Sharding:
    """What of a DeepSpeed config decides on memory and communication. Sizes are in elements, as DeepSpeed has them."""

    stage: int
    optimizer_on_host: bool
    parameters_on_host: bool
    overlaps: bool
    reduce_bucket: int
    prefetch_bucket: int
    reuse_distance: int
    max_live: int

    @classmethod
    def read(cls, path: str) -> Self:
        """Of the file at `path`, with DeepSpeed's defaults. Raises ConfigError."""
        zero = load_deepspeed_config(path)["zero_optimization"]
        stage = int(zero["stage"])

        def size(key: str, default: float) -> int:
            return int(zero.get(key, zero.get(f"stage3_{key}", default)))

        def is_away(key: str) -> bool:
            return (zero.get(key) or {}).get("device") in ("cpu", "nvme")

        return cls(stage, is_away("offload_optimizer"), is_away("offload_param"),
                   overlaps=bool(zero.get("overlap_comm", stage == 3)), reduce_bucket=size("reduce_bucket_size", 5e8),
                   prefetch_bucket=size("prefetch_bucket_size", 5e7), reuse_distance=size("max_reuse_distance", 1e9),
                   max_live=size("max_live_parameters", 1e9))


@dataclass(frozen=True)
class Activations:
    """What the backward pass needs of one micro-batch, in bytes."""

    blocks: int
    """Kept by all decoder blocks, or, of those that compute again, their inputs."""
    recomputed: int
    """Of the block that is being computed again: 0 where none is."""
    elsewhere: int
    """Embeddings, rotary positions, the last norm."""
    gradients: int
    """Gradients by activations that exist at once in the backward pass of a block."""

    @property
    def total(self) -> int:
        return self.blocks + self.recomputed + self.elsewhere + self.gradients


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model; `n_params` counts tied parameters once."""

    shape: ModelShape
    n_params: int
    n_trained: int
    n_block: int
    """Parameters of the largest decoder block."""
    n_outer: int
    """Of the largest layer outside of the blocks: embeddings or output."""
    vocab_size: int
    bytes_each: int
    """Of a weight or an activation: 2 in bfloat16, 4 in float32."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device, at the moment in a step when most is taken."""

    parameters: int
    """Weights that stay: all of them, or a rank's part under ZeRO-3."""
    gathered: int
    """Weights that ZeRO-3 holds whole for a while, beside the rank's part of them."""
    gradients: int
    optimizer: int
    """Float32 weights and two moments."""
    buffers: int
    """In which gradients are collected and sent."""
    activations: int
    logits: int
    """The loss: a chunk of logits, and the gradients that it computes with them."""
    context: int
    """What the device's driver and communication library take."""

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Memory:
    """What each rank takes."""

    device: DeviceMemory
    host: int
    """Of host memory (or disk), by what is offloaded."""


class Model:
    """A model without weights, as it would be trained: its sizes, and what a micro-batch leaves for backward."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, vocab_size: int | None = None) -> None:
        self._config = config
        self._counted: dict[int, Activations] = {}
        self._training = TrainingModel(describe(config.path, dtype=dtype, implementation=_COUNTED,
                                                trust_remote_code=config.trust_remote_code, vocab_size=vocab_size))
        if config.lora:
            add_lora(self._training.lm, config.lora)
        lm = self._training.lm
        self._blocks = decoder_blocks(lm)
        in_blocks = {id(p) for block in self._blocks for p in block.parameters()}
        outer = [p.numel() for p in lm.parameters() if id(p) not in in_blocks]
        self.sizes = ModelSizes(
            self._training.shape, sum(p.numel() for p in lm.parameters()),
            sum(p.numel() for p in lm.parameters() if p.requires_grad),
            max(sum(p.numel() for p in block.parameters()) for block in self._blocks), max(outer),
            lm.get_output_embeddings().weight.shape[0], dtype.itemsize)

    def activations(self, n_tokens: int) -> Activations:
        """Of a micro-batch of `n_tokens` tokens in all; each number of them is counted once."""
        if n_tokens not in self._counted:
            self._counted[n_tokens] = self._count(n_tokens)
        return self._counted[n_tokens]

    def _count(self, n_tokens: int) -> Activations:
        lm, every = self._training.lm, self._config.activation_checkpointing
        ids = torch.zeros(1, n_tokens, dtype=torch.int64, device="meta")
        with _counting(lm, self._blocks) as kept:
            lm.base_model(input_ids=ids, use_cache=False)
        by_block = [kept[i] for i in range(len(self._blocks))]
        hidden = n_tokens * self.sizes.shape.hidden_size * self.sizes.bytes_each
        again = by_block[::every] if every else []
        return Activations(
            blocks=sum(by_block) - sum(again) + len(again) * hidden, recomputed=max(again, default=0),
            elsewhere=kept[_ELSEWHERE], gradients=max(by_block) // 4 + hidden)


def memory_of(sizes: ModelSizes, activations: Activations, sharding: Sharding, *, n_ranks: int, n_tokens: int,
              context: int, on_gpu: bool) -> Memory:
    """What each of `n_ranks` takes with micro-batches of `n_tokens` tokens. On a CPU (`on_gpu=False`) pages of a buffer
    that nothing is written to are not counted, and nothing is offloaded."""
    n, stage, each = n_ranks, sharding.stage, sizes.bytes_each
    trained = sizes.n_trained
    parameters = each * sizes.n_params // (n if stage == 3 else 1)
    gradients = 4 * trained // (n if stage >= 2 else 1)
    optimizer = 12 * trained // n
    host = 0
    if on_gpu and sharding.optimizer_on_host:
        host, optimizer = host + optimizer, 0
        if stage < 3 or sharding.parameters_on_host:
            host, gradients = host + gradients, 0
    if on_gpu and sharding.parameters_on_host:
        host, parameters = host + parameters, 0
    device = DeviceMemory(
        parameters=parameters, gathered=each * _gathered(sizes, sharding) if stage == 3 else 0,
        gradients=gradients, optimizer=optimizer, buffers=_buffers(sizes, sharding, on_gpu=on_gpu),
        activations=activations.total, logits=_logits(sizes, n_tokens), context=context)
    return Memory(device, host)


def _gathered(sizes: ModelSizes, sharding: Sharding) -> int:
    """Weights that ZeRO-3 keeps whole at most: DeepSpeed does not give back what is used again within the reuse
    distance, and between a layer's forward and its backward pass all weights behind it lie twice."""
    working = max(sizes.n_block, sizes.n_outer) + sharding.prefetch_bucket
    return min(sizes.n_params, max(working, min(sharding.reuse_distance // 2 + working, sharding.max_live)))


def _buffers(sizes: ModelSizes, sharding: Sharding, *, on_gpu: bool) -> int:
    """The bucket in which gradients are collected and sent, two where communication overlaps before stage 3; float32,
    under stage 2 the weights' precision. On a GPU all of it is taken, whatever the model's size."""
    n_buckets = 2 if sharding.stage < 3 and sharding.overlaps else 1
    allocated = n_buckets * sharding.reduce_bucket
    return (sizes.bytes_each if sharding.stage == 2 else 4) * (allocated if on_gpu else min(allocated, sizes.n_trained))


def _logits(sizes: ModelSizes, n_tokens: int) -> int:
    """As cprec.loss computes: a chunk in float32 and rounded, the gradient of the last hidden states, and that of the
    weight in float32, with one product that is added to it."""
    rounded = sizes.bytes_each if sizes.bytes_each < 4 else 0
    chunk = min(loss.CHUNK_LOGITS, n_tokens * sizes.vocab_size)
    weight = sizes.vocab_size * sizes.shape.hidden_size
    return (4 + rounded) * chunk + n_tokens * sizes.shape.hidden_size * sizes.bytes_each + (4 + rounded) * weight


_COUNTED, _ELSEWHERE = "cprec_counted", -1


class _FlashAttention(torch.autograd.Function):
    """An attention that keeps what FlashAttention keeps: its inputs, its output, one float32 per head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("a forward pass that is only counted, on the meta device: nothing goes back through it")


def _counted(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
             **others: Any) -> tuple[Tensor, None]:
    out: Tensor = _FlashAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


AttentionInterface.register(_COUNTED, _counted)  # without a mask function: transformers then makes no mask


@contextmanager
def _counting(lm: nn.Module, blocks: list[Any]) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps while inside, by number of the decoder block; weights and what was there are not
    counted, nor is anything twice."""
    kept: dict[int, int] = defaultdict(int)
    seen = {p.untyped_storage()._cdata for p in (*lm.parameters(), *lm.buffers())}
    alive: list[Tensor] = []  # so that no address is used again
    here = [_ELSEWHERE]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)
            kept[here[0]] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        return lambda *_: here.__setitem__(0, number)

    handles: list[RemovableHandle] = []
    for i, block in enumerate(blocks):
        handles += [block.register_forward_pre_hook(enter(i)), block.register_forward_hook(enter(_ELSEWHERE))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()
