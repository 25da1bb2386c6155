"""Fine-tuning on few documents: what is drawn, and from packed shops to ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shops
import torch
from safetensors.torch import load_file

from cprec import base
from cprec.errors import ConfigError
from cprec.eval.comparison import make_report
from cprec.eval.run import EvalOptions, evaluate
from cprec.format import ITEM_BITS, PackedCorpus, read_manifest
from cprec.train.branch import find_checkpoint
from cprec.train.export import export
from cprec.train.metrics import read_metrics
from data_prep.pipeline import prepare
from data_prep.shots import draw_shots, shot_order
from launch import finetune

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small shops, packed with targets."""
    root = tmp_path_factory.mktemp("finetune")
    shops.write_shops(root)
    values = shops.config_values(root, root / "prepared") | {"template": "supervised"}
    prepare(shops.config(values | {"queries": {"max_per_domain": 5, "min_history": 1}}))
    return root / "prepared"


def documents(folder: Path) -> dict[int, tuple[list[int], list[bool]]]:
    """Tokens and loss mask of every document by id."""
    found = {}
    for row in PackedCorpus(folder):
        ends = np.cumsum(row.real_doc_lens)
        for doc, end, n in zip(row.doc_ids.tolist(), ends.tolist(), row.real_doc_lens.tolist(), strict=True):
            found[doc] = row.input_ids[end - n:end].tolist(), row.loss_mask[end - n:end].tolist()
    return found


def test_shots_are_whole_documents_with_their_targets(prepared: Path, tmp_path: Path) -> None:
    corpus = prepared / "packed/specific/toys"
    everything = documents(corpus)
    manifest = draw_shots(corpus, tmp_path / "shots", n_shots=12, seed=0, name="shots/toys-12")
    drawn = documents(tmp_path / "shots")
    assert len(drawn) == 12 and all(everything[doc] == drawn[doc] for doc in drawn)
    found = PackedCorpus(tmp_path / "shots")
    found.verify()
    n_real = sum(int(row.real_doc_lens.sum()) for row in found)
    assert (manifest.n_documents, manifest.n_tokens) == (12, n_real) and manifest.audit == read_manifest(corpus).audit
    assert manifest.sum_squared_doc_lens == sum(len(ids) ** 2 for ids, _ in drawn.values())
    assert manifest.n_rows < 12  # packed, not one a row


def test_fewer_shots_are_among_more_and_another_seed_draws_others(prepared: Path, tmp_path: Path) -> None:
    corpus = prepared / "packed/specific/toys"
    few, many, other = (set(documents(tmp_path / name)) for name, n, seed in (("4", 4, 0), ("16", 16, 0), ("o", 16, 1))
                        if draw_shots(corpus, tmp_path / name, n_shots=n, seed=seed, name=name))
    assert few < many and many != other


def test_a_users_documents_are_drawn_together() -> None:
    ids = np.array([(h << ITEM_BITS) + first for h in range(6) for first in (0, 5)])
    drawn = (ids[shot_order(ids, seed=3)] >> ITEM_BITS).tolist()
    assert drawn[::2] == drawn[1::2] and sorted(drawn[::2]) == list(range(6)) != drawn[::2]


def test_more_shots_than_documents_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"100,000 shots of .*, which has"):
        draw_shots(prepared / "packed/specific/toys", tmp_path / "x", n_shots=100_000, seed=0, name="x")


def options(model: Path, prepared: Path, run: Path, *rest: str) -> list[str]:
    return ["--model", str(model), "--packed", str(prepared / "packed"), "--run-dir", str(run), *rest]


def tune(model: Path, prepared: Path, run: Path, *given: str) -> None:
    """8 shots of toys by launch/finetune.py, with these options too."""
    command = [sys.executable, str(REPO / "launch/finetune.py"), *options(
        model, prepared, run, "--corpus", "specific/toys", "--shots", "8", *given,
        "optimizer.peak_lr=2e-2", "validation.every=null", "log_every=1")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=REPO,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_model_learns_its_shots_is_exported_and_ranks(prepared: Path, tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    base.make_small_llama(prepared / "tokenizer", model, hidden_size=32, n_layers=2, n_heads=2, context=512, seed=0)
    tune(model, prepared, run, "--epochs", "3")
    log = [r for r in read_metrics(run) if r["kind"] == "train"]
    assert set(log[0]["loss_by_corpus"]) == {"shots/toys-8"} and log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["lr"] < 0.4e-2 < 1.8e-2 < max(r["lr"] for r in log)  # up, and down in a line
    export(find_checkpoint(str(run)), run / "hf", dtype=torch.float32)
    folders = {"zero": model, "tuned": run / "hf"}
    for name, folder in folders.items():
        evaluate(EvalOptions(queries=str(prepared / "queries"), out=str(tmp_path / name), model=str(folder),
                             domains=["toys"]))
    report = make_report({name: tmp_path / name for name in folders}, reference="zero")
    nll = {c.model: c.mean for c in report.cells if (c.row, c.metric) == ("toys", "NLL")}
    assert nll["tuned"] < 0.8 * nll["zero"]
    assert [d.mean for d in report.differences if d.metric == "NLL"] == [pytest.approx(nll["tuned"] - nll["zero"])]


def test_adapters_alone_learn_the_shots_and_are_exported_merged(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'cprec[lora]'")
    model, run = tmp_path / "model", tmp_path / "run"
    base.make_small_llama(prepared / "tokenizer", model, hidden_size=32, n_layers=2, n_heads=2, context=512, seed=0)
    tune(model, prepared, run, "--epochs", "3", "model.lora={r: 4}")
    losses = [r["loss"] for r in read_metrics(run) if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    export(find_checkpoint(str(run)), run / "hf", dtype=torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run / "hf"))
    assert before.keys() == after.keys()  # the adapters are in the weights, and every script reads the folder
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all("_proj." in name for name in changed)


def test_the_plan_says_what_is_read_and_all_means_the_corpus_itself(
        prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPO)
    base.make_small_llama(prepared / "tokenizer", tmp_path / "model", hidden_size=32, n_layers=2, n_heads=2,
                          context=512, seed=0)
    rest = options(tmp_path / "model", prepared, tmp_path / "run", "--corpus", "specific/toys", "--dry-run")
    for shots, corpus in (("4", "shots/toys-4"), ("all", "specific/toys")):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *rest, "--shots", shots])
        assert finetune.main() == 0
        read = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and "%" in line]
        assert [line[0] for line in read if line[2] != "0.000%"] == [corpus]


@pytest.mark.parametrize(("given", "message"), [
    (["--corpus", "specific/toy", "--shots", "8"], "did you mean 'specific/toys'"),
    (["--corpus", "specific/toys", "--shots", "5k"], "5,000 shots of .*, which has"),
])
def test_what_cannot_be_fine_tuned_on_is_said(given: list[str], message: str, prepared: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    rest = options(tmp_path, prepared, tmp_path / "run", "--dry-run")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *rest, *given])
    with pytest.raises(ConfigError, match=message):
        finetune.main()


def test_no_shots_are_the_model_itself(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options(tmp_path, prepared, run), "--corpus", "x", "--shots",
                                      "0"])
    assert finetune.main() == 0 and not run.exists()
