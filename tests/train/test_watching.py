"""What a run says about itself: means over an interval, times that add up, peaks that are never another's, trackers."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_guard import train

from cprec.config import MetricsConfig, MlflowConfig, WandbConfig
from cprec.errors import ConfigError
from cprec.train import trackers
from cprec.train.metrics import Memory, PartTimes, TrainRecord, duration, flat, peak_by_name, read_metrics
from cprec.train.plan import build_plan
from cprec.train.profile import Trace, parse_steps
from cprec.train.watch import Clock


def of_kind(run_dir: str, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run_dir) if r["kind"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same run logged at every step, at every fourth (its steps 2 and 3 traced), and on two ranks."""
    root = tmp_path_factory.mktemp("metrics")
    world = tiny.write_world(root)
    world["schedule"] = {"total": {"steps": 6}, "warmup": {"steps": 2}}
    world["checkpoint"] = {"every": 6}
    world["validation"] = {"every": 3, "rows_per_corpus": 2}
    named = {name: {**world, "run_dir": str(root / name), "log_every": every}
             for name, every in (("each", 1), ("traced", 4), ("two", 2))}
    train(root, [named["each"], named["traced"]])
    train(root, [named["two"]], ranks=2)
    return named


def test_a_record_holds_the_token_mean_and_the_mean_norm_of_the_steps_since_the_last_one(
        runs: dict[str, dict[str, Any]]) -> None:
    each, fourth = (of_kind(runs[name]["run_dir"], "train") for name in ("each", "traced"))
    assert [(r["step"], r["n_steps"]) for r in fourth] == [(4, 4), (6, 2)]  # the last step is logged as well
    rows = build_plan(tiny.run_config(runs["each"]), 1).config.batch.global_batch_size
    for record, first in ((fourth[0], 0), (fourth[1], 4)):
        steps = each[first:record["step"]]
        assert record["grad_norm"] == pytest.approx(sum(r["grad_norm"] for r in steps) / len(steps), rel=1e-12)
        assert record["grad_norm_max"] == max(r["grad_norm"] for r in steps)
        assert record["pad_share"] == pytest.approx(sum(r["pad_share"] for r in steps) / len(steps), rel=1e-12)
        assert min(r["loss"] for r in steps) < record["loss"] < max(r["loss"] for r in steps)
        assert record["lr"] == steps[-1]["lr"] and record["param_norm"] == steps[-1]["param_norm"]
        assert record["tokens_seen"] == record["step"] * rows * tiny.SEQ_LEN
    mean = sum(r["loss"] for r in each[:4]) / 4  # steps have nearly equal numbers of labels
    assert fourth[0]["loss"] == pytest.approx(mean, abs=2e-2)


def test_the_parts_of_a_step_add_up_to_its_time(runs: dict[str, dict[str, Any]]) -> None:
    for r in of_kind(runs["traced"]["run_dir"], "train"):
        parts = r["time_s"]
        assert all(parts[name] > 0 for name in ("data", "forward", "backward", "optimizer"))
        whole = r["step_s"] + parts["validation"] + parts["checkpoint"]
        assert sum(parts.values()) == pytest.approx(whole, rel=1e-9)
        assert r["tokens_per_s"] == pytest.approx(8 * tiny.SEQ_LEN / r["step_s"])
    first, second = of_kind(runs["traced"]["run_dir"], "train")
    assert first["time_s"]["validation"] > 0  # of the steps 0 and 3
    assert second["time_s"]["logging"] > 0  # of step 4
    assert [r["step"] for r in of_kind(runs["traced"]["run_dir"], "valid")] == [0, 3, 6]
    assert first["eta_s"] > second["eta_s"] > 0  # a validation and a checkpoint are still to come
    assert first["mfu"] is None and first["memory"]["allocated_gb"] is None and first["memory"]["rss_gb"] > 0.1


