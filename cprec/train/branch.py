"""Branches: a checkpoint and an annealing, or a way back to the stable rate, make a run of their own.

reads: the parent's `config.yaml` and one of its checkpoints; of an exported folder its mark and its run's config.
gives: the branch's config, in which the trunk's schedule has `anneal` (or `returns`) filled in and `parent` says where
it came from, by path, step and hash. Training it is `loop.train`; nothing here or there writes into the parent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cprec import dist
from cprec.config import Length, ParentConfig, ReturnConfig, RunConfig
from cprec.data.corpora import find_corpora, read_data_record, roots_of
from cprec.data.sampler import matching
from cprec.errors import CheckpointError, ConfigError, did_you_mean, raise_all
from cprec.format import file_hash
from cprec.log import get_logger
from cprec.schedule import check_shape
from cprec.settings import apply_overrides, parse_settings
from cprec.tokenizer import load_tokenizer
from cprec.train.checkpoint import (
    AVERAGED,
    CONFIG,
    EXPORTED,
    STATE,
    Checkpoint,
    Folders,
    checkpoint_name,
    checkpoints_dir,
    look,
    read_checkpoint,
    read_run_config,
    why_incomplete,
)
from cprec.train.run_folder import FREE_TO_CHANGE

log = get_logger(__name__)
LATEST_STABLE = "latest-stable"
OWN_TO_A_BRANCH = (*(f for f in FREE_TO_CHANGE if f != "run_dir" and f != "data.packed"), "deepspeed",
                   "data.allow_unaudited")
"""Fields of the trunk's config that a branch may have other values of, besides what launch/anneal.py has options for:
they decide what is written, how it is computed, or how often a corpus may be read."""


@dataclass(frozen=True)
class Branching:
    """What every branch says of itself."""

    length: Length
    """From the fork to the branch's end; a share is one of the parent's steps."""
    run_dir: str | None = None
    """None: beside the trunk's, named by what the branch does."""
    seed: int | None = None
    """Another order of the rows that no epoch of the trunk has read yet."""
    overrides: Sequence[str] = ()
    """`key=value`, of OWN_TO_A_BRANCH."""
    pinned: bool = False
    """The parent was named with its step, so a branch that began from another one is not this one."""


@dataclass(frozen=True)
class Annealing(Branching):
    """From the stable rate down along `shape`. `mix` None keeps the trunk's weights, and with them the very rows that
    the trunk would have read next; `packed`: folders of packed corpora that are read besides the trunk's."""

    shape: str = "sqrt"
    final_lr_ratio: float = 0.1
    """The last rate, as a share of the stable one..."""
    final_lr: float | None = None
    """...or, if given, by itself."""
    mix: Mapping[str, float] | None = None
    packed: Sequence[str] = ()


@dataclass(frozen=True)
class Rewarming(Branching):
    """From an annealed checkpoint back to the stable rate, over `rewarm_steps` updates, and on at that."""

    rewarm_steps: int = 0
    from_zero: bool = False


