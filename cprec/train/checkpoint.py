"""Checkpoints that are either complete or absent: a file per rank, then `state.json`, written last, by rename.

reads, writes: `run/checkpoints/step_00001000/`: `rank_00000.safetensors` and so on (see `partitions`), and `state.json`
with what the step means (tokens, rows, rate, phase, parent, data) and every file's size and hash. A folder without it
is the rest of an interrupted save: never loaded, removed when the run starts again. Loading verifies every hash, shared
out over the ranks; `saving` writes, `retention` prunes. docs/checkpoints.md tells users what to expect.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import xxhash
import yaml
from pydantic import Field, ValidationError

from cprec import dist
from cprec.config import ParentConfig, RunConfig
from cprec.errors import CheckpointError
from cprec.format import file_hash, write_atomically
from cprec.log import get_logger
from cprec.schedule import PhaseName
from cprec.settings import Settings, parse_settings
from cprec.train.partitions import FileInfo

log = get_logger(__name__)
CONFIG, STATE = "config.yaml", "state.json"
PRUNED = STATE + ".pruned"
"""What `state.json` is called once its checkpoint is to go."""
EXPORTED, AVERAGED = "cprec_export.json", "cprec_average.json"
"""What an export has, to say of which run and step it is; and an average, to say of which models."""
BROKEN = "broken_"
"""What the folder's name begins with when a checkpoint was put aside because its files were altered."""
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What reading a file says that is not there, or whose name something else has."""


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
    valid_loss: float | None
    """Validation loss over all corpora, in nats per token; null where the step was not validated."""
    config_hash: str
    """Hash of the run's `config.yaml` when this was saved; some fields of it may change while a run goes on."""
    data_hashes: dict[str, str]
    """Hash of the rows of each training corpus, by name, as in the run's `data.json`."""
    tokenizer_fingerprint: str
    world_size: int
    zero_stage: int
    parent: ParentConfig | None
    files: dict[str, FileInfo]
    checksum: str = ""
    """Hash of all the rest: `state.json` vouches for the other files, this for `state.json`."""

    def sealed(self) -> State:
        """The same with its checksum."""
        bare = self.model_copy(update={"checksum": ""}).model_dump_json()
        return self.model_copy(update={"checksum": xxhash.xxh3_128_hexdigest(bare.encode())})


class BrokenError(CheckpointError):
    """A checkpoint whose files are not what was written."""


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


@dataclass(frozen=True)
class Folders:
    """The folders of a run's checkpoints as one look found them, oldest first: those with a sound `state.json`; what is
    wrong with those whose `state.json` was altered; rests of interrupted saves and prunings, which have none."""

    complete: list[Checkpoint]
    broken: dict[Path, str]
    rests: list[Path]


