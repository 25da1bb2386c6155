"""The training loop: resume, step, log, validate, save, stop when asked. Read `train` first; it is the whole story.

reads: packed corpora, a model folder or the run's (or its parent's) newest checkpoint. writes: the run folder
(`config.yaml`, `metrics.jsonl`, `starts.jsonl`, `tensorboard/`, `checkpoints/`). State of a run: the step, of which
rows, rate and phase are functions, and what its guard has learned about bad steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cprec import dist
from cprec.cluster import preflight
from cprec.cluster.straggler import Stragglers
from cprec.cluster.watchdog import Watchdog
from cprec.config import RunConfig
from cprec.data.corpora import shown
from cprec.data.dataset import PackedDataset, Step, open_corpora
from cprec.data.remote import small_cache_warning, verify_file
from cprec.errors import CheckpointError, ConfigError, DataError, DivergedError, n_of, raise_all
from cprec.log import get_logger
from cprec.log import progress as with_bar
from cprec.process import only_writer
from cprec.settings import dump_settings
from cprec.train.checkpoint import (
    Checkpoint,
    State,
    checkpoint_name,
    checkpoints_dir,
    list_checkpoints,
    newest_sound,
    read_checkpoint,
    verify_checkpoint,
)
from cprec.train.disk import name_refused_writes
from cprec.train.engine import Engine, StepResult
from cprec.train.guard import QUARANTINE, Guard, read_quarantine, write_quarantine
from cprec.train.metrics import BadStepRecord, MetricsLog
from cprec.train.partitions import SavedState
from cprec.train.plan import Plan, build_plan
from cprec.train.profile import Trace, parse_steps
from cprec.train.retention import give_back_parents, lease
from cprec.train.run_folder import check_run_folder, claim_run_folder
from cprec.train.saving import Saver
from cprec.train.starts import recorded_start
from cprec.train.stop import exit_code_of, look_for_stop_file, remove_stop_file, signals_collected
from cprec.train.validate import validate
from cprec.train.watch import Watch

log = get_logger(__name__)


@dataclass
class Progress:
    """What the loop carries from step to step. `step` counts steps done."""

    step: int
    guard: Guard
    valid_loss: float | None = None
    """Of this very step."""


def run(config: RunConfig, *, dry_run: bool = False, planned_world_size: int | None = None,
        profile: str | None = None) -> int:
    """What a launch script does with a config: train and return the exit code, or print the plan and start nothing.

    `profile`: steps to trace, as FIRST:LAST.
    """
    if dry_run:
        plan = build_plan(config, planned_world_size or dist.world_size())
        check_run_folder(Path(plan.config.run_dir), plan)
        if dist.rank() == 0:
            print(dump_settings(plan.config))
            print(plan.text())
        return 0
    with signals_collected() as asked:  # from the first to the last: a job may be told to end while it loads or leaves
        try:
            return train(config, traced=parse_steps(profile), asked=asked)
        finally:
            dist.shutdown()


@dist.name_lost_ranks()
def train(config: RunConfig, *, traced: range = range(0), asked: list[int] | None = None) -> int:
    """Train to the end of the schedule, from wherever the run folder stands; the exit code, not 0 if stopped before.

    `traced`: steps, counted from 1, that the profiler watches. `asked`: not empty, on any rank, once the run is to
    stop, see `cprec.train.stop`.

    Collective: every rank calls it. Raises ConfigError, DataError, CheckpointError, DivergedError or LostRankError.
    """
    dist.init()
    if config.preflight:
        preflight.examine(config)
    plan = build_plan(config, dist.world_size())
    _check_one_view(plan)
    run_dir = Path(plan.config.run_dir)
    with name_refused_writes(run_dir), ExitStack() as held:
        _hold(run_dir, held)
        claim_run_folder(run_dir, plan)
        if (parent := plan.config.parent) and dist.rank() == 0:
            lease(Path(parent.run_dir), parent.step, run_dir=run_dir)
        return _train(plan, run_dir, traced, [] if asked is None else asked)


def _check_one_view(plan: Plan) -> None:
    """Every rank read the same manifests: machines have copies, and data at a URL may change in between. Collective."""
    view = xxhash.xxh3_128(plan.data.model_dump_json().encode())
    for manifest in plan.valid.values():  # the record is of training data only
        view.update(manifest.model_dump_json().encode())
    seen = dist.gather_texts([view.hexdigest()])
    other = [str(rank) for rank, theirs in enumerate(seen) if theirs != seen[0]]
    if other:
        raise DataError(f"data.packed={shown(plan.config.data.packed)}: rank {', '.join(other)} found other data there "
                        f"than rank 0; give every machine the same copy, and start again")


def _hold(run_dir: Path, held: ExitStack) -> None:
    """Make rank 0 the folder's only writer; every rank raises if it cannot be."""
    problems = []
    if dist.rank() == 0:
        try:
            held.enter_context(only_writer(run_dir))
        except ConfigError as e:
            problems.append(str(e))
    raise_all(dist.gather_texts(problems), of="run_dir")