def find_checkpoint(source: str, *, phases: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint that `source` means: a checkpoint folder, RUN (its newest, of `phases` if given), RUN@STEP or
    RUN@latest-stable. Folders newer than the newest that are no sound checkpoint are warned of by name.

    Raises CheckpointError listing the complete ones when there is none such, BrokenError when the one named is altered.
    """
    path, step = _split(source)
    if Path(path).name.startswith("step_") and not step:
        return read_checkpoint(Path(path))
    run_dir = Path(path)
    if not run_dir.is_dir():
        raise CheckpointError(f"--from {source}: there is no run folder {path}")
    if (run_dir / AVERAGED).is_file():
        raise CheckpointError(f"--from {source}: an average of models has no checkpoint, no moments and no place in "
                              f"the data to go on from; begin a run on it: launch/pretrain.py with a config in which "
                              f"model.path={path} and schedule.warmup is its way back to the stable rate")
    if step == LATEST_STABLE:
        step, phases = "", ("stable",)
    if step and not step.isdigit():
        raise CheckpointError(f"--from {source}: {step!r} after the @ is no step; give a number, or {LATEST_STABLE}")
    if step and (folder := checkpoints_dir(run_dir) / checkpoint_name(int(step))).is_dir():
        return read_checkpoint(folder)
    found = look(run_dir)
    known = found.complete
    fitting = [] if step else [c for c in known if not phases or c.state.phase in phases]
    passed_over = _passed_over(found, newer_than=fitting[-1].folder.name if fitting else "")
    if not fitting:
        listed = ", ".join(f"{c.state.step} ({c.state.phase})" for c in known)
        raise CheckpointError("\n  ".join([f"--from {source}: no such checkpoint; complete ones of {path}: "
                                           f"{listed or 'none'}", *passed_over]))
    for why in passed_over if dist.rank() == 0 else []:
        log.warning("PASSED OVER for %s: %s", fitting[-1].folder, why)
    return fitting[-1]


def _passed_over(found: Folders, *, newer_than: str) -> list[str]:
    """What is wrong with each of the newer folders that would be a checkpoint if its save or its pruning had not been
    cut short or its `state.json` altered."""
    wrong = found.broken | {rest: f"{rest} is no complete checkpoint: {why_incomplete(rest)}" for rest in found.rests}
    return [why for folder, why in sorted(wrong.items()) if folder.name > newer_than]


def is_pinned(source: str) -> bool:
    """Whether `source` names a step, and not only the newest checkpoint there is."""
    path, step = _split(source)
    return step.isdigit() or Path(path).name.startswith("step_")


def _split(source: str) -> tuple[str, str]:
    """RUN and what follows its last @; a folder further up may have one in its name."""
    folder, slash, name = source.rpartition("/")
    run, _, step = name.partition("@")
    return folder + slash + run, step


def find_parent(source: str, *, annealed: bool = False) -> Checkpoint:
    """The stable (or, for a way back, the annealed) checkpoint that `source` means, its tokenizer still the run's.

    Raises CheckpointError when it is of another phase, or when the model's tokenizer has changed since.
    """
    phases = ("anneal", "decay") if annealed else ("stable",)
    chosen = find_checkpoint(source, phases=phases)
    state = chosen.state
    if state.phase not in phases:
        what = ("--rewarm starts from an annealed checkpoint; from a stable one, lengthen schedule.total of its run"
                if annealed else "an annealing branch starts from a checkpoint of the stable phase")
        raise CheckpointError(f"--from {source}: step {state.step} is in the {state.phase} phase; {what}")
    model = read_run_config(chosen.run_dir).model.path
    now = load_tokenizer(model).fingerprint
    if now != state.tokenizer_fingerprint:
        raise CheckpointError(f"--from {source}: the tokenizer of model.path={model!r} has changed since step "
                              f"{state.step} was saved (fingerprint {state.tokenizer_fingerprint[:12]} then, "
                              f"{now[:12]} now); put the old one back, its ids are what the weights know")
    return chosen


def annealing_config(parent: Checkpoint, branch: Annealing) -> RunConfig:
    """Config of the run that anneals `parent`. A branch that has begun keeps its fork. Raises ConfigError."""
    trunk, steps = read_run_config(parent.run_dir), _steps(parent, branch)
    stable_lr = trunk.optimizer.peak_lr
    ratio = branch.final_lr_ratio if branch.final_lr is None else branch.final_lr / stable_lr
    if branch.final_lr is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"--final-lr {branch.final_lr:g}: an annealing goes down from {stable_lr:g}, the rate of "
                          f"{parent.run_dir}; give a rate between 0 and that")
    check_shape(branch.shape, ratio)
    _check_mix(branch.mix, trunk, branch.packed)
    values, start = _fork(parent, trunk, branch, branch.run_dir or f"{parent.run_dir}-{branch.shape}-{steps}")
    values["schedule"]["total"] = {"steps": start + steps}
    values["schedule"]["anneal"] = {"length": {"steps": steps}, "shape": branch.shape, "final_lr_ratio": ratio}
    values["data"]["mix"]["anneal"] = None if branch.mix is None else dict(branch.mix)
    if branch.packed:
        values["data"]["packed"] = [*roots_of(trunk.data.packed), *branch.packed]
    return _checked(values, branch)


def control_config(config: RunConfig) -> RunConfig:
    """The control of a branch: the same annealing of the same checkpoint on the trunk's mixture, in RUN_DIR-control.

    Raises ConfigError when the branch has no mixture of its own.
    """
    if config.data.mix.anneal is None:
        raise ConfigError("--control: without --mix the branch already anneals on the trunk's mixture, and would be "
                          "its own control; leave --control out")
    values = config.model_dump()
    values["run_dir"] = f"{config.run_dir}-control"
    values["data"]["mix"]["anneal"] = None
    return RunConfig.model_validate(values)


def rewarming_config(parent: Checkpoint, branch: Rewarming) -> RunConfig:
    """Config of the trunk that goes on from the annealed `parent`, with its moments and its place in the data.

    It reads the trunk's mixture; annealings with others may branch from it. Raises ConfigError.
    """
    run_dir = branch.run_dir or f"{parent.run_dir}-rewarm-{branch.rewarm_steps}"
    values, start = _fork(parent, read_run_config(parent.run_dir), branch, run_dir)
    left = values["schedule"]["returns"][-1:]
    if not left or left[0]["end"] != start:
        raise ConfigError(f"--rewarm: {parent.folder} stands at the first step of its annealing and is not annealed "
                          f"yet; take a later one")
    left[0] |= {"rewarm_steps": branch.rewarm_steps, "from_zero": branch.from_zero}
    values["schedule"]["total"] = {"steps": start + _steps(parent, branch)}
    values["data"]["mix"]["anneal"] = None
    return _checked(values, branch)


def restarting_config(folder: Path, branch: Rewarming) -> RunConfig:
    """Config of a new run on the exported model in `folder`: its run's config with a warm-up, from step 0.

    An export has neither moments nor a place in the data: the rate climbs from 0, and the order of the rows is another
    one than the run's (its seed + 1, unless given). A share is one of the exported step. Raises ConfigError.
    """
    try:
        origin = json.loads((folder / EXPORTED).read_text(encoding="utf-8"))
        old = read_run_config(Path(origin["run"]))
    except (OSError, CheckpointError) as e:
        raise ConfigError(f"--from {folder}: its run's config is not at hand ({e}); start launch/pretrain.py with a "
                          f"config of your own, in which model.path={folder}") from None
    tokens_per_step = old.batch.global_batch_size * read_data_record(Path(origin["run"])).seq_len
    steps = branch.length.in_steps(tokens_per_step=tokens_per_step, total_steps=origin["step"])
    values = old.model_dump()
    values["model"]["path"] = str(folder)
    values["run_dir"] = branch.run_dir or f"{origin['run']}-restart-{branch.rewarm_steps}"
    values["parent"] = None
    values["schedule"] = {"total": {"steps": steps}, "warmup": {"steps": branch.rewarm_steps}}
    values["data"]["mix"] = {"stable": values["data"]["mix"]["stable"]}
    values["data"]["seed"] = old.data.seed + 1 if branch.seed is None else branch.seed
    values["data"]["reseed"] = {}
    return _checked(values, branch)


def _fork(parent: Checkpoint, old: RunConfig, branch: Branching, run_dir: str) -> tuple[dict[str, Any], int]:
    """The parent's run as values in which everything up to the fork is written out, and the fork's step."""
    if _steps(parent, branch) < 1:
        raise ConfigError(f"a branch of {_steps(parent, branch)} steps is none; give at least one")
    begun = Path(run_dir) / CONFIG
    if begun.is_file() and not branch.pinned:  # the trunk may have moved on
        fork = read_run_config(begun.parent).parent
        if fork and (Path(fork.run_dir) == parent.run_dir or _holds(parent.run_dir, fork)):
            parent = read_checkpoint(parent.folder.with_name(checkpoint_name(fork.step)))
    start = parent.state.step
    values = old.model_dump()
    values["run_dir"] = run_dir
    values["schedule"] |= {"kind": "wsa", "anneal": None, "final_lr_ratio": None, "cycles": None,
                           "returns": [r.model_dump() for r in _past(old, parent)]}
    values["data"]["reseed"] = {step: seed for step, seed in old.data.reseed.items() if step < start}
    if branch.seed is not None:
        values["data"]["reseed"][start] = branch.seed
    values["parent"] = ParentConfig(
        run_dir=str(parent.run_dir), step=start, state_hash=parent.state_hash).model_dump()
    return values, start


def _holds(run_dir: Path, fork: ParentConfig) -> bool:
    """Whether a run folder, which may have moved, has the checkpoint that a branch began from."""
    state = checkpoints_dir(run_dir) / checkpoint_name(fork.step) / STATE
    return state.is_file() and file_hash(state) == fork.state_hash


def _past(old: RunConfig, parent: Checkpoint) -> list[ReturnConfig]:
    """The annealings that the weights of `parent` have behind them."""
    mixes = {r.start: r.mix for r in old.schedule.returns}
    schedule = old.build_schedule(tokens_per_step=_tokens_per_step(parent))
    return [ReturnConfig(start=r.anneal.start, steps=r.anneal.steps, shape=r.anneal.shape,
                         final_lr_ratio=r.anneal.floor, end=r.end, rewarm_steps=r.rewarm_steps, from_zero=r.from_zero,
                         mix=mixes.get(r.anneal.start, old.data.mix.anneal))
            for r in schedule.past_at(parent.state.step)]


def _steps(parent: Checkpoint, branch: Branching) -> int:
    return branch.length.in_steps(tokens_per_step=_tokens_per_step(parent), total_steps=parent.state.step)


def _tokens_per_step(parent: Checkpoint) -> int:
    return parent.state.tokens_seen // parent.state.step


def _checked(values: dict[str, Any], branch: Branching) -> RunConfig:
    """The values with the branch's overrides as a config. Raises ConfigError, also for keys that a branch inherits."""
    keys = [o.partition("=")[0] for o in branch.overrides]
    raise_all([f"{key}: a branch has this from its trunk; own to it are {', '.join(OWN_TO_A_BRANCH)}"
               for key in keys if not any(key == f or key.startswith(f"{f}.") for f in OWN_TO_A_BRANCH)],
              of="anneal.py")
    return parse_settings(RunConfig, apply_overrides(values, branch.overrides), source="anneal.py")


def _check_mix(mix: Mapping[str, float] | None, trunk: RunConfig, packed: Sequence[str]) -> None:
    """Every name of `mix` is a corpus of the trunk or in the folders `packed`, and each of those has one named."""
    added = {folder: list(find_corpora(folder)) for folder in packed}
    known = [*(trunk.data.mix.stable or {}), *(name for names in added.values() for name in names)]
    problems = [f"--mix {name}: the run has no such corpus; {did_you_mean(name, known)}"
                for name in sorted(mix or {}) if not matching(name, known)]
    problems += [f"--mix {name}={weight:g}: a weight is a number from 0 up"
                 for name, weight in (mix or {}).items() if not 0 <= weight < float("inf")]
    if mix and not any(weight > 0 for weight in mix.values()):
        problems.append("--mix: all weights are zero, so there would be nothing to read; give one a positive weight")
    for folder, names in added.items():
        if not any(weight > 0 and {*names} & {*matching(pattern, known)} for pattern, weight in (mix or {}).items()):
            problems.append(f"--packed {folder}: no --mix gives one of its corpora a weight, so nothing of it would be "
                            f"read; name {' or '.join(names) or 'a corpus'} with --mix, and all others that the "
                            f"annealing is to read")
    raise_all(problems, of="anneal.py")
