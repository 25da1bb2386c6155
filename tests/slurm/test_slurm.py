"""The SLURM templates as users submit them, on a real SLURM of two nodes: from raw logs to ranks, interrupted.

The line is prepared once, by its template; tests then interrupt runs and compare their losses with an unbroken run's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import shops
import tiny
import yaml
from slurm_cluster import Slurm, running_slurm, wait_for

from cprec.errors import EXIT_HANG, EXIT_REQUEUE, EXIT_STOPPED
from cprec.train.checkpoint import list_checkpoints
from cprec.train.metrics import read_metrics
from cprec.train.stop import ask_to_stop

pytestmark = pytest.mark.timeout(5000)  # of a busy machine; `slurm_cluster` gives up earlier, and says on what
SITE = """EVERY_JOB=(--partition=main --cpus-per-task=1 --output={folder}/%j.log)
PREPARING=(--nodes=2 --ntasks-per-node=1)
TRAINING=(--nodes=2 --ntasks-per-node=1)
ANNEALING=(--nodes=1 --ntasks-per-node=1)
RANKING=(--nodes=1 --ntasks-per-node=1)
EXPORTING=(--nodes=1 --ntasks=1)
WARN_S=60
MAX_REQUEUES=5
VENV={venv}
CONTAINER=
MPI=pmi2
prepare_node() {{ export PYTHONPATH={repo} GLOO_SOCKET_IFNAME=eth0; }}
"""
STEPS = 40


class Cluster:
    """A SLURM with a site file of its own, and the scripts that hand it jobs."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        site = folder / "site.sh"
        site.write_text(SITE.format(folder=folder, repo=tiny.REPO, venv=Path(sys.executable).parents[1]))
        self._environment = {**slurm.environment, "CPREC_SITE": str(site), "PYTHONPATH": str(tiny.REPO)}

    def submit(self, *arguments: str, script: str = "launch/slurm/submit.sh", **environment: str) -> list[str]:
        """Numbers of the jobs that a script has submitted."""
        python = [sys.executable] if script.endswith(".py") else []
        done = subprocess.run([*python, str(tiny.REPO / script), *arguments], cwd=tiny.REPO, text=True,
                              env={**self._environment, **environment}, capture_output=True)
        assert done.returncode == 0, done.stderr
        return re.findall(r"\d+$", done.stdout, re.MULTILINE)

    def log(self, job: str) -> Path:
        return self.folder / f"{job}.log"

    def finish(self, job: str, state: str = "COMPLETED") -> None:
        self.slurm.wait(job, state, self.log(job))

    def until_steps(self, job: str, n: int, *, start: int = 1) -> None:
        """Wait until a start of the job has made `n` steps."""

        def is_there() -> bool:
            self.slurm.hurry(job)
            said = self.log(job).read_text() if self.log(job).exists() else ""
            return len(re.findall(r" step +\d+/", said.partition(f"start {start}, on ")[2])) >= n

        wait_for(is_there, f"{n} steps of start {start} of job {job}", self.log(job))

    def preempt(self, job: str, config: str) -> None:
        """Have a more urgent job take the nodes of a job away; it stands still until SLURM has told it so."""
        ranks = self.slurm.hosts.processes("n2", of=config)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        self.slurm.command("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                           "--wrap=true")
        wait_for(lambda: self.slurm.field(job, "PreemptTime") not in ("", "None"), f"job {job} to be preempted",
                 self.log(job))
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)

    def restarts(self, job: str) -> int:
        return int(self.slurm.field(job, "Restarts"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield Cluster(slurm, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def prepared(cluster: Cluster) -> Path:
    """Corpora, queries and a model, prepared by two MPI ranks on two nodes."""
    folder = cluster.folder
    shops.write_shops(folder)
    values = {**shops.config_values(folder, folder / "prepared"), "queries": {"max_per_domain": 4}}
    (folder / "prepare.yaml").write_text(yaml.safe_dump(values))
    (job,) = cluster.submit("prepare.sbatch", str(folder / "prepare.yaml"))
    cluster.finish(job)
    assert "MPI: rank 0 of 2 leads, 1 ranks work" in cluster.log(job).read_text()
    subprocess.run([sys.executable, str(tiny.REPO / "launch/base_model.py"), "small", "--hidden-size", "32", "--layers",
                    "2", "--tokenizer", str(folder / "prepared/tokenizer"), "--out", str(folder / "model")], check=True)
    return folder / "prepared"


@pytest.fixture(scope="module")
def settings(prepared: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(prepared.parent / "model")},
        "data": {"packed": str(prepared / "packed"), "mix": {"stable": {"specific/*": 1}}},
        "batch": {"global_batch_size": 4, "micro_batch_size": 1}, "optimizer": {"peak_lr": 1e-3},
        "schedule": {"total": {"steps": STEPS}, "warmup": {"steps": 2}},
        "deepspeed": str(tiny.REPO / "ds_configs/zero1.json"), "checkpoint": {"every": 10, "keep_last": 1},
        "validation": {"every": 1000, "rows_per_corpus": 1}, "log_every": 1}


@pytest.fixture(scope="module")
def trunk(cluster: Cluster, settings: dict[str, Any]) -> Path:
    """An unbroken run on two nodes."""
    run, config = write_run(cluster, settings, "trunk")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.finish(job)
    assert "started by srun: rank 0 of 2, 1 on n1; they meet at n1:" in cluster.log(job).read_text()
    assert cluster.restarts(job) == 0 and len(losses(run)) == STEPS
    return run


def write_run(cluster: Cluster, settings: dict[str, Any], name: str, **changes: Any) -> tuple[Path, str]:
    run, config = cluster.folder / name, cluster.folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**settings, **changes, "run_dir": str(run)}))
    return run, str(config)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run) if r["kind"] == "train"]