def test_the_parameter_norm_is_that_of_the_whole_model_on_any_number_of_ranks(
        runs: dict[str, dict[str, Any]]) -> None:
    values = runs["each"]
    weights = load_file(Path(values["model"]["path"]) / "model.safetensors").values()
    at_start = float(sum(w.double().pow(2).sum() for w in weights)) ** 0.5
    each = {r["step"]: r["param_norm"] for r in of_kind(values["run_dir"], "train")}
    two = {r["step"]: r["param_norm"] for r in of_kind(runs["two"]["run_dir"], "train")}
    assert each[1] == pytest.approx(at_start, rel=2e-2) and each[1] != each[6]
    assert [two[n] for n in (2, 4, 6)] == pytest.approx([each[n] for n in (2, 4, 6)], rel=1e-5)
    per_rank = [r["tokens_per_s_per_device"] * 2 for r in of_kind(runs["two"]["run_dir"], "train")]
    assert per_rank == pytest.approx([r["tokens_per_s"] for r in of_kind(runs["two"]["run_dir"], "train")])


def test_tensorboard_has_every_number_of_the_file(runs: dict[str, dict[str, Any]]) -> None:
    run_dir = runs["each"]["run_dir"]
    events = EventAccumulator(f"{run_dir}/tensorboard")
    events.Reload()
    for kind in ("train", "valid"):
        for record in of_kind(run_dir, kind):
            for name, value in flat(record):
                if name != "step":
                    (found,) = [e.value for e in events.Scalars(f"{kind}/{name}") if e.step == record["step"]]
                    assert found == pytest.approx(value, rel=1e-6), (name, record["step"])


def test_profile_writes_a_trace_of_the_chosen_steps(runs: dict[str, dict[str, Any]]) -> None:
    (path,) = (Path(runs["traced"]["run_dir"]) / "profile").iterdir()
    assert path.name == "steps-2-3.json.gz"
    names = [e.get("name", "") for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2 * 3  # two steps, three groups of parameters
    assert not (Path(runs["each"]["run_dir"]) / "profile").exists()


@pytest.mark.parametrize("text", ["10", "5:4", "0:3", "a:b", "1:2:3"])
def test_steps_to_trace_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 10:13"):
        parse_steps(text)


def test_steps_to_trace_that_this_start_does_not_run_are_refused(tmp_path: Path) -> None:
    assert parse_steps("10:13") == range(10, 14) and parse_steps(None) == range(0)
    with pytest.raises(ConfigError, match="runs steps 11 to 20"):
        Trace(tmp_path, range(10, 14), next_step=11, last_step=20)


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40", 181.05e12), ("NVIDIA L40S", 362.05e12), ("NVIDIA A10", 125e12),
    ("AMD Instinct MI300X", 1307.4e12),
    ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ("NVIDIA H20", None), ("NVIDIA H2000", None), ("Tesla V100-SXM2-16GB", None), ("NVIDIA GeForce RTX 4090", None),
])
def test_a_peak_belongs_to_one_device_and_an_unknown_one_has_none(name: str, peak: float | None) -> None:
    assert peak_by_name(name) == peak


def a_record(**changes: Any) -> TrainRecord:
    values: dict[str, Any] = {
        "step": 7, "n_steps": 1, "phase": "stable", "lr": 1e-3, "loss": 2.5, "loss_by_corpus": {"a": 2.5},
        "grad_norm": 1.25, "grad_norm_max": 1.25, "param_norm": 10.0, "tokens_seen": 700, "tokens_per_s": 12345.6,
        "tokens_per_s_per_device": 12345.6, "mfu": 0.425, "pad_share": 0.005, "step_s": 0.1,
        "time_s": PartTimes(data=0.001), "save_stall_s": None, "memory": Memory(12.5, 20.0, 3.0),
        "eta_s": 3723.0, "bad_steps": 0}
    return TrainRecord(**{**values, **changes})


