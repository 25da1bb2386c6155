"""What one process of the benchmark is told, and what it answers: values, sent as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """Train one model with one side, as one rank."""

    model_config = ConfigDict(frozen=True)

    side: str
    base: Path
    """Folder of the model to start from."""
    rows: Path
    """Folder of the packed rows, more than are read; sides without packed rows read the documents in them."""
    out: Path
    """New folder for what the side writes; `out/hf` holds its last weights."""
    steps: int
    """Optimizer steps."""
    rows_per_step: int
    rows_per_forward: int
    """Of one rank. A side without packed rows takes as many documents as give it the same tokens on average."""
    seed: int
    peak_lr: float
    warmup_steps: int
    """Of the learning rate."""
    rank: int = 0
    world_size: int = 1
    port: int = 0
    cores: list[int] = []
    """That this rank may use; none: all."""
    bf16: bool = False
    attention: str = "sdpa"
    """transformers' name of the implementation, of sides that take it."""
    weights: bool = True
    """Whether the last weights are wanted."""

    @property
    def accumulation(self) -> int:
        """Forward passes of a rank and step."""
        return self.rows_per_step // (self.rows_per_forward * self.world_size)


class Answer(BaseModel):
    """What one rank measured."""

    model_config = ConfigDict(frozen=True)

    step_ends_s: list[float]
    """When each optimizer step was done."""
    useful: list[int]
    """Tokens of documents, padding left out, that this rank computed on in each step."""
    slots: list[int]
    """Token positions that it computed on, padding counted."""
    peak_mb: float
    """Largest resident memory in 10^6 bytes."""
    notes: dict[str, Any] = {}

    def seconds(self, skipped_steps: int) -> float:
        """Of the steps after the first `skipped_steps`."""
        return self.step_ends_s[-1] - self.step_ends_s[skipped_steps - 1]
