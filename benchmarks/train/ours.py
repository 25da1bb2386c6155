"""Our side: `cprec.train.loop.train` as a user starts it, watched from outside at the end of every optimizer step.

reads: the packed rows, the base model. writes: a run folder, and the export of its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.train.job import Job
from cprec.config import RunConfig
from cprec.data.dataset import Step
from cprec.settings import parse_settings
from cprec.train import loop
from cprec.train.checkpoint import list_checkpoints
from cprec.train.engine import Engine, StepResult
from cprec.train.export import export

REPO = Path(__file__).parents[2]


class Enough(Exception):
    """The steps that were wanted are done."""


@dataclass
class Seen:
    """What was seen of a run."""

    ends_s: list[float] = field(default_factory=list)
    useful: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    inside_s: list[float] = field(default_factory=list)
    """Of each step, within `Engine.step`."""


def config(job: Job) -> RunConfig:
    """The run config of a job."""
    values: dict[str, Any] = {
        "run_dir": str(job.out / "run"), "model": {"path": str(job.base)},
        "data": {"packed": str(job.rows), "seed": job.seed},
        "batch": {"global_batch_size": job.rows_per_step, "micro_batch_size": job.rows_per_forward},
        "optimizer": {"peak_lr": job.peak_lr},
        "schedule": {"total": {"steps": job.steps}, "warmup": {"steps": job.warmup_steps}},
        "checkpoint": {"every": 10**6}, "validation": {"every": None},
        "deepspeed": str(REPO / "ds_configs/zero3.json"),
    }
    return parse_settings(RunConfig, values, source="benchmark")


@contextmanager
def watching(last: int | None = None) -> Iterator[Seen]:
    """While inside, every optimizer step of an Engine is noted. After the `last`, if given, Enough is raised."""
    seen, original = Seen(), Engine.step

    def step(self: Engine, work: Step, *args: Any, **kwargs: Any) -> StepResult:
        begin_s = time.perf_counter()
        result = original(self, work, *args, **kwargs)
        seen.ends_s.append(time.perf_counter())
        seen.inside_s.append(seen.ends_s[-1] - begin_s)
        seen.slots.append(sum(b.input_ids.numel() for b in work.batches))
        seen.useful.append(seen.slots[-1] - sum(b.n_pad for b in work.batches))
        if len(seen.ends_s) == last:
            raise Enough
        return result

    Engine.step = step  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Engine.step = original  # type: ignore[method-assign]


def train(job: Job) -> Seen:
    """Train as `launch/pretrain.py` does."""
    with watching() as seen:
        loop.train(config(job))
    return seen


def export_last(job: Job) -> None:
    """Write the last checkpoint as a folder of weights. One process does it, when the run is over."""
    export(list_checkpoints(job.out / "run")[-1], job.out / "hf", dtype=torch.float32)
