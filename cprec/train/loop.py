"""The training loop: resume, step, log, validate, save, stop when asked. Read `train` first; it is the whole story.

reads: packed corpora, a model folder or the run's (or its parent's) newest checkpoint. writes: the run folder
(`config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`). State of a run: the step; everything else (rows, rate,
phase) is a function of it.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from cprec import dist
from cprec.config import RunConfig
from cprec.data.collate import collate
from cprec.data.corpora import shown
from cprec.data.dataset import PackedDataset, Step, open_corpora
from cprec.data.remote import open_corpus, small_cache_warning, verify_file
from cprec.data.sampler import permute
from cprec.errors import EXIT_REQUEUE, CheckpointError, ConfigError, DataError, DivergedError, raise_all
from cprec.format import Manifest, PackedCorpus
from cprec.log import get_logger
from cprec.log import progress as with_bar
from cprec.process import only_writer
from cprec.settings import dump_settings
from cprec.train.checkpoint import (
    Checkpoint,
    State,
    list_checkpoints,
    load_checkpoint,
    prune,
    read_checkpoint,
    save_checkpoint,
)
from cprec.train.engine import Engine, StepResult
from cprec.train.metrics import MetricsLog, TrainRecord, ValidationRecord, memory_gb, peak_flops
from cprec.train.plan import Plan, build_plan
from cprec.train.run_folder import check_run_folder, claim_run_folder

log = get_logger(__name__)


@dataclass
class Progress:
    """What the loop carries from step to step."""

    step: int
    bad_steps: int = 0


def run(config: RunConfig, *, dry_run: bool = False, planned_world_size: int | None = None) -> int:
    """What a launch script does with a config: train and return the exit code, or print the plan and start nothing."""
    if dry_run:
        plan = build_plan(config, planned_world_size or dist.world_size())
        check_run_folder(Path(plan.config.run_dir), plan)
        if dist.rank() == 0:
            print(dump_settings(plan.config))
            print(plan.text())
        return 0
    try:
        return 0 if train(config) else EXIT_REQUEUE
    finally:
        dist.shutdown()


def train(config: RunConfig) -> bool:
    """Train to the end of the schedule, from wherever the run folder stands; False when asked to stop before it.

    Collective: every rank calls it. Raises ConfigError, DataError, CheckpointError or DivergedError.
    """
    dist.init()
    plan = build_plan(config, dist.world_size())
    _check_one_view(plan)
    run_dir = Path(plan.config.run_dir)
    with ExitStack() as held:
        _hold(run_dir, held)
        claim_run_folder(run_dir, plan)
        return _train(plan, run_dir)


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


def _train(plan: Plan, run_dir: Path) -> bool:
    start = _starting_point(plan, run_dir)
    if start and start.run_dir == run_dir and start.state.step >= plan.schedule.total_steps:
        log.info("%s is complete: %d of %d steps", run_dir, start.state.step, plan.schedule.total_steps)
        return True
    dataset = _open_data(plan)
    engine = Engine(plan)
    progress = _resume(engine, plan, start)
    _announce(plan, engine)
    metrics = MetricsLog(run_dir, resume_step=progress.step if start else -1, active=dist.rank() == 0)
    try:
        with _asked_to_stop() as asked:
            return _run(plan, engine, dataset, metrics, progress, asked)
    except DataError as e:
        e.on_one_rank = True  # a rank reads rows that no other one reads
        raise
    finally:
        metrics.close()
        engine.close()


def _run(plan: Plan, engine: Engine, dataset: PackedDataset, metrics: MetricsLog, progress: Progress,
         asked: list[int]) -> bool:
    """Steps from `progress.step` to the last one, or to the next step's border after a signal."""
    run_dir, total = Path(plan.config.run_dir), plan.schedule.total_steps
    checkpoint_steps = set(plan.checkpoint_steps())
    if plan.valid and progress.step == 0:
        metrics.write(validate(plan, engine, 0))
    watch = _StepWatch(plan, engine)
    steps: Iterator[Step] = dataset.steps(progress.step, total)
    if dist.rank() == 0:
        steps = with_bar(steps, total=total - progress.step, label="train", unit="step", lines=False)
    for step in steps:
        watch.data_is_there()
        lr = plan.schedule.lr(progress.step)
        engine.train_only_embeddings(plan.only_embeddings(progress.step))
        result = engine.step(step, lr)
        totals = _Totals.over_ranks(result, stop=bool(asked))
        _guard(totals, result, plan, dataset, progress)
        progress.step += 1
        record = watch.record(progress, step, totals, result, lr)
        if progress.step % plan.config.log_every == 0 or progress.step == total:
            metrics.write(record)
            log.info("%s", record.line(total))
        if plan.valid and (progress.step % (plan.config.validation.every or total) == 0 or progress.step == total):
            metrics.write(validate(plan, engine, progress.step))
        if progress.step in checkpoint_steps or totals.stop:
            _save(plan, engine, run_dir, progress)
        if totals.stop and progress.step < total:
            log.warning("asked to stop: saved step %d of %d; the same command goes on from there", progress.step, total)
            return False
        watch.next_step()
    return True


