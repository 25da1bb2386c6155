"""What a run will take before it has a machine: memory, communication, time, checkpoints, and which ds_config to take.

reads: the run config, the model's config.json, the packed data's manifests where they are there, ds_configs/. Formulas
and their errors: docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from cprec.cluster.memory import DeviceMemory, Memory, Model, ModelSizes, Sharding, memory_of
from cprec.config import RunConfig, check_batch
from cprec.errors import ConfigError, did_you_mean
from cprec.format import Manifest
from cprec.train.metrics import duration, peak_by_name

USABLE = 0.92
"""Of a device's memory: the rest is lost between blocks of torch's allocator."""


@dataclass(frozen=True)
class Device:
    """A kind of device. `name`: as torch calls it, for its peak."""

    name: str
    memory: float
    """Bytes."""
    link_gb_s: float
    """Bus bandwidth of an all-reduce within a machine, 10^9 bytes/s, about four fifths of what the links carry in one
    direction. `launch/preflight.py` measures it."""
    context: float = 1.5e9
    """Bytes that CUDA, NCCL and cuBLAS take."""


DEVICES = {
    "a100-40gb": Device("NVIDIA A100-SXM4-40GB", 40e9, 240.0),
    "a100": Device("NVIDIA A100-SXM4-80GB", 80e9, 240.0),
    "h100": Device("NVIDIA H100 80GB HBM3", 80e9, 360.0),
    "h100-pcie": Device("NVIDIA H100 PCIe", 80e9, 50.0),
    "h200": Device("NVIDIA H200", 141e9, 360.0),
    "l40s": Device("NVIDIA L40S", 48e9, 25.0),
    "mi300x": Device("AMD Instinct MI300X", 192e9, 360.0),
}
"""Memory by the vendors' data sheets."""
BY_COST = ("zero1", "zero2", "zero3", "zero3-offload-optimizer", "zero3-offload")
"""ds_configs from the least communication to the most."""


@dataclass(frozen=True)
class Cluster:
    """Where it would run, and at which speeds."""

    nodes: int
    gpus_per_node: int
    device: Device
    network_gb_s: float
    """Bus bandwidth of an all-reduce over all machines, 10^9 bytes/s."""
    storage_gb_s: float
    """To checkpoints, of all ranks together."""
    mfu: float

    @property
    def n_ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def bus_gb_s(self) -> float:
        return self.device.link_gb_s if self.nodes == 1 else min(self.network_gb_s, self.device.link_gb_s)


@dataclass(frozen=True)
class Choice:
    """A ds_config: what it takes with the config's micro-batch, and the largest that fits."""

    path: str
    """Folder and name."""
    memory: Memory
    fits: bool
    largest_micro_batch: int
    """Rows; 0 where not even one fits."""


@dataclass(frozen=True)
class Traffic:
    """What each rank sends in an optimizer step, in bytes, and how long that takes alone."""

    weights: float
    gradients: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """A run's cost. Times are at the MFU that was given; `traffic` is hidden behind computing as far as it can be."""

    n_ranks: int
    seq_len: int
    doc_len: float
    """Whose square is the mean of squares that attention pays for."""
    micro_batch_size: int
    grad_accum_steps: int
    steps: int
    sizes: ModelSizes
    chosen: Choice
    """The run's own ds_config."""
    choices: list[Choice]
    """Those of ds_configs/, from the least communication to the most."""
    recommended: str | None
    """The first that fits with the run's micro-batch."""
    traffic: Traffic
    compute_s: float
    """Per step."""
    tokens_per_s: float
    days: float
    checkpoint_bytes: float
    checkpoint_bytes_per_rank: float
    checkpoint_s: float
    checkpoint_files: int
    shards_per_rank: float | None
    """Packed files of the training data over ranks; None without the data."""

    @property
    def device_hours(self) -> float:
        return self.days * 24 * self.n_ranks


@dataclass(frozen=True)
class Rows:
    """What of the data decides on cost."""

    seq_len: int
    doc_len: float
    """Sum of squared document lengths over tokens: the length of equal documents that cost as much attention."""
    vocab_size: int | None
    n_shards: int | None


