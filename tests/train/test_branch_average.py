"""Averages of models: the arithmetic by hand, the greedy choice, and what is refused."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cprec.errors import CheckpointError, ConfigError, DataError
from cprec.train.average import Corpora, _open_corpora, greedy, uniform, validation_loss
from cprec.train.disk import name_refused_writes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one shape and other weights; the second lies in several shards."""
    root = tmp_path_factory.mktemp("models")
    folders = [tiny.write_model(root / name, seed=i) for i, name in enumerate("abc")]
    AutoModelForCausalLM.from_pretrained(folders[1]).save_pretrained(folders[1], max_shard_size="40KB")
    (folders[1] / "model.safetensors").unlink()
    assert len(list(folders[1].glob("model-*.safetensors"))) > 1
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in sorted(folder.glob("*.safetensors")) for k, t in load_file(path).items()}


def test_a_uniform_average_is_the_mean_of_every_tensor_and_a_model(models: list[Path], tmp_path: Path) -> None:
    uniform(models, tmp_path / "soup")
    a, b, c, soup = (tensors(f) for f in (*models, tmp_path / "soup"))
    assert soup.keys() == a.keys()
    for name in soup:
        expected = ((a[name].double() + b[name].double() + c[name].double()) / 3).float()
        torch.testing.assert_close(soup[name], expected, rtol=1e-6, atol=1e-7)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert torch.equal(lm.get_input_embeddings().weight, soup["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "soup").eos_token == "</s>"
    uniform([models[1], models[0]], tmp_path / "sharded")  # in the shards of the first
    assert {p.name for p in (tmp_path / "sharded").glob("*.safetensors")} == {
        p.name for p in models[1].glob("*.safetensors")}
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_an_average_has_base_model_licence_and_language_of_its_first_model(models: list[Path], tmp_path: Path) -> None:
    first = tiny.write_model(tmp_path / "first")
    said = {"base_model": "org/base", "license": "other", "license_name": "terms", "license_link": "LICENSE",
            "language": ["en", "de"]}
    (first / "README.md").write_text(f"---\n{yaml.safe_dump(said)}---\n# first\n")
    (first / "LICENSE").write_text("terms")
    uniform([first, models[1]], tmp_path / "soup")
    uniform([tmp_path / "soup", models[2]], tmp_path / "again")  # and the average of an average
    for out in (tmp_path / "soup", tmp_path / "again"):
        metadata = yaml.safe_load((out / "README.md").read_text().split("---")[1])
        assert {k: metadata[k] for k in said} == said and "model-soup" in metadata["tags"]
        assert (out / "LICENSE").read_text() == "terms"


@pytest.mark.parametrize("kind", ["uniform", "greedy"])
def test_an_average_on_a_full_disk_is_one_clear_error_and_leaves_nothing(
        models: list[Path], tmp_path: Path, kind: str) -> None:
    packed = tmp_path / "packed"
    tiny.write_corpus(packed, "valid/toys", model=models[0], n_rows=3, seed=3, kind="valid")
    with (tiny.largest_file(40_000),
          pytest.raises(CheckpointError, match=r"cannot write below .*soup.*File too large .*bytes are free")):
        if kind == "uniform":
            uniform(models, tmp_path / "soup")
        else:
            greedy(models, tmp_path / "soup", Corpora(str(packed), rows=3))
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.ENOSPC, "No space left on device", "run/x"), r"cannot write run/x: No space left on device \(\d"),
    (RuntimeError("safetensors: No space left on device (os error 28)"),
     r"cannot write below run: safetensors: No space left on device \(os error 28\)"),
    (OSError(errno.EIO, "Input/output error", "run/x"), r"cannot write run/x: Input/output error"),
    (OSError(errno.EIO, "Input/output error"), r"cannot write below run: Input/output error"),
    (OSError(errno.EIO, "Input/output error", "run.partial/x"), r"cannot write run.partial/x: Input/output error"),
    (OSError(errno.EIO, "Input/output error", "base/model.safetensors"), None),
    (RuntimeError("cannot read base/model.safetensors: Input/output error (os error 5)"), None),
])
def test_only_what_a_write_says_is_told_as_a_refused_write(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as raised, name_refused_writes(Path("run")):
        raise error
    if said is None:
        assert raised.value is error
    else:
        assert isinstance(raised.value, CheckpointError) and re.match(said, str(raised.value))


def test_16_bit_weights_are_summed_in_float32(models: list[Path], tmp_path: Path) -> None:
    """1 + 3 * 2^-8 summed in bfloat16 would stay at 1: each 2^-8 is lost against 1."""
    folders = []
    for i, value in enumerate([1.0, 2.0**-8, 2.0**-8, 2.0**-8]):
        folder = tiny.write_model(tmp_path / f"{i}")
        filled = {k: torch.full_like(t, value, dtype=torch.bfloat16) for k, t in tensors(folder).items()}
        save_file(filled, str(folder / "model.safetensors"), metadata={"format": "pt"})
        folders.append(folder)
    uniform(folders, tmp_path / "soup")
    exact = torch.tensor((1 + 3 * 2.0**-8) / 4).to(torch.bfloat16)
    assert exact != torch.tensor(0.25, dtype=torch.bfloat16)
    assert {float(t.unique()) for t in tensors(tmp_path / "soup").values()} == {float(exact)}


def test_the_greedy_average_leaves_out_what_makes_it_worse_and_says_so(models: list[Path], tmp_path: Path) -> None:
    """`near` is the best model with a little noise; `bad` is the best one turned round: it can only hurt."""
    packed = tmp_path / "packed"
    tiny.write_corpus(packed, "valid/toys", model=models[0], n_rows=6, seed=3, kind="valid")
    tiny.write_corpus(packed, "train", model=models[0], n_rows=6, seed=4)
    near, bad = tiny.write_model(tmp_path / "near"), tiny.write_model(tmp_path / "bad")
    own = tensors(models[0])
    save_file({k: t * 1.001 for k, t in own.items()}, str(near / "model.safetensors"), metadata={"format": "pt"})
    save_file({k: t * 30 for k, t in own.items()}, str(bad / "model.safetensors"), metadata={"format": "pt"})
    greedy([bad, models[0], near], tmp_path / "soup", Corpora(str(packed), rows=5))
    said = json.loads((tmp_path / "soup/cprec_average.json").read_text())
    corpora = _open_corpora(Corpora(str(packed)), models[0])
    losses = {f: validation_loss(f, corpora, 5).loss for f in (models[0], near, bad, tmp_path / "soup")}
    assert list(corpora) == ["valid/toys"] and str(bad) not in said["kept"]
    assert losses[tmp_path / "soup"] == pytest.approx(said["loss"], rel=1e-6)
    assert said["loss"] <= min(losses[models[0]], losses[near]) < losses[bad]
    card = (tmp_path / "soup/README.md").read_text()
    assert f"| {bad} | - | - | no | {losses[bad]:.4f} |" in card and "no estimate for data" in card
    assert not list(tmp_path.glob("*.trial")) and not list(tmp_path.glob("*.partial"))


def test_a_models_validation_loss_is_transformers_own_document_by_document(
        models: list[Path], tmp_path: Path) -> None:
    tiny.write_corpus(tmp_path / "packed", "valid/toys", model=models[0], n_rows=3, seed=3, kind="valid")
    corpora = _open_corpora(Corpora(str(tmp_path / "packed")), models[0])
    lm, total, n = AutoModelForCausalLM.from_pretrained(models[0]).eval(), 0.0, 0
    for row in corpora["valid/toys"]:
        start = 0
        for length in row.real_doc_lens.tolist():
            ids = torch.tensor(row.input_ids[start:start + length].astype("int64"))[None]
            total, n, start = total + float(lm(ids, labels=ids).loss) * (length - 1), n + length - 1, start + length
    assert validation_loss(models[0], corpora, 3).loss == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize(("other", "why"), [
    ({"num_hidden_layers": 1}, r"(?s)different architectures: num_hidden_layers is 2 and 1.*only one of them has"),
    ({"intermediate_size": 32}, r"(?s)intermediate_size is 64 and 32.*mlp.down_proj.weight has shape \(32, 64\) in"),
])
def test_models_that_have_no_average_are_told_apart(
        models: list[Path], tmp_path: Path, other: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        uniform([models[0], tiny.write_model(tmp_path / "other", **other)], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_what_cannot_be_averaged_is_refused_with_the_reason(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two models or more"):
        uniform(models[:1], tmp_path / "soup")
    with pytest.raises(ConfigError, match="named twice"):
        uniform([models[0], models[0]], tmp_path / "soup")
    with pytest.raises(ConfigError, match=r"is no model folder: it has no config.json; launch/export.py"):
        uniform([models[0], tmp_path], tmp_path / "soup")
    changed = tiny.write_model(tmp_path / "changed")
    spec = json.loads((changed / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (changed / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="have different tokenizers"):
        uniform([models[0], changed], tmp_path / "soup")
    (tmp_path / "soup").mkdir()
    with pytest.raises(ConfigError, match="does not hold this average"):
        uniform(models, tmp_path / "soup")
    tiny.write_corpus(tmp_path / "packed", "valid/toys", model=models[0], n_rows=3, seed=3, kind="valid")
    with pytest.raises(DataError, match=r"--corpora valid/toy: no such corpus.*did you mean 'valid/toys'"):
        greedy(models, tmp_path / "new", Corpora(str(tmp_path / "packed"), "valid/toy"))


def test_the_script_averages_and_a_second_call_finds_it_done(models: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, str(tiny.REPO / "launch/average.py"), *map(str, models[:2]), "--out",
               str(tmp_path / "soup")]
    for said in ("wrote the average of 2 models", "already holds this average"):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said in done.stderr
    done = subprocess.run([*command, "--greedy"], capture_output=True, text=True)
    assert done.returncode == 2 and "--greedy needs --packed FOLDER" in done.stderr
