"""Packing: every document once, no item cut, rows exactly full, tokens as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.errors import DataError
from cprec.format import PackedCorpus, list_corpora
from cprec.tokenizer import load_tokenizer
from data_prep.pack import best_fit_decreasing, cut_to_fit, plan_documents, plan_rows
from data_prep.pipeline import prepare
from data_prep.ragged import ragged
from data_prep.templates import TEMPLATES

LEAD_IN = TEMPLATES["cprec"].lead_in


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120), capacity=st.just(40))
@settings(deadline=None, derandomize=True)
def test_bins_hold_everything_once_and_never_overflow(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity=capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in b) for b in bins]
    assert max(used) <= capacity
    # a bin is opened only for an item that no open bin could take: the earlier bins held too much of longer ones
    for b, later in enumerate(bins):
        opener = later[0]
        longer = [[i for i in earlier if (-lengths[i], i) < (-lengths[opener], opener)] for earlier in bins[:b]]
        assert all(sum(lengths[i] for i in held) + lengths[opener] > capacity for held in longer)


@pytest.mark.parametrize(("lengths", "bins"), [
    ([4, 6, 5, 5], [[1, 0], [2, 3]]),  # 6+4, 5+5: both full
    ([7, 6, 3, 4], [[0, 2], [1, 3]]),  # 4 goes beside 6 (4 left), not 7 (3 left); 3 fills the 7 up
    ([10, 10], [[0], [1]]),
    ([2, 2, 2], [[0, 1, 2]]),
])
def test_best_fit_by_hand(lengths: list[int], bins: list[list[int]]) -> None:
    assert best_fit_decreasing(lengths, capacity=10) == bins


def test_rows_are_planned_window_by_window() -> None:
    rows = plan_rows(np.array([6, 4, 4, 6]), seq_len=10, window=2)
    assert rows == [[0, 1], [3, 2]]  # not [0, 2], which lies across the windows


@pytest.mark.parametrize(("tokens", "runs"), [
    ([3, 3, 3], [(0, 3)]),  # 9 of 10
    ([5, 5, 5], [(0, 2), (2, 1)]),  # cut at the item border
    ([4, 11, 4], [(0, 1), (2, 1)]),  # the second does not fit into any row
    ([11], []),
    ([10, 1], [(0, 1), (1, 1)]),
])
def test_long_histories_are_cut_at_item_borders(tokens: list[int], runs: list[tuple[int, int]]) -> None:
    assert cut_to_fit(tokens, room=10) == runs


def test_documents_of_a_long_history_and_of_an_item_that_cannot_fit(tmp_path: Path) -> None:
    # start 2, end 1 tokens; items of 3, 4 and 9 tokens; rows of 10: room 7
    segments = ragged([[1, 1], [2], [5] * 3, [6] * 4, [7] * 9])
    pq.write_table(pa.table({"history_id": [0, 1, 2], "items": pa.array([[0, 1], [0, 0, 0], [1, 2, 0]],
                                                                        pa.list_(pa.int32())),
                             "ts": [[1, 2], [3, 4, 5], [6, 7, 8]]}), tmp_path / "h.parquet")
    made = plan_documents(tmp_path / "h.parquet", segments, seq_len=10)
    assert made.history_id.tolist() == [0, 1, 1, 2, 2]
    assert made.first_item.tolist() == [0, 0, 2, 0, 2]
    assert made.n_items.tolist() == [2, 2, 1, 1, 1]
    assert made.n_tokens.tolist() == [10, 9, 6, 7, 6]  # overhead of 3 each
    assert made.dropped == {2: 1} and made.max_ts == 8


def texts_by_document(out: Path, name: str) -> dict[int, list[int]]:
    """Every packed document's ids, each document required to be there once."""
    found: dict[int, list[int]] = {}
    for row in PackedCorpus(out / "packed" / name):
        assert int(row.doc_lens.sum()) == len(row.input_ids)
        ends = np.cumsum(row.real_doc_lens)
        for doc_id, end, n in zip(row.doc_ids, ends, row.real_doc_lens, strict=True):
            assert int(doc_id) not in found
            found[int(doc_id)] = row.input_ids[end - n:end].tolist()
    return found