def rows_of(train: Sequence[Manifest]) -> Rows:
    """The same of packed corpora."""
    tokens = sum(m.n_rows * m.seq_len for m in train)
    return Rows(train[0].seq_len, sum(m.sum_squared_doc_lens for m in train) / tokens,
                train[0].tokenizer.vocab_size, sum(len(m.shards) for m in train))


def device_called(name: str) -> Device:
    """The device of that name. Raises ConfigError."""
    if name not in DEVICES:
        raise ConfigError(f"--device={name}: no such device; {did_you_mean(name, DEVICES)}")
    return DEVICES[name]


def estimate(config: RunConfig, rows: Rows, cluster: Cluster, *, ds_configs: Path) -> Cost:
    """The cost of `config` on `cluster`. Raises ConfigError."""
    problems = check_batch(config.batch, cluster.n_ranks)
    if problems:
        raise ConfigError(problems[0])
    sharding = Sharding.read(config.deepspeed)
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    model = Model(config.model, dtype=dtype, vocab_size=rows.vocab_size)
    own, known = Path(config.deepspeed), [ds_configs / f"{name}.json" for name in BY_COST]
    choices = [_choose(path, model, config, rows, cluster) for path in known]
    chosen = next((c for c, path in zip(choices, known, strict=True) if path.samefile(own)), None)
    if chosen is None:
        chosen = _choose(own, model, config, rows, cluster)
    batch, sizes = config.batch, model.sizes
    accum = batch.global_batch_size // (batch.micro_batch_size * cluster.n_ranks)
    tokens = batch.global_batch_size * rows.seq_len
    steps = config.build_schedule(tokens_per_step=tokens).total_steps
    peak = peak_by_name(cluster.device.name)
    assert peak is not None, f"{cluster.device.name} has no peak"
    compute_s = sizes.shape.flops(tokens, round(tokens * rows.doc_len)) / (cluster.mfu * peak * cluster.n_ranks)
    saved, of_rank = checkpoint_bytes(sizes, sharding.stage, cluster.n_ranks)
    return Cost(
        n_ranks=cluster.n_ranks, seq_len=rows.seq_len, doc_len=rows.doc_len, micro_batch_size=batch.micro_batch_size,
        grad_accum_steps=accum, steps=steps, sizes=sizes, chosen=chosen, choices=choices,
        recommended=next((c.path for c in choices if c.fits), None),
        traffic=traffic_of(sizes, sharding, n_ranks=cluster.n_ranks, accum=accum, bus_gb_s=cluster.bus_gb_s),
        compute_s=compute_s, tokens_per_s=tokens / compute_s, days=steps * compute_s / 86400, checkpoint_bytes=saved,
        checkpoint_bytes_per_rank=of_rank, checkpoint_s=saved / (1e9 * cluster.storage_gb_s),
        checkpoint_files=cluster.n_ranks * (2 if sharding.stage == 3 else 1) + (sharding.stage < 3),
        shards_per_rank=rows.n_shards / cluster.n_ranks if rows.n_shards else None)


def _choose(path: Path, model: Model, config: RunConfig, rows: Rows, cluster: Cluster) -> Choice:
    sharding, budget = Sharding.read(str(path)), USABLE * cluster.device.memory

    def taken(micro_batch: int) -> Memory:
        n_tokens = micro_batch * rows.seq_len
        return memory_of(model.sizes, model.activations(n_tokens), sharding, n_ranks=cluster.n_ranks, n_tokens=n_tokens,
                         context=round(cluster.device.context), on_gpu=True)

    rows_per_rank = config.batch.global_batch_size // cluster.n_ranks
    possible = [n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0]
    largest = max((n for n in possible if taken(n).device.total <= budget), default=0)
    memory = taken(config.batch.micro_batch_size)
    return Choice(f"{path.parent.name}/{path.name}", memory, memory.device.total <= budget, largest)