def _train(plan: Plan, run_dir: Path, traced: range, asked: list[int]) -> int:
    start = _starting_point(plan, run_dir)
    if start and start.run_dir == run_dir and start.state.step >= plan.schedule.total_steps:
        log.info("%s is complete: %d of %d steps", run_dir, start.state.step, plan.schedule.total_steps)
        return 0
    trace = Trace(run_dir, traced, next_step=(start.state.step if start else plan.first_step) + 1,
                  last_step=plan.schedule.total_steps)
    dataset = _open_data(plan)
    engine = Engine(plan)
    progress = _resume(engine, plan, start)
    dataset.leave_out(progress.guard.quarantine)
    _announce(plan, engine)
    saver = Saver(engine, run_dir, plan.config.checkpoint)
    metrics = MetricsLog(run_dir, plan.config, resume_step=progress.step if start else -1, active=dist.rank() == 0)
    try:
        with recorded_start(run_dir, step=lambda: progress.step, last_step=plan.schedule.total_steps), \
                Watchdog(run_dir, timeout_s=plan.config.watchdog.timeout_s) as watchdog:
            is_complete = _run(plan, engine, saver, dataset, metrics, progress, trace, asked, watchdog)
        remove_stop_file(run_dir)
        return 0 if is_complete else exit_code_of(asked)
    except DataError as e:
        e.on_one_rank = True  # a rank reads rows that no other one reads
        raise
    finally:
        trace.close()
        metrics.close()
        saver.close()
        engine.close()


def _run(plan: Plan, engine: Engine, saver: Saver, dataset: PackedDataset, metrics: MetricsLog, progress: Progress,
         trace: Trace, asked: list[int], watchdog: Watchdog) -> bool:
    """Steps from `progress.step` to the last one, or to the next step's border when asked to stop: then False."""
    run_dir, total, log_every = Path(plan.config.run_dir), plan.schedule.total_steps, plan.config.log_every
    checkpoint_steps, validation_steps = set(plan.checkpoint_steps()), set(plan.validation_steps())
    watch, stragglers = Watch(plan, engine, alive=watchdog.beat), Stragglers(engine.device)
    clock = watch.clock
    if plan.valid and progress.step == 0:
        with clock.part("validation"):
            metrics.write(validate(plan, engine, 0, alive=watchdog.beat))
    for step in clock.each("data", _with_bar(dataset.steps(progress.step, total), total - progress.step)):
        trace.before(progress.step + 1)
        look_for_stop_file(run_dir, asked)
        result = None
        if not step.n_valid:
            log.info("step %d is passed over: all of its rows are in quarantine", progress.step + 1)
        else:
            engine.train_only_embeddings(plan.only_embeddings(progress.step))
            result = engine.step(step, plan.schedule.lr(progress.step), judge=progress.guard.judge, times=clock,
                                 asked_to_stop=asked)
            watch.add(step, result)
            _guard(result, dataset, metrics, progress, saver)
        progress.step, progress.valid_loss = progress.step + 1, None
        n, stop = progress.step, result is not None and result.is_asked_to_stop
        trace.after(n)
        watchdog.step_done(n)
        if saver.is_under_way:
            with clock.part("checkpoint", more=True):
                saver.poll()
        saves = n in checkpoint_steps or stop
        if n % log_every == 0 or saves:  # also before it saves, so that a run that goes on from there logs the same
            with clock.part("logging"):
                _log(metrics, watch, stragglers, progress, total)
        if n in validation_steps:
            with clock.part("validation"):
                progress.valid_loss = _validate(plan, engine, metrics, n, watchdog)
        if saves:
            with clock.part("checkpoint"):
                watchdog.expect_long()
                saver.save(_state(plan, engine, progress))
        if stop and n < total:
            watchdog.expect_long()
            saver.finish()
            log.warning("asked to stop: saved step %d of %d; the same command goes on from there", n, total)
            return False
    watchdog.expect_long()
    saver.finish()
    return True


