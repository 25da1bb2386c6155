"""The SLURM templates as users submit them, on a real SLURM of two nodes: from raw logs to ranks, interrupted.

The line is prepared once, by its templates; tests then interrupt runs and compare their losses with an unbroken run.
"""

from __future__ import annotations

import re
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

from cprec.errors import EXIT_STOPPED
from cprec.train.checkpoint import list_checkpoints
from cprec.train.metrics import read_metrics
from cprec.train.stop import ask_to_stop

SITE = """EVERY_JOB=(--partition=main --cpus-per-task=1 --output={folder}/%x-%j.log)
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
STEPS = 60


class Cluster:
    """A SLURM with a site file of its own, and the scripts that hand it jobs."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.site = folder / "site.sh"
        self.site.write_text(SITE.format(folder=folder, repo=tiny.REPO, venv=Path(sys.executable).parents[1]))

    def submit(self, *arguments: str, script: str = "submit.sh", **environment: str) -> list[str]:
        """Numbers of the jobs that a script has submitted."""
        env = {**self.slurm.environment, "CPREC_SITE": str(self.site), **environment}
        done = subprocess.run([str(tiny.REPO / "launch/slurm" / script), *arguments], cwd=tiny.REPO, env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return re.findall(r"\d+$", done.stdout, re.MULTILINE)

    def log(self, job: str) -> Path:
        return next(iter(self.folder.glob(f"*-{job}.log")), self.folder / "none")

    def finish(self, job: str, state: str = "COMPLETED", *, within_s: float = 500) -> None:
        self.slurm.wait(job, state, within_s=within_s, log=self.log(job))

    def until_step(self, job: str, run: Path, step: int) -> None:
        """Wait until the run has done a step, in whichever start of its job."""

        def is_there() -> bool:
            self.slurm.hurry(job)
            return len(losses(run)) >= step

        wait_for(is_there, f"step {step} of {run}", within_s=500, log=self.log(job))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield Cluster(slurm, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def prepared(cluster: Cluster) -> Path:
    """Corpora, queries and a model, prepared by two MPI ranks on two nodes."""
    folder = cluster.folder
    shops.write_shops(folder)
    values = shops.config_values(folder, folder / "prepared")
    (folder / "prepare.yaml").write_text(yaml.safe_dump({**values, "workers": 2}))
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
        "deepspeed": str(tiny.REPO / "ds_configs/zero1.json"), "checkpoint": {"every": 20, "keep_last": 1},
        "validation": {"every": 1000, "rows_per_corpus": 1}, "log_every": 1}


@pytest.fixture(scope="module")
def trunk(cluster: Cluster, settings: dict[str, Any]) -> Path:
    """An unbroken run on two nodes."""
    run, config = write_run(cluster, settings, "trunk")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.finish(job)
    assert "started by srun: rank 0 of 2, 1 on n1; they meet at n1:" in cluster.log(job).read_text()
    return run


def write_run(cluster: Cluster, settings: dict[str, Any], name: str) -> tuple[Path, str]:
    run, config = cluster.folder / name, cluster.folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**settings, "run_dir": str(run)}))
    return run, str(config)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run) if r["kind"] == "train"]


def test_a_job_told_to_end_saves_comes_back_by_itself_and_has_the_losses_of_an_unbroken_one(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "interrupted")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.until_step(job, run, 3)
    cluster.slurm.command("scancel", "--signal=USR1", job)  # as --signal does before the time limit
    cluster.until_step(job, run, 15)  # it is back
    assert cluster.slurm.field(job, "Restarts") == "1"
    cluster.slurm.command("scontrol", "requeue", job)
    cluster.finish(job)
    said = cluster.log(job).read_text()
    assert cluster.slurm.field(job, "Restarts") == "2"
    assert "exit code 75" in said and "start 1, on n[1-2]" in said and "start 3, on n[1-2]" in said  # one log for all
    assert losses(run) == losses(trunk)


