"""How unequal the ranks' work is, in modelled FLOPs, before and after the reader deals a step's rows.

The ranks of a micro-step wait for each other, so a micro-step costs what its slowest rank costs. The model is
Qwen2.5-1.5B (its published config): every token costs its matrix products, every pair of tokens of a document that see
each other its attention. reads: a packed corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.reader.ours import Costs, Dealt

WORLD_SIZES, GRAD_ACCUM_STEPS, MICRO_BATCH_SIZES = (8, 64), (1, 4, 16), (1, 8)
MOST_ROWS = 1 << 14
"""That one setting looks at, in whole steps, at least one."""


@dataclass(frozen=True)
class Model:
    """The widths that decide the FLOPs; defaults are those of Qwen2.5-1.5B."""

    layers: int = 28
    hidden: int = 1536
    heads: int = 12
    kv_heads: int = 2
    intermediate: int = 8960
    vocabulary: int = 151_936

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, attention's own products left out: 6 per weight of a matrix."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate
        return 6.0 * (self.layers * layer + self.hidden * self.vocabulary)

    @property
    def flops_per_pair(self) -> float:
        """Of one unit of attention cost (a document's length squared, of which causal attention computes half):
        two products, forward once and backward twice."""
        return 0.5 * 2 * 2 * 3 * self.hidden * self.layers


@dataclass(frozen=True)
class Spread:
    """Slowest rank over the mean of the ranks, of one setting."""

    world_size: int
    grad_accum_steps: int
    micro_batch_size: int
    n_micro_steps: int
    before: float
    """Sum of the slowest over the sum of the means: how much longer all takes than if it were equal."""
    after: float
    worst_before: float
    """Of the worst micro-step."""
    worst_after: float
    attention_before: float
    """As `before`, attention alone."""
    attention_after: float

    @property
    def has_choice(self) -> bool:
        """Whether a rank has more than one row per step: with one, whoever gets the longest is the slowest, and no
        dealing helps."""
        return self.grad_accum_steps * self.micro_batch_size > 1


def measure(packed: Path, names: list[str], *, seq_len: int, seed: int, model: Model | None = None) -> list[Spread]:
    """The spread of every setting, over the first steps of a run."""
    return [spread(packed, names, seq_len=seq_len, seed=seed, world_size=world, grad_accum_steps=accum,
                   micro_batch_size=micro, model=model or Model())
            for micro in MICRO_BATCH_SIZES for world in WORLD_SIZES for accum in GRAD_ACCUM_STEPS]


def spread(packed: Path, names: list[str], *, seq_len: int, seed: int, world_size: int, grad_accum_steps: int,
           micro_batch_size: int, model: Model) -> Spread:
    """The spread of one setting."""
    dealt = Dealt(packed, names, seed=seed, world_size=world_size, grad_accum_steps=grad_accum_steps,
                  micro_batch_size=micro_batch_size)
    n_steps = max(1, MOST_ROWS // (world_size * grad_accum_steps * micro_batch_size))
    before, after = ([step(i) for i in range(n_steps)] for step in (dealt.drawn, dealt.dealt))
    flops = [rank_flops(costs, seq_len=seq_len, model=model) for costs in (before, after)]
    attention = [np.concatenate(costs).sum(axis=2) for costs in (before, after)]
    return Spread(world_size, grad_accum_steps, micro_batch_size, len(flops[0]), slowest(flops[0]), slowest(flops[1]),
                  worst(flops[0]), worst(flops[1]), slowest(attention[0]), slowest(attention[1]))


def rank_flops(costs: Sequence[Costs], *, seq_len: int, model: Model) -> npt.NDArray[np.float64]:
    """Modelled FLOPs of every rank in every micro-step, (micro-steps of all steps, ranks)."""
    pairs = np.concatenate(costs)  # (micro-steps, ranks, rows)
    tokens = pairs.shape[2] * seq_len
    found: npt.NDArray[np.float64] = tokens * model.flops_per_token + pairs.sum(axis=2) * model.flops_per_pair
    return found


def slowest(work: npt.NDArray[np.float64] | Costs) -> float:
    """Time of all micro-steps over what it were if the ranks' work were equal."""
    return float(work.max(axis=1).sum() / work.mean(axis=1).sum())


def worst(work: npt.NDArray[np.float64]) -> float:
    """The same of the worst micro-step."""
    return float((work.max(axis=1) / work.mean(axis=1)).max())
