"""What users meet in a terminal: help that is short, grouped and has an example; JSON; misspelt names; plain lines."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml

from cprec import base
from cprec.attention import select
from cprec.config import RunConfig
from cprec.data.sampler import resolve_mix
from cprec.errors import CPRecError
from cprec.log import progress
from cprec.model import load_for_training
from cprec.settings import load_settings
from cprec.train.plan import build_plan
from cprec.train.run_folder import claim_run_folder
from data_prep.config import PrepConfig

REPO = Path(__file__).parents[2]
SCRIPTS = sorted(p.name for p in (REPO / "launch").glob("*.py"))
MOST_LINES, MOST_UNGROUPED = 75, 9


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{Path(name).stem}", REPO / "launch" / name)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said_by(name: str, *args: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
            expect: int = 0) -> str:
    """What a script prints, in this process; it returns or leaves with the exit code `expect`."""
    monkeypatch.setattr(sys, "argv", [f"launch/{name}", *args])
    monkeypatch.setenv("COLUMNS", "120")
    try:
        code: Any = script(name).main()
    except SystemExit as e:
        code = e.code
    assert (code or 0) == expect
    captured = capsys.readouterr()
    return captured.out if expect == 0 else captured.err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_short_grouped_explains_every_option_and_has_an_example(
        name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = said_by(name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert len(text.splitlines()) <= MOST_LINES and max(map(len, text.splitlines())) <= 120
    assert re.search(rf"^ {{4}}(python|deepspeed|torchrun|mpirun) .*{name}", text, re.MULTILINE), "no example"
    ungrouped = text.partition("\noptions:\n")[2].partition("\n\n")[0]
    options = [line for line in ungrouped.splitlines() if line.startswith("  -")]
    assert len(options) <= MOST_UNGROUPED, options
    lines = text.partition("\noptions:\n")[2].splitlines()
    unexplained = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if line.startswith("  -")
                   and not re.search(r"\S {2,}\S", line.strip()) and not below.startswith(" " * 10)]
    assert not unexplained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has not begun to train."""
    root = tmp_path_factory.mktemp("terminal")
    plan = build_plan(tiny.run_config(tiny.write_world(root)), 1)
    claim_run_folder(Path(plan.config.run_dir), plan)
    return Path(plan.config.run_dir)


