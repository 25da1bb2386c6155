"""The run config: one typed, immutable tree, read from YAML with dotted overrides, all problems reported at once.

reads: the run's YAML file. writes: `run/config.yaml`, resolved, which is itself a valid config. The run config owns
batch sizes, rate, clip and precision; `ds_configs/*.json` own ZeRO, offload and communication, and may not name a key
that this file owns.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from cprec.attention import BACKENDS
from cprec.errors import ConfigError, did_you_mean, raise_all
from cprec.schedule import Anneal, Return, Schedule, check_shape, cycles, decay
from cprec.settings import Settings

OWNED_HERE = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size and batch.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "communication_data_type": "model.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
    "compile": "model.compile",
    "steps_per_print": "log_every",
}
"""Keys of a DeepSpeed config that the run config owns, and where."""


class Length(Settings):
    """A stretch of training, in exactly one unit: optimizer steps, tokens of packed rows, or a share of the run."""

    steps: int | None = Field(None, ge=0)
    tokens: float | None = Field(None, gt=0)
    share: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        given = [n for n in ("steps", "tokens", "share") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"a length needs exactly one of steps, tokens, share; given: {given or 'none'}")
        return self

    def in_steps(self, *, tokens_per_step: int, total_steps: int | None = None) -> int:
        """The length in optimizer steps, rounded to the nearest; a share is of `total_steps`."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return round(self.tokens / tokens_per_step)
        assert self.share is not None and total_steps is not None
        return round(self.share * total_steps)


class LoraConfig(Settings):
    """Low-rank adapters (LoRA, arXiv:2106.09685): W + alpha/r * B A, with only A (r, in) and B (out, r) trained."""

    r: PositiveInt = 16
    """Rank of the two factors."""
    alpha: PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers that get one, by the end of their name (`q_proj`); `all-linear`: all but the output layer."""


class ModelConfig(Settings):
    """Which model to continue, and how it computes."""

    path: str
    """Local Hugging Face folder, hub name, or GGUF file."""
    attention: str = "auto"
    """Kernel (cprec/attention.py); `auto`: the fastest that runs here. A named one that cannot run is an error."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 with float32 master weights on a GPU, float32 on a CPU."""
    activation_checkpointing: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Forget what every k-th decoder block computed and compute it again in the backward pass: 1: every block; null:
    keep all. Saves memory and changes no number."""
    compile: bool = False
    """Compile the decoder blocks (`torch.compile`; needs a C++ compiler, on a GPU Triton)."""
    lora: LoraConfig | None = None
    """Train adapters instead of the model's own weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @field_validator("attention")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        if name not in {*BACKENDS, "auto"}:
            raise ValueError(f"unknown attention backend; {did_you_mean(name, [*BACKENDS, 'auto'])}")
        return name


class MixConfig(Settings):
    """Mixing weights by phase: corpus name or pattern (`specific/*`) -> share of the rows; null: in proportion to size.

    `anneal: null` keeps the weights of the stable phase.
    """

    warmup: dict[str, float] | None = None
    stable: dict[str, float] | None = None
    anneal: dict[str, float] | None = None