def traffic_of(sizes: ModelSizes, sharding: Sharding, *, n_ranks: int, accum: int, bus_gb_s: float) -> Traffic:
    """What a rank sends in a step of `accum` micro-batches, as ds_configs/README.md counts it.

    An all-gather or a reduce-scatter of S bytes is (n - 1) / n * S. Gradients are float32. Weights that ZeRO-3 need not
    give back between forward and backward are gathered once."""
    share = (n_ranks - 1) / n_ranks
    whole = share * sizes.bytes_each * sizes.n_params
    kept = min(1.0, sharding.reuse_distance / 2 / sizes.n_params)
    weights = accum * (2 - kept) * whole if sharding.stage == 3 else share * sizes.bytes_each * sizes.n_trained
    gradients = share * 4 * sizes.n_trained * (1 if sharding.stage == 1 else accum)
    return Traffic(weights, gradients, (weights + gradients) / (1e9 * bus_gb_s))


def checkpoint_bytes(sizes: ModelSizes, stage: int, n_ranks: int) -> tuple[float, float]:
    """Bytes of a checkpoint, and of the rank that writes most of it: float32 weights and two moments of what is
    trained, shared out, and the weights as the model computes with them, which before stage 3 rank 0 writes whole."""
    optimizer, weights = 12 * sizes.n_trained, sizes.bytes_each * sizes.n_params
    return float(optimizer + weights), optimizer / n_ranks + weights / (n_ranks if stage == 3 else 1)


def text(cost: Cost, cluster: Cluster) -> str:
    """The cost as lines to read."""
    gb, part = 1e9, cost.chosen.memory.device
    lines = [
        f"{cost.sizes.n_params / 1e9:.3f} B parameters ({cost.sizes.n_trained / 1e9:.3f} B trained), {cost.n_ranks} x "
        f"{cluster.device.name}, rows of {cost.seq_len:,}, documents like {cost.doc_len:,.0f} tokens",
        f"micro batch {cost.micro_batch_size}, accumulation {cost.grad_accum_steps}, {cost.steps:,} steps", "",
        f"memory per device with {cost.chosen.path}, GB",
        *(f"  {f.name:<12} {getattr(part, f.name) / gb:>8.2f}" for f in fields(DeviceMemory)),
        f"  {'total':<12} {part.total / gb:>8.2f} of {USABLE * cluster.device.memory / gb:.1f} usable"
        + (f", and {cost.chosen.memory.host / gb:.2f} of the host's per rank" if cost.chosen.memory.host else ""), "",
        f"{'ds_config':<42}  fits   GB/device  GB/rank on host  largest micro batch"]
    lines += [f"{c.path:<42}  {'yes' if c.fits else 'no':<4}  {c.memory.device.total / gb:>10.1f}  "
              f"{c.memory.host / gb:>15.1f}  {c.largest_micro_batch or 'none':>19}" for c in cost.choices]
    take = cost.recommended or "none: more devices, activation_checkpointing, or a smaller micro batch"
    over = cost.traffic.seconds / cost.compute_s
    return "\n".join([
        *lines, f"take: {take}", "",
        f"step: {cost.compute_s:.2f} s at {cluster.mfu:.0%} MFU; each rank sends "
        f"{cost.traffic.weights / gb:.1f} GB of weights, {cost.traffic.gradients / gb:.1f} GB of gradients: "
        f"{cost.traffic.seconds:.2f} s at {cluster.bus_gb_s:g} GB/s, {over:.0%} of computing"
        + (": it cannot all be hidden" if over > 1 else ""),
        f"run: {cost.tokens_per_s:,.0f} tokens/s, {duration(cost.days * 86400)}, {cost.device_hours:,.0f} device-hours",
        f"checkpoint: {cost.checkpoint_bytes / gb:.1f} GB in {cost.checkpoint_files:,} files, at most "
        f"{cost.checkpoint_bytes_per_rank / gb:.2f} GB per rank; {cost.checkpoint_s:.0f} s at "
        f"{cluster.storage_gb_s:g} GB/s",
        "data: not here, so documents are taken to fill their rows" if cost.shards_per_rank is None else
        f"data: {cost.shards_per_rank:.2g} packed files per rank"])

