"""The Python of docs/howto.md runs, and what it makes is what the page says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ingesting import events_of, items_of, parse
from transformers import AttentionInterface

from cprec.attention import kernel_arguments
from data_prep.parsers.registry import PARSERS, Parser
from tests.core.test_attention import Layer, inputs, reference
from tests.eval.test_baselines import best_first, sequences, shop
from tests.eval.test_metrics import answers

HOWTO = (Path(__file__).parents[2] / "docs/howto.md").read_text(encoding="utf-8")


def block(title: str, *modules: str) -> dict[str, Any]:
    """What the code below a heading defines, run among the names of `modules`; their registries are copies."""
    section = HOWTO.split(f"\n## {title}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for module in modules:
        names |= vars(importlib.import_module(module))
    names |= {name: value.copy() for name, value in names.items() if isinstance(value, dict) and name.isupper()}
    exec(compile(code, title, "exec", dont_inherit=True), names)
    return names


def test_every_kind_of_the_table_has_its_section() -> None:
    kinds = re.findall(r"^\| \[([a-z ]+)\]\(#(?:a|an)-", HOWTO, re.MULTILINE)
    assert len(kinds) == 7
    for kind in kinds:
        assert re.search(rf"^## An? {kind}$", HOWTO, re.MULTILINE), kind


def test_a_parser_reads_a_format_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = block("A dataset parser")
    monkeypatch.setitem(PARSERS, "grocer", Parser(made["inputs"], made["parse"]))
    monkeypatch.setattr("data_prep.config.PARSER_NAMES", (*PARSERS, "grocer"))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/orders.csv").write_text("customer,sku,at\n7,a1,1500000000\n8,a1,1500000060\n")
    (tmp_path / "raw/products.csv").write_text("sku,name,maker\na1,Red lamp,Acme\n")
    events, items = parse(tmp_path, parser="grocer", path=str(tmp_path / "raw"))
    assert events_of(events) == [("7", "grocer", "a1", 1_500_000_000_000, None),
                                 ("8", "grocer", "a1", 1_500_000_060_000, None)]
    assert items_of(items) == [("grocer", "a1", "Red lamp", "Acme", None)]


def test_a_template_writes_its_text() -> None:
    template = block("A prompt template")["TEMPLATE"]
    lines = [template.line({"title": "Lamp", "brand": "Acme"}), template.line({"title": "Rope"})]
    assert template.render(lines) == "Bought, the oldest first:\n* Lamp (Acme)\n* Rope\n"


def test_a_shape_starts_at_1_and_ends_at_its_floor() -> None:
    made = block("An annealing shape", "cprec.schedule")
    shape = made["SHAPES"]["quadratic"]
    assert [shape(x, 0.2) for x in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.8, 0.2])  # 1 - 0.8 / 4 half-way
    assert "quadratic" not in importlib.import_module("cprec.schedule").SHAPES


def test_a_backend_isolates_documents() -> None:
    made = block("An attention backend", "cprec.attention")
    qkv, lens = inputs(12, torch.float64), [5, 4, 3]
    borders = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    implementation = made["BACKENDS"]["by_hand"].implementation
    forward = AttentionInterface()[implementation]
    found = forward(Layer(implementation), *qkv, None, scaling=0.25, **kernel_arguments(borders, 5))[0]
    torch.testing.assert_close(found, reference(qkv, lens, scaling=0.25), atol=1e-12, rtol=0)


def test_a_metric_maps_ranks_to_values() -> None:
    metric = block("A metric", "cprec.eval.metrics")["METRICS"]["HR@5"]
    assert metric(answers([1.0, 5.0, 5.5, np.inf])).tolist() == [1, 1, 0, 0]


def test_a_baseline_scores_every_item() -> None:
    made = block("A baseline", "cprec.eval.neighbours", "cprec.eval.baselines")
    queries = shop([0, 2], titles=list("abc"))
    score = made["together"](sequences([0, 1, 2, 1], [1, 2], [0, 1], n_items=3), queries.catalogue, last=1)
    assert best_first(score(queries, 0)) == [1, 2, 0]  # with 2, people had 0 once, 1 twice, 2 itself twice
    assert "together" in made["COUNTING"]


def test_a_control_changes_what_it_says() -> None:
    made = block("A control", "cprec.eval.controls")
    queries = shop([2, 0, 1], titles=list("abc"))
    assert made["CONTROLS"]["last-item-only"](queries).histories[0].tolist() == [1]
