"""The memorisation probe, on a model that has learnt half of a catalogue by heart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cprec.errors import DataError
from cprec.eval.memory_probe import probe, says
from cprec.eval.queries import load_queries
from cprec.eval.rankers import LoadedModel
from cprec.tokenizer import load_tokenizer
from tests.eval.folders import TEMPLATE, TOKENIZER_VOCAB, Query, Shop, write_queries, write_tokenizer
from tests.eval.models import random_model

REPOSITORY = Path(__file__).parents[2]
KNOWN, UNKNOWN = ["Quiet lamp", "Violet jug", "Yellow mop"], ["Brown kettle", "Zinc pail", "Plum jam"]
SHOP = Shop([*KNOWN, *UNKNOWN, "Ax"], [Query("u0", [0, 3], 1), Query("u1", [4, 2], 5)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was shown nothing but the known titles, and that who had items 0 and 3 took item 1."""
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    tokenizer = load_tokenizer(str(folder))
    model = random_model(vocab_size=TOKENIZER_VOCAB, dtype=torch.float32, attention="sdpa", spread=0.1)
    texts = [TEMPLATE.render([f"{t}\n"]) for t in KNOWN] + [TEMPLATE.render([f"{SHOP.titles[i]}\n" for i in (0, 3, 1)])]
    rows = [torch.tensor([tokenizer.encode_start(text)]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(60):
        for ids in rows:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def generated(model: PreTrainedModel, before: list[int], n: int) -> list[int]:
    return model.generate(torch.tensor([before]), max_new_tokens=n, do_sample=False)[0, len(before):].tolist()


def test_what_is_said_is_what_greedy_decoding_generates() -> None:
    model = random_model(vocab_size=40, spread=0.3, dtype=torch.float32, attention="sdpa").eval()
    model.generation_config.eos_token_id = None
    before = [3, 9, 4]
    said = generated(model, before, 6)
    assert says(model, before, said)
    for i in range(6):
        other = [*said[:i], (said[i] + 1) % 40, *said[i + 1:]]
        assert not says(model, before, other)


def test_titles_and_next_titles_that_were_learnt_are_counted_and_no_others(folder: Path, tmp_path: Path) -> None:
    queries = write_queries(tmp_path / "queries", {"goods": SHOP})
    done = subprocess.run([sys.executable, REPOSITORY / "launch/probe.py", "--model", folder, "--queries", queries,
                           "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"goods": {
        "titles": 6, "completed": 3, "queries": 2, "next_titles": 1, "next_titles_of_others": 0}}


def test_a_catalogue_of_short_lines_is_refused(folder: Path, tmp_path: Path) -> None:
    queries = write_queries(tmp_path / "queries", {"goods": Shop(["a", "b", "c"], [Query("u0", [0], 1)])})
    model = LoadedModel(random_model(vocab_size=TOKENIZER_VOCAB), load_tokenizer(str(folder)), 256)
    with pytest.raises(DataError, match="goods: no item's line has 4 tokens"):
        probe(model, TEMPLATE, load_queries(queries, "goods"), limit=10)