class DataConfig(Settings):
    """What is read."""

    packed: str | list[str]
    """Folder of packed corpora, as `launch/prepare.py` left it, or its URL (`s3://bucket/prepared/packed`); or several,
    of which only one may have a corpus of a name."""
    cache_dir: str = "~/.cache/cprec/shards"
    """Where shards from a URL are kept: a local disk of each machine, which all its ranks share."""
    cache_gb: PositiveFloat = 100.0
    """Most that `cache_dir` may take, in 10^9 bytes; the least recently opened shards go first."""
    mix: MixConfig = MixConfig()
    max_epochs: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field({})
    """How often the whole run may read a corpus: name or pattern -> epochs (fractions too); others as often as the
    mixture says. An exact name beats a pattern."""
    when_dry: Literal["error", "redistribute"] = "error"
    """What follows when a corpus has reached its `max_epochs`: the run does not start, or the others take its share."""
    seed: int = 0
    """Decides the order of the rows."""
    reseed: dict[int, int] = Field({})
    """From step -> seed: from there on the rows that an epoch has left come in another order. Written by
    launch/anneal.py --seed."""
    verify: Literal["open", "full"] = "full"
    """`open`: sizes of all shards; `full`: also their hashes, before the first step, shared out over the ranks."""
    allow_unaudited: bool = False
    """Train on corpora whose leak audit is missing or failed, or that were split by different clocks."""

    @field_validator("packed", mode="before")
    @classmethod
    def _names_folders(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
            return value
        raise ValueError("give a folder of packed corpora, or a list of them")


class BatchConfig(Settings):
    """Rows per optimizer step and per forward. Accumulation follows from the world size."""

    global_batch_size: PositiveInt
    """Rows per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt
    """Rows per rank and forward pass."""


class OptimizerConfig(Settings):
    """AdamW. Weight decay leaves out norms, biases and every other parameter of fewer than two dimensions."""

    peak_lr: PositiveFloat
    """The stable rate; a branch anneals from it."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = True
    """Weight decay on the input embeddings too (and on the output layer where it is tied to them)."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""


class AnnealConfig(Settings):
    """The annealing phase: the last `length` of the run, down to `final_lr_ratio` times the stable rate."""

    length: Length
    """A share is one of the run; of a cycle, under `kind: wsd-s`."""
    shape: str = "sqrt"
    """Formulas: cprec/schedule.py."""
    final_lr_ratio: float = 0.1
    """The last rate as a share of the stable one."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            check_shape(self.shape, self.final_lr_ratio)
        except ConfigError as e:
            raise ValueError(str(e)) from None
        return self


class ReturnConfig(Settings):
    """An annealing in the run's past, of `steps` updates from `start` on, which was left at step `end` for the stable
    rate, over `rewarm_steps` updates: written by launch/anneal.py."""

    start: int
    steps: PositiveInt
    shape: str
    final_lr_ratio: float
    end: int
    rewarm_steps: int = Field(0, ge=0)
    from_zero: bool = False
    """The rate climbed from 0; else from where the annealing had brought it."""
    mix: dict[str, float] | None = None
    """What the annealing read; null: the weights of the stable phase."""


class ScheduleConfig(Settings):
    """Warm-up, then what `kind` says. A run that only stays at its stable rate is a trunk for branches."""

    kind: Literal["wsa", "constant", "cosine", "linear", "wsd-s"] = "wsa"
    """`wsa`: stable, and at the end the annealing if there is one; `constant`: stable only; `cosine`, `linear`: down to
    `final_lr_ratio` from the warm-up on; `wsd-s`: `cycles` times stable and annealed, each going on from the annealed
    weights of the last."""
    total: Length
    warmup: Length = Length(share=0.02)
    anneal: AnnealConfig | None = None
    """Of `wsa` and `wsd-s`."""
    embeddings_only: Length | None = None
    """Begin by training the embeddings (and an untied output layer) alone; everything else stays as it is for so long.
    For a vocabulary that was enlarged."""
    final_lr_ratio: float | None = None
    """Of `cosine` and `linear`: the last rate as a share of the peak; 0.1 if not given."""
    cycles: PositiveInt | None = None
    """Of `wsd-s`: how many, of equal lengths."""
    returns: list[ReturnConfig] = Field([])
    """Annealings that the weights have behind them, oldest first: written by launch/anneal.py."""

    @model_validator(mode="after")
    def _blocks_fit_the_kind(self) -> Self:
        if self.total.share is not None:
            raise ValueError("total.share has nothing to be a share of; give total.steps or total.tokens")
        users = {"anneal": ("wsa", "wsd-s"), "final_lr_ratio": ("cosine", "linear"), "cycles": ("wsd-s",)}
        for field, kinds in users.items():
            if getattr(self, field) is not None and self.kind not in kinds:
                raise ValueError(f"{field} means nothing under kind={self.kind!r}, only under {' and '.join(kinds)}; "
                                 f"take it out, or choose such a kind")
        if self.kind == "wsd-s" and (self.anneal is None or self.cycles is None):
            raise ValueError("kind='wsd-s' needs both cycles, their number, and anneal, which ends each of them")
        if self.returns and self.kind != "wsa":
            raise ValueError(f"returns are of kind='wsa', not {self.kind!r}; let launch/anneal.py write them")
        if self.final_lr_ratio is not None:
            try:
                check_shape(self.kind, self.final_lr_ratio)
            except ConfigError as e:
                raise ValueError(str(e)) from None
        return self

    def text(self) -> str:
        """What follows the warm-up, in words; lengths in steps, as a resolved config has them."""
        a = self.anneal
        annealing = f"{a.shape} over {a.length.steps:,} steps to {a.final_lr_ratio:g} of the rate" if a else ""
        if self.kind in ("cosine", "linear"):
            return f"{self.kind} to {0.1 if self.final_lr_ratio is None else self.final_lr_ratio:g} of the peak"
        if self.kind == "wsd-s":
            return f"{self.cycles} cycles (WSD-S) of stable and {annealing}"
        if a or not self.returns:
            return annealing or "stable"
        back = self.returns[-1]
        return f"from step {back.end:,} back to the stable rate over {back.rewarm_steps:,} steps"


class CheckpointConfig(Settings):
    """When checkpoints are written and which are kept; docs/checkpoints.md. Parents of branches always are."""

    every: PositiveInt = 1000
    """Steps between two of them."""
    keep_last: PositiveInt = 2
    """So many of the newest are kept."""
    keep_stable_every: PositiveInt | None = None
    """Those of the stable phase at multiples of so many steps are never pruned: branches start from them."""
    keep_best: PositiveInt | None = None
    """So many of lowest validation loss are kept as well."""
    asynchronous: bool = True
    """Training goes on while files are written, out of a copy in the host's memory: 12 bytes per trained parameter over
    the number of ranks. False: it waits, and there is no copy."""


class ValidationConfig(Settings):
    """Loss per validation corpus, on rows drawn once, every so many steps and at the end; `every: null`: never."""

    every: PositiveInt | None = 500
    """Steps."""
    rows_per_corpus: PositiveInt = 64
    """At most; the same ones every time."""


class GuardConfig(Settings):
    """When a step's update is left out (docs/watching.md): always on a loss or gradient that is not finite."""

    norm_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 10.0
    """Also on a gradient norm of more than so many times the median of the last `window` good steps; null: never."""
    window: PositiveInt = 128
    """Good steps behind that median. Before there are so many, only what is not finite is left out."""
    max_bad_steps: int = Field(10, ge=0)
    """Steps whose update may be left out, over the whole run, before it stops."""


class WatchdogConfig(Settings):
    """When a run that stands still is ended (docs/preflight.md)."""

    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 300.0
    """Most seconds from one micro-batch, validation row or rest of a step to the next; six times as long for the first
    steps and a checkpoint. null: never. Keep it below the process group's own limit (NCCL: 600), which says less."""


class WandbConfig(Settings):
    """Weights & Biases; `mode` defaults to what the environment says (WANDB_MODE)."""

    project: str
    name: str | None = None
    mode: Literal["online", "offline"] | None = None


class MlflowConfig(Settings):
    """MLflow; `tracking_uri` defaults to what the environment says (MLFLOW_TRACKING_URI)."""

    experiment: str
    name: str | None = None
    tracking_uri: str | None = None


class MetricsConfig(Settings):
    """Where metrics go besides metrics.jsonl and TensorBoard."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


class ParentConfig(Settings):
    """Where a branch starts: written by launch/anneal.py."""

    run_dir: str
    step: int
    state_hash: str
    """Xxh3-128 of the parent checkpoint's state.json, which names every file of it with its hash."""


class RunConfig(Settings):
    """Everything that decides a run."""

    run_dir: str
    """Folder of the run; the same command goes on from what is in it."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    deepspeed: str = "ds_configs/zero3.json"
    """DeepSpeed config: ZeRO, offload and communication only."""
    deterministic: bool = False
    """The same numbers to the last bit whenever it is run on the same machines: only kernels that promise it, which on
    a GPU are slower. On a CPU it is so in any case."""
    log_every: PositiveInt = 10
    """Steps that one record sums up."""
    metrics: MetricsConfig = MetricsConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    preflight: bool = False
    """Examine every machine before the run starts (docs/preflight.md): seconds, and none that is bad takes part."""
    parent: ParentConfig | None = None

    @model_validator(mode="after")
    def _the_best_are_known(self) -> Self:
        every, valid = self.checkpoint.every, self.validation.every
        if self.checkpoint.keep_best and (valid is None or every % valid):
            raise ValueError(f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation loss at every "
                             f"checkpoint, but checkpoint.every={every} is no multiple of validation.every={valid}")
        return self

    @model_validator(mode="after")
    def _adapters_have_no_embeddings(self) -> Self:
        if self.model.lora and self.schedule.embeddings_only:
            raise ValueError("model.lora trains no embeddings, so schedule.embeddings_only would train nothing; remove "
                             "one of them")
        return self

    def build_schedule(self, *, tokens_per_step: int) -> Schedule:
        """The run's schedule in steps. Raises ConfigError listing every phase that does not fit."""
        s = self.schedule
        total = s.total.in_steps(tokens_per_step=tokens_per_step)
        n_cycles = s.cycles or 1
        ends = [round(total * k / n_cycles) for k in range(1, n_cycles + 1)]
        warmup = s.warmup.in_steps(tokens_per_step=tokens_per_step, total_steps=total)
        annealing = s.anneal.length.in_steps(
            tokens_per_step=tokens_per_step, total_steps=total // n_cycles) if s.anneal else 0
        problems = _misfits(s, total, warmup, annealing, ends, tokens_per_step)
        if s.kind in ("cosine", "linear") and self.data.mix.anneal is not None:
            problems.append(f"data.mix.anneal is never read under kind={s.kind!r}, which has no annealing phase; take "
                            f"it out, or choose kind=wsa or wsd-s")
        raise_all(problems, of="schedule")
        peak = self.optimizer.peak_lr
        if s.kind in ("cosine", "linear"):
            return decay(peak, warmup, total, s.kind, 0.1 if s.final_lr_ratio is None else s.final_lr_ratio)
        if s.kind == "wsd-s" and s.anneal:
            return cycles(peak, warmup, ends, annealing, s.anneal.shape, s.anneal.final_lr_ratio)
        past = tuple(Return(Anneal(r.start, r.steps, r.shape, r.final_lr_ratio), r.end, r.rewarm_steps, r.from_zero)
                     for r in s.returns)
        trunk = Schedule(peak, warmup, total, returns=past)
        if not s.anneal:
            return trunk
        return trunk.branch(total - annealing, annealing, s.anneal.shape, s.anneal.final_lr_ratio)


def _misfits(s: ScheduleConfig, total: int, warmup: int, annealing: int, ends: list[int], tokens_per_step: int
             ) -> list[str]:
    """What is wrong with the lengths of a schedule, all of them in steps; `ends` are those of its cycles."""
    problems = []
    if total < 1:
        problems.append(f"schedule.total={s.total.model_dump(exclude_none=True)} is {total} steps of "
                        f"{tokens_per_step:,} tokens; give at least one step")
    if warmup + annealing > total:
        problems.append(f"schedule.warmup ({warmup} steps) and schedule.anneal ({annealing} steps) do not fit into "
                        f"schedule.total ({total} steps); shorten them or lengthen the run")
    elif len(ends) > 1 and (warmup + annealing > ends[0] or any(annealing > b - a for a, b in pairwise(ends))):
        problems.append(f"schedule.cycles={len(ends)} of schedule.total ({total} steps) are {total // len(ends)} steps "
                        f"each, too few for schedule.warmup ({warmup} steps) in the first and schedule.anneal "
                        f"({annealing} steps) in every one; shorten these, or lengthen the run")
    elif s.kind in ("cosine", "linear") and warmup >= total:
        problems.append(f"schedule.warmup ({warmup} steps) leaves nothing of schedule.total ({total} steps) for "
                        f"kind={s.kind!r}; shorten it")
    if s.anneal and annealing < 1:
        problems.append(f"schedule.anneal.length={s.anneal.length.model_dump(exclude_none=True)} is less than one "
                        f"step of {tokens_per_step:,} tokens; lengthen it, or set schedule.anneal=null")
    busy = max((r.end + r.rewarm_steps for r in s.returns), default=0)
    if busy > total - annealing:
        problems.append(f"schedule.returns reach to step {busy}, and the run is to be at its stable rate by step "
                        f"{total - annealing}; lengthen schedule.total")
    return problems


def check_batch(batch: BatchConfig, world_size: int) -> list[str]:
    """Problems of the batch sizes on `world_size` ranks: empty, or one sentence with the nearest sizes that work."""
    unit = batch.micro_batch_size * world_size
    if batch.global_batch_size % unit == 0:
        return []
    below = batch.global_batch_size // unit * unit
    near = " or ".join(str(n) for n in (below, below + unit) if n)
    return [f"batch.global_batch_size={batch.global_batch_size} rows does not divide by micro_batch_size="
            f"{batch.micro_batch_size} x world_size={world_size} (={unit}); nearest: {near}"]


def load_deepspeed_config(path: str) -> dict[str, Any]:
    """The DeepSpeed JSON of a run. Raises ConfigError when it is unreadable, holds a key that the run config owns, or
    names no ZeRO stage of 1 to 3 (without one there would be no float32 master weights)."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"deepspeed={path!r} cannot be read: {e.strerror}; see ds_configs/") from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"deepspeed={path!r} is not valid JSON: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"deepspeed={path!r} is not a mapping of keys; see ds_configs/")
    problems = [f"{key} is also set by the run config, as {OWNED_HERE[key]}; remove it from {path}"
                for key in values if key in OWNED_HERE]
    zero = values.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        problems.append(f"zero_optimization.stage={stage!r} in {path}: give 1, 2 or 3; see ds_configs/README.md")
    raise_all(problems, of=path)
    return values


