"""The pool gives results in order and lets a worker's error through."""

from __future__ import annotations

import operator
import os

import pytest

from cprec.errors import DataError
from data_prep.workers import Workers


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    pool = Workers(workers)
    for n in (20, 3):  # the second run uses the same processes
        assert list(pool.run(operator.neg, iter(range(n)), n_tasks=n, label="test")) == [-i for i in range(n)]
    pool.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_workers_error_comes_through_whole(workers: int) -> None:
    pool = Workers(workers)
    tasks: list[object] = [1, "nothing"]
    with pytest.raises(TypeError, match="bad operand type for unary -: 'str'"):
        list(pool.run(operator.neg, tasks, n_tasks=2, label="test"))
    pool.close()


def test_a_killed_worker_is_one_clear_error() -> None:
    pool = Workers(2)
    with pytest.raises(DataError, match=r"pack: a worker process was killed.* with fewer `workers`"):
        list(pool.run(os._exit, [1, 2], n_tasks=2, label="pack"))
    pool.close()