def look(run_dir: Path) -> Folders:
    """What there is in a run's folder of checkpoints. No other file than each `state.json` is read."""
    found = Folders([], {}, [])
    for folder in sorted(checkpoints_dir(run_dir).glob("step_*")):
        try:
            found.complete.append(_read(folder))
        except BrokenError as e:
            found.broken[folder] = str(e)
        except NO_FILE:
            found.rests.append(folder)
    return found


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints of a run that have a sound `state.json`, oldest first."""
    return look(run_dir).complete


def read_checkpoint(folder: Path) -> Checkpoint:
    """The complete checkpoint in `folder`, its other files not yet verified. Raises CheckpointError when there is none,
    BrokenError when its `state.json` was altered."""
    try:
        return _read(folder)
    except NO_FILE:
        complete = ", ".join(c.folder.name for c in list_checkpoints(folder.parent.parent)) or "none"
        raise CheckpointError(f"{folder} is no complete checkpoint: {why_incomplete(folder)}; complete ones: "
                              f"{complete}") from None


def _read(folder: Path) -> Checkpoint:
    path = folder / STATE
    try:
        state = State.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as e:
        raise BrokenError(f"{path} is not a valid checkpoint state: {e}") from None
    if state.sealed() != state or checkpoint_name(state.step) != folder.name:
        raise BrokenError(f"{path} was altered: its checksum or its step is wrong")
    return Checkpoint(folder, state)


def is_half_pruned(folder: Path) -> bool:
    """Whether a checkpoint was to go, and is not gone yet."""
    return (folder / PRUNED).is_file()


def why_incomplete(folder: Path) -> str:
    """Why a folder has no `state.json`, with the way out."""
    if not folder.is_dir():
        return "there is no such folder"
    if not is_half_pruned(folder):
        return f"it has no {STATE}: it is being saved now, or an interrupted save left it"
    return (f"it is being pruned now, or was when its run was killed; if nothing trains there, start "
            f"{folder.parent.parent} once, by the command it was started with: it takes the checkpoint back where a "
            f"living branch needs it and every file is still there, and removes it otherwise")


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file with its size and hash in `state.json`. Collective: each rank reads its share.

    Raises BrokenError naming the files that differ or are missing, or CheckpointError when one cannot be read.
    """
    broken, unreadable = [], []
    for name in sorted(checkpoint.state.files)[dist.rank()::dist.world_size()]:
        try:
            if problem := _wrong_with(checkpoint.folder / name, checkpoint.state.files[name]):
                broken.append(problem)
        except OSError as e:
            unreadable.append(f"{name}: {e.strerror}")
    broken, unreadable = dist.gather_texts(broken), dist.gather_texts(unreadable)
    if broken:
        raise BrokenError(f"{checkpoint.folder} was altered: {'; '.join(sorted(broken))}; {_remedy(checkpoint)}")
    if unreadable:
        raise CheckpointError(f"{checkpoint.folder} cannot be read: {'; '.join(sorted(unreadable))}")


def _wrong_with(path: Path, info: FileInfo) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != info.bytes:
        return f"{path.name} has {path.stat().st_size:,} bytes, {STATE} says {info.bytes:,}"
    return None if file_hash(path) == info.xxh3_128 else f"{path.name} has not the hash that {STATE} says"


def newest_sound(run_dir: Path) -> Checkpoint | None:
    """The run's newest checkpoint whose files are as they were written; None where it has none at all. Collective, for
    the run's only writer.

    Rests of interrupted saves are removed and altered checkpoints put aside, by name, with a warning each: kept beside
    the others they would count as one of the last. Raises CheckpointError when there are checkpoints and none is sound.
    """
    broken: dict[Path, str] = {}
    rests = look(run_dir).rests
    for folder in sorted(set(checkpoints_dir(run_dir).glob("step_*")) - set(rests), reverse=True):
        try:
            found = read_checkpoint(folder)
            verify_checkpoint(found)
        except BrokenError as e:
            broken[folder] = str(e)
            continue
        break
    else:
        if broken:
            raise CheckpointError(f"no checkpoint of {run_dir} is sound; move {checkpoints_dir(run_dir)} away to begin "
                                  f"anew:\n  " + "\n  ".join(broken.values()))
        found = None
    dist.barrier()  # every rank has looked
    if dist.rank() == 0:
        for rest in rests:
            log.warning("removed %s: an interrupted %s left it without %s", rest,
                        "pruning" if is_half_pruned(rest) else "save", STATE)
            shutil.rmtree(rest)
        for folder, why in broken.items():
            log.warning("PASSED OVER, and put aside as %s%s: %s", BROKEN, folder.name, why)
            _put_aside(folder)
        if broken and found:
            log.warning("going on from %s instead: the steps after it are done again", found.folder)
    dist.barrier()
    return found


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(BROKEN + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def write_state(folder: Path, sealed: State) -> None:
    """Write `state.json`: from here on the checkpoint exists. Rank 0 only, when every file is on the disk."""
    write_atomically(folder / STATE, sealed.model_dump_json(indent=1))


def _remedy(checkpoint: Checkpoint) -> str:
    others = [c.folder.name for c in list_checkpoints(checkpoint.run_dir) if c.folder != checkpoint.folder]
    return f"others of the run: {', '.join(others)}" if others else "the run has no other one"
