"""DeepSpeed, and the only module that imports it: ZeRO, the optimizer step.

reads: the DeepSpeed JSON of a run (ZeRO, offload, communication). Whatever the model computes in, gradients are summed
over micro-batches and ranks, and weights are kept, in float32. The rate is written into the optimizer before every
step; DeepSpeed gets no scheduler. Loss is the token mean over the optimizer step and over all ranks: each rank scales
its summed loss by world_size * grad_accum_steps / n_valid, which undoes the averages that DeepSpeed takes.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from packaging.version import Version
from torch import Tensor

from cprec import dist
from cprec.attention import select
from cprec.config import OptimizerConfig, RunConfig, load_deepspeed_config
from cprec.data.collate import Batch
from cprec.data.dataset import Step
from cprec.errors import CheckpointError, ConfigError
from cprec.log import get_logger
from cprec.model import TrainingModel, compile_blocks, load_for_training
from cprec.train.guard import Judge, judge_finite
from cprec.train.lora import add_lora
from cprec.train.optimizer import EmbeddingsOnly, parameter_groups
from cprec.train.partitions import Layout, SavedState
from cprec.train.plan import Plan
from cprec.train.zero_state import ZeroState

log = get_logger(__name__)
MIN_DEEPSPEED = "0.19.8"
"""Earlier versions let one NaN loss under ZeRO-3 poison the float32 master weights while they report a norm of 1.0."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks; the same on each, but for `bad_rows`."""

    loss_sums: list[float]
    """Summed loss by corpus number, in nats."""
    n_valid: list[float]
    """Predicted tokens by corpus number."""
    grad_norm: float | None
    """Before clipping."""
    rejected: str | None
    """Why the update was left out: then no weight, moment or step count has changed, on any rank."""
    is_asked_to_stop: bool
    """Whether any rank was."""
    bad_rows: list[tuple[int, int]]
    """This rank's rows whose own loss is not finite, as (micro-step, place)."""

    @property
    def loss(self) -> float:
        return sum(self.loss_sums) / sum(self.n_valid)


class Times(Protocol):
    """What the engine asks of a clock, see `cprec.train.watch.Clock`."""

    def compute(self, name: str) -> AbstractContextManager[None]: ...


class _NoTimes:
    def compute(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class _Pending:
    """The step under way, from the moment when all ranks' sums are on their way."""

    totals: Tensor
    row_losses: list[Tensor]
    judge: Judge
    result: StepResult | None = None


class Engine:
    """A model under ZeRO with its optimizer: runs steps, validates, saves and loads."""

    def __init__(self, plan: Plan) -> None:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)  # takes over the process group that cprec.dist made
        config = plan.config
        _seed(config)
        self.device = dist.device()
        self.dtype = _dtype(config.model.dtype, self.device)
        self.backend = select(config.model.attention, self.device, self.dtype)
        self.n_corpora = len(plan.sampler.names)
        self.grad_accum_steps, self.world_size = plan.grad_accum_steps, plan.world_size
        ds_config = _deepspeed_config(plan, self.dtype)
        self.zero_stage = int(ds_config["zero_optimization"]["stage"])
        if config.model.compile and self.zero_stage == 3:
            raise ConfigError(f"model.compile=true does not go with ZeRO stage 3 ({config.deepspeed}): its hooks "
                              f"around every layer leave nothing to compile; use ds_configs/zero1.json or zero2.json, "
                              f"or model.compile=false")
        model = _load_model(plan, self.backend, self.dtype, ds_config)
        self.model_shape = model.shape
        optimizer = _adamw(parameter_groups(model, config.optimizer), config.optimizer,
                           on_host=self.device.type == "cuda" and _offloads_optimizer(ds_config))
        self._embeddings_only = EmbeddingsOnly(model, optimizer)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
        if config.model.compile:
            compile_blocks(model.lm)
        self._zero_state = ZeroState(self._engine.module, self._engine.optimizer)
        self._pending: _Pending | None = None
        for updating in (optimizer, getattr(self._optimizer, "backup_optimizer", None)):  # the second: partial offload
            if updating is not None:
                self._guard(updating)

    def train_only_embeddings(self, only: bool) -> None:
        """Whether the next step trains the embeddings alone, as `Plan.only_embeddings` says, or everything."""
        self._embeddings_only.set(only)

    def step(self, step: Step, lr: float, *, judge: Judge = judge_finite, times: Times | None = None,
             asked_to_stop: Sequence[int] = ()) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one optimizer step, at rate `lr`.

        `judge` sees loss and gradient norm of all ranks when the optimizer is about to update, and may leave the update
        out. That is the one moment at which the host waits for a GPU. Until then a loss that is not finite takes its
        course: under ZeRO-3 every rank has to take part in every backward, and gradients are overwritten by the next
        step. Collective; `asked_to_stop`, if not empty on one rank, is told to all.
        """
        times = times or _NoTimes()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self.world_size * self.grad_accum_steps / step.n_valid
        totals = torch.zeros(2 * self.n_corpora + 1, dtype=torch.float64, device=self.device)
        row_losses = []
        for i, batch in enumerate((b.to(self.device) for b in step.batches), 1):
            with times.compute("forward"):
                losses = self._engine(batch)
            with times.compute("backward"):
                self._engine.backward(losses.sum() * scale)
            row_losses.append(losses.detach())
            totals.index_add_(0, batch.corpus, row_losses[-1].double())
            totals.index_add_(0, batch.corpus + self.n_corpora, batch.n_valid_by_row.double())
            with times.compute("optimizer"):
                if i == len(step.batches):
                    totals[-1] = float(bool(asked_to_stop))
                    dist.add_over_ranks(totals)
                    self._pending = _Pending(totals, row_losses, judge)
                self._engine.step()
        result = self._decide()
        self._pending = None
        if result.rejected:  # stages 1 and 2 link the moments once, after what they take for the first update
            self._optimizer._hp_optimizer_states_linked = False
        return result

    def _guard(self, optimizer: Any) -> None:
        """Have `optimizer.step`, which DeepSpeed calls for each part of the parameters, do nothing in a step that is
        rejected: whatever DeepSpeed makes of such a step, it has no other way to weights and moments."""
        update = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            return None if self._pending and self._decide().rejected else update(*args, **kwargs)

        optimizer.step = step

    def _decide(self) -> StepResult:
        """The result of the step under way; judged once. DeepSpeed knows the norm before it calls the optimizer."""
        pending = self._pending
        assert pending is not None
        if pending.result is None:
            values, n = pending.totals.tolist(), self.n_corpora
            norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
            found = StepResult(values[:n], values[n:2 * n], None if norm is None else float(norm), rejected=None,
                               is_asked_to_stop=values[-1] > 0, bad_rows=[])
            bad = [] if math.isfinite(found.loss) else [
                (m, i) for m, losses in enumerate(pending.row_losses)
                for i, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
            pending.result = replace(found, rejected=pending.judge(found.loss, found.grad_norm), bad_rows=bad)
        return pending.result

    @torch.no_grad()
    def param_norm(self) -> float | None:
        """2-norm of the trained parameters as the model computes with them; None where they lie on NVMe. Collective."""
        trained = [p for p in self._engine.module.parameters() if p.requires_grad]
        parts = [part for part in map(_own_part, trained) if part is not None]
        if len(parts) < len(trained):
            return None
        squares = torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32).double() ** 2 for p in parts]).sum()
        if self.zero_stage == 3:
            dist.add_over_ranks(squares)
        return math.sqrt(float(squares))

    @torch.no_grad()
    def row_losses(self, batch: Batch) -> Tensor:
        """Summed loss of each row, (B,), without gradients. Every rank must call it equally often under ZeRO-3."""
        self._engine.eval()
        losses: Tensor = self._engine(batch.to(self.device))
        self._engine.train()
        return losses

    def layout(self) -> Layout:
        """This rank's share of weights and moments as a checkpoint has them: views, good until the next step."""
        return self._zero_state.layout()

    def load(self, saved: SavedState) -> None:
        """Take weights, moments and counts of updates from a checkpoint, whatever ranks and stage saved it. Collective.
        Raises CheckpointError when it is of another model."""
        try:
            with torch.no_grad():
                self._zero_state.load(saved)
        except CheckpointError as e:
            e.on_one_rank = True
            raise

    def close(self) -> None:
        """Release hooks and buffers."""
        self._engine.destroy()