def test_a_job_whose_node_dies_comes_back_and_has_the_losses_of_an_unbroken_one(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "bereft")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.until_step(job, run, 22)  # past its first checkpoint
    cluster.slurm.hosts.power_off("n2")
    cluster.slurm.command("scontrol", "update", "nodename=n2", "state=down", "reason=no power")
    cluster.finish(job, "PENDING", within_s=120)
    cluster.slurm.start_node("n2")
    cluster.slurm.command("scontrol", "update", "nodename=n2", "state=resume")
    cluster.finish(job)
    assert cluster.slurm.field(job, "Restarts") == "1" and losses(run) == losses(trunk)


def test_a_chain_goes_on_where_its_job_was_cut_off_and_what_is_left_of_it_vanishes(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    run, config = write_run(cluster, settings, "chained")
    first, second, third = cluster.submit("3", "pretrain.sbatch", config, script="chain.sh")
    cluster.until_step(first, run, 3)
    cluster.slurm.command("scancel", "--signal=USR1", first)
    cluster.finish(first, "FAILED")
    cluster.finish(second)
    cluster.finish(third, "CANCELLED")
    assert losses(run) == losses(trunk)


def test_the_stop_file_ends_a_job_and_the_chain_that_it_is_of(cluster: Cluster, settings: dict[str, Any],
                                                              prepared: Path) -> None:
    run, config = write_run(cluster, settings, "stopped")
    first, second = cluster.submit("2", "pretrain.sbatch", config, script="chain.sh")
    cluster.until_step(first, run, 3)
    ask_to_stop(run)
    cluster.finish(first, "FAILED")
    cluster.finish(second, "CANCELLED")
    assert cluster.slurm.field(first, "ExitCode") == f"{EXIT_STOPPED}:0"
    (saved,) = list_checkpoints(run)
    assert saved.state.step == len(losses(run)) < STEPS


def test_a_bad_config_fails_once_and_does_not_come_back(cluster: Cluster, settings: dict[str, Any],
                                                        prepared: Path) -> None:
    _, config = write_run(cluster, {**settings, "batch": {"global_batch_size": 3, "micro_batch_size": 1}}, "refused")
    (job,) = cluster.submit("pretrain.sbatch", config)
    cluster.finish(job, "FAILED")
    assert cluster.slurm.field(job, "ExitCode") == "2:0" and cluster.slurm.field(job, "Restarts") == "0"
    assert cluster.log(job).read_text().count("ConfigError:") == 1


def test_an_array_anneals_twice_another_ranks_both(cluster: Cluster, prepared: Path, trunk: Path) -> None:
    branches = [cluster.folder / shape for shape in ("sqrt", "linear")]
    commands = cluster.folder / "commands.txt"
    commands.write_text("".join(f"ranks launch/anneal.py --from {trunk} --steps 4 --shape {b.name} --run-dir {b}\n"
                                for b in branches))
    (anneal,) = cluster.submit("--array=0-1", "sweep.sbatch", str(commands))
    cluster.finish(anneal)
    assert [len(losses(b)) for b in branches] == [4, 4]
    (export,) = cluster.submit("export.sbatch", *map(str, branches))
    cluster.finish(export)
    (rank,) = cluster.submit("--array=0-1", "rank.sbatch", str(prepared / "queries"), *(f"{b}/hf" for b in branches))
    cluster.finish(rank)
    assert all("NDCG@10" in (b / "eval/report.md").read_text() for b in branches)


def test_a_job_of_one_to_two_nodes_goes_on_with_one_when_the_other_is_down(
        cluster: Cluster, settings: dict[str, Any], trunk: Path) -> None:
    pytest.importorskip("cprec.train.zero_state", reason="checkpoints are not yet loaded by another number of ranks")
    run, config = write_run(cluster, settings, "elastic")
    (job,) = cluster.submit("--nodes=1-2", "--ntasks-per-node=2", "pretrain.sbatch", config, ELASTIC="1")
    cluster.until_step(job, run, 3)
    cluster.slurm.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        cluster.finish(job)
    finally:
        cluster.slurm.command("scontrol", "update", "nodename=n2", "state=resume")
    assert "start 2, on n1" in cluster.log(job).read_text()
    assert losses(run) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(trunk)]
