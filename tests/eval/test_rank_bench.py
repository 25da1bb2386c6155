"""The benchmark of ranking, run in full on a shop of forty titles with a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.rank import run
from tests.eval.folders import TOKENIZER_VOCAB, write_tokenizer
from tests.eval.models import random_model


def write_model(folder: Path, kind: str) -> Path:
    random_model(kind, vocab_size=TOKENIZER_VOCAB, dtype=torch.float32,
                 max_position_embeddings=512).save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options for a shop that fifteen users have bought twelve different things in."""
    rng, users, bought = np.random.default_rng(0), [], []
    for user in range(15):
        users += [f"u{user}"] * 12
        bought += [f"i{item}" for item in rng.permutation(40)[:12]]
    for name in ("items", "interactions"):
        (tmp_path / "data" / name).mkdir(parents=True)
    pq.write_table(pa.table({"item_id": [f"i{i}" for i in range(40)],
                             "title": [f"Toy {i} {rng.integers(1000)}" for i in range(40)]}),
                   tmp_path / "data/items/toys.parquet")
    pq.write_table(pa.table({"user_id": users, "item_id": bought, "timestamp": list(range(len(users)))}),
                   tmp_path / "data/interactions/toys.parquet")
    return ["--data", str(tmp_path / "data"), "--domains", "toys", "--sample", "16", "--check-titles", "20", "--sizes",
            "30,60", "--work", str(tmp_path / "work"), "--model"]


def measure(given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the last line says."""
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    run.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_the_last_line_has_every_number_and_names_model_and_commit_of_every_part(
        given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given += [str(write_model(tmp_path / "llama", "llama"))]
    line = measure([*given, "--out", str(tmp_path)], monkeypatch, capsys)
    assert line["equal_to_bruteforce"] is True
    for ratio in ("vs_bruteforce_shared_prompt", "vs_per_candidate"):
        assert line[ratio] is not None  # so small a catalogue is scored as fast one by one
    assert line["by_catalogue"] == {"toys": line["vs_bruteforce_shared_prompt"]}
    assert line["tokens_forwarded_share"] > 0
    assert line["beam_overlap"].keys() == {"10", "20", "50", "100"} and line["beam_overlap"]["100"] == 1
    assert line["growth"]["toys"].keys() == {"30", "60"}
    assert line["made_by"].keys() == {"check", "speed", "beam", "growth"}
    assert {m for part in line["made_by"].values() for m in part.values()} == {
        f"llama, 0.0M parameters, commit {line['commit']}"}
    kept = tmp_path / "work/found.json"
    assert json.loads((tmp_path / "rank_bench.json").read_text()) == json.loads(kept.read_text())
    kept.write_text(kept.read_text().replace(line["commit"], "another"))
    line = measure([*given, "--only", "check"], monkeypatch, capsys)
    assert [line["made_by"][part]["toys"].partition("commit ")[2] for part in ("check", "speed")] == [
        line["commit"], "another"]


def test_measurements_of_another_model_are_not_merged(
        given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measure([*given, str(write_model(tmp_path / "llama", "llama")), "--only", "check"], monkeypatch, capsys)
    with pytest.raises(SystemExit, match=r"found\.json holds what other models did, and this one is qwen2, .*: "
                                         r"check of toys by llama, .*; give another --work"):
        measure([*given, str(write_model(tmp_path / "qwen2", "qwen2")), "--only", "speed"], monkeypatch, capsys)
