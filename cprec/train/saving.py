"""Saving while training goes on: a copy in the host's memory, a thread that writes it, a commit at a later step.

writes: a checkpoint folder. Training stands still for the copy, not for the disk; with `checkpoint.asynchronous: false`
for all of it, without the copy. Costs: 12 bytes of host memory per trained parameter over all ranks, kept for the next
save. The order is always files and their names on the disk, on every rank; then `state.json`; then pruning.
All of that is the thread's: training takes part by a sum of two numbers at each step's border while it lasts.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cprec import dist
from cprec.config import CheckpointConfig
from cprec.errors import CheckpointError
from cprec.format import sync
from cprec.log import get_logger
from cprec.train.checkpoint import Checkpoint, State, checkpoint_name, checkpoints_dir, list_checkpoints, write_state
from cprec.train.partitions import FileInfo, Layout, file_name, write_file
from cprec.train.retention import prune

log = get_logger(__name__)


class HasLayout(Protocol):
    """The part of the engine that a save needs."""

    def layout(self) -> Layout: ...


class _Job:
    """Work for the disk, in a thread or at once, and how it ended."""

    def __init__(self, work: Callable[[], None], *, in_thread: bool) -> None:
        self.is_done = False
        self.error: str | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True) if in_thread else None
        if self._thread:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._work()
        except OSError as e:
            self.error = f"rank {dist.rank()}: {e.strerror or e}"
        except BaseException as e:
            self.error = f"rank {dist.rank()}: {type(e).__name__}: {e}"
            raise
        else:
            self.is_done = True

    def wait(self) -> None:
        if self._thread:
            self._thread.join()


class _Save:
    """A checkpoint under way: first its files, on every rank; then, when all have written, `state.json`, on rank 0."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.file: FileInfo | None = None
        self.is_committing = False
        self.removed: list[str] = []
        self.cancelled = threading.Event()
        self.began = time.perf_counter()
        self.job: _Job | None = None

    def write(self, layout: Layout, body: Iterable[Tensor]) -> None:
        """This rank's file, and every name on the way to it, on the disk itself."""
        path = self.folder / file_name(dist.rank())
        self.file = write_file(path, layout.head, body, self.cancelled.is_set)
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            sync(folder)

    def commit(self, config: CheckpointConfig) -> None:
        """From here on the checkpoint exists, and others may go. Rank 0 only."""
        write_state(self.folder, self.state)
        run_dir = self.folder.parent.parent
        try:
            self.removed = prune(run_dir, config)
        except (OSError, CheckpointError) as e:
            log.warning("could not prune the checkpoints of %s: %s", run_dir, e)


class Saver:
    """Saves a run's checkpoints. All calls but `close` are collective, at a step's border."""

    def __init__(self, engine: HasLayout, run_dir: Path, config: CheckpointConfig) -> None:
        self.run_dir = run_dir
        self.stall_s = 0.0
        """For how long training has stood still for the newest checkpoint."""
        self._engine, self._config = engine, config
        self._save: _Save | None = None
        self._memory: Tensor | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint has been begun that is not complete yet; on all ranks alike."""
        return self._save is not None

    def save(self, state: State) -> None:
        """Begin a checkpoint, after the last one is complete. Raises CheckpointError when either cannot be written."""
        self.finish()
        self.stall_s = 0.0
        with self._standing_still():
            folder = checkpoints_dir(self.run_dir) / checkpoint_name(state.step)
            self._make(folder)
            save = self._save = _Save(state, folder)
            layout, in_thread = self._engine.layout(), self._config.asynchronous
            body: Iterable[Tensor] = [self._copy(layout)] if in_thread else layout.stream()
            save.job = _Job(partial(save.write, layout, body), in_thread=in_thread)
        if not in_thread:
            self.finish()

    def poll(self) -> Checkpoint | None:
        """See how the checkpoint under way stands, and take it on; it, once it is complete, else None. Costs nothing
        when none is under way, else a sum of two numbers over the ranks. Raises CheckpointError on every rank when it
        failed on one."""
        save = self._save
        if save is None:
            return None
        with self._standing_still():
            assert save.job is not None
            n_done, n_failed = dist.sum_over_ranks([save.job.is_done, save.job.error is not None])
            if n_failed:
                self._give_up(save)
            if n_done < dist.world_size():
                return None
            if not save.is_committing:
                self._commit(save)
                return None
            return self._complete(save)

    def finish(self) -> Checkpoint | None:
        """Wait for the checkpoint under way; it, or None. Raises CheckpointError when it failed."""
        found = None
        while self._save is not None:
            with self._standing_still():
                assert self._save.job is not None
                self._save.job.wait()
            found = self.poll()
        return found

    def close(self) -> None:
        """Give up what is under way: what it has written is removed when the run starts again."""
        if self._save:
            self._save.cancelled.set()
        self._save = self._memory = None

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stall_s += time.perf_counter() - began

    def _make(self, folder: Path) -> None:
        problems = []
        if dist.rank() == 0:
            try:
                folder.mkdir(parents=True)
            except OSError as e:
                problems.append(e.strerror or str(e))
        self._raise(dist.gather_texts(problems), folder)

    def _copy(self, layout: Layout) -> Tensor:
        """The layout's bytes, in memory of the host that is kept from save to save."""
        if self._memory is None or self._memory.numel() < layout.n_bytes:
            self._memory = None
            self._memory = torch.empty(layout.n_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copy = self._memory[:layout.n_bytes]
        layout.copy_to(copy)
        return copy

    def _commit(self, save: _Save) -> None:
        """Every rank has its file on the disk: have rank 0 write `state.json`."""
        assert save.file is not None
        texts = dist.gather_texts([file_name(dist.rank()), save.file.model_dump_json()])
        files = {n: FileInfo.model_validate_json(t) for n, t in zip(texts[::2], texts[1::2], strict=True)}
        save.state = save.state.model_copy(update={"files": files}).sealed()
        save.is_committing = True
        work = partial(save.commit, self._config) if dist.rank() == 0 else _nothing
        save.job = _Job(work, in_thread=self._config.asynchronous)

    def _complete(self, save: _Save) -> Checkpoint:
        self._save = None
        n_bytes = sum(f.bytes for f in save.state.files.values())
        log.info("saved %s: %.1f MB in %.1f s%s%s", save.folder, n_bytes / 1e6, time.perf_counter() - save.began,
                 f", of which training stood still for {self.stall_s:.2f} s" if self._config.asynchronous else "",
                 f"; pruned {', '.join(save.removed)}" if save.removed else "")
        return Checkpoint(save.folder, save.state)

    def _give_up(self, save: _Save) -> None:
        """Leave nothing of a save that failed: on a full disk its room is what the next attempt needs."""
        self._save = None
        assert save.job is not None
        errors = dist.gather_texts([save.job.error] if save.job.error else [])
        save.cancelled.set()
        save.job.wait()
        dist.barrier()  # no rank writes there any more
        if dist.rank() == 0:
            shutil.rmtree(save.folder, ignore_errors=True)
        self._raise(errors, save.folder)

    def _raise(self, errors: list[str], folder: Path) -> None:
        if errors:
            saved = list_checkpoints(self.run_dir)
            newest = f"the newest complete one is {saved[-1].folder.name}" if saved else "there is no complete one yet"
            raise CheckpointError(f"{folder} could not be saved: {'; '.join(errors)}; {newest}. Make room or mend the "
                                  f"folder; the same command then goes on from there")


def _nothing() -> None:
    return None
