"""Which checkpoints of a run are kept, and why; the others are pruned.

reads: the run's checkpoints and `run/branches/`, where a branch leaves a lease on the checkpoint that it began from.
Kept are the last ones, the stable ones at multiples of `keep_stable_every`, the best by validation loss, and parents of
living branches. A branch lives as long as its run folder does, a sweep as long as its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import xxhash
import yaml
from pydantic import ValidationError

from cprec import dist
from cprec.config import CheckpointConfig
from cprec.errors import CheckpointError, ConfigError, raise_all
from cprec.format import sync, write_atomically
from cprec.log import get_logger
from cprec.settings import Settings
from cprec.train.checkpoint import (
    CONFIG,
    PRUNED,
    STATE,
    Checkpoint,
    State,
    checkpoint_name,
    checkpoints_dir,
    is_half_pruned,
    list_checkpoints,
    look,
    read_run_config,
)

log = get_logger(__name__)


class Lease(Settings):
    """What a branch leaves with its parent: which checkpoint it needs, and where the branch is; or a sweep, with its
    own folder, for those of its branches that have not begun."""

    run_dir: str
    step: int
    is_of_sweep: bool = False


def reasons_to_keep(checkpoints: list[Checkpoint], config: CheckpointConfig,
                    branches: dict[int, list[str]]) -> dict[int, list[str]]:
    """Why each of `checkpoints` is kept, by step; nothing for those that are not. Ties of the best: the later."""
    reasons: dict[int, list[str]] = {c.state.step: [] for c in checkpoints}
    for c in checkpoints[-config.keep_last:]:
        reasons[c.state.step].append("last")
    for step, state in ((c.state.step, c.state) for c in checkpoints):
        if config.keep_stable_every and state.phase == "stable" and step % config.keep_stable_every == 0:
            reasons[step].append("stable")
        reasons[step] += [f"parent of {run_dir}" for run_dir in branches.get(step, [])]
    scored = sorted((c.state.valid_loss, -c.state.step) for c in checkpoints if c.state.valid_loss is not None)
    for _, negative in scored[:config.keep_best or 0]:
        reasons[-negative].append("best")
    return reasons


def prunable(run_dir: Path, config: CheckpointConfig) -> list[str]:
    """Names of the checkpoints that `prune` would remove now."""
    checkpoints = list_checkpoints(run_dir)
    reasons = reasons_to_keep(checkpoints, config, living_branches(run_dir))
    return [c.folder.name for c in checkpoints if not reasons[c.state.step]]


def prune(run_dir: Path, config: CheckpointConfig) -> list[str]:
    """Remove the checkpoints that nothing keeps; their names. For the run's only writer, one process.

    `state.json` goes first, so that a crash in between leaves no half checkpoint that looks whole. A branch that took
    its lease in this very moment is given its parent back, by `give_back_parents` if the crash comes before that.
    """
    removed = []
    for name in prunable(run_dir, config):
        folder = checkpoints_dir(run_dir) / name
        (folder / STATE).rename(folder / PRUNED)
        sync(folder)
        if any(checkpoint_name(step) == name for step in living_branches(run_dir)):
            (folder / PRUNED).rename(folder / STATE)
            continue
        shutil.rmtree(folder)
        removed.append(name)
    return removed


def give_back_parents(run_dir: Path) -> None:
    """Give the checkpoints that living branches need back what a pruning, killed in the middle, had taken: their name.
    For the run's only writer, before rests are removed; collective. Raises CheckpointError, on every rank, when a lease
    cannot be read or a name not given back.
    """
    problems = []
    if dist.rank() == 0:
        try:
            _give_back_parents(run_dir)
        except CheckpointError as e:
            problems.append(str(e))
        except OSError as e:  # the other ranks wait below
            problems.append(f"a checkpoint of {run_dir} that a branch needs, half pruned, could not be given its "
                            f"{STATE} back: {e}; make it writable and start the run again")
    raise_all(dist.gather_texts(problems), of="branches", error=CheckpointError)


def _give_back_parents(run_dir: Path) -> None:
    rests = [rest for rest in look(run_dir).rests if is_half_pruned(rest)]
    branches = living_branches(run_dir) if rests else {}
    needed = {checkpoint_name(step): of for step, of in branches.items()}
    for rest in rests:
        if rest.name in needed and _is_whole(rest):
            (rest / PRUNED).rename(rest / STATE)
            sync(rest)
            log.warning("kept %s, which was being pruned when the run was killed: parent of %s", rest,
                        ", ".join(needed[rest.name]))


def _is_whole(rest: Path) -> bool:
    """Whether every file of a checkpoint that was to go is still there."""
    try:
        state = State.model_validate_json((rest / PRUNED).read_text(encoding="utf-8"))
        return all((rest / name).stat().st_size == info.bytes for name, info in state.files.items())
    except (ValidationError, OSError, UnicodeDecodeError):
        return False


def lease(trunk: Path, step: int, *, run_dir: Path, is_of_sweep: bool = False) -> None:
    """Have the run in `trunk` keep the checkpoint that the branch in `run_dir` began from, or those of the sweep there
    will. Where its folder may not be written, a warning: nothing prunes it but its own run."""
    folder = trunk / "branches"
    value = Lease(run_dir=str(run_dir.absolute()), step=step, is_of_sweep=is_of_sweep)
    whose = f"{value.run_dir}@{step}" if is_of_sweep else value.run_dir  # a sweep's folder may have two parents
    path = folder / f"{xxhash.xxh3_64_hexdigest(whose.encode())}.json"
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(path, value.model_dump_json(indent=1))
    except OSError as e:
        log.warning("could not leave a lease in %s (%s): if that run goes on, it may prune %s, which %s needs until "
                    "it has checkpoints of its own", folder, e.strerror, checkpoint_name(step), run_dir)


def living_branches(run_dir: Path) -> dict[int, list[str]]:
    """The folders of the branches that live, by the step that they began from; also of one that lies on a disk that is
    not there. Raises CheckpointError when a lease cannot be read."""
    found: dict[int, list[str]] = {}
    for path in sorted((run_dir / "branches").glob("*.json")):
        try:
            value = Lease.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{path} is no lease of a branch, so nothing can be pruned: {e}; delete it if the "
                                  f"branch is gone") from None
        if _lives(value):
            found.setdefault(value.step, []).append(value.run_dir)
    return found


def _lives(branch: Lease) -> bool:
    folder = Path(branch.run_dir)
    if not folder.parent.is_dir():
        return True  # its disk may not be mounted
    if branch.is_of_sweep:
        return folder.is_dir()
    if not (folder / CONFIG).is_file():
        return False
    try:
        parent = read_run_config(folder).parent
    except (ConfigError, yaml.YAMLError):
        return True
    return parent is not None and parent.step == branch.step
