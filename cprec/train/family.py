"""The family of a run: its parents, its branches and theirs, found from what their `config.yaml` say.

reads: `config.yaml`, `data.json`, `metrics.jsonl` and checkpoint states of the named runs, of their parents, of the
runs beside them and in sweeps beside them, and of those that have a lease with them. writes: nothing. Folders may have
been moved, together or alone: a parent is looked for where it was, then beside its branch, and known by the hash of its
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cprec.config import RunConfig
from cprec.data.corpora import DATA, read_data_record
from cprec.errors import CheckpointError, ConfigError
from cprec.format import file_hash
from cprec.log import get_logger
from cprec.schedule import Schedule
from cprec.train.checkpoint import CONFIG, STATE, checkpoint_name, checkpoints_dir, list_checkpoints, read_run_config
from cprec.train.metrics import read_metrics
from cprec.train.retention import living_branches

log = get_logger(__name__)


@dataclass(frozen=True)
class Member:
    """A run in its family. `parent` is the folder of its parent where that was found; `notes` say what was not."""

    name: str
    folder: Path
    config: RunConfig
    schedule: Schedule
    records: list[dict[str, Any]]
    parent: Path | None
    notes: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """Where it begins: 0, or its fork."""
        return self.config.parent.step if self.config.parent else 0

    @property
    def step(self) -> int:
        """How far it has come, as logged or saved."""
        saved = [c.state.step for c in list_checkpoints(self.folder)]
        return max([self.first_step, *saved, *(int(r["step"]) for r in self.records)])

    @property
    def is_complete(self) -> bool:
        return self.step >= self.schedule.total_steps

    @property
    def state(self) -> str:
        """How far it has come, in words."""
        if self.is_complete:
            return f"complete at step {self.step:,}"
        begun = "" if self.records else ", nothing logged yet"
        return f"at step {self.step:,} of {self.schedule.total_steps:,}{begun}"

    @property
    def what(self) -> str:
        """What it does from its fork on, in words."""
        words, mix = self.config.schedule.text(), self.config.data.mix.anneal
        seed = self.config.data.reseed.get(self.first_step)
        if mix is not None:
            words += ", on " + ", ".join(f"{name}={weight:g}" for name, weight in mix.items() if weight)
        return words if seed is None else f"{words}, seed {seed}"

    def validation_at(self, step: int | None = None) -> dict[str, Any] | None:
        """Its validation record of `step`, or its last."""
        found = [r for r in self.records if r["kind"] == "valid" and step in (None, r["step"])]
        return found[-1] if found else None


def find_family(folders: Sequence[Path]) -> list[Member]:
    """The runs in `folders` with all parents and branches that are found, parents first, then by fork and name.

    Raises CheckpointError for a folder that is no run.
    """
    asked = [f.resolve() for f in folders]
    named, found = [*asked], dict[Path, Member]()
    while named:
        folder = named.pop(0)
        if folder not in found:
            found[folder] = member = _read(folder, asked)
            named += [member.parent] if member.parent else []
            named += [f for f in (*_neighbours(folder), *_leaseholders(folder))
                      if f not in found and _parent_of(f, asked) in found]
    return _named_apart(list(_in_order(found)))


def is_control_of(control: Member, branch: Member) -> bool:
    """Whether `control` is the annealing of `branch` on the trunk's mixture, from the same checkpoint."""
    a, b = control.config, branch.config
    return (a.parent is not None and b.parent is not None and a.parent.state_hash == b.parent.state_hash
            and a.schedule == b.schedule and a.data.reseed == b.data.reseed
            and a.data.mix.anneal is None and b.data.mix.anneal is not None)


def _read(folder: Path, asked: Sequence[Path]) -> Member:
    config = read_run_config(folder)
    parent, notes = _find_parent(folder, config, asked)
    tokens = config.batch.global_batch_size * read_data_record(folder).seq_len
    return Member(folder.name, folder, config, config.build_schedule(tokens_per_step=tokens), read_metrics(folder),
                  parent, notes)


def _find_parent(folder: Path, config: RunConfig, asked: Sequence[Path]) -> tuple[Path | None, tuple[str, ...]]:
    """The parent's folder, of where it was, beside the branch, and those asked for; and what is to be said about it."""
    if config.parent is None:
        return None, ()
    there = Path(config.parent.run_dir)
    by_name = [there.resolve(), (folder.parent / there.name).resolve(), (folder.parent.parent / there.name).resolve()]
    problems = []
    for place in dict.fromkeys([*by_name, *asked]):
        state = checkpoints_dir(place) / checkpoint_name(config.parent.step) / STATE
        if place == folder or not (place / CONFIG).is_file():
            continue
        if state.is_file() and file_hash(state) == config.parent.state_hash:
            return place, (() if place == there.resolve() else (f"its parent has moved from {there} to {place}",))
        if place in by_name and not state.is_file():
            return place, (f"its fork, step {config.parent.step:,} of {place}, is no longer there",)
        if place in by_name:
            problems.append(f"{place} has another checkpoint of step {config.parent.step:,} than it branched from")
    return None, tuple(problems) or (f"its parent {there} is not there, nor beside it; name its folder too if it has "
                                     f"moved elsewhere",)


def _parent_of(folder: Path, asked: Sequence[Path]) -> Path | None:
    """Folder of the parent of a run beside a known one; None for what is no branch, or no run of this version."""
    try:
        return _find_parent(folder, read_run_config(folder), asked)[0]
    except (ConfigError, CheckpointError) as e:
        log.warning("left out %s: %s", folder, e)
        return None


def _neighbours(folder: Path) -> Iterator[Path]:
    """Run folders beside a run and in folders beside it, such as a sweep's."""
    return _runs_in(folder.parent, "*", "*/*")


def _leaseholders(folder: Path) -> Iterator[Path]:
    """Run folders, wherever they are, of the branches and sweeps that have a lease on a checkpoint of the run."""
    try:
        branches = living_branches(folder)
    except CheckpointError as e:
        log.warning("branches of %s elsewhere may be missing: %s", folder, e)
        return
    for place in sorted(place for places in branches.values() for place in places):
        yield from _runs_in(Path(place), ".", "*")


def _runs_in(folder: Path, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        for path in sorted(folder.glob(f"{pattern}/{DATA}")):
            if (path.parent / CONFIG).is_file():
                yield path.parent.resolve()


def _in_order(found: dict[Path, Member]) -> Iterator[Member]:
    """Depth first from the runs without a parent."""
    def below(parent: Path | None) -> Iterator[Member]:
        children = [m for m in found.values() if (m.parent if m.parent in found else None) == parent]
        for child in sorted(children, key=lambda m: (m.first_step, m.folder)):
            yield child
            yield from below(child.folder)

    yield from below(None)


def _named_apart(members: list[Member]) -> list[Member]:
    """The members, those that share a name with the folder that they are in before it."""
    names = [m.name for m in members]
    return [replace(m, name=f"{m.folder.parent.name}/{m.name}") if names.count(m.name) > 1 else m for m in members]
