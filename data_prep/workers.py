"""Runs a function over many tasks on worker processes or MPI ranks, results in the order of the tasks.

reads: nothing. writes: nothing. Keeps at most two tasks per worker waiting, so that lazily made tasks stay few.
The results do not depend on the number of workers; one worker runs in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar, cast

from cprec.errors import ConfigError, DataError
from cprec.log import get_logger, progress
from cprec.tokenizer import Tokenizer, load_tokenizer

log = get_logger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which mpirun (Open MPI, MPICH) and srun tell how many ranks they started."""


class Workers:
    """A pool of `n` processes, started when first needed and kept until `close`; with n = 1 this process works.

    Given an `executor`, for one that spans machines, that one works; `n` is how many workers it has.
    """

    def __init__(self, n: int, executor: Executor | None = None) -> None:
        self._n = n
        self._executor = executor
        self._is_own = executor is None

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task], *, n_tasks: int,
            label: str) -> Iterator[Result]:
        """Yield `function(task)` for every task, in order. A worker's exception is raised here with its traceback.

        `function` must be importable (a module's top level), tasks and results must pickle.
        """
        in_this_process = self._is_own and min(self._n, n_tasks) <= 1
        results = map(function, tasks) if in_this_process else self._on_pool(function, tasks, label)
        yield from progress(results, total=n_tasks, label=label, unit="tasks")

    def close(self) -> None:
        """End the processes; tasks not begun are dropped."""
        if self._executor is not None and self._is_own:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def _on_pool(self, function: Callable[[Task], Result], tasks: Iterable[Task], label: str) -> Iterator[Result]:
        if self._executor is None:
            # spawn: a fork of a process that holds engine threads can dead-lock
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._n, mp_context=context, initializer=_end_with_parent)
        waiting: deque[Future[Result]] = deque()
        todo = iter(tasks)
        try:
            for task in islice(todo, 2 * self._n):
                waiting.append(self._executor.submit(function, task))
            while waiting:
                try:
                    result = waiting.popleft().result()
                except BrokenProcessPool:
                    raise DataError(f"{label}: a worker process was killed, perhaps for want of memory; the same "
                                    f"command goes on, with fewer `workers` if need be") from None
                for task in islice(todo, 1):
                    waiting.append(self._executor.submit(function, task))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _end_with_parent() -> None:
    """Let this worker end as soon as its parent is gone, however that died: nobody would read its results."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def n_mpi_ranks() -> int:
    """How many ranks `mpirun` or `srun` started of this program; 1 without them."""
    return max((int(os.environ.get(name, "1")) for name in MPI_SIZES), default=1)


def over_mpi(work: Callable[[Workers], None]) -> None:
    """Call `work` on rank 0 with all other ranks as its workers; the others return when it is done.

    A rank that dies takes the job with it: start it again, finished parts are kept. Raises ConfigError where mpi4py is
    missing or where the ranks do not see each other.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as e:
        raise ConfigError(f"started as {n_mpi_ranks()} ranks, but mpi4py cannot be imported ({e}); pip install mpi4py "
                          f"built for the MPI at hand, or start one process without mpirun or srun") from None
    world = MPI.COMM_WORLD
    if world.Get_size() != n_mpi_ranks():
        raise ConfigError(f"started as {n_mpi_ranks()} ranks, but mpi4py sees {world.Get_size()}: it was built for "
                          f"another MPI than the one that starts it (under srun, try --mpi=pmix or --mpi=pmi2)")
    with MPICommExecutor(world, root=0) as executor:
        if executor is not None:
            log.info("MPI: rank 0 of %d leads, %d ranks work", world.Get_size(), world.Get_size() - 1)
            work(Workers(world.Get_size() - 1, cast(Executor, executor)))


@lru_cache(maxsize=2)
def cached_tokenizer(name: str) -> Tokenizer:
    """The tokenizer, loaded once per process."""
    return load_tokenizer(name)
