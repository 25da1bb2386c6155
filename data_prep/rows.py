"""From planned rows to a shard's arrays: tokens gathered list by list, borders, padding, loss mask.

reads: a mapped table of token lists. writes: nothing. Keeps one shard's rows in memory, twice where a row is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cprec.format import PackedRows
from data_prep.plan import Documents, RowPlan
from data_prep.ragged import END, FIRST_ITEM, START, TARGET, Ids, Ints, Ragged, spans


class TokenSource(Protocol):
    """Where documents' tokens come from."""

    def tokens(self, docs: Ints) -> Ids:
        """Tokens of the documents at these places, end to end."""


@dataclass(frozen=True)
class FromSegments:
    """Documents gathered from the catalogue's segments: start, items, what stands before the last one, that, end."""

    segments: Ragged
    parts: Ragged
    """Of each document, the places of its parts in `segments`."""

    def tokens(self, docs: Ints) -> Ids:
        return self.segments.gather(self.parts.gather(docs))


def parts_of_documents(documents: Documents) -> Ragged:
    """Places in the segment table of all that makes up each document."""
    ends = np.cumsum(documents.n_items + 3)
    parts = np.full(int(ends[-1]) if len(ends) else 0, END, dtype=np.int32)
    starts = ends - documents.n_items - 3
    is_item = np.ones(len(parts), bool)
    parts[starts], parts[ends - 3] = START, TARGET
    is_item[starts] = is_item[ends - 3] = is_item[ends - 1] = False
    items = documents.events
    if int(documents.n_items.sum()) != len(items):  # some were dropped
        items = items[spans(documents.first_event, documents.n_items)]
    parts[is_item] = items + FIRST_ITEM
    return Ragged(parts, np.concatenate([[0], ends]))


@dataclass(frozen=True)
class FromWhole:
    """Documents that were tokenized whole: one list each."""

    lists: Ragged

    def tokens(self, docs: Ints) -> Ids:
        return self.lists.gather(docs)


def fill_rows(plan: RowPlan, documents: Documents, source: TokenSource, *, seq_len: int, dtype: str, pad_id: int,
              has_loss_mask: bool = False) -> PackedRows:
    """The planned rows: tokens of their pieces, then padding; with a loss mask where the template has a target."""
    first_piece = np.cumsum(plan.pieces_per_row) - plan.pieces_per_row
    row_tokens = np.add.reduceat(plan.n_tokens, first_piece)
    tokens = _of_pieces(source.tokens(plan.docs), plan, documents)
    assert len(tokens) == row_tokens.sum(), f"{len(tokens)} tokens gathered, {row_tokens.sum()} planned"
    n_pad = seq_len - row_tokens
    padded = np.flatnonzero(n_pad)
    lens = np.insert(plan.n_tokens, (first_piece + plan.pieces_per_row)[padded], n_pad[padded])
    mask = None
    if has_loss_mask:
        mask = _padded(_of_pieces(_target_mask(documents, plan.docs), plan, documents), row_tokens, seq_len, pad=False)
    return PackedRows(
        input_ids=_padded(tokens.astype(dtype, copy=False), row_tokens, seq_len, pad=pad_id),
        doc_lens=lens.astype(np.int32), n_lens=plan.pieces_per_row + (n_pad > 0), doc_ids=documents.ids[plan.docs],
        n_docs=plan.pieces_per_row, n_pad=n_pad.astype(np.int32), loss_mask=mask)


def _of_pieces(flat: npt.NDArray[Any], plan: RowPlan, documents: Documents) -> npt.NDArray[Any]:
    """What belongs to the plan's pieces out of `flat`, which has all of each piece's document, end to end."""
    n_whole = documents.n_tokens[plan.docs]
    if np.array_equal(n_whole, plan.n_tokens):
        return flat
    return flat[spans(np.cumsum(n_whole) - n_whole + plan.skips, plan.n_tokens)]


def _padded(flat: npt.NDArray[Any], row_lens: Ints, seq_len: int, *, pad: int) -> npt.NDArray[Any]:
    """`flat` as rows of `seq_len`, each filled up with `pad`; full rows between padded ones are copied as one run."""
    n_rows = len(row_lens)
    if len(flat) == n_rows * seq_len:
        return flat.reshape(n_rows, seq_len)
    rows = np.empty(n_rows * seq_len, flat.dtype)
    read = row = 0
    for last in np.flatnonzero(row_lens < seq_len).tolist():
        n = (last - row) * seq_len + int(row_lens[last])
        begin = row * seq_len
        rows[begin:begin + n] = flat[read:read + n]
        rows[begin + n:(last + 1) * seq_len] = pad
        read, row = read + n, last + 1
    rows[row * seq_len:] = flat[read:]
    return rows.reshape(n_rows, seq_len)


def _target_mask(documents: Documents, docs: Ints) -> npt.NDArray[np.bool_]:
    """True at the tokens, of these documents end to end, that the loss is taken on."""
    ends = np.cumsum(documents.n_tokens[docs])
    mask = np.zeros(int(ends[-1]) if len(ends) else 0, bool)
    n_target = documents.n_target_tokens[docs]
    mask[spans(ends - n_target, n_target)] = True
    return mask
