"""The same launch/pretrain.py under every launcher, on one machine and on two hosts: real ranks, the same losses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hosts import Hosts, running_hosts

from cprec.errors import EXIT_STOPPED
from cprec.launcher import free_port
from cprec.train.checkpoint import list_checkpoints
from cprec.train.metrics import read_metrics

BIN = Path(sys.executable).parent
SCRIPT = str(tiny.REPO / "launch/pretrain.py")
OPEN_MPI = shutil.which("mpirun.openmpi")
MPICH = shutil.which("mpiexec.hydra", path=os.pathsep.join([str(BIN), os.environ["PATH"]]))
needs_open_mpi = pytest.mark.skipif(OPEN_MPI is None, reason="no Open MPI: apt-get install openmpi-bin")
needs_ssh = pytest.mark.skipif(not all(map(shutil.which, ("/usr/sbin/sshd", "ssh", "ssh-keygen"))),
                               reason="no sshd: apt-get install openssh-server openssh-client")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny world, trained for 4 steps without a look at validation data."""
    values = tiny.write_world(tmp_path_factory.mktemp("world"))
    return {**values, "schedule": {"total": {"steps": 4}, "warmup": {"steps": 2}}, "validation": {"every": 100},
            "deepspeed": str(tiny.REPO / "ds_configs/zero1.json")}


@pytest.fixture(scope="module")
def losses_of_deepspeed(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("deepspeed")
    said = start([str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()], world, folder)
    assert "started by deepspeed: rank 0 of 2" in said
    return losses(folder / "run")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with running_hosts(("n1", "n2"), tmp_path_factory.mktemp("hosts")) as hosts:
        hosts.start_ssh()
        for name in hosts.names:
            ssh = hosts.on("n1", "ssh", name, "true")
            deadline = time.monotonic() + 30
            while subprocess.run(ssh, capture_output=True).returncode:
                assert time.monotonic() < deadline, f"no ssh to {name}"
        yield hosts


def start(launcher: list[str], world: dict[str, Any], folder: Path, *, expect: int = 0, **environment: str) -> str:
    """Train under `launcher` into `folder/run`; what was said."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**world, "run_dir": str(folder / "run")}))
    env = {**os.environ, "PYTHONPATH": str(tiny.REPO), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*launcher, SCRIPT, "--config", str(config)], capture_output=True, text=True, env=env,
                          timeout=500)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run)]


def open_mpi_first(folder: Path) -> dict[str, str]:
    """An environment whose `mpirun` is Open MPI's, whichever else there is."""
    assert OPEN_MPI
    (folder / "bin").mkdir()
    (folder / "bin/mpirun").symlink_to(OPEN_MPI)
    return {"PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]), "MPI4PY_MPIABI": "openmpi"}


def test_torchrun_trains_like_deepspeed(world: dict[str, Any], losses_of_deepspeed: list[float],
                                        tmp_path: Path) -> None:
    said = start([str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()], world, tmp_path)
    assert "started by torchrun: rank 0 of 2" in said
    assert losses(tmp_path / "run") == losses_of_deepspeed


@pytest.mark.skipif(MPICH is None, reason="no MPICH: pip install mpich")
def test_mpirun_of_mpich_trains_like_deepspeed(world: dict[str, Any], losses_of_deepspeed: list[float],
                                               tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'cprec[mpi]'")
    said = start([str(MPICH), "-n", "2", sys.executable], world, tmp_path)
    assert "started by mpirun: rank 0 of 2" in said
    assert losses(tmp_path / "run") == losses_of_deepspeed


@needs_open_mpi
def test_mpirun_of_open_mpi_trains_like_deepspeed(world: dict[str, Any], losses_of_deepspeed: list[float],
                                                  tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'cprec[mpi]'")
    said = start([str(OPEN_MPI), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable], world, tmp_path,
                 MPI4PY_MPIABI="openmpi")
    assert "started by mpirun: rank 0 of 2" in said
    assert losses(tmp_path / "run") == losses_of_deepspeed


def test_two_ranks_without_a_place_to_meet_are_told_how_to_give_one(world: dict[str, Any], tmp_path: Path) -> None:
    said = start([sys.executable], world, tmp_path, expect=2, RANK="0", WORLD_SIZE="2")
    assert "rank 0 of 2 has no MASTER_ADDR and MASTER_PORT" in said


@needs_ssh
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh: apt-get install pdsh")
def test_deepspeed_reaches_two_hosts_of_a_hostfile_over_ssh(world: dict[str, Any], losses_of_deepspeed: list[float],
                                                            two_hosts: Hosts, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    said = start(two_hosts.on("n1", str(BIN / "deepspeed"), "--hostfile", str(hostfile)), world, tmp_path)
    assert "n1: " in said and "n2: " in said  # pdsh says who spoke
    assert f"rank 0 of 2, 1 on n1; they meet at {two_hosts.address['n1']}:" in said
    assert losses(tmp_path / "run") == losses_of_deepspeed


@needs_ssh
@needs_open_mpi
def test_deepspeed_reaches_two_hosts_over_open_mpi(world: dict[str, Any], losses_of_deepspeed: list[float],
                                                   two_hosts: Hosts, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'cprec[mpi]'")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    command = two_hosts.on("n1", str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--launcher", "openmpi",
                           "--launcher_args", "--allow-run-as-root -x PATH -x PYTHONPATH -x MPI4PY_MPIABI")
    said = start(command, world, tmp_path, **open_mpi_first(tmp_path))
    assert "started by mpirun: rank 0 of 2, 1 on n1; they meet at n1:" in said
    assert losses(tmp_path / "run") == losses_of_deepspeed


def test_the_stop_file_makes_a_run_under_deepspeed_save_and_exit(world: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()  # from before the start: the run stops after its first step
    said = start([str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()], world, tmp_path,
                 expect=EXIT_STOPPED)
    assert [c.state.step for c in list_checkpoints(run)] == [1] and "asked to stop: saved step 1 of 4" in said
    assert not (run / "stop").exists()
    subprocess.run([sys.executable, str(tiny.REPO / "launch/stop.py"), str(run)], check=True)
    assert (run / "stop").exists()
