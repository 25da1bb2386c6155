"""The learning rate as a pure function of the step: Warmup-Stable-Annealing (arXiv:2504.08949).

Nothing is stored and nothing is restored: the loop writes `lr(step)` into the optimizer before every update. A branch
is its trunk's schedule with `anneal` filled in, so both agree on every step before the fork by construction.

    warm-up   step < W           peak * (step + 1) / W
    stable    W <= step < start  peak
    anneal    start <= step      peak_at_start * shape(x, floor),  x = (step - start) / anneal_steps, at most 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cprec.errors import ConfigError, did_you_mean

PhaseName = Literal["warmup", "stable", "anneal"]
Shape = Callable[[float, float], float]


def linear(x: float, floor: float) -> float:
    """Straight line from 1 to `floor`."""
    return 1 - (1 - floor) * x


def cosine(x: float, floor: float) -> float:
    """Half a cosine wave from 1 to `floor`."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2


def sqrt(x: float, floor: float) -> float:
    """1-sqrt (Hägele et al. 2024, arXiv:2405.18392): falls fast at first, slowly near the end."""
    return floor + (1 - floor) * (1 - math.sqrt(x))


def exponential(x: float, floor: float) -> float:
    """Equal ratios in equal times: MiniCPM's form (arXiv:2404.06395), half-life `anneal_steps * ln 2 / ln(1/floor)`."""
    return float(floor**x)


def inverse(x: float, floor: float) -> float:
    """1/lr grows in a straight line (WSD-S, Wen et al. 2024, arXiv:2410.05192)."""
    return 1 / (1 + (1 / floor - 1) * x)


SHAPES: dict[str, Shape] = {
    "linear": linear, "cosine": cosine, "sqrt": sqrt, "exponential": exponential, "inverse": inverse,
}
NEEDS_POSITIVE_FLOOR = frozenset({"exponential", "inverse"})


def check_shape(shape: str, floor: float) -> None:
    """Raise ConfigError unless `shape` is known and can end at `floor` (a share of the stable rate, 0 to 1)."""
    if shape not in SHAPES:
        raise ConfigError(f"shape={shape!r} is no annealing shape; {did_you_mean(shape, SHAPES)}")
    if not 0 <= floor <= 1:
        raise ConfigError(f"final_lr_ratio={floor} must lie between 0 and 1: it is a share of the stable rate")
    if floor == 0 and shape in NEEDS_POSITIVE_FLOOR:
        raise ConfigError(f"final_lr_ratio=0 cannot be reached by shape={shape!r}; give a positive one, such as 0.1")


@dataclass(frozen=True)
class Anneal:
    """The last phase: from `start` on, `steps` updates along `shape` down to `floor` times the rate at `start`."""

    start: int
    steps: int
    shape: str
    floor: float

    def __post_init__(self) -> None:
        check_shape(self.shape, self.floor)
        assert self.start >= 0 and self.steps > 0, (self.start, self.steps)


@dataclass(frozen=True)
class Schedule:
    """Rate and phase of every step of a run of `total_steps` updates. Steps count from 0, before the update."""

    peak_lr: float
    warmup_steps: int
    total_steps: int
    anneal: Anneal | None = None

    def lr(self, step: int) -> float:
        """Rate of the update that takes the run from `step` to `step + 1`; stays at its last value beyond the end."""
        if self.anneal is None or step < self.anneal.start:
            return self.peak_lr * min(1.0, (step + 1) / max(self.warmup_steps, 1))
        a = self.anneal
        at_start = replace(self, anneal=None).lr(a.start)
        return at_start * SHAPES[a.shape](min((step - a.start) / a.steps, 1.0), a.floor)

    def phase(self, step: int) -> PhaseName:
        """Name of the phase that `step` belongs to."""
        if self.anneal is not None and step >= self.anneal.start:
            return "anneal"
        return "warmup" if step < self.warmup_steps else "stable"

    def corners(self) -> list[int]:
        """Steps at which the phase changes, with the first and the last one; for plans and plots."""
        last = self.total_steps - 1
        steps = {0, self.warmup_steps, last} | ({self.anneal.start} if self.anneal else set())
        return sorted(s for s in steps if 0 <= s <= last)

    def branch(self, start: int, steps: int, shape: str, floor: float) -> Schedule:
        """This schedule with an annealing of `steps` updates from `start` on, and its end there."""
        return replace(self, total_steps=start + steps, anneal=Anneal(start, steps, shape, floor))
