"""An export is written tensor by tensor, tells what it is, and computes what the trained weights compute."""

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
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from cprec.config import ParentConfig
from cprec.data.corpora import read_data_record
from cprec.train import export as exporting
from cprec.train.checkpoint import Checkpoint, list_checkpoints, read_run_config
from cprec.train.export import export
from cprec.train.model_card import model_card
from cprec.train.partitions import SavedWeights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of a run of 2 steps on one rank, from a model with a card and a generation config."""
    root = tmp_path_factory.mktemp("export")
    world = tiny.write_world(root)
    (root / "model/README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# a base\n")
    GenerationConfig(max_new_tokens=7, eos_token_id=1).save_pretrained(root / "model")
    schedule = {"total": {"steps": 2}, "warmup": {"steps": 1}}
    config = root / "run.yaml"
    config.write_text(yaml.safe_dump({**world, "schedule": schedule, "validation": {"every": 2, "rows_per_corpus": 4}}))
    subprocess.run([sys.executable, str(tiny.REPO / "launch/pretrain.py"), "--config", str(config)], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return list_checkpoints(root / "run")[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_in_several_shards_computes_what_the_trained_weights_compute_in_the_base_model(
        checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    export(checkpoint, tmp_path / "hf", dtype=dtype)
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(s.stat().st_size < 60_000 for s in shards)
    with safe_open(shards[0], framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    trained = AutoModelForCausalLM.from_pretrained(read_run_config(checkpoint.run_dir).model.path, dtype=dtype).eval()
    weights = SavedWeights(checkpoint.folder)
    assert trained.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, strict=False).unexpected_keys == []
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype).eval()
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, trained(ids).logits)
    assert exported.generation_config.max_new_tokens == 7


def test_a_model_card_tells_base_licence_data_lineage_and_losses(checkpoint: Checkpoint) -> None:
    config = read_run_config(checkpoint.run_dir)
    text = model_card(config, checkpoint)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en"]
    assert metadata["base_model"] == config.model.path and metadata["library_name"] == "transformers"
    for corpus in read_data_record(checkpoint.run_dir).corpora.values():
        assert corpus.rows_hash in text
    assert "1,024 tokens seen" in text and "| valid/toys |" in text and checkpoint.state_hash in text


def test_the_card_of_a_branch_names_its_ancestors_and_says_where_their_folders_are_gone(
        checkpoint: Checkpoint, tmp_path: Path) -> None:
    trunk = shutil.copytree(checkpoint.run_dir, tmp_path / "trunk")
    values: dict[str, Any] = yaml.safe_load((trunk / "config.yaml").read_text())
    values["parent"] = ParentConfig(run_dir=str(tmp_path / "gone"), step=1, state_hash="ab").model_dump()
    (trunk / "config.yaml").write_text(yaml.safe_dump(values))
    config = tiny.run_config({**values, "parent": {"run_dir": str(trunk), "step": 2, "state_hash": "cd"}})
    lineage = model_card(config, checkpoint).split("## Lineage")[1].split("##")[0]
    assert f"2. branch of `{trunk}` at step 2" in lineage and f"3. branch of `{tmp_path / 'gone'}` at step 1" in lineage
    assert "4. of an origin that is not known" in lineage
