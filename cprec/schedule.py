"""The learning rate as a pure function of the step: Warmup-Stable-Annealing (arXiv:2504.08949), and its rivals.

Nothing is stored and nothing is restored: the loop writes `lr(step)` into the optimizer before every update. A branch
is its trunk's schedule with `anneal` filled in, so both agree on every step before the fork by construction.

    warm-up   step < W           peak * (step + 1) / W
    stable    W <= step < start  peak
    anneal    start <= step      rate_at_start * shape(x, floor),  x = (step - start) / anneal_steps, at most 1
    rewarm    end <= step        r + (peak - r) * (step - end + 1) / N, after an annealing that was left at `end`, where
                                 its rate was r; stable again from end + N on

Warm-up and then nothing but a decay (cosine, linear) is an annealing that starts where the warm-up ends, called
`decay`; WSD-S (arXiv:2410.05192) is annealings that are each left at their end, with N = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cprec.errors import ConfigError, did_you_mean

PhaseName = Literal["warmup", "stable", "anneal", "decay", "rewarm"]
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
    """From `start` on, `steps` updates along `shape` down to `floor` times the rate at `start`."""

    start: int
    steps: int
    shape: str
    floor: float
    phase: Literal["anneal", "decay"] = "anneal"
    """`decay`: all that follows the warm-up, as in a cosine schedule; there is no stable phase to branch from."""

    def __post_init__(self) -> None:
        check_shape(self.shape, self.floor)
        assert self.start >= 0 and self.steps > 0, (self.start, self.steps)

    def factor(self, step: int) -> float:
        """Share of the rate at `start` that is left at `step`; stays at `floor` beyond the end."""
        return SHAPES[self.shape](min((step - self.start) / self.steps, 1.0), self.floor)


@dataclass(frozen=True)
class Return:
    """An annealing of the past, left at step `end` for the stable rate: over `rewarm_steps` updates, 0: at once."""

    anneal: Anneal
    end: int
    rewarm_steps: int = 0
    from_zero: bool = False
    """The rate climbs from 0; else from where the annealing had brought it."""

    def __post_init__(self) -> None:
        assert self.anneal.start <= self.end and self.rewarm_steps >= 0, self

    @property
    def stable_from(self) -> int:
        """First step after `end` at the stable rate."""
        return self.end + self.rewarm_steps

    def factor(self, step: int) -> float:
        """Share of the stable rate at a step of the annealing or of the way back; 1 outside."""
        if not self.anneal.start <= step < self.stable_from:
            return 1.0
        if step < self.end:
            return self.anneal.factor(step)
        low = 0.0 if self.from_zero else self.anneal.factor(self.end)
        return 1 - (1 - low) * (1 - (step - self.end + 1) / self.rewarm_steps)


@dataclass(frozen=True)
class Schedule:
    """Rate and phase of every step of a run of `total_steps` updates. Steps count from 0, before the update.

    >>> trunk = Schedule(peak_lr=1.0, warmup_steps=4, total_steps=100)
    >>> [trunk.lr(step) for step in (0, 1, 3, 50)]
    [0.25, 0.5, 1.0, 1.0]
    >>> branch = trunk.branch(start=50, steps=10, shape="linear", floor=0.0)
    >>> [(branch.phase(step), branch.lr(step)) for step in (49, 50, 55)]
    [('stable', 1.0), ('anneal', 1.0), ('anneal', 0.5)]
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    anneal: Anneal | None = None
    returns: tuple[Return, ...] = ()
    """Annealings before `anneal` that went back to the stable rate, in order; none overlaps the next."""

    def __post_init__(self) -> None:
        starts = [r.anneal.start for r in self.returns[1:]] + ([self.anneal.start] if self.anneal else [])
        assert all(r.stable_from <= s for r, s in zip(self.returns, starts, strict=False)), self

    def lr(self, step: int) -> float:
        """Rate of the update that takes the run from `step` to `step + 1`; stays at its last value beyond the end."""
        at = step if self.anneal is None else min(step, self.anneal.start)
        rate = self.peak_lr * min(1.0, (at + 1) / max(self.warmup_steps, 1))
        rate *= next((f for r in self.returns if (f := r.factor(at)) != 1.0), 1.0)
        return rate if self.anneal is None or step < self.anneal.start else rate * self.anneal.factor(step)

    def phase(self, step: int) -> PhaseName:
        """Name of the phase that `step` belongs to."""
        if self.anneal is not None and step >= self.anneal.start:
            return self.anneal.phase
        for r in self.returns:
            if r.anneal.start <= step < r.stable_from:
                return "anneal" if step < r.end else "rewarm"
        return "warmup" if step < self.warmup_steps else "stable"

    def corners(self) -> list[int]:
        """Steps at which the phase changes, with the first and the last one; for plans and plots."""
        last = self.total_steps - 1
        steps = {0, self.warmup_steps, last} | ({self.anneal.start} if self.anneal else set())
        steps |= {s for r in self.returns for s in (r.anneal.start, r.end - 1, r.end, r.stable_from)}
        return sorted(s for s in steps if 0 <= s <= last)

    def branch(self, start: int, steps: int, shape: str, floor: float) -> Schedule:
        """This schedule with an annealing of `steps` updates from `start` on, and its end there."""
        past = tuple(r for r in self.returns if r.anneal.start < start)
        return replace(self, total_steps=start + steps, anneal=Anneal(start, steps, shape, floor), returns=past)

    def past_at(self, step: int) -> tuple[Return, ...]:
        """What a run that leaves this schedule at `step` for the stable rate has behind it; an annealing that `step` is
        in, or at the end of, is left there, at once."""
        past = [r for r in self.returns if r.stable_from <= step]
        now = next((r.anneal for r in self.returns if r.anneal.start < step < r.end), self.anneal)
        if now is not None and now.start < step:
            past.append(Return(now, step))
        return tuple(past)


def decay(peak_lr: float, warmup_steps: int, total_steps: int, shape: str, floor: float) -> Schedule:
    """Warm-up, then `shape` over all the rest: what is known as a cosine or a linear schedule."""
    anneal = Anneal(warmup_steps, total_steps - warmup_steps, shape, floor, phase="decay")
    return Schedule(peak_lr, warmup_steps, total_steps, anneal)


def cycles(peak_lr: float, warmup_steps: int, ends: Sequence[int], steps: int, shape: str, floor: float) -> Schedule:
    """WSD-S: the last `steps` updates before each of `ends` anneal; the next cycle goes on from the annealed weights at
    the full rate, without another warm-up (Wen et al. 2024, arXiv:2410.05192)."""
    anneals = [Anneal(end - steps, steps, shape, floor) for end in ends]
    past = tuple(Return(a, a.start + steps) for a in anneals[:-1])
    return Schedule(peak_lr, warmup_steps, ends[-1], anneals[-1], past)
