"""Whether a run folder may be gone on with: the config, the data and the rows that it has read are this run's.

reads: `config.yaml`, `data.json` and the checkpoints' states, of the run and of a branch's parent. writes:
`config.yaml` and `data.json`, when all is well. Costs: the order of two runs, no rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cprec import dist
from cprec.config import RunConfig
from cprec.data.corpora import DATA, read_data_record, shown
from cprec.errors import ConfigError, DataError
from cprec.format import write_atomically
from cprec.settings import dump_settings
from cprec.train.checkpoint import CONFIG, list_checkpoints, read_run_config
from cprec.train.order import build_order
from cprec.train.plan import Plan

FREE_TO_CHANGE = ("run_dir", "checkpoint", "validation", "log_every", "metrics", "guard", "watchdog", "preflight",
                  "data.packed", "data.verify",
                  "data.cache_dir", "data.cache_gb", "data.max_epochs", "data.when_dry", "batch.micro_batch_size",
                  "model.attention", "model.activation_checkpointing", "model.compile", "deterministic", "deepspeed")
"""Fields that may differ when a run goes on: they change what is written or how it is computed, not what is trained.
The run folder and the data may have moved: that they are the same is checked by what is in them. What `max_epochs` has
decided up to now is checked by the rows that it gives."""


def claim_run_folder(run_dir: Path, plan: Plan) -> None:
    """Check the run folder, then write the resolved config and the data's record into it. Collective."""
    check_run_folder(run_dir, plan)
    dist.barrier()
    if dist.rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / DATA, plan.data.model_dump_json(indent=1))
        write_atomically(run_dir / CONFIG, dump_settings(plan.config))
    dist.barrier()


def check_run_folder(run_dir: Path, plan: Plan) -> None:
    """Check that a run that has checkpoints in `run_dir` is this one, on the same data; and so with the parent of a
    branch that has none of its own yet: afterwards the parent may move.

    Raises ConfigError listing the fields that differ, or DataError naming the corpora that do. Writes nothing.
    """
    newest = list_checkpoints(run_dir)[-1:]
    if any((run_dir / "checkpoints").glob("step_*")):
        theirs = read_run_config(run_dir)
        differing = [f"{field}: {old!r} in {run_dir / CONFIG}, {new!r} now"
                     for field, old, new in _differences(theirs, plan.config)]
        if differing:
            listed = "\n  ".join(differing)
            raise ConfigError(f"{run_dir} belongs to another run:\n  {listed}\ngive this one a run_dir of its own, or "
                              f"start it with the old values")
        _check_same_data(run_dir, plan, may_differ_in_names=False)
        _check_same_rows(run_dir, plan, step=newest[0].state.step if newest else 0)
    if plan.config.parent and not newest:
        _check_same_data(Path(plan.config.parent.run_dir), plan, may_differ_in_names=True)
        _check_same_rows(Path(plan.config.parent.run_dir), plan, step=plan.config.parent.step)


def _check_same_data(run_dir: Path, plan: Plan, *, may_differ_in_names: bool) -> None:
    """The packed data are those that the run in `run_dir` was trained on, by their shards' hashes; for a branch, as far
    as both have them."""
    known = {name: c.rows_hash for name, c in read_data_record(run_dir).corpora.items()}
    found = {name: c.rows_hash for name, c in plan.data.corpora.items()}
    names = {*known} & {*found} if may_differ_in_names else {*known, *found}
    other = sorted(name for name in names if known.get(name) != found.get(name))
    if other:
        raise DataError(f"{', '.join(other)} below data.packed={shown(plan.config.data.packed)} are not what {run_dir} "
                        f"was trained on; give it the corpora that it began with, or start a new run")


def _check_same_rows(run_dir: Path, plan: Plan, *, step: int) -> None:
    """Up to `step` the plan has the rows that the run in `run_dir` has read: what it goes on from is counted right."""
    theirs = read_run_config(run_dir)
    end = step * theirs.batch.global_batch_size
    before = build_order(theirs, read_data_record(run_dir)).sampler
    if before.order_until(end) != plan.sampler.order_until(end):
        raise ConfigError(f"data.max_epochs, data.when_dry, data.mix or data.seed of this run give other rows for "
                          f"steps 1 to {step:,} than those that {run_dir} has read; let them be as they were up to "
                          f"there ({run_dir / CONFIG})")


def _differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """Dotted fields in which two resolved configs train differently. A trunk without annealing may grow longer; a
    parent is known by its step and hash, wherever it lies."""
    a, b = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    grows = all(c.schedule.kind in ("wsa", "constant") and c.schedule.anneal is None for c in (old, new))
    free = (*FREE_TO_CHANGE, "parent.run_dir", *(["schedule.total"] if grows else []))
    return [(k, a.get(k), b.get(k)) for k in sorted({*a, *b})
            if a.get(k) != b.get(k) and not any(k == f or k.startswith(f + ".") for f in free)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted key; an empty block is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
