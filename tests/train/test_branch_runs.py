"""Branches as runs, through the launch scripts, on real DeepSpeed: what a branch shares with its parent, bit by bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from cprec.compare import compare
from cprec.config import Length
from cprec.errors import CheckpointError
from cprec.eval.run import EvalOptions, evaluate
from cprec.format import file_hash
from cprec.train import sweep
from cprec.train.branch import find_parent
from cprec.train.metrics import read_metrics
from cprec.train.partitions import SavedState
from tests.eval.folders import Query, Shop, write_queries

LAUNCH = tiny.REPO / "launch"


def launch(script: str, *args: str, expect: int = 0) -> str:
    """What a script said, run on one rank."""
    done = subprocess.run([sys.executable, str(LAUNCH / script), *args], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def pretrain(values: dict[str, Any], folder: Path, *overrides: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    launch("pretrain.py", "--config", str(config), *overrides)


def log_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [r for r in read_metrics(run) if r["kind"] == kind]


def tree_hashes(folder: Path) -> dict[str, str]:
    """All that a branch leaves as it is: everything but its own lease."""
    return {str(p): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != "branches"}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files, by file and name."""
    return {f"{path.name}/{name}": tensor for path in sorted(checkpoint.glob("rank_*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys() and any("exp_avg" in name for name in left), list(left)
    assert SavedState(a).updates == SavedState(b).updates
    assert not [name for name in left if not torch.equal(left[name], right[name])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**tiny.write_world(tmp_path_factory.mktemp("world")), "checkpoint": {"every": 1, "keep_last": 99}}


@pytest.fixture(scope="module")
def trunk(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of one rank, all saved."""
    pretrain(world, tmp_path_factory.mktemp("config"))
    return Path(world["run_dir"])


@pytest.fixture(scope="module")
def branches(trunk: Path) -> dict[str, Path]:
    """From step 8: two steps on a mixture of their own, with their control; the trunk must not change by it."""
    before = tree_hashes(trunk)
    launch("anneal.py", "--from", f"{trunk}@8", "--steps", "2", "--mix", "mixed=1", "--control", "--final-lr", "0.001",
           "--shape", "linear")
    assert tree_hashes(trunk) == before
    return {"branch": Path(f"{trunk}-linear-2"), "control": Path(f"{trunk}-linear-2-control")}


def test_the_first_step_of_a_branch_is_its_trunks_bit_by_bit(trunk: Path, branches: dict[str, Path]) -> None:
    """Same weights, moments, rate and rows before it, so the same weights and moments after it."""
    first, of_trunk = log_of(branches["control"])[0], log_of(trunk)[8]
    assert (first["step"], first["phase"], of_trunk["phase"]) == (9, "anneal", "stable")
    assert [first[k] for k in ("lr", "loss", "grad_norm", "loss_by_corpus")] == [
        of_trunk[k] for k in ("lr", "loss", "grad_norm", "loss_by_corpus")]
    name = "checkpoints/step_00000009"
    assert_same_tensors(branches["control"] / name, trunk / name)


def test_a_branch_and_its_control_differ_in_what_they_read_and_in_nothing_else(branches: dict[str, Path]) -> None:
    logs = log_of(branches["branch"]), log_of(branches["control"])
    assert [[(r["step"], r["lr"], r["phase"]) for r in log] for log in logs] == [
        [(9, 1e-2, "anneal"), (10, pytest.approx(5.5e-3), "anneal")]] * 2
    assert {tuple(r["loss_by_corpus"]) for r in logs[0]} == {("mixed",)}
    assert {tuple(r["loss_by_corpus"]) for r in logs[1]} == {("mixed", "specific/toys")}
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in branches.values()]
    assert [k for k in configs[0] if configs[0][k] != configs[1][k]] == ["run_dir", "data"]


def test_a_trunk_goes_on_from_its_stable_checkpoint_as_if_no_branch_had_been_taken(
        world: dict[str, Any], trunk: Path, branches: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    for step in (10, 11, 12):  # as a trunk of nine steps was left when its branches were taken
        shutil.rmtree(run / f"checkpoints/step_{step:08d}")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["schedule"]["total"]["steps"] = 9
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    pretrain({**world, "run_dir": str(run)}, tmp_path)
    assert [(r["step"], r["loss"], r["lr"]) for r in log_of(run)] == [
        (r["step"], r["loss"], r["lr"]) for r in log_of(trunk)]
    assert_same_tensors(run / "checkpoints/step_00000012", trunk / "checkpoints/step_00000012")


def test_a_way_back_goes_on_with_the_annealed_weights_and_moments(branches: dict[str, Path], tmp_path: Path) -> None:
    """At once at the stable rate, on the trunk's rows: the steps that the optimizer has counted go on too."""
    run = tmp_path / "back"
    launch("anneal.py", "--from", str(branches["branch"]), "--rewarm", "2", "--steps", "3", "--run-dir", str(run))
    log = log_of(run)
    low = 1e-3
    assert [(r["step"], r["phase"]) for r in log] == [(11, "rewarm"), (12, "rewarm"), (13, "stable")]
    assert [r["lr"] for r in log] == pytest.approx([(low + 1e-2) / 2, 1e-2, 1e-2])
    assert set(SavedState(run / "checkpoints/step_00000013").updates.values()) == {13}


def test_a_parent_whose_files_have_changed_is_refused(trunk: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    victim = next((copy / "checkpoints/step_00000008").glob("rank_*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    said = launch("anneal.py", "--from", f"{copy}@8", "--steps", "2", expect=4)
    assert victim.name in said and "altered" in said and "Traceback" not in said
    assert not list(tmp_path.glob("trunk-sqrt-2/checkpoints/*/state.json"))


def test_a_sweep_makes_what_is_missing_and_its_array_job_is_plain_bash(trunk: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "sweep", ["sqrt-1-mixed-1-seed1", "linear-1-mixed-1-seed1"]
    args = ["--from", f"{trunk}@8", "--steps", "1", "--mix", "mixed=1", "--seed", "1", "--out", str(out),
            "--launcher", sys.executable]
    said = launch("sweep.py", *args)
    assert f"{names[0]}  finished" in said and (out / f"{names[0]}.log").is_file()
    grid = sweep.Grid([Length(steps=1)], ("sqrt", "linear"), ("mixed=1",), (1,))
    jobs = sweep.plan_sweep(find_parent(f"{trunk}@8"), grid, out)
    assert [(j.name, j.is_finished) for j in jobs] == [(names[0], True), (names[1], False)]
    array, script, commands = sweep.write_commands(jobs, sys.executable, LAUNCH / "anneal.py", out)
    assert array == "--array=1"
    subprocess.run(["bash", script, commands], check=True, capture_output=True,
                   env={**os.environ, "SLURM_ARRAY_TASK_ID": "1", "VENV": sys.prefix})
    assert [r["step"] for r in log_of(out / names[1])] == [9]
    said = launch("sweep.py", *args, "--shape", "sqrt,linear")
    assert all(name in said for name in names) and said.count("skipped") == 2


def test_a_comparison_tells_the_tree_the_settings_the_losses_and_the_ranking(
        trunk: Path, branches: dict[str, Path], tmp_path: Path) -> None:
    runs = {name: Path(shutil.copytree(run, tmp_path / "now" / run.name))
            for name, run in {"trunk": trunk, **branches}.items()}
    for name in branches:  # as if all had stood in another folder when the branches were taken
        config = (runs[name] / "config.yaml").read_text()
        moved = config.replace(f"run_dir: {trunk}\n", f"run_dir: {tmp_path}/then/run\n")
        (runs[name] / "config.yaml").write_text(moved)
    queries = write_queries(tmp_path / "queries", {"toys": Shop([f"Toy {i}" for i in range(6)], [
        Query(f"u{i}", [i % 6], (i + 1) % 6) for i in range(8)])})
    for name in ("branch", "control"):
        model = tiny.write_model(tmp_path / name, seed=len(name))
        evaluate(EvalOptions(queries=str(queries), out=str(runs[name] / "eval"), model=str(model)))
    text = compare([runs["branch"]], tmp_path / "out")
    fork = "at step 8: linear over 2 steps to 0.1 of the rate"
    assert text.splitlines()[3:6] == [
        f"run                      stable; complete at step {log_of(trunk)[-1]['step']}",
        f"├─ run-linear-2          {fork}, on mixed=1; complete at step 10",
        f"└─ run-linear-2-control  {fork}; complete at step 10"]
    assert f"- run-linear-2: its parent has moved from {tmp_path}/then/run to {runs['trunk']}" in text
    assert "| `data.mix.anneal.mixed` | - | `1.0` | - |" in text
    losses = [log_of(runs[name], "valid")[-1]["loss"] for name in ("branch", "control")]
    assert f"| run-linear-2 | run-linear-2-control at 10 | {losses[0] - losses[1]:+.4f} |" in text
    assert text.count("### Differences to run-linear-2-control\n") == 1 and "Paired over users" in text
    assert text.count("![") == 1  # the picture that is drawn here
    html = (tmp_path / "out/compare.html").read_text()
    assert 'src="data:image/png;base64,' in html and "<td>run-linear-2-control at 10</td>" in html
    assert (tmp_path / "out/compare.md").read_text() == text and (tmp_path / "out/compare.png").stat().st_size > 10_000


def test_an_unfinished_run_and_one_without_its_parent_are_compared_and_told(
        branches: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(branches["branch"], tmp_path / "alone"))
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["parent"]["run_dir"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = compare([run], tmp_path / "out")
    assert "on mixed=1; at step 8 of 10, nothing logged yet" in text
    assert f"- alone: its parent {tmp_path / 'gone'} is not there, nor beside it; name its folder too" in text
    assert "Nothing measured yet: alone." in text and "No run has a finished evaluation" in text
    with pytest.raises(CheckpointError, match=r"is no run folder: it has no config.yaml"):
        compare([tmp_path], tmp_path / "out")