def validate(plan: Plan, engine: Engine, step: int) -> ValidationRecord:
    """Loss of every validation corpus on `rows_per_corpus` of its rows, the same ones every time. Collective."""
    losses, total, n_total = {}, 0.0, 0.0
    for name, manifest in plan.valid.items():
        loss_sum, n_valid = _validate_corpus(plan, engine, name, manifest)
        losses[name] = loss_sum / n_valid
        total, n_total = total + loss_sum, n_total + n_valid
    shown = "  ".join(f"{name.removeprefix('valid/')} {loss:.3f}" for name, loss in losses.items())
    log.info("step %7d  validation loss %.4f  (%s)", step, total / n_total, shown)
    return ValidationRecord(step=step, loss=total / n_total, loss_by_corpus=losses)


def _validate_corpus(plan: Plan, engine: Engine, name: str, manifest: Manifest) -> tuple[float, float]:
    """Summed loss and predicted tokens over all ranks. Ranks without a row left run a row that does not count, since
    under ZeRO-3 every rank takes part in every forward."""
    corpus = _open_valid(plan, name, manifest)
    n_rows = min(plan.config.validation.rows_per_corpus, len(corpus))
    rows = permute(np.arange(n_rows), len(corpus), key=(plan.config.data.seed, name, 0))
    loss_sum = n_valid = 0.0
    for first in range(0, n_rows, plan.world_size):
        mine = first + dist.rank()
        batch = collate([corpus[int(rows[min(mine, n_rows - 1)])]], [0])
        loss = float(engine.row_losses(batch).sum())
        if mine < n_rows:
            loss_sum, n_valid = loss_sum + loss, n_valid + batch.n_valid
    corpus.release()  # until the next validation, which may be hours away
    loss_sum, n_valid = dist.sum_over_ranks([loss_sum, n_valid])
    return loss_sum, n_valid


_valid_corpora: dict[str, PackedCorpus] = {}
"""The validation corpora of the process's run, by name."""


def _open_valid(plan: Plan, name: str, manifest: Manifest) -> PackedCorpus:
    """The corpus, opened at the run's first validation. Another manifest object, even if equal, is another run's."""
    corpus = _valid_corpora.get(name)
    if corpus is None or corpus.manifest is not manifest:
        corpus = _valid_corpora[name] = open_corpus(plan.places[name], plan.cache, manifest=manifest)
    return corpus


@dataclass(frozen=True)
class _Totals:
    """One step over all ranks: summed loss and predicted tokens by corpus, and whether any rank was asked to stop."""

    loss_sums: list[float]
    n_valid: list[float]
    stop: bool

    @classmethod
    def over_ranks(cls, result: StepResult, *, stop: bool) -> _Totals:
        n = len(result.loss_sums)
        summed = dist.sum_over_ranks([*result.loss_sums, *result.n_valid, float(stop)])
        return cls(summed[:n], summed[n:2 * n], summed[-1] > 0)

    @property
    def loss(self) -> float:
        return sum(self.loss_sums) / sum(self.n_valid)


def _guard(totals: _Totals, result: StepResult, plan: Plan, dataset: PackedDataset, progress: Progress) -> None:
    """Count a step that was skipped because something was not finite, name its rows, and stop after too many."""
    finite = math.isfinite(totals.loss)
    if finite and not result.skipped:
        return
    progress.bad_steps += 1
    rows = dataset.describe(progress.step)
    if not result.skipped:
        raise DivergedError(f"step {progress.step + 1}: the loss is {totals.loss}, but the gradients were finite and "
                            f"the weights were updated; rows: {'; '.join(rows)}; go on from the newest checkpoint")
    corpora = Counter(row.split(" ")[0] for row in rows)
    log.warning("step %d was skipped: loss %s, gradient norm %s; rows by corpus: %s; rows: %s", progress.step + 1,
                totals.loss, result.grad_norm, dict(corpora), "; ".join(rows))
    if progress.bad_steps > plan.config.max_bad_steps:
        raise DivergedError(
            f"{progress.bad_steps} steps had a non-finite loss or gradient, more than max_bad_steps="
            f"{plan.config.max_bad_steps}; the last was step {progress.step + 1}, with rows: {'; '.join(rows)}; look "
            f"at these rows, or begin another run_dir with a lower optimizer.peak_lr")


