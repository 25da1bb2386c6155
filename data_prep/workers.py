"""Runs a function over many tasks on a pool of processes, results in the order of the tasks.

reads: nothing. writes: nothing. Keeps at most two tasks per worker waiting, so that lazily made tasks stay few.
The results do not depend on the number of workers; one worker runs in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar

from cprec.log import progress
from cprec.tokenizer import Tokenizer, load_tokenizer

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """A pool of `n` processes, started when first needed and kept until `close`; with n = 1 this process works."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task], *, n_tasks: int,
            label: str) -> Iterator[Result]:
        """Yield `function(task)` for every task, in order. A worker's exception is raised here with its traceback.

        `function` must be importable (a module's top level), tasks and results must pickle.
        """
        results = map(function, tasks) if min(self._n, n_tasks) <= 1 else self._on_pool(function, tasks)
        yield from progress(results, total=n_tasks, label=label, unit="tasks")

    def close(self) -> None:
        """End the processes; tasks not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _on_pool(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        if self._pool is None:
            # spawn: a fork of a process that holds engine threads can dead-lock
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._n, mp_context=context, initializer=_end_with_parent)
        waiting: deque[Future[Result]] = deque()
        todo = iter(tasks)
        try:
            for task in islice(todo, 2 * self._n):
                waiting.append(self._pool.submit(function, task))
            while waiting:
                result = waiting.popleft().result()
                for task in islice(todo, 1):
                    waiting.append(self._pool.submit(function, task))
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


@lru_cache(maxsize=2)
def cached_tokenizer(name: str) -> Tokenizer:
    """The tokenizer, loaded once per process."""
    return load_tokenizer(name)
