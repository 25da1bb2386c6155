"""The measurements of `benchmarks/gpu.py`, each in a process of its own: kernels, bare step, our run, the Trainer.

Device time is taken by events between steps, after untimed ones; medians over steps. A measurement is a `Record`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from benchmarks.gpu_world import CORPUS, FULL, Model, known_models
from cprec.attention import BACKENDS, kernel_arguments, select
from cprec.data.collate import Batch, collate
from cprec.format import PackedCorpus
from cprec.loss import row_losses
from cprec.model import TrainingModel

UNTIMED_STEPS = 3


@dataclass(frozen=True)
class Asked:
    """One measurement."""

    part: str
    work: str
    tiny: bool = False
    model: str = "135m"
    rows: str = FULL
    backend: str = "auto"
    steps: int = 12


@dataclass
class Record:
    """What came of it. `values` are numbers by name, with the unit in the name."""

    part: str
    model: str | None = None
    rows: str | None = None
    backend: str | None = None
    values: dict[str, float | str | None] = field(default_factory=dict)
    failed: str | None = None


def run(asked: Asked) -> Iterator[Record]:
    """All records of one measurement."""
    yield from PARTS[asked.part](asked)


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def backends() -> list[str]:
    """Those that run here in the benchmark's precision."""
    return [name for name, b in BACKENDS.items() if b.obstacle(device(), dtype()) is None]


# --- ceiling: what the card gives at most --------------------------------------------------------------------------