class _StepWatch:
    """Times the parts of a step and makes its record."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan, self._engine = plan, engine
        self._peak = peak_flops(engine.device)
        self.next_step()

    def next_step(self) -> None:
        self._started = time.perf_counter()

    def data_is_there(self) -> None:
        self._data_wait_s = time.perf_counter() - self._started

    def record(self, progress: Progress, step: Step, totals: _Totals, result: StepResult, lr: float) -> TrainRecord:
        plan, seconds = self._plan, time.perf_counter() - self._started
        tokens = plan.tokens_per_step
        flops = self._engine.model_shape.flops(tokens - step.n_pad, step.cost)
        mfu = flops / seconds / (self._peak * plan.world_size) if self._peak else None
        by_corpus = {name: total / n for name, total, n
                     in zip(plan.sampler.names, totals.loss_sums, totals.n_valid, strict=True) if n}
        return TrainRecord(
            step=progress.step, phase=plan.schedule.phase(progress.step - 1), lr=lr, loss=totals.loss,
            loss_by_corpus=by_corpus, grad_norm=result.grad_norm, tokens_seen=progress.step * tokens,
            tokens_per_s=tokens / seconds, tokens_per_s_per_device=tokens / seconds / plan.world_size, mfu=mfu,
            pad_share=step.n_pad / tokens, step_s=seconds, data_wait_s=self._data_wait_s,
            memory_gb=memory_gb(self._engine.device), bad_steps=progress.bad_steps)


def _starting_point(plan: Plan, run_dir: Path) -> Checkpoint | None:
    """The run's newest complete checkpoint, else its parent's, else None: the model as it was published."""
    own = list_checkpoints(run_dir)
    if own:
        return own[-1]
    parent = plan.config.parent
    if parent is None:
        return None
    folder = Path(parent.run_dir) / "checkpoints" / f"step_{parent.step:08d}"
    checkpoint = read_checkpoint(folder)
    if checkpoint.state_hash != parent.state_hash:
        raise CheckpointError(f"{folder} is not the checkpoint that {run_dir} branched from: its state.json has hash "
                              f"{checkpoint.state_hash}, the branch's config says {parent.state_hash}; branch anew")
    return checkpoint


def _resume(engine: Engine, plan: Plan, start: Checkpoint | None) -> Progress:
    if start is None:
        return Progress(plan.first_step)
    load_checkpoint(engine, start)
    log.info("loaded %s: step %d, %s tokens seen", start.folder, start.state.step, f"{start.state.tokens_seen:,}")
    return Progress(start.state.step, start.state.bad_steps)


def _save(plan: Plan, engine: Engine, run_dir: Path, progress: Progress) -> None:
    started = time.perf_counter()
    n = progress.step
    state = State(
        step=n, tokens_seen=n * plan.tokens_per_step, rows_seen=n * plan.config.batch.global_batch_size,
        lr=plan.schedule.lr(n), phase=plan.schedule.phase(n), bad_steps=progress.bad_steps,
        config_hash=xxhash.xxh3_128_hexdigest(dump_settings(plan.config).encode()),
        tokenizer_fingerprint=next(iter(plan.train.values())).tokenizer.fingerprint,
        world_size=plan.world_size, zero_stage=engine.zero_stage, parent=plan.config.parent, files={})
    saved = save_checkpoint(engine, run_dir, state)
    removed: list[str] = []
    if dist.rank() == 0:
        kept = {c.state.step for c in list_checkpoints(run_dir) if plan.is_kept(c.state.step)}
        removed = prune(run_dir, keep_last=plan.config.checkpoint.keep_last, kept_for_good=kept)
    dist.barrier()
    log.info("saved %s in %.1f s%s", saved.folder, time.perf_counter() - started,
             f"; pruned {', '.join(removed)}" if removed else "")


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
    for name, file in files[first::step]:
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


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """While inside, SIGTERM and SIGUSR1 are collected in the yielded list instead of ending the process."""
    received: list[int] = []
    old = {s: signal.signal(s, lambda number, frame: received.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
