"""A run's checkpoints as a person reads them: a line each, with what keeps it, and what is wrong with any.

reads: `run/checkpoints/`, `run/branches/`. writes: nothing. Costs: `unsound` reads every byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cprec.config import CheckpointConfig
from cprec.errors import CheckpointError
from cprec.train.checkpoint import (
    BROKEN,
    Checkpoint,
    checkpoints_dir,
    find_rests,
    list_checkpoints,
    read_checkpoint,
    verify_checkpoint,
)
from cprec.train.retention import living_branches, reasons_to_keep


def write_table(run_dir: Path, config: CheckpointConfig) -> Iterator[str]:
    """Lines: every checkpoint, oldest first, then folders that are none."""
    checkpoints = list_checkpoints(run_dir)
    reasons = reasons_to_keep(checkpoints, config, living_branches(run_dir))
    if not checkpoints:
        yield f"{run_dir} has no complete checkpoint"
    else:
        yield f"{'step':>10}  {'phase':<7} {'tokens':>16} {'valid. loss':>11} {'GB':>9}  saved by      kept as"
    for c in checkpoints:
        yield _line(c, reasons[c.state.step])
    for folder in find_rests(run_dir):
        yield f"{folder.name}: incomplete; removed when the run starts again, unless it is being written now"
    for folder in sorted(checkpoints_dir(run_dir).glob(f"{BROKEN}*")):
        yield f"{folder.name}: put aside, its files were altered; delete it when you have looked at it"


def _line(checkpoint: Checkpoint, kept_as: list[str]) -> str:
    s = checkpoint.state
    loss = "-" if s.valid_loss is None else f"{s.valid_loss:.4f}"
    n_bytes = sum(f.bytes for f in s.files.values())
    return (f"{s.step:>10,}  {s.phase:<7} {s.tokens_seen:>16,} {loss:>11} {n_bytes / 1e9:>9.3f}  "
            f"{s.world_size:>4} x ZeRO-{s.zero_stage}  {', '.join(kept_as) or '(nothing keeps it)'}")


def unsound(run_dir: Path) -> list[str]:
    """What is wrong with each checkpoint of the run that is not as it was written."""
    problems = []
    rests = set(find_rests(run_dir))
    for folder in sorted(set(checkpoints_dir(run_dir).glob("step_*")) - rests):
        try:
            verify_checkpoint(read_checkpoint(folder))
        except CheckpointError as e:
            problems.append(str(e))
    return problems
