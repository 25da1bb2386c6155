"""The tutorial's last part is done as it is written: a reader's own CSV files become a ranked model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.docs.commands import FENCED, REPO, script_module, simple_commands
from tests.prep.shops import write_shops

TUTORIAL = (REPO / "docs/tutorial.md").read_text(encoding="utf-8")
SHORTER = {"launch/pretrain.py": ["schedule.total={steps: 3}", "schedule.warmup={steps: 1}", "checkpoint.every=3",
                                  "checkpoint.keep_stable_every=3", "validation.every=3",
                                  "validation.rows_per_corpus=1", "log_every=1"],
           "launch/rank.py": ["--limit", "3"]}
"""All that is changed: 3 steps instead of 150, 2 of annealing instead of 30, 3 queries of each shop."""


def write_csv(folder: Path) -> None:
    """The two shops of the tutorial, with its column names."""
    write_shops(folder)
    (folder / "raw").mkdir()
    for shop in ("books", "games"):
        events = pq.read_table(folder / f"{shop}.parquet")
        events = events.rename_columns({"user_id": "who", "item_id": "what", "timestamp": "when"})
        stars = pa.array([float(1 + i % 5) for i in range(len(events))])
        pyarrow.csv.write_csv(events.append_column("stars", stars), folder / f"raw/{shop}.csv")
        items = pq.read_table(folder / f"{shop}.items.parquet").rename_columns({"item_id": "what", "title": "name"})
        maker = pa.array(["Acme Press" if i % 2 else None for i in range(len(items))], pa.string())
        pyarrow.csv.write_csv(items.append_column("maker", maker), folder / f"raw/{shop}.items.csv")


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A `python launch/...` of the page, changed as above: training in a process of its own, all else in this one."""
    _, script, *arguments = ["2" if w == "30" else w for w in words]
    arguments += SHORTER.get(script, [])
    if script not in ("launch/pretrain.py", "launch/anneal.py"):
        monkeypatch.setattr("sys.argv", [script, *arguments])
        assert not script_module(script).main()
        return
    command = [sys.executable, script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_own_csv_files_become_a_ranked_model_by_the_commands_of_the_page(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = TUTORIAL.split("\n## Your own CSV files\n")[1].split("\n## ")[0]
    blocks = {m[2]: m[3] for m in FENCED.finditer(section)}
    write_csv(tmp_path)
    (tmp_path / "shop.yaml").write_text(blocks["yaml"])
    for folder in ("launch", "examples", "ds_configs"):
        (tmp_path / folder).symlink_to(REPO / folder)
    monkeypatch.chdir(tmp_path)
    commands = simple_commands(blocks["bash"])
    assert [words[1] for words in commands] == [f"launch/{name}.py" for name in (
        "prepare", "prepare", "base_model", "pretrain", "anneal", "export", "rank")]
    for words in commands:
        run(words, monkeypatch)
    report = json.loads((tmp_path / "work/shop/sqrt/eval/report.json").read_text())
    assert report and (tmp_path / "work/shop/sqrt/eval/report.md").read_text().startswith("# Ranking")
    first, *_ = (tmp_path / "work/shop/sqrt/hf").glob("*.safetensors")
    assert first.stat().st_size > 100_000
