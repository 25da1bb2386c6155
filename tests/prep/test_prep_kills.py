"""SIGKILL in the middle of stages and of workers: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import shops
import yaml

from benchmarks.faults.lives import KILLED, Moment, build_moments
from data_prep.pipeline import prepare

REPOSITORY = Path(__file__).parents[2]
LONGEST_START_S = 300.0
"""No start of this small shop takes so long, on a machine that does much else."""
MOMENTS = [  # operation, on what below the output folder (the first time a process does it), how the start ends
    ("rename", "staged/00000.parquet", "a worker was killed"),  # a source is read, and not yet there
    ("rename", "interactions/clean.parquet", "killed"),  # so is a result of the engine
    ("write", "packed/mixed/shard-00000-003.arrow", "a worker was killed"),  # half a shard
    ("write", "packed/mixed/manifest.json", "killed"),  # half of what says that a corpus is packed
]


def start_and_die(config: Path, moment: Moment, library: Path) -> str:
    """How a start ended that had a process killed at the moment."""
    environment = os.environ | moment.env() | {
        "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, str(REPOSITORY / "launch" / "prepare.py"), "--config", str(config)],
                          stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as run:
        try:
            _, said = run.communicate(timeout=LONGEST_START_S)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the workers too, which hold the pipe
            raise
    if run.returncode == KILLED:
        return "killed"
    assert run.returncode == 0 or "a worker process was killed" in said, said
    return "a worker was killed" if run.returncode else "nothing was killed"


def test_kills_inside_stages_and_workers_leave_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("gcc is absent: the library that ends a process at a chosen file operation cannot be built")
    values = shops.config_values(raw, tmp_path / "out") | {"workers": 2}
    for dataset in values["datasets"][:2]:  # text is read by workers
        text = tmp_path / f"{dataset['domain']}.csv"
        pyarrow.csv.write_csv(pq.read_table(dataset["path"]), text)
        dataset["path"] = str(text)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    library = build_moments(tmp_path)
    for operation, at, end in MOMENTS:
        assert start_and_die(config, Moment(operation, f"{tmp_path}/out/{at}"), library) == end, (operation, at)
    prepare(shops.config(values))
    whole = tmp_path / "whole"
    prepare(shops.config(values | {"out": str(whole), "workers": 1}))
    assert shops.bytes_below(tmp_path / "out") == shops.bytes_below(whole)