def ceiling(asked: Asked) -> Iterator[Record]:
    """Matrix products on random data, large and of the 1.5B model's shapes, and a copy within the device's memory."""
    unit = 256 if asked.tiny else 8192
    shapes = {"square": (unit, unit, unit), "mlp_1p5b": (unit, 1536, 8960), "head_1p5b": (unit // 4, 1536, 151936)}
    if asked.tiny:
        shapes = {"square": shapes["square"]}
    for name, (m, k, n) in shapes.items():
        pairs = [(torch.randn(m, k, device=device(), dtype=dtype()), torch.randn(k, n, device=device(), dtype=dtype()))
                 for _ in range(2)]  # two sets in turn, larger than the cache together
        seconds = _median_s(lambda i, pairs=pairs: pairs[i % 2][0] @ pairs[i % 2][1], 30)  # type: ignore[misc]
        yield Record("ceiling", values={"what": name, "tflops": 2 * m * k * n / seconds / 1e12})
    source = torch.randn(2**18 if asked.tiny else 2**30, device=device())
    target = torch.empty_like(source)
    seconds = _median_s(lambda i: target.copy_(source), 20)
    yield Record("ceiling", values={"what": "copy", "tb_per_s": 2 * source.nbytes / seconds / 1e12})


# --- parity: every backend against float64 -------------------------------------------------------------------------

def parity(asked: Asked) -> Iterator[Record]:
    """Relative error of output and gradients of one backend, ||out - ref|| / ||ref||, against masked softmax in float64
    on the same inputs, at grouped heads and documents of 1 token to a row; and what a document changes in others."""
    n, heads, kv_heads, width = (192, 4, 2, 16) if asked.tiny else (4096, 12, 2, 128)
    seed = int(time.time())  # other inputs every time: it must hold for any
    torch.manual_seed(seed)
    lens = {"mixed": _mixed(n), "one": [n]}
    for what, docs in lens.items():
        q, k, v, g = (torch.randn(1, h, n, width, device=device(), dtype=dtype())
                      for h in (heads, kv_heads, kv_heads, heads))
        out, *grads = _attend(asked.backend, (q, k, v), docs, g)
        with_noise = k.clone()
        with_noise[:, :, :docs[0]] = torch.randn_like(with_noise[:, :, :docs[0]])
        leaked = (_attend(asked.backend, (q, with_noise, v), docs, g)[0] - out)[:, docs[0]:].abs()
        wanted = _reference(q, k, v, docs, g)
        errors = {f"error_{name}": _error(a, b) for name, a, b in
                  zip(("out", "dq", "dk", "dv"), (out, *grads), wanted, strict=True)}
        limit = 1e-2 if dtype() == torch.bfloat16 else 1e-5
        leak = float(leaked.max()) if leaked.numel() else 0.0
        holds = all(e < limit for e in errors.values()) and leak == 0.0  # NaN is not below
        yield Record("parity", rows=what, backend=asked.backend,
                     values={**errors, "leak": leak, "limit": limit, "seed": float(seed)},
                     failed=None if holds else "error beyond the limit, or a document changed another")


def _mixed(n: int) -> list[int]:
    lens, left = [1, 2, 7, 64, 65], n - 139
    while left > 0:
        lens.append(min(left, 1 + len(lens) * 37 % 300))
        left -= lens[-1]
    return lens


def _attend(backend: str, qkv: tuple[Tensor, ...], lens: list[int], grad: Tensor) -> list[Tensor]:
    """Output (1, n, heads, width) of the backend, and gradients of its inputs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    config = LlamaConfig(hidden_size=q.shape[1] * q.shape[3], num_attention_heads=q.shape[1],
                         num_key_value_heads=k.shape[1], num_hidden_layers=1)
    config._attn_implementation = BACKENDS[backend].implementation
    layer = LlamaAttention(config, 0).to(q.device, q.dtype)
    borders = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32, device=q.device)
    out, _ = ALL_ATTENTION_FUNCTIONS[BACKENDS[backend].implementation](
        layer, q, k, v, None, scaling=q.shape[3] ** -0.5, dropout=0.0, **kernel_arguments(borders, max(lens)))
    out.backward(grad.transpose(1, 2))
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]


def _reference(q: Tensor, k: Tensor, v: Tensor, lens: list[int], grad: Tensor) -> list[Tensor]:
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    outs, at = [], 0
    for n in lens:
        one, key, value = (x[:, :, at:at + n] for x in (q, k, v))
        scores = one @ key.repeat_interleave(group, 1).transpose(2, 3) * q.shape[3] ** -0.5
        hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 1))
        at += n
    out = torch.cat(outs, 2).transpose(1, 2)
    out.backward(grad.double().transpose(1, 2))
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]


def _error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


def loss_parity(asked: Asked) -> Iterator[Record]:
    """Losses of ten updates of a small model in float32 on the CPU and on the device, from the same weights and
    batches: the largest relative difference."""
    model = known_models(tiny=True)["135m"]
    batches = _batches(model, Path(asked.work) / f"parity-{asked.rows}", 10)
    config = model.config.__class__(**model.config.to_dict())
    on_cpu = _losses(config, batches, torch.device("cpu"), "sdpa")
    here = _losses(config, batches, device(), "doc_sdpa")
    worst = max(abs(a - b) / a for a, b in zip(on_cpu, here, strict=True))
    yield Record("parity", rows="losses, CPU and device", backend="doc_sdpa",
                 values={"worst_relative_difference": worst, "first": on_cpu[0], "last": on_cpu[-1], "limit": 1e-3},
                 failed=None if worst < 1e-3 else "losses differ")


def _losses(config: Any, batches: list[Batch], where: torch.device, backend: str) -> list[float]:
    torch.manual_seed(0)
    model = TrainingModel(AutoModelForCausalLM.from_config(
        config, attn_implementation=BACKENDS[backend].implementation, dtype=torch.float32)).to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for batch in (b.to(where) for b in batches):
        loss = model(batch).sum() / batch.n_valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


# --- speed ---------------------------------------------------------------------------------------------------------

def bare(asked: Asked) -> Iterator[Record]:
    """Forward, backward and fused AdamW in the model's own precision, without engine, master weights or clipping:
    less than any trainer has to do."""
    model, folder = known_models(tiny=asked.tiny)[asked.model], Path(asked.work) / asked.model
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=BACKENDS[asked.backend].implementation,
                                              dtype=dtype())
    training = TrainingModel(lm).to(device()).train()
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-5, fused=True)
    n = model.accumulation
    batches = [b.to(device()) for b in _batches(model, _rows(asked), 4 * n)]

    def step(i: int) -> None:
        for batch in batches[i % 4 * n:i % 4 * n + n]:
            (training(batch).sum() / (batch.n_valid * n)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = _median_s(step, asked.steps)
    yield _speed(asked, asked.backend, seconds, training.shape)


def ours(asked: Asked) -> Iterator[Record]:
    """`cprec.train.loop.train` as it is, ended after the timed steps and before it saves."""
    from benchmarks.train.ours import REPO, Enough, watching
    from cprec.config import RunConfig
    from cprec.settings import parse_settings
    from cprec.train import loop

    model, work = known_models(tiny=asked.tiny)[asked.model], Path(asked.work)
    n = UNTIMED_STEPS + asked.steps
    config = parse_settings(RunConfig, {
        "run_dir": str(work / "runs" / f"{asked.model}-{asked.rows}-{asked.backend}"),
        "model": {"path": str(work / asked.model), "attention": asked.backend},
        "data": {"packed": str(_rows(asked)), "allow_unaudited": True},
        "batch": {"global_batch_size": model.rows_per_step, "micro_batch_size": model.rows_per_forward},
        "optimizer": {"peak_lr": 1e-5}, "schedule": {"total": {"steps": n + 1}},
        "validation": {"every": None}, "deepspeed": str(REPO / "ds_configs/zero3.json")}, source="benchmark")
    with watching(last=n) as seen, suppress(Enough):
        loop.train(config)
    seconds = statistics.median(b - a for a, b in pairwise(seen.ends_s[UNTIMED_STEPS - 1:]))
    yield _speed(asked, select(asked.backend, device(), dtype()), seconds, _shape(model))


def trainer(asked: Asked) -> Iterator[Record]:
    """`transformers.Trainer` with DeepSpeed ZeRO-3: documents padded, in batches of like length."""
    from benchmarks.train import rivals
    from benchmarks.train.job import Job

    model, work = known_models(tiny=asked.tiny)[asked.model], Path(asked.work)
    kernel = next((b for b in ("flash3", "flash2") if b in backends()), None)
    job = Job(side="trainer padded", base=work / asked.model, rows=_rows(asked), out=work / "runs" / "trainer",
              steps=UNTIMED_STEPS + asked.steps, rows_per_step=model.rows_per_step,
              rows_per_forward=model.rows_per_forward, seed=1, peak_lr=1e-5, warmup_steps=1, weights=False,
              bf16=dtype() == torch.bfloat16, attention=BACKENDS[kernel].implementation if kernel else "sdpa")
    seen = rivals.padded(job)
    useful = sum(seen.useful[UNTIMED_STEPS:])
    seconds = seen.ends_s[-1] - seen.ends_s[UNTIMED_STEPS - 1]
    yield Record("trainer", asked.model, asked.rows, job.attention, {
        "useful_tokens_per_s": useful / seconds, "padding": 1 - sum(seen.useful) / sum(seen.slots), **_peak_memory()})


def memory(asked: Asked) -> Iterator[Record]:
    """Peak of the loss alone, forward and backward at the 1.5B model's vocabulary: ours, and over full logits."""
    tokens, hidden, vocabulary = (512, 64, 4096) if asked.tiny else (8192, 1536, 151936)
    labels = torch.randint(vocabulary, (1, tokens), device=device())  # the same for both, as are the inputs
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda h, w: row_losses(h, w, labels).sum(),
        "full": lambda h, w: F.cross_entropy(F.linear(h, w).float().flatten(0, 1), labels.flatten(), reduction="sum")}
    for name, way in ways.items():
        torch.manual_seed(0)
        h = torch.randn(1, tokens, hidden, device=device(), dtype=dtype(), requires_grad=True)
        w = (torch.randn(vocabulary, hidden, device=device(), dtype=dtype()) * hidden ** -0.5).requires_grad_()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        loss = way(h, w)
        loss.backward()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if torch.cuda.is_available() else None
        yield Record("memory", rows=name, values={"loss": float(loss.detach()), "peak_gb": peak})
        del h, w, loss


# --- what they share -----------------------------------------------------------------------------------------------

def _speed(asked: Asked, backend: str, seconds: float, shape: Any) -> Record:
    """Tokens per second and the share of the device's peak, over the documents' own attention."""
    from cprec.train.metrics import peak_flops

    model, corpus = known_models(tiny=asked.tiny)[asked.model], PackedCorpus(_rows(asked) / CORPUS)
    tokens = model.rows_per_step * model.seq_len
    pairs = corpus.manifest.sum_squared_doc_lens / len(corpus) * model.rows_per_step
    flops = shape.flops(tokens, pairs)
    peak = peak_flops(device())
    useful = tokens * corpus.manifest.n_tokens / (len(corpus) * model.seq_len)
    return Record(asked.part, asked.model, asked.rows, backend, {
        "step_s": seconds, "useful_tokens_per_s": useful / seconds, "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None, **_peak_memory()})


def _peak_memory() -> dict[str, float | str | None]:
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None}


def _shape(model: Model) -> Any:
    with torch.device("meta"):
        return TrainingModel(AutoModelForCausalLM.from_config(model.config)).shape


def _rows(asked: Asked) -> Path:
    return Path(asked.work) / f"{asked.model}-{asked.rows}"


def _batches(model: Model, rows: Path, n: int) -> list[Batch]:
    corpus, size = PackedCorpus(rows / CORPUS), model.rows_per_forward
    return [collate([corpus[(i * size + j) % len(corpus)] for j in range(size)], [0] * size) for i in range(n)]


def _median_s(work: Callable[[int], Any], n: int) -> float:
    """Median seconds of `n` calls after the untimed ones, by the device's own events."""
    for i in range(UNTIMED_STEPS):
        work(i)
    if not torch.cuda.is_available():
        times = []
        for i in range(n):
            begin_s = time.perf_counter()
            work(i)
            times.append(time.perf_counter() - begin_s)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for i in range(n):
        work(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(marks))


PARTS: dict[str, Callable[[Asked], Iterator[Record]]] = {
    "ceiling": ceiling, "parity": parity, "loss_parity": loss_parity, "bare": bare, "ours": ours, "trainer": trainer,
    "memory": memory}