def test_a_job_told_to_end_saves_comes_back_by_itself_and_has_the_losses_of_an_unbroken_one(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "interrupted")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.until_steps(job, 3)
    cluster.slurm.command("scancel", "--signal=USR1", job)  # as --signal does before the time limit
    cluster.until_steps(job, 3, start=2)
    cluster.slurm.command("scontrol", "requeue", job)
    cluster.until_steps(job, 3, start=3)
    cluster.preempt(job, config)
    cluster.finish(job)
    said = cluster.log(job).read_text()  # one for all starts
    assert cluster.restarts(job) == 3 and said.count("asked to stop: saved step") == 6  # each time, by both ranks
    assert f"exit code {EXIT_REQUEUE}" in said
    assert losses(run) == losses(trunk)


def test_a_job_whose_node_is_lost_comes_back_and_has_the_losses_of_an_unbroken_one(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "bereft")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.until_steps(job, 12)  # past its first checkpoint
    cluster.slurm.lose("n2")
    try:
        cluster.finish(job, "PENDING")
    finally:
        cluster.slurm.repair("n2")
    cluster.finish(job)
    said = cluster.log(job).read_text()
    assert cluster.restarts(job) == 1 and "loaded" in said and "asked to stop" not in said
    assert losses(run) == losses(trunk)


def test_a_job_that_hangs_is_ended_and_comes_back_and_has_the_losses_of_an_unbroken_one(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "hung", watchdog={"timeout_s": 8})
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.until_steps(job, 12)
    for pid in cluster.slurm.hosts.processes("n2", of=config):
        os.kill(pid, signal.SIGSTOP)
    cluster.finish(job)
    said = cluster.log(job).read_text()
    assert "rank 1 on n2: no answer: stopped, or gone with the machine" in said
    assert f"exit code {EXIT_HANG}" in said and cluster.restarts(job) >= 1
    assert losses(run) == losses(trunk)


def test_a_chain_goes_on_where_its_job_was_cut_off_and_what_is_left_of_it_vanishes(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "chained")
    first, second, third = cluster.submit("3", "pretrain.sbatch", config, script="launch/slurm/chain.sh")
    cluster.until_steps(first, 3)
    cluster.slurm.command("scancel", "--signal=USR1", first)
    cluster.finish(first, "FAILED")
    cluster.finish(second)
    cluster.finish(third, "CANCELLED")
    assert losses(run) == losses(trunk)


def test_the_stop_file_ends_a_job_and_the_chain_that_it_is_of(cluster: Cluster, settings: dict[str, Any]) -> None:
    run, config = write_run(cluster, settings, "stopped")
    first, second = cluster.submit("2", "pretrain.sbatch", config, script="launch/slurm/chain.sh")
    cluster.until_steps(first, 3)
    ask_to_stop(run)
    cluster.finish(first, "FAILED")
    cluster.finish(second, "CANCELLED")
    assert cluster.slurm.field(first, "ExitCode") == f"{EXIT_STOPPED}:0"
    (saved,) = list_checkpoints(run)
    assert saved.state.step == len(losses(run)) < STEPS


def test_a_bad_config_fails_once_and_does_not_come_back(cluster: Cluster, settings: dict[str, Any]) -> None:
    _, config = write_run(cluster, settings, "refused", batch={"global_batch_size": 3, "micro_batch_size": 1})
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.finish(job, "FAILED")
    assert cluster.slurm.field(job, "ExitCode") == "2:0" and cluster.restarts(job) == 0
    assert cluster.log(job).read_text().count("ConfigError:") == 1


def test_a_sweep_anneals_twice_as_an_array_another_array_ranks_both(cluster: Cluster, prepared: Path,
                                                                   trunk: Path) -> None:
    out = cluster.folder / "sweep"
    (anneal,) = cluster.submit("--from", str(trunk), "--steps", "4", "--shape", "sqrt,linear", "--out", str(out),
                               "--launcher", "ranks", "--slurm", "submit", script="launch/sweep.py")
    cluster.finish(anneal)
    branches = [config.parent for config in out.glob("*/config.yaml")]
    assert [len(losses(b)) for b in branches] == [4, 4]
    (export,) = cluster.submit("export.sbatch", *map(str, branches))
    cluster.finish(export)
    (rank,) = cluster.submit("--array=0-1", "rank.sbatch", str(prepared / "queries"), *(f"{b}/hf" for b in branches))
    cluster.finish(rank)
    assert all("NDCG@10" in (b / "eval/report.md").read_text() for b in branches)


def test_a_job_of_one_to_two_nodes_goes_on_with_one_when_the_other_is_lost(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "elastic")
    (job,) = cluster.submit("--nodes=1-2", "--ntasks-per-node=2", "pretrain.sbatch", config, ELASTIC="1")
    cluster.until_steps(job, 12)
    cluster.slurm.lose("n2")
    try:
        cluster.finish(job, "PENDING")
        cluster.slurm.command("scontrol", "update", f"jobid={job}", "numtasks=2")  # else SLURM waits for room for 4
        cluster.finish(job)
    finally:
        cluster.slurm.repair("n2")
    said = cluster.log(job).read_text()
    assert "rank 0 of 4, 2 on n1" in said and "start 2, on n1\n" in said and "rank 0 of 2, 2 on n1" in said
    assert losses(run) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in losses(trunk)]
