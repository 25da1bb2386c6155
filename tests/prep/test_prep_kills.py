"""SIGKILL in the middle of stages and of workers: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
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

def moments(rng: random.Random, out: Path) -> list[Moment]:
    """Where each start is to die: in what workers read, in the engine's results, in a worker's shards, anywhere."""
    below = ["staged/", "interactions/", "packed/", ""]
    return [Moment(rng.choice(["write", "rename"]), f"{out}/{part}", count=rng.randint(1, 6)) for part in below]


def start_and_die(config: Path, moment: Moment, library: Path) -> str | None:
    """How a start ended that had a process killed at the moment; None where the moment never came."""
    environment = os.environ | moment.env() | {
        "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, str(REPOSITORY / "launch" / "prepare.py"), "--config", str(config)],
                          stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as run:
        assert run.stderr is not None
        said = run.stderr.read()
    if run.returncode == KILLED:
        return "killed"
    assert run.returncode == 0 or "a worker process was killed" in said, said
    return "a worker was killed" if run.returncode else None


@pytest.mark.parametrize("seed", [1])
def test_kills_inside_stages_and_workers_leave_the_same_bytes(raw: Path, tmp_path: Path, seed: int) -> None:
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
    ends = [start_and_die(config, moment, library) for moment in moments(random.Random(seed), tmp_path / "out")]
    assert "killed" in ends and "a worker was killed" in ends, ends
    prepare(shops.config(values))
    whole = tmp_path / "whole"
    prepare(shops.config(values | {"out": str(whole), "workers": 1}))
    assert shops.bytes_below(tmp_path / "out") == shops.bytes_below(whole)
