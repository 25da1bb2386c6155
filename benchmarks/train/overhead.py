"""What our loop and ZeRO-3 cost over the bare step: `python -m benchmarks.train.overhead JOB REPEATS`, one rank.

Three ways over the same batches take turns in one process, and their steps are compared one by one:

    loop    `cprec.train.loop.train`: reading ahead, logging, sums over ranks, everything
    engine  forward, backward and step of the same DeepSpeed engine, on batches that lie ready
    torch   forward, backward, clipping and AdamW of plain torch, on batches that lie ready
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.train.job import Job

REPO = Path(__file__).parents[2]
UNTIMED_STEPS = 2
Times = list[list[float]]


@dataclass(frozen=True)
class Overhead:
    """Medians over steps and repeats."""

    loop_s: float
    engine_s: float
    torch_s: float
    loop_over_engine_pct: float
    """Of the ratios step by step, in which the batches are the same."""
    engine_over_torch_pct: float
    outside_step_pct: float
    """Share of the loop's time that passes outside of `Engine.step`: waiting for data, logging, bookkeeping."""


def measure(job: Job, repeats: int) -> Overhead:
    """All three ways, in a process of its own with one core."""
    shutil.rmtree(job.out, ignore_errors=True)
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.train.overhead", job.model_dump_json(),
                           str(repeats)], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"overhead ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
    return summary(**json.loads(done.stdout.splitlines()[-1]))


def summary(loop: Times, engine: Times, torch: Times, inside: Times) -> Overhead:
    """From seconds per repeat and step of the three ways, and of the loop's steps inside `Engine.step`."""

    def over(one: Times, other: Times) -> float:
        pairs = [a / b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
        return 100 * (median(pairs) - 1)

    flat_loop, flat_inside = ([t for run in times for t in run] for times in (loop, inside))
    return Overhead(
        median(flat_loop), median(t for run in engine for t in run), median(t for run in torch for t in run),
        over(loop, engine), over(engine, torch),
        100 * median((a - b) / a for a, b in zip(flat_loop, flat_inside, strict=True)))


def main() -> None:
    job, repeats = Job.model_validate_json(sys.argv[1]), int(sys.argv[2])
    if job.cores:
        os.sched_setaffinity(0, job.cores)
        os.environ["OMP_NUM_THREADS"] = str(len(job.cores))
    times: dict[str, Times] = {"loop": [], "engine": [], "torch": [], "inside": []}
    for repeat in range(repeats):
        one = job.model_copy(update={"out": job.out / str(repeat)})
        loop, inside = by_loop(one)
        steps = ready_steps(one)
        for name, seconds in (("loop", loop), ("inside", inside), ("engine", by_engine(one, steps)),
                              ("torch", by_torch(one, steps))):
            times[name].append(seconds[UNTIMED_STEPS:])
    print(json.dumps(times))


def by_loop(job: Job) -> tuple[list[float], list[float]]:
    """Seconds of every step of a run, from the end of one to the end of the next, and those inside `Engine.step`."""
    from benchmarks.train import ours

    seen = ours.train(job)
    return [b - a for a, b in pairwise([seen.ends_s[0] - seen.inside_s[0], *seen.ends_s])], seen.inside_s


def ready_steps(job: Job) -> list[Any]:
    """The steps that the run took, with their batches."""
    from cprec.data.dataset import PackedDataset, open_corpora

    plan = _plan(job)
    dataset = PackedDataset(open_corpora(plan.sampler, plan.places, plan.cache, plan.train), plan.sampler,
                            global_batch_size=job.rows_per_step, micro_batch_size=job.rows_per_forward)
    return [dataset.step(i) for i in range(job.steps)]


def by_engine(job: Job, steps: list[Any]) -> list[float]:
    """Seconds of every step of DeepSpeed's engine."""
    from cprec.train.engine import Engine

    engine = Engine(_plan(job))
    inner = engine._engine

    def run(step: Any) -> None:
        for batch in step.batches:
            inner.backward(inner(batch).sum() * (job.accumulation / step.n_valid))
            inner.step()

    seconds = list(_timed(run, steps))
    engine.close()
    return seconds


def by_torch(job: Job, steps: list[Any]) -> list[float]:
    """Seconds of every step of plain torch, with the same model code, loss, clipping and optimizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from cprec.attention import BACKENDS, select
    from cprec.model import TrainingModel

    backend = select("auto", torch.device("cpu"), torch.float32)
    model = TrainingModel(AutoModelForCausalLM.from_pretrained(
        job.base, attn_implementation=BACKENDS[backend].implementation, dtype=torch.float32)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.peak_lr, fused=True)

    def run(step: Any) -> None:
        for batch in step.batches:
            (model(batch).sum() / step.n_valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return list(_timed(run, steps))


def _plan(job: Job) -> Any:
    from benchmarks.train import ours
    from cprec.train.plan import build_plan

    return build_plan(ours.config(job), 1)


def _timed(run: Any, steps: list[Any]) -> Iterator[float]:
    for step in steps:
        begin_s = time.perf_counter()
        run(step)
        yield time.perf_counter() - begin_s


if __name__ == "__main__":
    main()