def expected_ids(out: Path, name: str, *, tokenizer_name: str) -> dict[int, list[int]]:
    """Every document's ids by tokenizing its whole text, from histories and catalogue alone."""
    tokenizer = load_tokenizer(tokenizer_name)
    lines = pq.read_table(out / "catalogue.parquet")["line"].to_pylist()
    histories = pq.read_table(out / "histories" / f"{name}.parquet")["items"].to_pylist()
    expected = {}
    for doc in pq.read_table(out / "packed" / name / "documents.parquet").to_pylist():
        items = histories[doc["history_id"]][doc["first_item"]:doc["first_item"] + doc["n_items"]]
        text = LEAD_IN + "".join(lines[i] for i in items)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        expected[doc["doc_id"]] = [*bos, *tokenizer.encode([text])[0], tokenizer.eos_id]
    return expected


def test_every_document_of_every_corpus_is_packed_once_with_the_ids_of_its_whole_text(
        prepared: Path, tiny_tokenizer: str) -> None:
    for name in list_corpora(prepared / "packed"):
        expected = expected_ids(prepared, name, tokenizer_name=tiny_tokenizer)
        assert texts_by_document(prepared, name) == expected, name


def test_the_same_holds_for_a_tokenizer_that_puts_a_space_before_every_text(
        raw: Path, tmp_path: Path, mistral_tokenizer: str) -> None:
    values = shops.config_values(raw, tmp_path / "out") | {"tokenizer": {"path": mistral_tokenizer}}
    prepare(shops.config(values))
    made = (tmp_path / "out" / "segments.arrow").stat().st_mtime_ns
    prepare(shops.config(values))
    assert (tmp_path / "out" / "segments.arrow").stat().st_mtime_ns == made, "a finished stage ran again"
    for name in list_corpora(tmp_path / "out" / "packed"):
        expected = expected_ids(tmp_path / "out", name, tokenizer_name=mistral_tokenizer)
        assert texts_by_document(tmp_path / "out", name) == expected, name


def test_padding_is_the_pad_token_at_the_end_and_is_counted(prepared: Path) -> None:
    corpus = PackedCorpus(prepared / "packed" / "mixed")
    pad_id = corpus.manifest.tokenizer.pad_id
    for row in corpus:
        assert (row.input_ids[len(row.input_ids) - row.n_pad:] == pad_id).all()
        assert (row.doc_lens[-1] == row.n_pad) if row.n_pad else len(row.doc_lens) == len(row.doc_ids)
    assert corpus.manifest.n_pad == sum(row.n_pad for row in corpus)


@pytest.fixture
def values(raw: Path, tmp_path: Path, tiny_tokenizer: str) -> dict[str, Any]:
    return shops.config_values(raw, tmp_path / "out") | {"tokenizer": {"path": tiny_tokenizer, "exact": "slow"}}


def test_tokenizing_documents_whole_loses_no_item_and_gives_the_ids_of_the_text(
        values: dict[str, Any], prepared: Path, tmp_path: Path, tiny_tokenizer: str) -> None:
    prepare(shops.config(values))
    for name in ("mixed", "specific/books", "valid/garden"):
        expected = expected_ids(tmp_path / "out", name, tokenizer_name=tiny_tokenizer)
        assert texts_by_document(tmp_path / "out", name) == expected, name
        n_items = [sum(pq.read_table(out / "packed" / name / "documents.parquet")["n_items"].to_pylist())
                   for out in (tmp_path / "out", prepared)]
        assert n_items[0] == n_items[1]


def test_rows_too_short_for_any_line_are_refused_with_the_way_out(values: dict[str, Any]) -> None:
    values["pack"]["seq_len"] = 16
    with pytest.raises(DataError, match=r"no document fits into seq_len=16 tokens; raise pack.seq_len"):
        prepare(shops.config(values | {"tokenizer": {"train_vocab_size": 512}}))
