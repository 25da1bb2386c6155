"""Which launcher started a process, from the environments that the launchers leave; nothing is started here."""

from __future__ import annotations

import pytest

from cprec import launcher
from cprec.errors import ConfigError
from cprec.launcher import Place, find_place, first_host

SRUN = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "n[1-2]"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}


@pytest.mark.parametrize("env, place", [
    ({}, Place("no launcher", 0, 1, 0, 1)),
    (DEEPSPEED, Place("deepspeed", 3, 4, 1, 2)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
     Place("torchrun", 3, 4, 1, 2)),
    ({"RANK": "1", "WORLD_SIZE": "2"}, Place("RANK in the environment", 1, 2, 0, 2)),
    ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Place("mpirun", 3, 4, 1, 2)),
    ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Place("mpirun", 3, 4, 1, 2)),
    (SRUN, Place("srun", 5, 7, 1, 3)),
    ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"}, Place("srun", 5, 7, 1, 3)),
    ({**SRUN, **DEEPSPEED}, Place("deepspeed", 3, 4, 1, 2)),
    ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place("no launcher", 0, 1, 0, 1)),
], ids=["none", "deepspeed", "torchrun", "RANK", "Open MPI", "MPICH", "srun", "srun --mpi=pmi2", "deepspeed in srun",
        "a batch script"])
def test_the_environment_of_a_launcher_says_the_place_of_a_process(env: dict[str, str], place: Place) -> None:
    assert find_place(env) == place


@pytest.mark.parametrize("nodelist, first", [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[003,007-9],login", "gpu003"),
                                             ("login,gpu[1-3]", "login"), ("r[2-3]n[07-10].example", "r2n07.example")])
def test_the_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_ranks_of_srun_meet_on_the_first_node_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in {**SRUN, "SLURM_STEP_NODELIST": "localhost,n2"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.agree_on_address(find_place(SRUN)) == "localhost:20121"  # 20000 + 7 * job + step


def test_a_node_whose_name_nobody_knows_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SRUN, "SLURM_STEP_NODELIST": "no-such-node.invalid,n2", "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"first node, no-such-node.invalid, .* set MASTER_ADDR"):
        launcher.agree_on_address(find_place(SRUN))