@pytest.mark.parametrize(("name", "args", "fields"), [
    ("checkpoints.py", ["RUN"],
     {"checkpoints", "broken", "incomplete", "half_pruned", "put_aside", "pruned", "unsound"}),
    ("checkpoints.py", ["RUN", "--verify", "--prune", "--dry-run"], {"checkpoints", "pruned", "unsound"}),
    ("compare.py", ["RUN"], {"name", "parent", "step", "last_step", "valid_loss_by_corpus", "evaluations"}),
    ("peek.py", ["PACKED"], {"corpus", "n_tokens", "shards", "audit"}),
    ("plan.py", ["--config", "CONFIG", "--gpus-per-node", "2"], {"device_hours"}),
])
def test_what_scripts_read_is_one_json_value_per_line(
        name: str, args: list[str], fields: set[str], run: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    places = {"RUN": str(run), "PACKED": str(run.parent / "packed"), "CONFIG": str(run / "config.yaml")}
    lines = said_by(name, *(places.get(a, a) for a in args), "--json", monkeypatch=monkeypatch,
                    capsys=capsys).splitlines()
    assert len(lines) == (4 if name == "peek.py" else 1)
    for line in lines:
        values = json.loads(line)
        for value in values if isinstance(values, list) else [values]:
            assert fields <= value.keys()


MISSPELT = {
    "key": (lambda: load_settings(RunConfig, REPO / "launch/configs/quickstart.yaml", ["optimizer.peek_lr=1"]),
            "'peak_lr'"),
    "block": (lambda: load_settings(RunConfig, REPO / "launch/configs/quickstart.yaml", ["optimiser.peak_lr=1"]),
              "'optimizer'"),
    "shape": (lambda: load_settings(RunConfig, REPO / "launch/configs/quickstart.yaml",
                                    ["schedule.anneal={length: {steps: 1}, shape: sqrrt}"]), "'sqrt'"),
    "backend": (lambda: load_settings(RunConfig, REPO / "launch/configs/quickstart.yaml",
                                      ["model.attention=flash22"]), "'flash2'"),
    "corpus": (lambda: resolve_mix({"mixd": 1.0}, {"mixed": 1, "specific/toys": 1}, field="data.mix.stable"),
               "'mixed'"),
    "parser": (lambda: load_settings(PrepConfig, REPO / "data_prep/configs/complete_journey.yaml",
                                     ["datasets=[{parser: movilens, path: x}]"]), "'movielens'"),
    "template": (lambda: load_settings(PrepConfig, REPO / "data_prep/configs/complete_journey.yaml",
                                       ["template=compct"]), "'compact'"),
}


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_name_is_answered_with_the_nearest(what: str) -> None:
    ask, nearest = MISSPELT[what]
    with pytest.raises(CPRecError, match=f"did you mean .*{nearest}"):
        ask()


def test_a_misspelt_option_is_answered_with_the_nearest(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by("rank.py", "--model", "m", "--queries", "q", "--out", "o", "--domain-s", "toys", expect=2,
                   monkeypatch=monkeypatch, capsys=capsys)
    assert "there is no option --domain-s: did you mean '--domains'" in said


def test_progress_that_is_no_terminal_is_plain_lines_with_rate_and_time_left(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 4.0, 12.0, 40.0, 80.0])  # the start, then after each of four items
    monkeypatch.setattr("cprec.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO):
        assert list(progress(iter("abcd"), total=4, label="export", unit="tensor")) == list("abcd")
    assert [r.getMessage() for r in caplog.records] == [
        "export: 2/4 tensor, 0.2 tensor/s, about 12 s left", "export: 3/4 tensor, 0.1 tensor/s, about 13 s left",
        "export: 4/4 tensor, 0.1 tensor/s, about 0 s left"]
    assert capsys.readouterr().err == ""


def test_a_model_is_written_and_loaded_without_progress_bars_in_a_log(
        run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 32, "n_layers": 2, "n_heads": 2, "context": 64}
    capfd.readouterr()
    base.make_small_llama(run.parent / "model", tmp_path / "model", seed=1, **shape)
    load_for_training(str(tmp_path / "model"), backend=select("sdpa", torch.device("cpu"), torch.float32),
                      dtype=torch.float32, seq_len=64, vocab_size=258, activation_checkpointing=None,
                      trust_remote_code=False)
    captured = capfd.readouterr()
    assert "\r" not in captured.out + captured.err and "%" not in captured.err


SCHEMAS = {"run": RunConfig, "prepare": PrepConfig}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_for_editors_are_those_of_the_configs(name: str) -> None:
    committed = json.loads((REPO / f"schemas/{name}.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(script("schemas.py").schema_of(SCHEMAS[name]))), "run `make schemas`"


@pytest.mark.parametrize("path", sorted(p for f in ("launch/configs", "data_prep/configs")
                                        for p in (REPO / f).rglob("*.yaml")), ids=lambda p: p.name)
def test_every_config_names_its_schema_which_knows_all_of_its_keys(path: Path) -> None:
    first, _, text = path.read_text(encoding="utf-8").partition("\n")
    schema_path = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    schema = json.loads(schema_path.read_text(encoding="utf-8"))
    assert not unknown_keys(yaml.safe_load(text), schema, schema["$defs"])


def unknown_keys(value: Any, schema: dict[str, Any], defs: dict[str, Any], at: str = "") -> list[str]:
    """Keys that no form of the schema has; free mappings have any."""
    forms = [schema, *schema.get("anyOf", [])]
    forms = [defs[f["$ref"].rpartition("/")[2]] if "$ref" in f else f for f in forms]
    if isinstance(value, list):
        items = next((f["items"] for f in forms if "items" in f), {})
        return [k for v in value for k in unknown_keys(v, items, defs, at)]
    if not isinstance(value, dict) or any("additionalProperties" in f and f["additionalProperties"] for f in forms):
        return []
    known = {k: v for f in forms for k, v in f.get("properties", {}).items()}
    wrong = [f"{at}{k}" for k in value if k not in known]
    return wrong + [k for key, v in value.items() if key in known for k in unknown_keys(v, known[key], defs, f"{key}.")]


def test_the_walk_over_schemas_finds_a_misspelt_key() -> None:
    schema = script("schemas.py").schema_of(RunConfig)
    assert unknown_keys({"optimizer": {"peek_lr": 1}, "data": {"mix": {"stable": {"any/*": 1}}}}, schema,
                        schema["$defs"]) == ["optimizer.peek_lr"]