def _own_part(parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter, without padding, flat; all of it where parameters are not partitioned; None
    where it is not in memory."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach().flatten()
    if part.numel() == 0 and part.ds_numel:
        return None
    n_left = parameter.ds_numel - dist.rank() * part.ds_numel  # type: ignore[attr-defined]
    return part.detach().flatten()[:max(min(n_left, part.numel()), 0)]  # type: ignore[no-any-return]


def _import_deepspeed() -> Any:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if Version(deepspeed.__version__.split("+")[0]) < Version(MIN_DEEPSPEED):
        raise ConfigError(f"deepspeed {deepspeed.__version__} is installed; {MIN_DEEPSPEED} or newer is needed, since "
                          f"earlier ones let a single NaN loss ruin the weights in silence: pip install -U deepspeed")
    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for a minute, and serves inference only
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's calls, not ours
    return deepspeed


def _deepspeed_config(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The run's DeepSpeed JSON with the keys that the run config owns filled in."""
    config: RunConfig = plan.config
    return {
        **load_deepspeed_config(config.deepspeed),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": config.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**12,
    }


def _load_model(plan: Plan, backend: str, dtype: torch.dtype, ds_config: dict[str, Any]) -> TrainingModel:
    """The model, each parameter partitioned as it is loaded when ZeRO stage 3 is on."""
    from transformers.integrations import HfDeepSpeedConfig

    zero3 = HfDeepSpeedConfig(ds_config)  # from_pretrained looks for a living one
    config = plan.config.model
    model = load_for_training(
        config.path, backend=backend, dtype=dtype, seq_len=plan.seq_len, trust_remote_code=config.trust_remote_code,
        vocab_size=next(iter(plan.train.values())).tokenizer.vocab_size,
        activation_checkpointing=config.activation_checkpointing,
    )
    if config.lora:
        add_lora(model.lm, config.lora)
    del zero3
    return model


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, *, on_host: bool) -> torch.optim.Optimizer:
    """AdamW over `groups`: torch's fused one, or DeepSpeed's for the host's cores, where a GPU's states are offloaded.

    The latter is compiled on its first use. On a machine without a GPU torch's is as fast.
    """
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        on_cores: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, adamw_mode=True)
        return on_cores
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


def _offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device") in ("cpu", "nvme")


def _seed(config: RunConfig) -> None:
    """Make new weights (adapters, rows of an enlarged vocabulary) a function of the config; if asked, everything."""
    torch.manual_seed(config.data.seed)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # GBs of buffers


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
