"""The trained tokenizer: two equal copies, repeatable, blind to what training may not see."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from cprec.tokenizer import load_tokenizer
from data_prep.records import Corpora, Layout
from data_prep.templates import TEMPLATES
from data_prep.vocabulary import train_tokenizer

TEMPLATE = TEMPLATES["cprec"]
LEAD_IN = TEMPLATE.lead_in
CORPORA = Corpora(("books", "games", "toys"), ("garden",))


def test_both_copies_encode_every_line_alike(prepared: Path) -> None:
    lines = pq.read_table(prepared / "catalogue.parquet")["line"].to_pylist()
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer" / "tokenizer.model"))
    texts = [LEAD_IN + "".join(lines[i:i + 5]) for i in range(0, len(lines), 5)]
    assert load_tokenizer(str(prepared / "tokenizer")).encode(texts) == model.encode(texts)


def test_transformers_loads_it_with_the_same_ids_and_control_tokens(prepared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    roles = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert roles == (0, 1, 2, 3)
    text = LEAD_IN + "Red lamp naïve 🙂 (2.5 oz)\n"
    assert tokenizer(text)["input_ids"] == load_tokenizer(str(prepared / "tokenizer")).encode([text])[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_size_reached_is_said_when_the_titles_hold_no_more(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "catalogue.parquet").symlink_to(prepared / "catalogue.parquet")
    counts = train_tokenizer(Layout(tmp_path), vocab_size=50_000, template=TEMPLATE, corpora=CORPORA).by_reason
    n_pieces = len(json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    assert counts["pieces asked for"] == 50_000 and counts["pieces reached"] == n_pieces < 5_000


def test_titles_of_unseen_domains_and_of_later_items_leave_no_trace(prepared: Path, tmp_path: Path) -> None:
    table = pq.read_table(prepared / "catalogue.parquet")
    rows = table.to_pylist()
    others = [r for r in rows if r["domain"] == "garden"]
    assert others
    for row in others:
        row |= {"title": f"Xylophone {row['item']}", "line": f"Xylophone {row['item']}\n"}
    rows.append(rows[0] | {"item": len(rows), "title": "Zither", "line": "Zither\n", "n_train": 0})
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "catalogue.parquet")
    train_tokenizer(Layout(tmp_path), vocab_size=512, template=TEMPLATE, corpora=CORPORA)
    made = (tmp_path / "tokenizer" / "tokenizer.model").read_bytes()
    assert made == (prepared / "tokenizer" / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_gets_a_tokenizer_that_knows_its_words(prepared: Path, tmp_path: Path, name: str) -> None:
    template, table = TEMPLATES[name], pq.read_table(prepared / "catalogue.parquet")
    rows = [row | {"line": template.line({"title": row["title"], "domain": row["domain"], "brand": "Acme Brothers"})}
            for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "catalogue.parquet")
    train_tokenizer(Layout(tmp_path), vocab_size=768, template=template, corpora=CORPORA)
    frame = template.render([template.any_line])
    assert len(load_tokenizer(str(tmp_path / "tokenizer")).encode([frame])[0]) <= 2 * len(frame.split())


def test_the_lead_in_is_not_spelled_letter_by_letter(prepared: Path) -> None:
    assert len(load_tokenizer(str(prepared / "tokenizer")).encode([LEAD_IN])[0]) <= 2 * len(LEAD_IN.split())


def test_scores_are_multiples_so_that_their_sums_are_exact_in_both_copies(prepared: Path) -> None:
    pieces = json.loads((prepared / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer" / "tokenizer.model"))
    scores = [model.get_score(i) for i in range(len(pieces))]
    assert len(set(scores)) > 50 and all((score * 64).is_integer() for score in scores)
    assert all((score * 64).is_integer() for _, score in pieces)
