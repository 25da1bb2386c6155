"""Ranks that stand still or are slow, by real means: a stopped process, a held interpreter lock, a limited process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from cprec import dist
from cprec.cluster.straggler import find_slow
from cprec.cluster.watchdog import summarize
from cprec.errors import EXIT_HANG
from cprec.train.metrics import read_metrics


def start_ranks(world: dict[str, Any], folder: Path, **changes: Any) -> tuple[Path, list[subprocess.Popen[str]]]:
    """A run of two ranks that would go on for hours, once it has made its first steps; and its folder."""
    run_dir = folder / "run"
    values = {**world, "run_dir": str(run_dir), "schedule": {"total": {"steps": 100_000}, "warmup": {"steps": 2}},
              "checkpoint": {"every": 100_000}, "validation": {"every": None}, **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": dist.free_port(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.REPO)}
    ranks = [subprocess.Popen([sys.executable, str(tiny.REPO / "launch/pretrain.py"), "--config",
                               str(folder / "run.yaml")], text=True, stderr=(folder / f"stderr-{r}").open("w"),
                              env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    wait_for(lambda: len(read_metrics(run_dir)) > 3 or any(p.poll() is not None for p in ranks))
    return run_dir, ranks


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def end(processes: list[subprocess.Popen[str]]) -> None:
    for p in processes:
        p.kill()
        p.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_world(tmp_path_factory.mktemp("world"))


def test_when_one_rank_is_stopped_the_other_writes_its_stacks_names_it_and_ends_with_the_code_of_a_hang(
        world: dict[str, Any], tmp_path: Path) -> None:
    run_dir, ranks = start_ranks(world, tmp_path, watchdog={"timeout_s": 4})
    try:
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert ranks[0].wait(timeout=200) == EXIT_HANG
    finally:
        end(ranks)
    said = (tmp_path / "stderr-0").read_text()
    assert f"rank 1 on {os.uname().nodename}: no answer" in said
    folder, = (run_dir / "hang").iterdir()
    assert (folder / "summary.txt").read_text() in said
    assert [p.name for p in folder.glob("rank_*")] == ["rank_00000.txt"]
    stacks = (folder / "rank_00000.txt").read_text()
    assert re.match(r"(train|cluster)/\w+\.py:\d+ in \w+", stacks), stacks  # wherever it waits for the other rank
    assert "in _run" in stacks and "in _watch" in stacks  # the main thread's, and every other one's


def test_when_one_rank_is_killed_the_other_ends_with_a_line_instead_of_its_own_stack(world: dict[str, Any],
                                                                                    tmp_path: Path) -> None:
    _, ranks = start_ranks(world, tmp_path)
    try:
        ranks[1].kill()
        assert ranks[0].wait(timeout=200) == 1
    finally:
        end(ranks)
    said = (tmp_path / "stderr-0").read_text()
    assert f"LostRankError: rank 0 on {os.uname().nodename} has lost another rank (Connection" in said
    assert "Traceback" not in said


def test_a_process_that_keeps_the_interpreters_lock_is_ended_and_leaves_its_stacks(tmp_path: Path) -> None:
    code = ("import ctypes, sys; from pathlib import Path; from cprec.cluster.watchdog import Watchdog\n"
            "def stuck(): ctypes.PyDLL(None).pause()\n"
            "with Watchdog(Path(sys.argv[1]), timeout_s=0.1): stuck()")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(tiny.REPO)})
    assert done.returncode == 1 and "in stuck" in done.stderr


def test_a_summary_names_first_who_does_not_answer_and_then_the_places_where_the_fewest_are(tmp_path: Path) -> None:
    hosts = ["node-a", "node-a", "node-b", "node-b", "node-c"]
    places = {0: "x.py:1 in wait", 1: "x.py:1 in wait", 2: "read.py:9 in read", 3: "x.py:1 in wait"}
    assert summarize(places, hosts, step=7, silent_s=30.4, folder=tmp_path).splitlines()[1:] == [
        "  rank 4 on node-c: no answer: stopped, or gone with the machine",
        "  rank 2 on node-b: read.py:9 in read",
        "  3 ranks (0 on node-a, 1 on node-a, 3 on node-b): x.py:1 in wait"]


def test_a_rank_that_gets_little_of_its_processor_is_named_as_the_one_that_holds_up_the_others(
        world: dict[str, Any], tmp_path: Path) -> None:
    _, ranks = start_ranks(world, tmp_path, log_every=2)
    done = threading.Event()
    throttle = threading.Thread(target=limit, args=(ranks[1].pid, done))
    throttle.start()
    try:
        wait_for(lambda: "rank 1 on" in (tmp_path / "stderr-0").read_text())
    finally:
        done.set()
        throttle.join()
        end(ranks)
    line = next(line for line in (tmp_path / "stderr-0").read_text().splitlines() if "rank 1 on" in line)
    assert "holds up the others: its matrix products take" in line


def limit(pid: int, done: threading.Event) -> None:
    """Let a process run for 1 of every 11 ms, as cpulimit does: shorter than a measured product, so each is stopped."""
    while not done.is_set():
        os.kill(pid, signal.SIGSTOP)
        done.wait(0.01)
        os.kill(pid, signal.SIGCONT)
        done.wait(0.001)


def test_slow_is_who_exceeds_the_median_rank_in_products_or_in_waiting_for_rows() -> None:
    # by rank: median product 1.0, so more than 1.5 is slow; median wait 0.1, so with steps of 2 s more than 0.3 is
    slow = find_slow([1.0, 1.5, 1.6, 0.9, 1.0], [0.1, 0.31, 0.1, 0.0, 0.3], step_s=2.0)
    assert [(s.rank, s.why) for s in slow] == [
        (2, "its matrix products take 1.6 times as long as the median rank's"),
        (1, "it waits 0.31 s per step of 2.00 s for its rows, the median rank 0.10 s")]
    assert [s.rank for s in find_slow([1.0, 2.0], [0.0, 0.0], step_s=1.0)] == [1]  # of two, one can be slow
