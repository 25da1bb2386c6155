"""Annealing branches: a stable checkpoint and an annealing make a run of their own, and never touch the parent.

reads: the parent's `config.yaml` and one of its checkpoints. gives: the branch's config, in which the trunk's schedule
has `anneal` filled in and `parent` says where it came from, by path, step and hash. Training it is `loop.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cprec.config import Length, ParentConfig, RunConfig
from cprec.data.corpora import find_corpora, roots_of
from cprec.data.sampler import matching
from cprec.errors import CheckpointError, ConfigError, did_you_mean, raise_all
from cprec.schedule import check_shape
from cprec.train.checkpoint import (
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    read_checkpoint,
    read_run_config,
)


def find_checkpoint(source: str, *, phase: str | None = None) -> Checkpoint:
    """The checkpoint that `source` means: a checkpoint folder, RUN (its newest, of `phase` if given) or RUN@STEP.

    Raises CheckpointError listing the complete ones when there is none such.
    """
    path, _, step = source.partition("@")
    if Path(path).name.startswith("step_") and not step:
        return read_checkpoint(Path(path))
    if not Path(path).is_dir():
        raise CheckpointError(f"--from {source}: there is no run folder {path}")
    if step and not step.isdigit():
        raise CheckpointError(f"--from {source}: {step!r} after the @ is no step; give a number")
    known = {c.state.step: c for c in list_checkpoints(Path(path))}
    fitting = [s for s, c in known.items() if phase in (None, c.state.phase)]
    wanted = int(step) if step.isdigit() else (fitting[-1] if fitting and not step else None)
    if wanted not in known:
        listed = ", ".join(f"{s} ({c.state.phase})" for s, c in known.items())
        raise CheckpointError(f"--from {source}: no such checkpoint; complete ones of {path}: {listed or 'none'}")
    return known[wanted]


def find_parent(source: str) -> Checkpoint:
    """The stable checkpoint that `source` means. Raises CheckpointError when it is none of the stable phase."""
    chosen = find_checkpoint(source, phase="stable")
    if chosen.state.phase != "stable":
        raise CheckpointError(f"--from {source}: step {chosen.state.step} is in the {chosen.state.phase} phase; an "
                              f"annealing branch starts from a checkpoint of the stable phase")
    return chosen


def branch_config(parent: Checkpoint, *, length: Length, shape: str, final_lr_ratio: float, run_dir: str | None,
                  mix: dict[str, float] | None, data: Sequence[str] = ()) -> RunConfig:
    """Config of the branch that anneals `parent` over `length` (of which a share is one of the parent's steps).

    `run_dir` defaults to the trunk's with `-SHAPE-STEPS`; `mix` None keeps the trunk's weights, and with them the very
    rows that the trunk would have read next. `data`: folders of packed corpora that the branch reads too. A branch that
    has begun keeps its fork. Raises ConfigError.
    """
    check_shape(shape, final_lr_ratio)
    trunk = read_run_config(parent.run_dir)
    tokens_per_step = parent.state.tokens_seen // parent.state.step
    steps = length.in_steps(tokens_per_step=tokens_per_step, total_steps=parent.state.step)
    if steps < 1:
        raise ConfigError(f"an annealing of {steps} steps is none; give at least one")
    _check_mix(mix, trunk, data)
    values = trunk.model_dump()
    values["data"]["packed"] = [*roots_of(trunk.data.packed), *data] if data else trunk.data.packed
    values["run_dir"] = run_dir or f"{parent.run_dir}-{shape}-{steps}"
    begun = Path(values["run_dir"]) / "config.yaml"
    if begun.is_file() and (fork := read_run_config(begun.parent).parent) and Path(fork.run_dir) == parent.run_dir:
        parent = read_checkpoint(parent.folder.with_name(checkpoint_name(fork.step)))  # the trunk may have moved on
    start = parent.state.step
    values["schedule"]["total"] = {"steps": start + steps}
    values["schedule"]["anneal"] = {"length": {"steps": steps}, "shape": shape, "final_lr_ratio": final_lr_ratio}
    values["data"]["mix"]["anneal"] = mix
    values["parent"] = ParentConfig(
        run_dir=str(parent.run_dir), step=start, state_hash=parent.state_hash).model_dump()
    return RunConfig.model_validate(values)


def _check_mix(mix: dict[str, float] | None, trunk: RunConfig, data: Sequence[str]) -> None:
    """Every name of `mix` is a corpus of the trunk or in the folders `data`, and each of those has a corpus named."""
    added = {folder: list(find_corpora(folder)) for folder in data}
    known = [*(trunk.data.mix.stable or {}), *(name for names in added.values() for name in names)]
    problems = [f"--mix {name}: the run has no such corpus; {did_you_mean(name, known)}"
                for name in sorted(mix or {}) if not matching(name, known)]
    for folder, names in added.items():
        if not any(weight > 0 and {*names} & {*matching(pattern, known)} for pattern, weight in (mix or {}).items()):
            problems.append(f"--data {folder}: no --mix gives one of its corpora a weight, so nothing of it would be "
                            f"read; name {' or '.join(names) or 'a corpus'} with --mix, and all others that the "
                            f"annealing is to read")
    raise_all(problems, of="anneal.py")
