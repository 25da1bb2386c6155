"""Packing: every document once, no item cut, rows exactly full, tokens as planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shops
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.errors import DataError
from cprec.format import PackedCorpus, list_corpora
from cprec.tokenizer import load_tokenizer
from data_prep.pack import gathered_documents
from data_prep.pipeline import prepare
from data_prep.plan import (
    PACK_MODES,
    Documents,
    RowPlan,
    best_fit,
    best_fit_decreasing,
    concat,
    cut_histories,
    cut_to_fit,
    one_per_row,
)
from data_prep.ragged import ragged
from data_prep.rows import FromSegments, fill_rows
from data_prep.templates import TEMPLATES

LEAD_IN = TEMPLATES["cprec"].lead_in


def rows_of(plan: RowPlan) -> list[list[int]]:
    """Documents of each row."""
    return [d.tolist() for d in np.split(plan.docs, np.cumsum(plan.pieces_per_row)[:-1])]


def one_by_one(lengths: list[int], *, seq_len: int) -> list[list[int]]:
    """Best-fit decreasing as its definition says: each document into the fullest row that takes it, of several into
    the one that changed last."""
    rows: list[list[int]] = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in reversed(rows) if sum(r) + n <= seq_len]
        row = max(fitting, key=sum) if fitting else []
        rows = [r for r in rows if r is not row] + [row]
        row.append(n)
    return rows


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120))
@settings(deadline=None, derandomize=True)
def test_packing_equal_lengths_at_once_fills_rows_as_packing_one_by_one_does(lengths: list[int]) -> None:
    plan = best_fit_decreasing(np.array(lengths), seq_len=40)
    rows = rows_of(plan)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert plan.n_tokens.tolist() == [lengths[i] for row in rows for i in row] and not plan.skips.any()
    filled = [sorted((lengths[i] for i in row), reverse=True) for row in rows]
    assert sorted(filled) == sorted(one_by_one(lengths, seq_len=40))


@pytest.mark.parametrize(("lengths", "rows"), [
    ([4, 6, 5, 5], [[1, 0], [2, 3]]),  # 6+4, 5+5: both full
    ([7, 6, 3, 4], [[0, 2], [1, 3]]),  # 4 goes beside 6 (4 left), not 7 (3 left); 3 fills the 7 up
    ([10, 10], [[0], [1]]),
    ([2, 2, 2], [[0, 1, 2]]),
    ([4, 4, 4, 2, 2], [[0, 1, 3], [2, 4]]),  # the third 4 opens a row; each 2 goes where less is left
])
def test_best_fit_by_hand(lengths: list[int], rows: list[list[int]]) -> None:
    assert rows_of(best_fit_decreasing(np.array(lengths), seq_len=10)) == rows


@given(lengths=st.lists(st.integers(1, 40), max_size=400))
@settings(deadline=None, derandomize=True)
def test_exchanging_documents_loses_none_and_overfills_no_row(lengths: list[int]) -> None:
    plan = best_fit(np.array(lengths, np.int64), seq_len=40)
    assert sorted(plan.docs.tolist()) == list(range(len(lengths))) and plan.pieces_per_row.sum() == len(lengths)
    assert all(0 < sum(lengths[i] for i in row) <= 40 for row in rows_of(plan) if lengths)


def test_rows_that_best_fit_alone_leaves_open_are_filled_by_exchange() -> None:
    lengths = np.random.default_rng(1).integers(30, 200, 20_000)  # no document fits into a gap below 30
    alone, exchanged = (plan(lengths, seq_len=1024) for plan in (best_fit_decreasing, best_fit))
    gaps = [1 - lengths.sum() / (1024 * len(plan.pieces_per_row)) for plan in (alone, exchanged)]
    assert gaps[1] < gaps[0] / 2


def test_documents_end_to_end_are_cut_where_a_row_ends() -> None:
    plan = concat(np.array([4, 7, 12, 2]), seq_len=10)  # 25 tokens: borders at 4, 11, 23, 25 and 10, 20
    assert rows_of(plan) == [[0, 1], [1, 2], [2, 3]]
    assert plan.n_tokens.tolist() == [4, 6, 1, 9, 3, 2]
    assert plan.skips.tolist() == [0, 0, 6, 0, 9, 0]


def test_one_document_per_row() -> None:
    assert rows_of(one_per_row(np.array([4, 7]), seq_len=10)) == [[0], [1]]


@pytest.mark.parametrize("plan", PACK_MODES.values(), ids=PACK_MODES)
def test_some_rows_of_a_plan_are_those_rows(plan: Callable[..., RowPlan]) -> None:
    lengths = np.random.default_rng(3).integers(1, 33, 200)
    whole = plan(lengths, seq_len=32)
    parts = [whole.rows(first, 7) for first in range(0, len(whole.pieces_per_row), 7)]
    for column in ("docs", "n_tokens", "skips", "pieces_per_row"):
        assert np.array_equal(np.concatenate([getattr(p, column) for p in parts]), getattr(whole, column))


@pytest.mark.parametrize(("tokens", "runs"), [
    ([3, 3, 3], [(0, 3)]),  # 9 of 10
    ([5, 5, 5], [(0, 2), (2, 1)]),  # cut at the item border
    ([4, 11, 4], [(0, 1), (2, 1)]),  # the second does not fit into any row
    ([11], []),
    ([10, 1], [(0, 1), (1, 1)]),
])
def test_long_histories_are_cut_at_item_borders(tokens: list[int], runs: list[tuple[int, int]]) -> None:
    assert cut_to_fit(tokens, room=10) == runs


# start 2, end 1 tokens; items of 3, 4 and 9 tokens; rows of 10: room 7
SEGMENTS = ragged([[1, 1], [2], [], [0], [5] * 3, [6] * 4, [7] * 9])
HISTORIES = [[0, 1], [0, 0, 0], [1, 2, 0]]


def documents_of_histories(histories: list[list[int]], **how: Any) -> tuple[Documents, FromSegments]:
    lengths = np.array([len(h) for h in histories])
    items = np.array([i for h in histories for i in h], np.int32)
    return gathered_documents(items, lengths, 70 + np.arange(len(histories)), seq_len=10, **how)


def test_documents_of_a_long_history_and_of_an_item_that_cannot_fit() -> None:
    made, source = documents_of_histories(HISTORIES, segments=SEGMENTS, has_target=False)
    assert [divmod(i, 1 << 16) for i in made.ids.tolist()] == [(70, 0), (71, 0), (71, 2), (72, 0), (72, 2)]
    assert made.n_items.tolist() == [2, 2, 1, 1, 1]
    assert made.n_tokens.tolist() == [10, 9, 6, 7, 6]  # overhead of 3 each
    assert made.dropped == {2: 1}
    assert source.tokens(np.array([4, 0])).tolist() == [1, 1, 5, 5, 5, 2, 1, 1, 5, 5, 5, 6, 6, 6, 6, 2]


def test_a_target_stands_behind_its_segment_and_needs_a_history_before_it() -> None:
    segments = ragged([[1], [2], [3], [0], [5] * 3, [6] * 4, [7] * 9])  # room 7 again
    made, source = documents_of_histories(HISTORIES, segments=segments, has_target=True)
    assert [divmod(i, 1 << 16) for i in made.ids.tolist()] == [(70, 0), (71, 0)]
    assert made.dropped == {2: 1} and made.n_alone == 3  # pieces of one item: nothing is left to be their history
    assert source.tokens(np.array([0])).tolist() == [1, 5, 5, 5, 3, 6, 6, 6, 6, 2]
    assert made.n_target_tokens.tolist() == [5, 4]  # the last item and the end
    rows = fill_rows(best_fit(made.n_tokens, seq_len=10), made, source, seq_len=10, dtype="uint16", pad_id=0,
                     has_loss_mask=True)
    assert rows.loss_mask is not None
    assert rows.input_ids.tolist() == [[1, 5, 5, 5, 3, 6, 6, 6, 6, 2], [1, 5, 5, 5, 3, 5, 5, 5, 2, 0][:10]]
    assert rows.loss_mask.astype(int).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]]


def test_a_single_last_item_gets_company_from_the_run_before_it() -> None:
    line_lens = np.array([2, 5, 9], np.int32)
    events = np.array([*[0, 0, 0, 0], *[0, 0, 0, 1], *[1, 0, 1]], np.int32)  # 2 2 2 2, 2 2 2 5, 5 2 5 tokens
    runs = cut_histories(events, np.array([4, 4, 3]), line_lens, room=7, min_items=2)
    assert list(zip(runs.place.tolist(), runs.first_item.tolist(), runs.n_items.tolist(), strict=True)) == [
        (0, 0, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2), (2, 0, 2)]
    assert runs.n_tokens.tolist() == [4, 4, 4, 7, 7]
    assert runs.dropped == {} and runs.n_alone == 1  # 5 2 keep each other company, the last 5 has none


def test_exchange_costs_little_where_rows_have_wide_gaps() -> None:
    plan = best_fit(np.full(20_000, 2100), seq_len=4096)
    assert plan.pieces_per_row.tolist() == [1] * 20_000


def test_rows_of_documents_end_to_end_hold_every_token_in_order() -> None:
    made, source = documents_of_histories(HISTORIES, segments=SEGMENTS, has_target=False)
    stream = source.tokens(np.arange(5)).tolist()  # 38 tokens
    plan = concat(made.n_tokens, seq_len=10)
    rows = fill_rows(plan, made, source, seq_len=10, dtype="uint32", pad_id=9)
    assert rows.input_ids.reshape(-1).tolist() == [*stream, 9, 9]
    assert rows.doc_lens.tolist() == [10, 9, 1, 5, 5, 2, 6, 2] and rows.n_pad.tolist() == [0, 0, 0, 2]
    later = fill_rows(plan.rows(1, 2), made, source, seq_len=10, dtype="uint32", pad_id=9)
    assert later.input_ids.reshape(-1).tolist() == stream[10:30]


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
    starts: dict[int, list[int]] = {}
    for doc_id in sorted(texts_by_document(out, name)):
        starts.setdefault(doc_id >> 16, []).append(doc_id % (1 << 16))
    assert sorted(starts) == list(range(len(histories)))
    for history, firsts in starts.items():
        for first, end in zip(firsts, [*firsts[1:], len(histories[history])], strict=True):
            text = LEAD_IN + "".join(lines[i] for i in histories[history][first:end])
            bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            expected[history << 16 | first] = [*bos, *tokenizer.encode([text])[0], tokenizer.eos_id]
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
        n_events = [json.loads((out / "report.json").read_text())["pack"][f"{name}: events in them"]
                    for out in (tmp_path / "out", prepared)]
        assert n_events[0] == n_events[1]


def test_rows_too_short_for_any_line_are_refused_with_the_way_out(values: dict[str, Any]) -> None:
    values["pack"]["seq_len"] = 16
    with pytest.raises(DataError, match=r"no document fits into seq_len=16 tokens; raise pack.seq_len"):
        prepare(shops.config(values | {"tokenizer": {"train_vocab_size": 512}}))
