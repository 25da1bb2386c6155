"""Configs: every mistake at once, each with its field, value and remedy; resolved configs are configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from cprec.config import BatchConfig, Length, RunConfig, check_batch, load_deepspeed_config
from cprec.errors import ConfigError, DataError
from cprec.settings import apply_overrides, dump_settings, load_settings, parse_settings
from cprec.train.plan import build_plan


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_world(tmp_path_factory.mktemp("world"))


def test_three_mistakes_are_told_at_once_with_field_value_and_remedy(world: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**world, "optimiser": {}, "batch": {"global_batch_size": -4, "micro_batch_size": 2},
             "model": {"path": "x", "attention": "flash9"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError) as e:
        load_settings(RunConfig, path)
    said = str(e.value)
    assert "3 problems" in said
    assert "optimiser: unknown key; did you mean 'optimizer'?" in said
    assert "batch.global_batch_size=-4" in said
    assert "model.attention='flash9'" in said and "'flash" in said.split("flash9'")[1]


def test_a_nested_unknown_key_is_answered_with_its_neighbour(world: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"schedule.warm_up: unknown key; did you mean 'warmup'"):
        parse_settings(RunConfig, {**world, "schedule": {"total": {"steps": 3}, "warm_up": {"steps": 1}}}, source="t")


def test_overrides_reach_into_blocks_and_are_read_as_yaml(world: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(world))
    config = load_settings(RunConfig, path, ["optimizer.peak_lr=0.5", "schedule.total={tokens: 1e4}", "log_every=7"])
    assert (config.optimizer.peak_lr, config.schedule.total.tokens, config.log_every) == (0.5, 1e4, 7)
    with pytest.raises(ConfigError, match="not of the form"):
        apply_overrides({}, ["novalue"])


def test_a_resolved_config_is_a_config_and_resolves_to_itself(world: dict[str, Any]) -> None:
    once = build_plan(tiny.run_config(world), 2).config
    again = parse_settings(RunConfig, yaml.safe_load(dump_settings(once)), source="resolved")
    assert again == once
    assert build_plan(again, 2).config == once


def test_a_config_cannot_be_changed(world: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny.run_config(world).log_every = 3  # type: ignore[misc]


@pytest.mark.parametrize(("length", "expected"), [
    (Length(steps=7), 7), (Length(tokens=5300), 5), (Length(share=0.25), 50),
])
def test_a_length_in_any_unit_is_a_number_of_steps(length: Length, expected: int) -> None:
    assert length.in_steps(tokens_per_step=1000, total_steps=200) == expected


def test_a_length_has_exactly_one_unit() -> None:
    with pytest.raises(ValueError, match="exactly one of steps, tokens, share"):
        Length(steps=3, share=0.1)


def test_batch_sizes_that_do_not_divide_name_the_nearest_that_do() -> None:
    (problem,) = check_batch(BatchConfig(global_batch_size=100, micro_batch_size=8), world_size=4)
    assert problem == ("batch.global_batch_size=100 rows does not divide by micro_batch_size=8 x world_size=4 (=32); "
                       "nearest: 96 or 128")
    assert check_batch(BatchConfig(global_batch_size=96, micro_batch_size=8), world_size=4) == []


def test_phases_that_do_not_fit_are_refused(world: dict[str, Any]) -> None:
    values = {**world, "schedule": {"total": {"steps": 10}, "warmup": {"steps": 6}, "anneal": {"length": {"steps": 5}}}}
    with pytest.raises(ConfigError, match=r"warmup \(6 steps\) and schedule.anneal \(5 steps\) do not fit"):
        build_plan(tiny.run_config(values), 1)


def test_the_same_key_in_both_configs_names_both_places(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "optimizer": {}}))
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*gradient_clipping .* optimizer.grad_clip; remove it"):
        load_deepspeed_config(str(path))
    assert load_deepspeed_config(str(tiny.REPO / "ds_configs/zero3.json"))["zero_optimization"]["stage"] == 3


def test_packed_data_of_another_tokenizer_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other")
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["model"]["vocab"]["<one-more>"] = 258
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"has another tokenizer .*than the one that packed"):
        build_plan(tiny.run_config({**world, "model": {"path": str(other)}}), 1)


@pytest.mark.parametrize("audit", [None, tiny.Audit(passed=False, checks={"held-out events": "3 found"})])
def test_data_whose_leak_audit_is_missing_or_failed_is_refused_unless_allowed(tmp_path: Path, audit: Any) -> None:
    world = tiny.write_world(tmp_path)
    tiny.write_corpus(tmp_path / "packed", "leaky", model=tmp_path / "model", n_rows=3, seed=9, audit=audit)
    values = {**world, "data": {"packed": str(tmp_path / "packed")}}
    with pytest.raises(DataError, match=r"leak audit of leaky is missing or failed"):
        build_plan(tiny.run_config(values), 1)
    values["data"]["allow_unaudited"] = True
    assert "leaky" in build_plan(tiny.run_config(values), 1).train


def test_checkpoints_of_the_stable_phase_are_kept_for_good(world: dict[str, Any]) -> None:
    values = {**world, "schedule": {"total": {"steps": 20}, "warmup": {"steps": 5}, "anneal": {"length": {"steps": 4}}},
              "checkpoint": {"every": 4, "keep_stable_every": 8}}
    plan = build_plan(tiny.run_config(values), 1)
    assert plan.checkpoint_steps() == [4, 8, 12, 16, 20]
    assert [s for s in plan.checkpoint_steps() if plan.is_kept(s)] == [8]  # 16 begins the annealing, 4 is no multiple
