"""Checkpoints that are either complete or absent: DeepSpeed's files, then `state.json`, written last, by rename.

writes: `run/checkpoints/step_00001000/`: one pair of files per rank, and `state.json` with what the step means (tokens,
rows, rate, phase, parent) and every file's size and hash. A folder without `state.json` is the rest of an interrupted
save; it is removed before the next save and never loaded. Loading verifies every hash, shared out over the ranks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as torch_dist
import yaml
from pydantic import Field, ValidationError

from cprec import dist
from cprec.config import ParentConfig, RunConfig
from cprec.errors import CheckpointError
from cprec.format import file_hash, sync, write_atomically
from cprec.log import get_logger
from cprec.schedule import PhaseName
from cprec.settings import Settings, parse_settings

log = get_logger(__name__)
CONFIG, STATE = "config.yaml", "state.json"
EXPORTED = "cprec_export.json"
"""What an export has, to say of which run and step it is."""


class Saves(Protocol):
    """The part of the engine that writes and reads one checkpoint's files; both calls are collective."""

    zero_stage: int

    def save(self, folder: Path, name: str) -> None: ...
    def load(self, folder: Path, name: str) -> None: ...


class FileInfo(Settings):
    """One file of a checkpoint."""

    bytes: int
    xxh3_128: str


class State(Settings):
    """What a checkpoint is of. `step` counts updates done; `lr` and `phase` are those of the step that comes next."""

    step: int
    tokens_seen: int
    rows_seen: int
    lr: float
    phase: PhaseName
    bad_steps: int
    recent_norms: list[float] = Field([])
    """Gradient norms of the last good steps: what the guard's bound follows from."""
    quarantine: dict[str, list[int]] = Field({})
    """Rows, by corpus, that the run and its branches do not read again."""
    config_hash: str
    tokenizer_fingerprint: str
    world_size: int
    zero_stage: int
    parent: ParentConfig | None
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run."""

    folder: Path
    state: State

    @property
    def run_dir(self) -> Path:
        """The run that it belongs to."""
        return self.folder.parent.parent

    @property
    def state_hash(self) -> str:
        """Hash of `state.json`, and through the hashes in it of everything."""
        return file_hash(self.folder / STATE)


def read_run_config(run_dir: Path) -> RunConfig:
    """The resolved config of a run. Raises CheckpointError when the folder has none."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{run_dir} is no run folder: it has no {CONFIG}")
    return parse_settings(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path))


def checkpoints_dir(run_dir: Path) -> Path:
    """Folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """The complete checkpoint in `folder`. Raises CheckpointError when there is none."""
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no {STATE}; complete ones: "
                              f"{', '.join(c.folder.name for c in list_checkpoints(folder.parent.parent)) or 'none'}")
    try:
        return Checkpoint(folder, State.model_validate_json(path.read_text(encoding="utf-8")))
    except ValidationError as e:
        raise CheckpointError(f"{path} is not a valid checkpoint state: {e}") from None


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first."""
    folders = sorted(checkpoints_dir(run_dir).glob("step_*"))
    return [read_checkpoint(f) for f in folders if (f / STATE).is_file()]


def save_checkpoint(engine: Saves, run_dir: Path, state: State) -> Checkpoint:
    """Write a checkpoint; it exists from the moment `state.json` does. Collective: every rank calls it."""
    folder = checkpoints_dir(run_dir) / checkpoint_name(state.step)
    if dist.rank() == 0:
        for rest in sorted(checkpoints_dir(run_dir).glob("step_*")):
            if not (rest / STATE).is_file():
                log.warning("removed %s: an interrupted save left it without %s", rest, STATE)
                shutil.rmtree(rest)
    dist.barrier()
    engine.save(folder.parent, folder.name)
    state = state.model_copy(update={"files": _hash_files(folder)})
    if dist.rank() == 0:
        write_atomically(folder / STATE, state.model_dump_json(indent=1))
    dist.barrier()
    return Checkpoint(folder, state)


def load_checkpoint(engine: Saves, checkpoint: Checkpoint) -> None:
    """Verify the files and load them. Raises CheckpointError naming what is missing, altered or does not fit."""
    state = checkpoint.state
    if state.world_size != dist.world_size() or state.zero_stage != engine.zero_stage:
        raise CheckpointError(
            f"{checkpoint.folder} was saved by {state.world_size} ranks under ZeRO stage {state.zero_stage}; this run "
            f"has {dist.world_size()} ranks and stage {engine.zero_stage}; start it with the same numbers")
    verify_checkpoint(checkpoint)
    engine.load(checkpoint.folder.parent, checkpoint.folder.name)


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file with its size and hash in `state.json`; raises CheckpointError naming those that differ."""
    known = {name: info for name, info in checkpoint.state.files.items() if (checkpoint.folder / name).is_file()}
    missing = sorted(set(checkpoint.state.files) - set(known))
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {', '.join(missing)}; {_remedy(checkpoint)}")
    found = _hash_files(checkpoint.folder)
    altered = sorted(name for name, info in checkpoint.state.files.items() if found[name] != info)
    if altered:
        raise CheckpointError(f"{checkpoint.folder} was altered: {', '.join(altered)} do not have the size and hash "
                              f"that {STATE} says; {_remedy(checkpoint)}")


def prune(run_dir: Path, *, keep_last: int, kept_for_good: set[int]) -> list[str]:
    """Remove all but the newest `keep_last` checkpoints and those of the steps `kept_for_good`; names of the removed.

    `state.json` goes first, so that a crash in between leaves no half checkpoint that looks whole. Rank 0 only.
    """
    older = list_checkpoints(run_dir)[:-keep_last]
    removed = [c for c in older if c.state.step not in kept_for_good]
    for checkpoint in removed:
        (checkpoint.folder / STATE).unlink()
        shutil.rmtree(checkpoint.folder)
    return [c.folder.name for c in removed]


def _hash_files(folder: Path) -> dict[str, FileInfo]:
    """Size and hash of every file of a checkpoint but `state.json`; each rank reads its share. Collective."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != STATE)
    mine = {n: _describe(folder / n) for n in names[dist.rank()::dist.world_size()]}
    if not torch_dist.is_initialized() or dist.world_size() == 1:
        return mine
    shares: list[dict[str, FileInfo]] = [{}] * dist.world_size()
    torch_dist.all_gather_object(shares, mine)
    return {name: info for share in shares for name, info in share.items()}


def _describe(path: Path) -> FileInfo:
    sync(path)  # state.json must not outlive, in a power loss, the files that it vouches for
    return FileInfo(bytes=path.stat().st_size, xxh3_128=file_hash(path))


def _remedy(checkpoint: Checkpoint) -> str:
    others = [c.folder.name for c in list_checkpoints(checkpoint.run_dir) if c.folder != checkpoint.folder]
    if not others:
        return "there is no other one: start the run anew in another folder"
    return f"move it away to go on from another ({', '.join(others)})"
