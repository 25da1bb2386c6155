"""LoRA adapters and a first phase of the embeddings alone, under ZeRO, resumed in the middle, exported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import in_ranks
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cprec.config import LoraConfig
from cprec.errors import CheckpointError, ConfigError
from cprec.model import load_for_training
from cprec.train.checkpoint import list_checkpoints, read_run_config
from cprec.train.export import export
from cprec.train.lora import add_lora
from cprec.train.metrics import read_metrics
from cprec.train.partitions import SavedState, SavedWeights
from cprec.train.plan import build_plan

STAGES = ["zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    values = tiny.write_world(tmp_path_factory.mktemp("adapters"))
    return {**values, "schedule": {"total": {"steps": 8}, "warmup": {"steps": 2}}}


@pytest.fixture(scope="module")
def runs(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by name, `lora STAGE` (where peft is installed) and `phase STAGE`, whose first 6 of 8 steps train the
    embeddings alone; each unbroken, and (`NAME again`) gone on with from step 4."""
    root = tmp_path_factory.mktemp("runs")
    lora = {"model": {**world["model"], "lora": {"r": 4, "alpha": 8}}}
    phase = {"schedule": {**world["schedule"], "embeddings_only": {"steps": 6}}}
    kinds = {"phase": phase, **({"lora": lora} if importlib.util.find_spec("peft") else {})}
    configs = {f"{kind} {s}": {**world, **values, "run_dir": str(root / f"{kind} {s}"),
                               "deepspeed": str(tiny.REPO / f"ds_configs/{s}.json")}
               for kind, values in kinds.items() for s in STAGES}
    assert in_ranks.train_all(configs, root, again_from=4) == dict.fromkeys(configs, "")
    return {name: root / name for n in configs for name in (n, f"{n} again")}


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs the package peft")


def weights(run: Path, step: int) -> SavedWeights:
    return SavedWeights(run / f"checkpoints/step_{step:08d}")


def assert_same_run(run: Path, again: Path) -> None:
    assert [(r["step"], r["loss"], r.get("grad_norm")) for r in read_metrics(run)] == \
        [(r["step"], r["loss"], r.get("grad_norm")) for r in read_metrics(again)]
    a, b = weights(run, 8), weights(again, 8)
    assert {*a} == {*b} and all(torch.equal(a[name], b[name]) for name in a)


@needs_peft
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_adapters_changes_them_alone_learns_and_resumes_exactly(
        world: dict[str, Any], runs: dict[str, Path], stage: str) -> None:
    assert_same_run(runs[f"lora {stage}"], runs[f"lora {stage} again"])
    saved, origin = weights(runs[f"lora {stage}"], 8), load_file(Path(world["model"]["path"]) / "model.safetensors")
    frozen = {n.replace(".base_layer", ""): t for n, t in saved.items() if ".lora_" not in n}
    assert {*frozen} == {*origin} and all(torch.equal(t, origin[n]) for n, t in frozen.items())
    adapters = {n: t for n, t in saved.items() if ".lora_" in n}
    assert len(adapters) == 2 * 2 * 7 and all(t.abs().sum() > 0 for t in adapters.values())  # A and B, 2 layers, 7 each
    losses = [r["loss"] for r in read_metrics(runs[f"lora {stage}"]) if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    zero3 = [r["loss"] for r in read_metrics(runs["lora zero3"]) if r["kind"] == "train"]
    assert losses == pytest.approx(zero3, abs=2e-5)


@needs_peft
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_exported_merged_and_alone_give_the_same_logits(
        runs: dict[str, Path], stage: str, tmp_path: Path) -> None:
    from peft import PeftModel

    checkpoint = list_checkpoints(runs[f"lora {stage}"])[-1]
    export(checkpoint, tmp_path / "hf", dtype=torch.float32)
    export(checkpoint, tmp_path / "adapter", dtype=torch.float32, adapter_only=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    base = AutoModelForCausalLM.from_pretrained(read_run_config(runs[f"lora {stage}"]).model.path).eval()
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        before = base(ids).logits
        alone = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits
        ours = merged(ids).logits
    assert (ours - before).abs().max() > 1e-2, "the adapters must do something"
    assert (ours - alone).abs().max() < 1e-5
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < \
        (tmp_path / "hf/model.safetensors").stat().st_size


def test_a_run_without_adapters_has_none_to_export(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained without model.lora.*without --adapter-only"):
        export(list_checkpoints(runs["phase zero3"])[-1], tmp_path / "out", dtype=torch.float32, adapter_only=True)


@needs_peft
@pytest.mark.parametrize(("targets", "said"), [(["q_porj"], "q_porj"), (["embed_tokens"], "are no linear layers")])
def test_adapters_on_what_is_no_linear_layer_are_refused(
        world: dict[str, Any], targets: list[str], said: str) -> None:
    model = load_for_training(world["model"]["path"], backend="doc_sdpa", dtype=torch.float32, seq_len=tiny.SEQ_LEN,
                              vocab_size=258, activation_checkpointing=None, trust_remote_code=False)
    with pytest.raises(ConfigError, match=said):
        add_lora(model.lm, LoraConfig(target_modules=targets))


@pytest.mark.parametrize("stage", STAGES)
def test_in_the_first_phase_nothing_but_the_embeddings_changes_and_it_resumes_in_its_middle(
        world: dict[str, Any], runs: dict[str, Path], stage: str) -> None:
    assert_same_run(runs[f"phase {stage}"], runs[f"phase {stage} again"])
    origin = load_file(Path(world["model"]["path"]) / "model.safetensors")
    at_4, at_8 = weights(runs[f"phase {stage}"], 4), weights(runs[f"phase {stage}"], 8)
    assert [n for n in at_4 if not torch.equal(at_4[n], origin[n])] == ["model.embed_tokens.weight"]
    assert [n for n in at_8 if torch.equal(at_8[n], at_4[n])] == []
    assert update_counts(runs[f"phase {stage}"], 4) == {"embeddings": 4}  # which alone have moments
    assert update_counts(runs[f"phase {stage}"], 8) == {"embeddings": 8, "matrices": 2, "vectors": 2}


def update_counts(run: Path, step: int) -> dict[str, int]:
    """AdamW's count of updates of every parameter group that it has seen, in a checkpoint."""
    return SavedState(run / f"checkpoints/step_{step:08d}").updates


def test_a_phase_of_embeddings_is_planned_in_steps_and_does_not_go_with_adapters(world: dict[str, Any]) -> None:
    schedule = {**world["schedule"], "embeddings_only": {"share": 0.25}}
    plan = build_plan(tiny.run_config({**world, "schedule": schedule}), 2)
    assert [plan.only_embeddings(step) for step in range(4)] == [True, True, False, False]
    assert plan.config.schedule.embeddings_only is not None and plan.config.schedule.embeddings_only.steps == 2
    with pytest.raises(ConfigError, match=r"schedule.embeddings_only would train nothing"):
        tiny.run_config({**world, "schedule": schedule, "model": {**world["model"], "lora": {}}})
