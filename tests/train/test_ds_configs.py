"""Every file of ds_configs/ as far as a CPU runs it: started, saved, loaded, exported; those that it cannot, said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import in_ranks
import pytest
import reshaped
import tiny
import torch
from safetensors.torch import load_file

from cprec.config import OWNED_HERE, load_deepspeed_config
from cprec.errors import ConfigError
from cprec.train.checkpoint import list_checkpoints, read_run_config
from cprec.train.export import export
from cprec.train.metrics import read_metrics
from cprec.train.partitions import SavedWeights

FOLDER = tiny.REPO / "ds_configs"
ON_A_CPU = ["zero1", "zero2", "zero3", "zero3-offload-optimizer", "zero3-offload"]
NOT_ON_A_CPU = ["zero3-nvme", "zeropp"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of 8 steps on 2 ranks, by ds_config: unbroken, and (`NAME again`) gone on with from step 4."""
    root = tmp_path_factory.mktemp("ds_configs")
    world = {**tiny.write_world(root), "schedule": {"total": {"steps": 8}, "warmup": {"steps": 2}}}
    configs = {n: {**world, "run_dir": str(root / n), "deepspeed": str(FOLDER / f"{n}.json")} for n in ON_A_CPU}
    assert in_ranks.train_all(configs, root, again_from=4) == dict.fromkeys(ON_A_CPU, "")
    return {name: root / name for n in ON_A_CPU for name in (n, f"{n} again")}


def train_records(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run) if r["kind"] == "train"]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(SavedWeights(list_checkpoints(run)[-1].folder))


@pytest.mark.parametrize("name", ON_A_CPU)
def test_every_ds_config_trains_like_zero3(runs: dict[str, Path], name: str) -> None:
    ours, zero3 = train_records(runs[name]), train_records(runs["zero3"])
    assert len(ours) == 8
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in zero3], abs=2e-5)
    assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in zero3], rel=1e-3)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_run_goes_on_from_a_checkpoint_of_every_ds_config_to_the_last_bit(runs: dict[str, Path], name: str) -> None:
    unbroken, again = runs[name], runs[f"{name} again"]
    assert [(r["step"], r["loss"]) for r in read_metrics(again)] == \
        [(r["step"], r["loss"]) for r in read_metrics(unbroken)]
    expected = last_weights(unbroken)
    assert {n: torch.equal(t, expected[n]) for n, t in last_weights(again).items()} == dict.fromkeys(expected, True)


@pytest.fixture(scope="module")
def gathered(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What DeepSpeed itself gathers of each run's last checkpoint, loaded on 2 ranks."""
    configs = {n: read_run_config(runs[n]).model_dump(mode="json") for n in ON_A_CPU}
    return reshaped.load_on(2, configs, tmp_path_factory.mktemp("gathered") / "loaded")


@pytest.mark.parametrize("name", ON_A_CPU)
def test_an_export_of_every_ds_config_holds_the_weights_that_deepspeed_itself_gathers(
        runs: dict[str, Path], gathered: dict[str, Any], name: str, tmp_path: Path) -> None:
    export(list_checkpoints(runs[name])[-1], tmp_path / "hf", dtype=torch.float32)
    ours = load_file(tmp_path / "hf/model.safetensors")
    theirs = {key: t for key, t in gathered[name]["tensors"].items() if key.startswith("weight/")}
    assert {f"weight/lm.{n}" for n in ours} == {*theirs}
    assert all(torch.equal(t, theirs[f"weight/lm.{n}"]) for n, t in ours.items())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_ds_config_is_valid_in_the_table_and_in_these_tests(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = load_deepspeed_config(str(path))
    assert list(values) == ["zero_optimization"] and not {*values["zero_optimization"]} & {*OWNED_HERE}
    DeepSpeedZeroConfig(**values["zero_optimization"])
    assert path.stem in ON_A_CPU + NOT_ON_A_CPU
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("zero", [None, {}, {"stage": 0}, {"stage": 4}])
def test_a_ds_config_without_a_zero_stage_is_refused(zero: dict[str, int] | None, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({} if zero is None else {"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=r"zero_optimization.stage=.*give 1, 2 or 3"):
        load_deepspeed_config(str(path))


@pytest.mark.parametrize("name", NOT_ON_A_CPU)
def test_what_a_cpu_cannot_run_starts_where_it_can(name: str, tmp_path: Path) -> None:
    """On a GPU, with libaio for NVMe, these run; elsewhere they are skipped with the reason that DeepSpeed gives."""
    if reason := obstacle(name):
        pytest.skip(f"{name}.json cannot run here: {reason}")
    world = {**tiny.write_world(tmp_path), "schedule": {"total": {"steps": 2}, "warmup": {"steps": 1}}}
    zero = load_deepspeed_config(str(FOLDER / f"{name}.json"))["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            zero[part]["nvme_path"] = str(tmp_path)
    zero.pop("zero_hpz_partition_size", None)  # of one rank there are no partitions
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    config = {**world, "deepspeed": str(tmp_path / "ds.json"), "model": {**world["model"], "dtype": "bfloat16"}}
    assert in_ranks.train_all({name: config}, tmp_path, ranks=1) == {name: ""}
    assert len(train_records(Path(world["run_dir"]))) == 2


def obstacle(name: str) -> str | None:
    from deepspeed.accelerator import get_accelerator

    op = "AsyncIOBuilder" if name == "zero3-nvme" else "QuantizerBuilder"
    builder = get_accelerator().create_op_builder(op)
    if type(builder).__name__ == "NotImplementedBuilder":
        return f"{op} is not implemented for the accelerator {get_accelerator().device_name()!r}"
    return None if builder.is_compatible() else f"{op} is not compatible: libaio or a compiler is missing"
