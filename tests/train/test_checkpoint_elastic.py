"""A checkpoint of any number of ranks and any ZeRO stage goes on under any other, to the last bit of what it holds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import in_ranks
import pytest
import reshaped
import tiny
import torch

from cprec.train.checkpoint import read_checkpoint
from cprec.train.metrics import read_metrics
from cprec.train.partitions import SavedState

STAGES = {f"zero{n}": str(tiny.REPO / f"ds_configs/zero{n}.json") for n in (1, 2, 3)}
SAVED_AT = 4
ROWS = 12
"""Of a step: 1, 2, 3 and 4 ranks can share them. Most parameters do not divide by 3."""
GROUPS = {"embeddings": 0.1, "matrices": 0.1, "vectors": 0.0}
"""Weight decay of every parameter group."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Unbroken runs of 8 steps on 2 ranks, saved after step 4, by stage."""
    root = tmp_path_factory.mktemp("elastic")
    world = {**tiny.write_world(root), "schedule": {"total": {"steps": 8}, "warmup": {"steps": 2}},
             "batch": {"global_batch_size": ROWS, "micro_batch_size": 1}}
    configs = {name: {**world, "run_dir": str(root / name), "deepspeed": path} for name, path in STAGES.items()}
    assert in_ranks.train_all(configs, root) == dict.fromkeys(configs, "")
    return configs


def cut_short(config: dict[str, Any], folder: Path, *, stage: str | None = None) -> dict[str, Any]:
    """A copy of the run as it stood after step 4, to go on under another stage."""
    shutil.copytree(config["run_dir"], folder)
    shutil.rmtree(folder / "checkpoints/step_00000008")
    return {**config, "run_dir": str(folder), "deepspeed": STAGES.get(stage or "", config["deepspeed"])}


def saved(config: dict[str, Any], step: int = SAVED_AT) -> SavedState:
    return SavedState(Path(config["run_dir"]) / f"checkpoints/step_{step:08d}")


def losses(config: dict[str, Any]) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(config["run_dir"]) if r["kind"] == "train"}


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_weights_moments_counts_and_settings_of_every_group_are_loaded_bit_by_bit_by_other_ranks_and_stages(
        runs: dict[str, dict[str, Any]], tmp_path: Path, ranks: int) -> None:
    changes = {"zero3 to zero3": ("zero3", "zero3"), "zero3 to zero2": ("zero3", "zero2"),
               "zero1 to zero3": ("zero1", "zero3")}
    configs = {name: cut_short(runs[a], tmp_path / name, stage=b) for name, (a, b) in changes.items()}
    for name, loaded in reshaped.load_on(ranks, configs, tmp_path / "loaded").items():
        expected = saved(configs[name])
        assert set(loaded["tensors"]) == set(expected.shapes)
        differing = [k for k, t in loaded["tensors"].items() if not torch.equal(t.flatten(), expected.read(k))]
        assert differing == [], name
        assert all(t.abs().sum() > 0 for t in loaded["tensors"].values())
        for groups in loaded["groups"]:  # of each rank
            assert {g["name"]: g["weight_decay"] for g in groups} == GROUPS
            assert {(g["step"], g["betas"], g["eps"]) for g in groups} == {(4.0, (0.9, 0.95), 1e-8)}
            assert len({g["at"] for g in groups}) == len(groups) == 3  # a count of its own


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_run_of_two_ranks_goes_on_with_other_ranks_and_stages_and_has_the_losses_of_the_unbroken_one(
        runs: dict[str, dict[str, Any]], tmp_path: Path, ranks: int) -> None:
    configs = {"zero3": cut_short(runs["zero3"], tmp_path / "zero3"),
               "zero3 to zero2": cut_short(runs["zero3"], tmp_path / "zero3 to zero2", stage="zero2")}
    assert in_ranks.train_all(configs, tmp_path, ranks=ranks) == dict.fromkeys(configs, "")
    for config in configs.values():
        assert losses(config) == pytest.approx(losses(runs["zero3"]), rel=1e-5)
        end = read_checkpoint(Path(config["run_dir"]) / "checkpoints/step_00000008").state
        assert end.world_size == ranks and end.rows_seen == 8 * ROWS


def test_a_run_of_one_rank_goes_on_with_two(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    alone = {**runs["zero3"], "run_dir": str(tmp_path / "alone")}
    assert in_ranks.train_all({"alone": alone}, tmp_path, ranks=1) == {"alone": ""}
    config = cut_short(alone, tmp_path / "again")
    assert in_ranks.train_all({"again": config}, tmp_path, ranks=2) == {"again": ""}
    assert losses(config) == pytest.approx(losses(alone), rel=1e-5)