def test_the_lines_of_a_log_stand_below_each_other() -> None:
    lines = [r.line(10_000) for r in (
        a_record(), a_record(step=10_000, phase="anneal", loss=12.25, grad_norm=117.5, tokens_per_s=9.0, mfu=None,
                             memory=Memory(None, None, 0.5), eta_s=300_000.0),
        a_record(loss=None, loss_by_corpus={}, grad_norm=None, grad_norm_max=None))]
    assert lines[0] == ("step     7/10000  stable  loss  2.5000  lr 1.000e-03  norm   1.250     12,346 tok/s  "
                        "mfu  42.5%  pad  0.50%  wait 0.001s  mem  12.50GB  left  1:02:03")
    assert len({len(line) for line in lines}) == 1
    assert "mfu    n/a" in lines[1] and "left 3d 11:20" in lines[1] and "mem   0.50GB" in lines[1]
    assert a_record(bad_steps=2).line(10_000).endswith("  bad 2")
    assert [duration(s) for s in (0, 59.6, 86_400 + 3600)] == ["0:00:00", "0:01:00", "1d 01:00"]
    assert dict(flat(asdict(a_record(mfu=None))))["time_s/data"] == 0.001
    assert "mfu" not in dict(flat(asdict(a_record(mfu=None))))


def test_a_clock_sums_by_part_counts_and_begins_anew() -> None:
    clock = Clock(torch.device("cpu"))
    assert list(clock.each("data", range(3))) == [0, 1, 2]
    for _ in range(2):
        with clock.part("validation"), clock.compute("forward"):
            pass
    taken = clock.take()
    assert set(taken) == {"data", "validation", "forward"} and taken["validation"] >= taken["forward"] > 0
    assert clock.times["validation"] == 2 and clock.take() == {}


def test_a_tracker_without_its_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = MetricsConfig(wandb=WandbConfig(project="p"), mlflow=MlflowConfig(experiment="e"))
    assert trackers.missing_packages(wanted) == [
        "metrics.wandb: the package wandb is not installed: pip install 'cprec[wandb]'",
        "metrics.mlflow: the package mlflow is not installed: pip install 'cprec[mlflow]'"]
    assert trackers.missing_packages(MetricsConfig()) == []
    with pytest.raises(ConfigError, match=r"pip install 'cprec\[wandb\]'"):
        build_plan(tiny.run_config({**tiny.write_world(tmp_path), "metrics": {"wandb": {"project": "p"}}}), 1)


TRACK = """
import sys
from pathlib import Path
from cprec.config import RunConfig
from cprec.settings import load_settings
from cprec.train.trackers import open_trackers
for start in (0, 1):
    opened = open_trackers(Path(sys.argv[1]), load_settings(RunConfig, sys.argv[2]), resume_step=start)
    for step in (2 * start + 1, 2 * start + 2):
        opened[sys.argv[3]].write(step, {"train/loss": 5.0 - step, "train/loss_by_corpus/specific/toys": 1.0 * step})
    opened[sys.argv[3]].close()
"""


def track_twice(tmp_path: Path, tracker: str, metrics: dict[str, Any]) -> dict[str, str]:
    """Open a tracker, write two steps and close it, twice over, in a process of its own; the ids it keeps."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "run_dir": str(run_dir), "model": {"path": "m"}, "data": {"packed": "p", "mix": {"stable": {"specific/*": 2}}},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2}, "optimizer": {"peak_lr": 1e-2},
        "schedule": {"total": {"steps": 12}}, "metrics": metrics}))
    done = subprocess.run([sys.executable, "-c", TRACK, str(run_dir), str(path), tracker], text=True, timeout=200,
                          capture_output=True, env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((run_dir / "trackers.json").read_text()))


def test_mlflow_has_one_run_with_every_step_for_a_run_that_is_started_twice(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    kept = track_twice(tmp_path, "MLflow", {"mlflow": {"experiment": "shops", "tracking_uri": uri}})
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("shops").experiment_id])
    assert run.info.run_id == kept["mlflow"] and run.info.status == "FINISHED" and run.info.run_name == "run"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] \
        == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert run.data.params["optimizer.peak_lr"] == "0.01"
    assert run.data.params["data.mix.stable.specific/_"] == "2.0"


def test_wandb_keeps_the_steps_of_both_starts_under_one_id_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    kept = track_twice(tmp_path, "W&B", {"wandb": {"project": "shops", "mode": "offline"}})
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert {f.name for f in files} == {f"run-{kept['wandb']}.wandb"}
    written = b"".join(f.read_bytes() for f in files)
    assert written.count(b"train/loss_by_corpus/specific/toys") >= 1 and b"peak_lr" in written
