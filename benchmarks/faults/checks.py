"""What a run folder has to be after a fault: everything in it as in an unbroken run, nothing lost but the last steps.

reads: `metrics.jsonl` and every complete checkpoint, byte by byte. writes: nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cprec.errors import CheckpointError
from cprec.train.checkpoint import Checkpoint, list_checkpoints, verify_checkpoint
from cprec.train.metrics import read_metrics

Losses = dict[tuple[str, int], tuple[float, dict[str, float], float | None]]
"""Loss, loss by corpus and gradient norm, by kind of record and step."""


@dataclass(frozen=True)
class Reference:
    """An unbroken run of the same config, which has saved after every step and kept it."""

    losses: Losses
    files: dict[int, Mapping[str, object]]
    """Sizes and hashes of the files of every step's checkpoint."""


@dataclass(frozen=True)
class Findings:
    """What is in a run folder, and what is wrong with it: the lists are empty where all is well."""

    newest: int
    """Step of the newest complete checkpoint; 0: there is none."""
    logged: int
    """Last step that is in metrics.jsonl."""
    other_losses: list[str]
    damaged: list[str]
    """Complete checkpoints whose files are not what their state.json says, or not those of the unbroken run."""
    damaged_stable: list[str]
    """Those among them that are never pruned, and such as are missing."""


def read_reference(run_dir: Path) -> Reference:
    """Of a finished run."""
    return Reference(losses(run_dir), {c.state.step: c.state.files for c in list_checkpoints(run_dir)})


def losses(run_dir: Path) -> Losses:
    """Of every record; a step that was logged twice is an error."""
    found: Losses = {}
    for r in read_metrics(run_dir):
        key = (r["kind"], r["step"])
        assert key not in found, f"{run_dir}: {key} is logged twice"
        found[key] = (r["loss"], r["loss_by_corpus"], r.get("grad_norm"))
    return found


def examine(run_dir: Path, reference: Reference, *, stable_every: int) -> Findings:
    """Compare all that there is with the unbroken run; every step is to be in the log once, without gaps."""
    found = losses(run_dir)
    steps = sorted(step for kind, step in found if kind == "train")
    other = [f"{kind} {step}: {found[kind, step]}, unbroken {reference.losses.get((kind, step))}"
             for kind, step in found if found[kind, step] != reference.losses.get((kind, step))]
    if steps != [*range(1, len(steps) + 1)]:
        other.append(f"steps logged: {steps}")
    complete = {c.state.step: c for c in list_checkpoints(run_dir)}
    newest = max(complete, default=0)
    damaged = {step: problem for step, c in complete.items() if (problem := _damage(c, reference))}
    for path in (run_dir / "checkpoints").glob("step_*/state.json"):
        if (step := int(path.parent.name.removeprefix("step_"))) not in complete:
            damaged[step] = f"{path} cannot be read"
    stable = [f"step {step}: {damaged.get(step, 'missing')}" for step in range(stable_every, newest + 1, stable_every)
              if step in damaged or step not in complete]
    return Findings(newest, len(steps), other, [f"step {s}: {p}" for s, p in damaged.items()], stable)


def _damage(checkpoint: Checkpoint, reference: Reference) -> str:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as e:
        return str(e)
    if checkpoint.state.files != reference.files[checkpoint.state.step]:
        return "its files have not the bytes of the unbroken run's"
    return ""


def resumed_at(said: str) -> int | None:
    """Step that a life says to have gone on from; 0 where it began; None if it did not come so far."""
    if found := re.search(r"loaded \S+: step (\d+),|is complete: (\d+) of", said):
        return int(found[1] or found[2])
    return 0 if re.search(r"world size \d+, micro batch", said) else None
