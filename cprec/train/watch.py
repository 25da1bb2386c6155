"""What happened between two records: losses summed, time by part, rates, the time that is left.

reads: the results of steps. gives: `TrainRecord`s. Costs: a few microseconds per step; on a GPU three pairs of events
per micro-batch, read when a record is made, so that no step waits for the device.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

from cprec import dist
from cprec.data.dataset import Step
from cprec.log import get_logger
from cprec.train.engine import Engine, StepResult
from cprec.train.metrics import PartTimes, TrainRecord, memory, peak_flops
from cprec.train.plan import Plan

log = get_logger(__name__)
T = TypeVar("T")
_SMOOTH_STEPS = 100
"""The time left follows the pace of about so many last steps."""


class Clock:
    """Seconds by part of training, summed until they are taken. Parts that compute are timed by the device.

    `alive` is called whenever a part begins."""

    def __init__(self, device: torch.device, *, alive: Callable[[], None] = lambda: None) -> None:
        self._alive = alive
        self._on_gpu = device.type == "cuda"
        self.times: dict[str, int] = defaultdict(int)
        """How often each part of the host's was entered."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def part(self, name: str, *, more: bool = False) -> AbstractContextManager[None]:
        """While inside, the host's time is of this part; with `more` of the same time that it was entered last."""
        self._alive()
        return self._host(name, more=more)

    def compute(self, name: str) -> AbstractContextManager[None]:
        """While inside, what is put to the device is of this part."""
        self._alive()
        return self._device(name) if self._on_gpu else self._host(name)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for them is of this part."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call. On a GPU waits for what was timed."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
        taken, self._seconds, self._events = self._seconds, defaultdict(float), []
        return taken

    @contextmanager
    def _host(self, name: str, *, more: bool = False) -> Iterator[None]:
        self.times[name] += not more
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @contextmanager
    def _device(self, name: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))


class Watch:
    """Sums up the steps since the last record."""

    def __init__(self, plan: Plan, engine: Engine, *, alive: Callable[[], None] = lambda: None) -> None:
        self.clock = Clock(engine.device, alive=alive)
        self._plan, self._engine = plan, engine
        self._peak = peak_flops(engine.device)
        self._pace_s: float | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._interruptions = {"validation": plan.validation_steps(), "checkpoint": plan.checkpoint_steps()}
        self._begin(time.perf_counter())

    def _begin(self, started: float) -> None:
        n = len(self._plan.sampler.names)
        self._loss_sums, self._n_valid = [0.0] * n, [0.0] * n
        self._norms: list[float] = []
        self._n_steps = self._n_pad = self._n_pairs = 0
        self._started = started

    def add(self, step: Step, result: StepResult) -> None:
        """Count a step that was run."""
        self._n_steps += 1
        self._n_pad += step.n_pad
        self._n_pairs += step.cost
        if result.rejected:
            return
        self._loss_sums = [a + b for a, b in zip(self._loss_sums, result.loss_sums, strict=True)]
        self._n_valid = [a + b for a, b in zip(self._n_valid, result.n_valid, strict=True)]
        if result.grad_norm is not None:
            self._norms.append(result.grad_norm)

    def record(self, step: int, *, bad_steps: int) -> TrainRecord | None:
        """What happened since the last record, up to and with `step` (1-based); None when nothing did. Collective."""
        if not self._n_steps:
            return None
        plan, n, now = self._plan, self._n_steps, time.perf_counter()  # from here on it is the next record's time
        param_norm = self._engine.param_norm()
        if param_norm is not None and not math.isfinite(param_norm):
            if dist.rank() == 0:
                log.warning("step %d: a trained parameter is not finite: parameter norm %s", step, param_norm)
            param_norm = None
        parts, wall_s = self.clock.take(), now - self._started
        for name, seconds in parts.items():
            self._seconds[name] += seconds
        step_s = (wall_s - parts["validation"] - parts["checkpoint"]) / n
        rows_s = plan.tokens_per_step / step_s
        flops = self._engine.model_shape.flops(plan.tokens_per_step * n - self._n_pad, self._n_pairs)
        record = TrainRecord(
            step=step, n_steps=n, phase=plan.schedule.phase(step - 1), lr=plan.schedule.lr(step - 1),
            loss=sum(self._loss_sums) / sum(self._n_valid) if any(self._n_valid) else None,
            loss_by_corpus={name: total / n_valid for name, total, n_valid
                            in zip(plan.sampler.names, self._loss_sums, self._n_valid, strict=True) if n_valid},
            grad_norm=sum(self._norms) / len(self._norms) if self._norms else None,
            grad_norm_max=max(self._norms, default=None), param_norm=param_norm,
            tokens_seen=step * plan.tokens_per_step, tokens_per_s=rows_s,
            tokens_per_s_per_device=rows_s / plan.world_size,
            mfu=flops / (step_s * n) / (self._peak * plan.world_size) if self._peak else None,
            pad_share=self._n_pad / (plan.tokens_per_step * n), step_s=step_s, time_s=_per_step(parts, wall_s, n),
            save_stall_s=parts["checkpoint"] or None, memory=memory(self._engine.device),
            eta_s=self._eta_s(step, step_s), bad_steps=bad_steps)
        self._begin(now)
        return record

    def _eta_s(self, step: int, step_s: float) -> float:
        """Steps that are left at their smoothed pace, and the validations and checkpoints at their mean so far."""
        newest = 1.0 if self._pace_s is None else 1.0 - math.exp(-self._n_steps / _SMOOTH_STEPS)
        self._pace_s = newest * step_s + (1.0 - newest) * (self._pace_s or 0.0)
        left_s = (self._plan.schedule.total_steps - step) * self._pace_s
        for name, steps in self._interruptions.items():
            times = self.clock.times[name]
            left_s += sum(s >= step for s in steps) * self._seconds[name] / times if times else 0.0
        return left_s


def _per_step(parts: dict[str, float], wall_s: float, n_steps: int) -> PartTimes:
    other_s = max(wall_s - sum(parts.values()), 0.0)
    return PartTimes(**{name: s / n_steps for name, s in parts.items()}, other=other_s / n_steps)
