"""Preflight on two real ranks: a sound pair, and one whose second rank has real faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from cprec import dist
from cprec.cluster.facts import Facts, Problem
from cprec.cluster.preflight import Finding, Limits, judge
from cprec.errors import ClusterError


def preflight(folder: Path, *args: str, second: dict[str, str] | None = None,
              second_in: Path | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and error of rank 0; the second rank may have another environment and folder."""
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": dist.free_port(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.REPO),
           "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    command = [sys.executable, str(tiny.REPO / "launch/preflight.py"), "--config", str(folder / "run.yaml"),
               "--min-speed", "0.01", *args]  # other processes of this machine may slow either rank
    ranks = [subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd=second_in if r and second_in else folder,
                              env={**env, **(second or {} if r else {}), "RANK": str(r), "LOCAL_RANK": str(r)})
             for r in range(2)]
    try:
        said = [p.communicate(timeout=300) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert ranks[0].returncode == ranks[1].returncode, said
    return ranks[0].returncode, *said[0]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a run's config, whose data and run folder are named relative to it."""
    values = tiny.write_world(tmp_path)
    values = {**values, "run_dir": "run", "data": {**values["data"], "packed": "packed"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_two_sound_ranks_are_fit_and_leave_nothing_behind(world: Path) -> None:
    code, out, err = preflight(world, "--json", "--min-disk-gb", "0")
    assert code == 0, err
    said = json.loads(out)
    assert said["findings"] == [] and [r["rank"] for r in said["ranks"]] == [0, 1]
    for rank in said["ranks"]:
        assert rank["sum_is_exact"] and rank["tflops"] > 0 and rank["bus_gb_s"] > 0
    assert list((world / "run").iterdir()) == []


def test_a_rank_with_another_version_a_stale_lock_and_without_the_data_is_named(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "site" / "deepspeed-0.1.0.dist-info"  # what an old installation earlier on the path looks like
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.0\n")
    lock = tmp_path / "left" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code, out, err = preflight(world, "--min-disk-gb", "1e9", second_in=elsewhere, second={
        "PYTHONPATH": f"{other.parent}:{tiny.REPO}", "TORCH_EXTENSIONS_DIR": str(tmp_path / "left")})
    assert code == ClusterError.exit_code
    host = os.uname().nodename
    assert f"1 of 1 hosts unfit ({host})" in err
    of_second = [line for line in err.splitlines() if f"{host} (rank 1)" in line]
    for part in ("versions: deepspeed 0.1.0 here, ", f"lock: {lock} is ", "run_dir: ",
                 "data: data.packed: packed: no such"):
        assert any(part in line for line in of_second), (part, err)
    assert f"{host} (rank 0): disk: run has " in err and f"{host} (rank 0): data" not in err
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["0", host, "no"], ["1", host, "no"]]


def test_a_run_that_asks_for_preflight_does_not_start_on_an_unfit_machine(world: Path) -> None:
    lock = world / "extensions" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    done = subprocess.run(
        [sys.executable, str(tiny.REPO / "launch/pretrain.py"), "--config", "run.yaml", "preflight=true"], cwd=world,
        env={**os.environ, "PYTHONPATH": str(tiny.REPO), "TORCH_EXTENSIONS_DIR": str(world / "extensions")},
        capture_output=True, text=True, timeout=300)
    assert done.returncode == ClusterError.exit_code and f"lock: {lock} is" in done.stderr
    assert list((world / "run").iterdir()) == []


def facts(rank: int, **changes: Any) -> Facts:
    return Facts.model_validate({
        "rank": rank, "host": f"node-{rank}", "device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.13.0"},
        "tflops": 600.0, "sum_is_exact": True, "bus_gb_s": 300.0, "free_memory_gb": 79.0, "memory_gb": 80.0,
        "free_disk_gb": {"run": 500.0}, "clock_s": 0.0, **changes})


@pytest.mark.parametrize("changes, finding", [
    ({"versions": {"torch": "2.12.0"}}, ("versions", "torch 2.12.0 here, 2.13.0 elsewhere")),
    ({"versions": {}}, ("versions", "torch none here, 2.13.0 elsewhere")),
    ({"sum_is_exact": False}, ("all-reduce", "its sum over the ranks is wrong")),
    ({"tflops": 420.0}, ("speed", "420 TFLOP/s in matrix products, 70% of the median rank's")),
    ({"free_memory_gb": 60.0}, ("memory", "60.0 of 80.0 GB are free: another process uses it")),
    ({"free_disk_gb": {"run": 500.0, "/tmp": 3.0}}, ("disk", "/tmp has 3.0 GB left, less than 10")),
    ({"clock_s": -2.5}, ("clock", "2.5 s behind rank 0's")),
    ({"problems": [Problem(check="data", what="gone")]}, ("data", "gone")),
])
def test_what_is_wrong_with_one_rank_of_three_is_found_there_and_nowhere_else(
        changes: dict[str, Any], finding: tuple[str, str]) -> None:
    assert judge([facts(0), facts(1, **changes), facts(2)], Limits()) == [Finding(1, "node-1", *finding)]


def test_a_slow_rank_of_two_is_found() -> None:
    assert [f.rank for f in judge([facts(0, tflops=300.0), facts(1)], Limits())] == [0]