def _validate(plan: Plan, engine: Engine, metrics: MetricsLog, step: int, watchdog: Watchdog) -> float:
    record = validate(plan, engine, step, alive=watchdog.beat)
    metrics.write(record)
    return record.loss


def _with_bar(steps: Iterator[Step], n_steps: int) -> Iterable[Step]:
    return with_bar(steps, total=n_steps, label="train", unit="step", lines=False) if dist.rank() == 0 else steps


def _log(metrics: MetricsLog, watch: Watch, stragglers: Stragglers, progress: Progress, total_steps: int) -> None:
    record = watch.record(progress.step, bad_steps=progress.guard.bad_steps)
    if record:
        metrics.write(record)
        log.info("%s", record.line(total_steps))
        stragglers.look(progress.step, step_s=record.step_s, data_s=record.time_s.data)


def _guard(result: StepResult, dataset: PackedDataset, metrics: MetricsLog, progress: Progress, saver: Saver) -> None:
    """Count the step; of one whose update was left out, name and put aside the rows, and stop after too many."""
    guard = progress.guard
    if not result.rejected:
        guard.note_good(result.grad_norm)
        return
    n, rows = progress.step + 1, dataset.rows_by_corpus(progress.step)
    guard.note_bad(rows)
    dataset.leave_out(guard.quarantine)
    by_corpus = ", ".join(f"{len(of):,} of {name}" for name, of in rows.items())
    culprits = dist.gather_texts([dataset.name_row(progress.step, m, i) for m, i in result.bad_rows])
    found = f"; not finite in {', '.join(culprits)}" if culprits else ""
    if dist.rank() == 0:
        log.warning("step %d was left out: %s%s; its rows are not read again: %s", n, result.rejected, found, by_corpus)
    metrics.write(BadStepRecord(step=n, reason=result.rejected, loss=_finite(result.loss),
                                grad_norm=_finite(result.grad_norm), rows=rows))
    if not guard.is_exhausted:
        return
    saver.finish()  # what is under way is sound, and what the run goes on from
    run_dir = saver.run_dir
    if dist.rank() == 0:
        write_quarantine(run_dir, guard.quarantine)
    saved = list_checkpoints(run_dir)[-1:]
    start = f"from {saved[0].folder}" if saved else "from the beginning"
    n_rows = sum(map(len, guard.quarantine.values()))
    raise DivergedError(
        f"{guard.bad_steps} steps were left out, more than guard.max_bad_steps; the last was step {n}: "
        f"{result.rejected}{found}; its rows: {by_corpus}. The same command goes on {start}, without the {n_rows:,} "
        f"rows that {run_dir / QUARANTINE} lists. Look at them first (launch/peek.py {run_dir} --step {n}); if they "
        f"are sound, begin another run_dir with a lower optimizer.peak_lr")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _starting_point(plan: Plan, run_dir: Path) -> Checkpoint | None:
    """The run's newest sound checkpoint, else its parent's, else None: the model as it was published. Collective."""
    give_back_parents(run_dir)
    own = newest_sound(run_dir)
    parent = plan.config.parent
    if own or parent is None:
        return own
    folder = checkpoints_dir(Path(parent.run_dir)) / checkpoint_name(parent.step)
    checkpoint = read_checkpoint(folder)
    if checkpoint.state_hash != parent.state_hash:
        raise CheckpointError(f"{folder} is not the checkpoint that {run_dir} branched from: its state.json has hash "
                              f"{checkpoint.state_hash}, the branch's config says {parent.state_hash}; branch anew")
    verify_checkpoint(checkpoint)
    return checkpoint


