"""A run's checkpoints: what there is, with what keeps each, as values and as lines; and what is wrong with any.

reads: `run/checkpoints/`, `run/branches/`. writes: nothing. Costs: `unsound` reads every byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cprec.config import CheckpointConfig
from cprec.errors import CheckpointError
from cprec.log import progress
from cprec.schedule import PhaseName
from cprec.train.checkpoint import (
    BROKEN,
    Checkpoint,
    checkpoints_dir,
    is_half_pruned,
    look,
    read_checkpoint,
    verify_checkpoint,
)
from cprec.train.retention import living_branches, reasons_to_keep


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint in the list; `kept_as` is empty when nothing keeps it."""

    folder: str
    step: int
    phase: PhaseName
    tokens_seen: int
    valid_loss: float | None
    n_bytes: int
    world_size: int
    zero_stage: int
    kept_as: list[str]


@dataclass(frozen=True)
class Inventory:
    """Complete checkpoints, oldest first; what is wrong with those whose `state.json` was altered; names of the folders
    that are rests of saves, of those whose pruning was cut short, and of those put aside as altered."""

    checkpoints: list[Entry]
    broken: list[str]
    incomplete: list[str]
    half_pruned: list[str]
    put_aside: list[str]


def take_inventory(run_dir: Path, config: CheckpointConfig) -> Inventory:
    """What there is in the run's folder of checkpoints."""
    found = look(run_dir)
    reasons = reasons_to_keep(found.complete, config, living_branches(run_dir))
    half_pruned = [f.name for f in found.rests if is_half_pruned(f)]
    return Inventory([_entry(c, reasons[c.state.step]) for c in found.complete], [*found.broken.values()],
                     [f.name for f in found.rests if f.name not in half_pruned], half_pruned,
                     [f.name for f in sorted(checkpoints_dir(run_dir).glob(f"{BROKEN}*"))])


def _entry(checkpoint: Checkpoint, kept_as: list[str]) -> Entry:
    s = checkpoint.state
    return Entry(str(checkpoint.folder), s.step, s.phase, s.tokens_seen, s.valid_loss,
                 sum(f.bytes for f in s.files.values()), s.world_size, s.zero_stage, kept_as)


def write_table(run_dir: Path, inventory: Inventory) -> Iterator[str]:
    """Lines: every checkpoint, oldest first, then folders that are none."""
    if not inventory.checkpoints:
        yield f"{run_dir} has no complete checkpoint"
    else:
        yield f"{'step':>10}  {'phase':<7} {'tokens':>16} {'valid. loss':>11} {'GB':>9}  saved by      kept as"
    for e in inventory.checkpoints:
        loss = "-" if e.valid_loss is None else f"{e.valid_loss:.4f}"
        yield (f"{e.step:>10,}  {e.phase:<7} {e.tokens_seen:>16,} {loss:>11} {e.n_bytes / 1e9:>9.3f}  "
               f"{e.world_size:>4} x ZeRO-{e.zero_stage}  {', '.join(e.kept_as) or '(nothing keeps it)'}")
    for why in inventory.broken:
        yield f"BROKEN: {why}"
    for name in inventory.incomplete:
        yield f"{name}: incomplete; removed when the run starts again, unless it is being written now"
    for name in inventory.half_pruned:
        yield (f"{name}: half pruned; when the run starts again, taken back if a living branch needs it and every file "
               f"is still there, else removed")
    for name in inventory.put_aside:
        yield f"{name}: put aside, its files were altered; delete it when you have looked at it"


def unsound(run_dir: Path) -> list[str]:
    """What is wrong with each checkpoint of the run that is not as it was written."""
    problems = []
    rests = set(look(run_dir).rests)
    folders = sorted(set(checkpoints_dir(run_dir).glob("step_*")) - rests)
    for folder in progress(folders, total=len(folders), label="verify", unit="checkpoint"):
        try:
            verify_checkpoint(read_checkpoint(folder))
        except CheckpointError as e:
            problems.append(str(e))
    return problems
