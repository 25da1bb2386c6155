"""An export is written tensor by tensor, tells what it is, and computes what the trained weights compute."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cprec.config import ParentConfig
from cprec.data.corpora import read_data_record
from cprec.errors import CheckpointError, ConfigError, CPRecError
from cprec.train import export as exporting
from cprec.train.checkpoint import BrokenError, Checkpoint, list_checkpoints, read_run_config
from cprec.train.export import export
from cprec.train.hub import check_can_push, push
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


def test_an_export_has_every_file_that_vllm_and_llama_cpp_ask_for_and_the_base_tokenizer(
        checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    out = tmp_path / "hf"
    export(checkpoint, out, dtype=torch.bfloat16)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    named = {name: file for file in sorted({*index["weight_map"].values()})
             for name in safe_open(out / file, framework="pt").keys()}  # noqa: SIM118 - not a mapping
    assert named == index["weight_map"] and {p.name for p in out.glob("*.safetensors")} == {*named.values()}
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) > index["metadata"]["total_size"] > 0
    ours, base = (AutoTokenizer.from_pretrained(p) for p in (out, read_run_config(checkpoint.run_dir).model.path))
    sample = ["Bought:\nA robot, 2nd edition\n", "Bücher & Spiele — 20 % günstiger", "</s> is text", "日本語 \t x"]
    assert [ours(s)["input_ids"] for s in sample] == [base(s)["input_ids"] for s in sample]
    assert ours.get_vocab() == base.get_vocab() and max(ours.get_vocab().values()) < config["vocab_size"]
    assert ours.special_tokens_map == base.special_tokens_map and ours.eos_token_id == base.eos_token_id == 1
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    gguf = pytest.importorskip("gguf", reason="llama.cpp's package gguf is not installed (extra gguf)")
    vocab = gguf.SpecialVocab(out, load_merges=True)  # what llama.cpp's converter reads a folder's tokens with
    assert vocab.special_token_ids == {"bos": 0, "eos": 1, "pad": 1}


@pytest.mark.parametrize(("name", "problem"), [
    ("model", "give OWNER/NAME"), ("a/b/c", "a/b/c"), ("me/no good", "me/no good"),
    ("me/model", "run `hf auth login`")])
def test_a_push_that_cannot_succeed_is_refused_before_anything_is_read(
        name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="--push-to") as raised:
        check_can_push(name)
    assert problem in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(CPRecError, match="the same command sends it again"):
            push(tmp_path, "me/model", message="step 1")


def test_a_model_card_tells_base_licence_data_lineage_and_losses(checkpoint: Checkpoint) -> None:
    config = read_run_config(checkpoint.run_dir)
    text = model_card(config, checkpoint)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en"]
    assert "base_model" not in metadata and metadata["library_name"] == "transformers"
    for corpus in read_data_record(checkpoint.run_dir).corpora.values():
        assert corpus.rows_hash in text
    assert f"`config.yaml` of the run: {checkpoint.state.config_hash}\n" in text
    assert "1,024 tokens seen" in text and "| valid/toys |" in text and checkpoint.state_hash in text


@pytest.mark.parametrize(("card", "files", "expected", "travels"), [
    (None, ["LICENSE"], {"license": "other", "license_name": "as-base-model", "license_link": "LICENSE"}, ["LICENSE"]),
    (None, [], {"license": "other", "license_name": "as-base-model"}, []),
    (None, ["LICENSE.txt"], {"license": "other", "license_name": "as-base-model"}, ["LICENSE.txt"]),
    ("{license: other, license_name: mine, license_link: LICENSE}", ["LICENSE"],
     {"license": "other", "license_name": "mine", "license_link": "LICENSE"}, ["LICENSE"]),
    ("{license: other, license_name: mine, license_link: LICENSE.md}", ["LICENSE", "LICENSE.md"],
     {"license": "other", "license_name": "mine", "license_link": "LICENSE.md"}, ["LICENSE.md"]),
    ("{license: other, license_name: mine, license_link: terms.txt}", ["terms.txt"],
     {"license": "other", "license_name": "mine", "license_link": "terms.txt"}, ["terms.txt"]),
    ("{license: other, license_name: mine, license_link: /home/me/terms.txt}", ["LICENSE"],
     {"license": "other", "license_name": "mine"}, ["LICENSE"]),
    ("{license: llama3, license_link: 'https://example.org/terms'}", [],
     {"license": "llama3", "license_link": "https://example.org/terms"}, []),
    ("{license: llama3, license_link: 'http://example.org/terms'}", ["LICENSE.txt"],
     {"license": "llama3", "license_link": "http://example.org/terms"}, ["LICENSE.txt"]),
    ("{license: apache-2.0}", ["LICENSE.md"], {"license": "apache-2.0"}, ["LICENSE.md"]),
])
def test_a_licence_travels_and_a_card_names_no_folder_of_this_machine_where_the_hub_wants_a_name_or_a_link(
        checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, card: str | None, files: list[str],
        expected: dict[str, str], travels: list[str]) -> None:
    values = read_run_config(checkpoint.run_dir).model_dump()
    model = Path(shutil.copytree(values["model"]["path"], tmp_path / "base"))
    (model / "README.md").unlink()
    if card:
        (model / "README.md").write_text(f"---\n{card}\n---\n")
    for name in files:
        (model / name).write_text(f"terms of {name}")
    values["model"]["path"] = str(model)
    metadata = yaml.safe_load(model_card(tiny.run_config(values), checkpoint).split("---")[1])
    assert {k: v for k, v in metadata.items() if k.startswith("license")} == expected and "base_model" not in metadata
    is_left_out = card is not None and "license_link" in card and "license_link" not in expected
    assert ("neither a URL nor a file" in caplog.text) == is_left_out
    run = Path(shutil.copytree(checkpoint.run_dir, tmp_path / "run"))
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    export(list_checkpoints(run)[-1], tmp_path / "hf", dtype=torch.bfloat16)
    found = {p.name: p.read_text() for p in (tmp_path / "hf").iterdir() if p.name in {*files, "LICENSE"}}
    assert found == {name: f"terms of {name}" for name in travels}


def test_the_card_of_a_model_of_the_hub_names_it_and_links_its_licence_there(checkpoint: Checkpoint) -> None:
    values = read_run_config(checkpoint.run_dir).model_dump()
    values["model"]["path"] = "Qwen/Qwen2.5-0.5B"
    metadata = yaml.safe_load(model_card(tiny.run_config(values), checkpoint).split("---")[1])
    assert metadata["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert metadata["license_link"] == "https://huggingface.co/Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize("room", [100, 40_000])
def test_an_export_to_a_full_disk_is_one_clear_error_and_with_room_it_is_made(
        checkpoint: Checkpoint, tmp_path: Path, room: int) -> None:
    """100 bytes: a library's own file fails; 40,000: the weights do."""
    out = tmp_path / "hf"
    with tiny.largest_file(room), pytest.raises(CheckpointError, match=r"cannot write .*hf.*bytes are free.*Make room"):
        export(checkpoint, out, dtype=torch.float32)
    assert not list(tmp_path.iterdir())
    export(checkpoint, out, dtype=torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_an_altered_checkpoint_is_not_exported_and_a_folder_with_something_else_is_left_alone(
        checkpoint: Checkpoint, tmp_path: Path) -> None:
    run = Path(shutil.copytree(checkpoint.run_dir, tmp_path / "run"))
    altered = list_checkpoints(run)[-1]
    with (altered.folder / "rank_00000.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x99")
    with pytest.raises(BrokenError, match=r"rank_00000.safetensors has not the hash"):
        export(altered, tmp_path / "hf", dtype=torch.float32)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.partial").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and holds something that is no export"):
        export(checkpoint, foreign, dtype=torch.float32)
    export(checkpoint, tmp_path / "hf", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"exists and holds .*float32.*give --out another folder"):
        export(checkpoint, tmp_path / "hf", dtype=torch.bfloat16)
    assert [p.name for p in foreign.iterdir()] == ["mine.txt"]


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