def _resume(engine: Engine, plan: Plan, start: Checkpoint | None) -> Progress:
    listed = read_quarantine(Path(plan.config.run_dir))
    if start is None:
        progress = Progress(plan.first_step, Guard(plan.config.guard))
    else:
        state = start.state
        _check_same_data(plan, start)
        engine.load(SavedState(start.folder))
        log.info("loaded %s: step %d, %s tokens seen", start.folder, state.step, f"{state.tokens_seen:,}")
        if start.run_dir == Path(plan.config.run_dir) and state.config_hash != _config_hash(plan):
            log.info("it was saved under another config.yaml: fields that may change in a run have changed")
        if (state.world_size, state.zero_stage) != (plan.world_size, engine.zero_stage):
            log.info("it was saved by %s under ZeRO stage %d; this is %s under stage %d",
                     n_of(state.world_size, "rank"), state.zero_stage, n_of(plan.world_size, "rank"),
                     engine.zero_stage)
        progress = Progress(state.step, Guard(plan.config.guard, bad_steps=state.bad_steps, quarantine=state.quarantine,
                                              recent_norms=state.recent_norms))
    progress.guard.put_aside(listed)
    if kept := progress.guard.quarantine:
        log.info("in quarantine: %s", ", ".join(f"{n_of(len(rows), 'row')} of {name}" for name, rows in kept.items()))
    return progress


def _check_same_data(plan: Plan, start: Checkpoint) -> None:
    """The checkpoint was trained on the run's corpora: a folder may have been copied from another run."""
    ours, theirs = {name: c.rows_hash for name, c in plan.data.corpora.items()}, start.state.data_hashes
    other = sorted(name for name in {*ours} & {*theirs} if ours[name] != theirs[name])
    if other:
        raise CheckpointError(f"{start.folder} was trained on other data: {', '.join(other)} have other hashes than in "
                              f"data.packed={shown(plan.config.data.packed)}")


def _config_hash(plan: Plan) -> str:
    """Hash of the run's `config.yaml`."""
    return xxhash.xxh3_128_hexdigest(dump_settings(plan.config).encode())


def _state(plan: Plan, engine: Engine, progress: Progress) -> State:
    n, guard = progress.step, progress.guard
    return State(
        step=n, tokens_seen=n * plan.tokens_per_step, rows_seen=n * plan.config.batch.global_batch_size,
        lr=plan.schedule.lr(n), phase=plan.schedule.phase(n), bad_steps=guard.bad_steps,
        recent_norms=guard.recent_norms, quarantine=guard.quarantine, valid_loss=progress.valid_loss,
        config_hash=_config_hash(plan),
        data_hashes={name: c.rows_hash for name, c in plan.data.corpora.items()},
        tokenizer_fingerprint=next(iter(plan.train.values())).tokenizer.fingerprint,
        world_size=plan.world_size, zero_stage=engine.zero_stage, parent=plan.config.parent, files={})


def _open_data(plan: Plan) -> PackedDataset:
    batch = plan.config.batch
    dataset = PackedDataset(
        open_corpora(plan.sampler, plan.places, plan.cache, plan.train), plan.sampler,
        global_batch_size=batch.global_batch_size, micro_batch_size=batch.micro_batch_size,
        rank=dist.rank(), world_size=plan.world_size)
    manifests = [*plan.train.values(), *plan.valid.values()]
    if dist.rank() == 0 and plan.cache and (warning := small_cache_warning(plan.cache, manifests)):
        log.warning("%s", warning)
    if plan.config.data.verify == "full":
        raise_all(dist.gather_texts(_altered_shards(plan)), of="data.packed", error=DataError)
    return dataset


def _altered_shards(plan: Plan) -> list[str]:
    """What is wrong with the bytes of this rank's share of the shards: of all its machine has, if they are cached."""
    problems = []
    manifests = {**plan.train, **plan.valid}
    files = [(name, file) for name, manifest in manifests.items() for file in manifest.files]
    first, step = (dist.local_rank(), dist.local_world_size()) if plan.cache else (dist.rank(), plan.world_size)
    mine = files[first::step]
    for name, file in with_bar(mine, total=len(mine), label="verify", unit="shard") if dist.rank() == 0 else mine:
        try:
            verify_file(plan.places[name], file, plan.cache)
        except DataError as e:
            problems.append(str(e))
    return problems


def _announce(plan: Plan, engine: Engine) -> None:
    shape = engine.model_shape
    log.info("%s: %.2fM parameters, %s, attention %s, ZeRO stage %d, on %s", plan.config.model.path,
             shape.n_params / 1e6, engine.dtype, engine.backend, engine.zero_stage, engine.device)
    doubtful = plan.warnings() if dist.rank() == 0 else []  # one rank says it
    for line in plan.text().splitlines():
        log.log(logging.WARNING if line.strip() in doubtful else logging.INFO, "%s", line)
