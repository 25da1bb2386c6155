"""DeepSpeed, and the only module that knows it: ZeRO, the optimizer step, its checkpoint files.

reads: the DeepSpeed JSON of a run (ZeRO, offload, communication). Whatever the model computes in, gradients are summed
over micro-batches and ranks, and weights are kept, in float32. The rate is written into the optimizer before every
step; DeepSpeed gets no scheduler. Loss is the token mean over the optimizer step and over all ranks: each rank scales
its summed loss by world_size * grad_accum_steps / n_valid, which undoes the averages that DeepSpeed takes.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from cprec.train.lora import add_lora
from cprec.train.optimizer import EmbeddingsOnly, parameter_groups
from cprec.train.plan import Plan

log = get_logger(__name__)
MIN_DEEPSPEED = "0.19.8"
"""Earlier versions let one NaN loss under ZeRO-3 poison the float32 master weights while they report a norm of 1.0."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step on this rank: summed loss and predicted tokens by corpus number, and what became of it."""

    loss_sums: list[float]
    n_valid: list[int]
    grad_norm: float | None
    skipped: bool
    """A gradient was not finite: no weight, moment or step count was changed, on any rank."""


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

    def train_only_embeddings(self, only: bool) -> None:
        """Whether the next step trains the embeddings alone, as `Plan.only_embeddings` says, or everything."""
        self._embeddings_only.set(only)

    def step(self, step: Step, lr: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one optimizer step, at rate `lr`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self.world_size * self.grad_accum_steps / step.n_valid
        sums = torch.zeros(self.n_corpora, dtype=torch.float64, device=self.device)
        n_valid = torch.zeros(self.n_corpora, dtype=torch.int64, device=self.device)
        skipped_before = self._engine.skipped_steps
        for batch in (b.to(self.device) for b in step.batches):
            row_losses = self._engine(batch)
            self._engine.backward(row_losses.sum() * scale)
            self._engine.step()
            sums.index_add_(0, batch.corpus, row_losses.detach().double())
            n_valid.index_add_(0, batch.corpus, batch.n_valid_by_row)
        return StepResult(sums.tolist(), n_valid.tolist(), self._grad_norm(),
                          self._engine.skipped_steps > skipped_before)

    @torch.no_grad()
    def row_losses(self, batch: Batch) -> Tensor:
        """Summed loss of each row, (B,), without gradients. Every rank must call it equally often under ZeRO-3."""
        self._engine.eval()
        losses: Tensor = self._engine(batch.to(self.device))
        self._engine.train()
        return losses

    def save(self, folder: Path, name: str) -> None:
        """Write this rank's partitions and moments into `folder/name`; returns when every rank has written."""
        self._engine.save_checkpoint(str(folder), tag=name, save_latest=False, client_state={})
        dist.barrier()

    def load(self, folder: Path, name: str) -> None:
        """Take weights and moments from `folder/name`, written on the same number of ranks. Raises CheckpointError."""
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=name, load_lr_scheduler_states=False)
        except Exception as e:
            error = CheckpointError(f"{folder / name}: DeepSpeed cannot load it: {type(e).__name__}: {e}")
            error.on_one_rank = True
            raise error from e
        if loaded is None:
            raise CheckpointError(f"{folder / name}: DeepSpeed found nothing to load there")

    def close(self) -> None:
        """Release hooks and buffers; asynchronous writers would hang at exit without it."""
        self._engine.destroy()

    def _grad_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)


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
