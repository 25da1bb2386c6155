"""Queries as read from their folder, candidates, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.errors import ConfigError, DataError
from cprec.eval.queries import Prompts, encode_lines, load_queries
from cprec.format import MANIFEST, QueriesManifest, file_hash
from cprec.template import Template
from cprec.tokenizer import Tokenizer, load_tokenizer
from tests.eval.folders import TEMPLATE, Query, Shop, write_queries, write_tokenizer

TITLES = ["Milk", "Bread", "Oat milk", "Bread roll", "Jam"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(str(write_tokenizer(tmp_path / "tokenizer")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shop = Shop(TITLES, [Query("u1", [0, 1], 2), Query("u2", [1], 4, query_ts=300, seen=[0, 1])],
                first_ts=[0, 0, 0, 400, 300])
    return write_queries(tmp_path / "queries", {"food": shop})


def test_what_was_written_is_read(folder: Path) -> None:
    q = load_queries(folder, "food")
    assert (len(q), q.user_ids, q.targets.tolist(), q.query_ts.tolist()) == (2, ["u1", "u2"], [2, 4], [1000, 300])
    assert [q.histories[i].tolist() for i in range(2)] == [[0, 1], [1]]
    assert [q.seen[i].tolist() for i in range(2)] == [[0, 1], [0, 1]]
    assert (q.catalogue.titles, q.catalogue.lines[3]) == (TITLES, "Bread roll\n")
    assert q.head(1).user_ids == ["u1"]


def test_candidates_are_items_that_exist_and_were_not_seen(folder: Path) -> None:
    q = load_queries(folder, "food")
    assert np.flatnonzero(q.candidates(0)).tolist() == [2, 3, 4]
    # u2 asks at 300: item 3 comes at 400, item 4 appears at this very moment; item 0 was seen before the history shown
    assert np.flatnonzero(q.candidates(1)).tolist() == [2, 4]


def test_with_seen_items_included_only_time_filters(tmp_path: Path) -> None:
    shop = Shop(TITLES, [Query("u1", [0, 1], 1)], first_ts=[0, 0, 0, 2000, 0])
    q = load_queries(write_queries(tmp_path / "q", {"food": shop}, seen="include"), "food")
    assert np.flatnonzero(q.candidates(0)).tolist() == [0, 1, 2, 4]
    assert q.is_repeat.tolist() == [True]


def test_a_target_among_the_seen_items_is_refused_where_they_are_excluded(tmp_path: Path) -> None:
    folder = write_queries(tmp_path / "q", {"food": Shop(TITLES, [Query("u1", [0, 1], 1)])})
    with pytest.raises(DataError, match="row 0: the target is among the seen items"):
        load_queries(folder, "food")


def test_an_unknown_domain_is_refused_with_the_nearest_known(folder: Path) -> None:
    with pytest.raises(DataError, match="'fod'; did you mean 'food'"):
        load_queries(folder, "fod")


def test_an_altered_file_is_refused(folder: Path) -> None:
    path = folder / "food.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"food\.parquet is missing or altered"):
        load_queries(folder, "food")


@pytest.mark.parametrize(("column", "values", "message"), [
    ("target", pa.array([2, 9], pa.int32()), "column target names item 9, the catalogue has 5 items"),
    ("target", None, "lacks the columns target"),
])
def test_a_file_that_does_not_fit_its_schema_is_refused(
        folder: Path, column: str, values: pa.Array | None, message: str) -> None:
    path = folder / "food.parquet"
    table = pq.read_table(path).drop_columns([column])
    pq.write_table(table if values is None else table.append_column(column, values), path)
    manifest = QueriesManifest.model_validate_json((folder / MANIFEST).read_text())
    rehashed = manifest.model_copy(update={"files": {name: file_hash(folder / name) for name in manifest.files}})
    (folder / MANIFEST).write_text(rehashed.model_dump_json())
    with pytest.raises(DataError, match=message):
        load_queries(folder, "food")


def test_prompt_is_the_lead_in_and_the_lines_as_one_text(tokenizer: Tokenizer) -> None:
    lines = encode_lines(TEMPLATE, tokenizer, [f"{t}\n" for t in TITLES])
    prompt = Prompts(TEMPLATE, tokenizer, lines, max_tokens=100).prompt(np.array([2, 0]))
    assert tokenizer.decode(prompt.ids) == "Chosen:\nOat milk\nMilk\n"
    assert prompt.ids == tokenizer.encode(["Chosen:\nOat milk\nMilk\n"])[0]
    assert prompt.n_dropped == 0


@pytest.mark.parametrize(("max_tokens", "text", "n_dropped"), [
    (22, "Chosen:\nOat milk\nMilk\n", 0),  # 8 + 9 + 5 bytes
    (21, "Chosen:\nMilk\n", 1),
    (13, "Chosen:\nMilk\n", 1),
    (12, "Chosen:\n", 2),
])
def test_a_long_prompt_drops_its_oldest_items_whole(
        tokenizer: Tokenizer, max_tokens: int, text: str, n_dropped: int) -> None:
    lines = encode_lines(TEMPLATE, tokenizer, [f"{t}\n" for t in TITLES])
    prompt = Prompts(TEMPLATE, tokenizer, lines, max_tokens=max_tokens).prompt(np.array([2, 0]))
    assert (tokenizer.decode(prompt.ids), prompt.n_dropped) == (text, n_dropped)


def test_the_prompt_of_a_supervised_template_ends_with_what_stands_before_the_target(tokenizer: Tokenizer) -> None:
    template = Template(name="own", lead_in="Chosen:", item=" {title};", before_target=" Then:", tail=" Done")
    lines = encode_lines(template, tokenizer, [f" {t};" for t in TITLES])
    # 7 + 6 bytes of frame, 10 of " Oat milk;", 6 of " Milk;"
    for max_tokens, text, n_dropped in ((29, "Chosen: Oat milk; Milk; Then:", 0), (28, "Chosen: Milk; Then:", 1),
                                        (18, "Chosen: Then:", 2)):
        prompt = Prompts(template, tokenizer, lines, max_tokens=max_tokens).prompt(np.array([2, 0]))
        assert (tokenizer.decode(prompt.ids), prompt.n_dropped) == (text, n_dropped)
    with pytest.raises(ConfigError, match=r"at most 12 tokens cannot hold the lead-in of template 'own' \(13 tokens\)"):
        Prompts(template, tokenizer, lines, max_tokens=12)


def test_an_item_that_a_tokenizer_encodes_otherwise_as_a_target_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "merging")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] |= {":Ċ": 300, ":ĊM": 301}
    spec["model"]["merges"] = [[":", "Ċ"], [":Ċ", "M"]]
    spec["pre_tokenizer"]["use_regex"] = False
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(DataError, match=r"merges 'Chosen:\\n' with 'Milk\\n' behind it.*titles cannot be ranked"):
        encode_lines(TEMPLATE, load_tokenizer(str(folder)), ["Milk\n"])


def test_a_context_too_short_for_the_lead_in_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="at most 7 tokens cannot hold the lead-in of template 'test'"):
        Prompts(TEMPLATE, tokenizer, [[1]], max_tokens=7)


def test_sentencepiece_lines_are_encoded_as_they_stand_in_a_text(tmp_path: Path) -> None:
    import sentencepiece

    text = "".join(f"{t}\n" for t in TITLES * 40)
    (tmp_path / "titles.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "titles.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=290, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", num_threads=1, minloglevel=2)
    tokenizer = load_tokenizer(str(tmp_path / "sp.model"))
    assert tokenizer.bos_id is not None
    lines = encode_lines(TEMPLATE, tokenizer, [f"{t}\n" for t in TITLES])
    prompt = Prompts(TEMPLATE, tokenizer, lines, max_tokens=100).prompt(np.array([1, 2]))
    # the dummy space that SentencePiece puts before a text comes once, at the lead-in
    assert prompt.ids == [tokenizer.bos_id, *tokenizer.encode(["Chosen:\nBread\nOat milk\n"])[0]]
