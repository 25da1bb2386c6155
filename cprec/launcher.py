"""Which launcher started this process, and what it says of the run: `deepspeed`, `torchrun`, `srun`, `mpirun`, or none.

reads: the environment. writes: into the environment what torchrun would (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that nobody else needs to know the launchers. Without torch.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from cprec.errors import ConfigError

NAME = "CPREC_LAUNCHER"
"""Environment variable: the launcher that `adopt` found, as RANK no longer tells."""
FIRST_PORT, N_PORTS = 20_000, 10_000
"""Ports below those that Linux hands out (32768 and up): nobody else has one of them by chance."""


@dataclass(frozen=True)
class Place:
    """One process among those of its run; ranks count from 0."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


ALONE = Place("no launcher")


def find_place(env: Mapping[str, str]) -> Place:
    """What the environment says: RANK as torchrun and deepspeed set it, else mpirun's variables, else srun's."""
    if "RANK" in env:
        name = ("torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else
                env.get(NAME, "RANK in the environment"))
        world_size = int(env.get("WORLD_SIZE", "1"))
        names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if name == "deepspeed" else ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
        local = env.get(names[0]) or env.get(names[1]) or world_size  # the other may be left from around the launcher
        return Place(name, int(env["RANK"]), world_size, int(env.get("LOCAL_RANK", "0")), int(local))
    if "OMPI_COMM_WORLD_RANK" in env:
        return _place(env, "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                      "OMPI_COMM_WORLD_LOCAL_SIZE")
    if "PMI_RANK" in env and "MPI_LOCALRANKID" in env:  # srun --mpi=pmi2 sets the first too
        return _place(env, "mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a batch script has the second, but is no step
        tasks = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        return Place("srun", int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]),
                     tasks[int(env["SLURM_NODEID"])])
    return ALONE


def adopt() -> Place:
    """Find this process' place and write it into the environment, where there is a launcher."""
    place = find_place(os.environ)
    if place != ALONE:
        os.environ.update({NAME: place.launcher, "RANK": str(place.rank), "WORLD_SIZE": str(place.world_size),
                           "LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(place.local_world_size)})
    return place


def agree_on_address(place: Place) -> str:
    """Where the ranks meet, as `address:port`, written into the environment. Collective under mpirun.

    MASTER_ADDR and MASTER_PORT go before all else. Raises ConfigError where the launcher does not tell.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        if place.world_size == 1:
            address, port = "127.0.0.1", free_port()
        elif place.launcher == "srun":
            address, port = _address_under_srun(os.environ)
        elif place.launcher == "mpirun":
            address, port = _address_over_mpi(place)
        else:
            raise ConfigError(f"rank {place.rank} of {place.world_size} has no MASTER_ADDR and MASTER_PORT to meet the "
                              f"others at; set them, or start with torchrun, deepspeed, srun or mpirun")
        os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR", address)
        os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT", port)
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def free_port() -> str:
    """A port of this machine that nobody listens on, for ranks to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def first_host(nodelist: str) -> str:
    """First name of a SLURM node list: `gpu[003,007-9],login` gives `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    assert first, nodelist
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _place(env: Mapping[str, str], launcher: str, *names: str) -> Place:
    return Place(launcher, *(int(env[name]) for name in names))


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of one number per node: `4(x2),3` is [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(n) for n, times in found for _ in range(int(times or 1))]


def _address_under_srun(env: Mapping[str, str]) -> tuple[str, str]:
    """The first node of the step, which has rank 0, and a port that follows from job and step."""
    host = first_host(env["SLURM_STEP_NODELIST"])
    try:
        socket.gethostbyname(host)
        address = host
    except OSError:  # SLURM may know nodes by names that nobody else does
        address = _slurm_address_of(host)
    step = int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])
    return address, str(FIRST_PORT + step % N_PORTS)


def _slurm_address_of(node: str) -> str:
    shown = ""
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "node", "-o", node], capture_output=True, text=True).stdout
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if not found:
        raise ConfigError(f"the name of the job's first node, {node}, cannot be resolved here, and scontrol does not "
                          f"tell its address; set MASTER_ADDR to an address of that node")
    return found.group(1)


def _address_over_mpi(place: Place) -> tuple[str, str]:
    """Rank 0's host and a free port of it, told to the others over MPI, which then has done its work."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # RuntimeError: mpi4py finds no MPI library
        raise ConfigError(f"started by mpirun, where the ranks agree on an address by mpi4py, which cannot be imported "
                          f"({e}); pip install mpi4py, or pass MASTER_ADDR and MASTER_PORT to all ranks") from None
    if MPI.COMM_WORLD.Get_size() != place.world_size:
        raise ConfigError(f"mpirun started {place.world_size} ranks, but mpi4py sees {MPI.COMM_WORLD.Get_size()}: it "
                          f"uses another MPI than this mpirun's; MPI4PY_MPIABI=openmpi or mpich chooses one")
    host = "127.0.0.1" if place.local_world_size == place.world_size else socket.gethostname()
    address, port = MPI.COMM_WORLD.bcast((host, free_port()) if place.rank == 0 else None)
    MPI.Finalize()  # at exit it would wait for ranks that failed
    return str(address), str(port)
