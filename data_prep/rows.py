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
from data_prep.ragged import END, FIRST_ITEM, PAD, START, TARGET, Ids, Ints, Ragged, spans


class TokenSource(Protocol):
    """Where documents' tokens come from."""

    @property
    def pad_doc(self) -> int | None:
        """Place of a document that is one token of padding, so that rows are gathered with theirs; None: has none."""

    def tokens(self, docs: Ints) -> Ids:
        """Tokens of the documents at these places, end to end."""


@dataclass(frozen=True)
class FromSegments:
    """Documents gathered from the catalogue's segments: start, items, what stands before the last one, that, end."""

    segments: Ragged
    parts: Ragged
    """Of each document, the places of its parts in `segments`; the last is one token of padding."""

    @property
    def pad_doc(self) -> int:
        return len(self.parts.offsets) - 2

    def tokens(self, docs: Ints) -> Ids:
        return self.segments.gather(self.parts.gather(docs))


def parts_of_documents(documents: Documents) -> Ragged:
    """Places in the segment table of all that makes up each document, and last of one token of padding."""
    ends = np.cumsum(documents.n_items + 3)
    n_parts = int(ends[-1]) if len(ends) else 0
    parts = np.full(n_parts + 1, END, dtype=np.int32)
    starts = ends - documents.n_items - 3
    is_item = np.ones(len(parts), bool)
    parts[starts], parts[ends - 3], parts[-1] = START, TARGET, PAD
    is_item[starts] = is_item[ends - 3] = is_item[ends - 1] = is_item[-1] = False
    items = documents.events
    if int(documents.n_items.sum()) != len(items):  # some were dropped
        items = items[spans(documents.first_event, documents.n_items)]
    parts[is_item] = items + FIRST_ITEM
    return Ragged(parts, np.concatenate([[0], ends, [n_parts + 1]]))


@dataclass(frozen=True)
class FromWhole:
    """Documents that were tokenized whole: one list each."""

    lists: Ragged
    pad_doc: None = None

    def tokens(self, docs: Ints) -> Ids:
        return self.lists.gather(docs)


def fill_rows(plan: RowPlan, documents: Documents, source: TokenSource, *, seq_len: int, dtype: str, pad_id: int,
              has_loss_mask: bool = False) -> PackedRows:
    """The planned rows: tokens of their pieces, then padding; with a loss mask where the template has a target."""
    first_piece = np.cumsum(plan.pieces_per_row) - plan.pieces_per_row
    row_tokens = np.add.reduceat(plan.n_tokens, first_piece)
    n_pad = seq_len - row_tokens
    padded = np.flatnonzero(n_pad)
    lens = np.insert(plan.n_tokens, (first_piece + plan.pieces_per_row)[padded], n_pad[padded])
    mask = None
    if has_loss_mask:
        mask = _padded(_of_pieces(_target_mask(documents, plan.docs), plan, documents), row_tokens, seq_len, pad=False)
    return PackedRows(
        input_ids=_input_ids(plan, documents, source, n_pad, seq_len, pad_id).astype(dtype, copy=False),
        doc_lens=lens.astype(np.int32), n_lens=plan.pieces_per_row + (n_pad > 0), doc_ids=documents.ids[plan.docs],
        n_docs=plan.pieces_per_row, n_pad=n_pad.astype(np.int32), loss_mask=mask)


def _input_ids(plan: RowPlan, documents: Documents, source: TokenSource, n_pad: Ints, seq_len: int,
               pad_id: int) -> npt.NDArray[Any]:
    """Tokens of the rows, (n_rows, seq_len): padding gathered with them where documents are whole, else added."""
    ends = np.cumsum(plan.pieces_per_row)
    if source.pad_doc is not None and np.array_equal(documents.n_tokens[plan.docs], plan.n_tokens):
        tokens = source.tokens(np.insert(plan.docs, np.repeat(ends, n_pad), source.pad_doc))
        assert len(tokens) == len(ends) * seq_len, f"{len(tokens)} tokens gathered for {len(ends)} rows of {seq_len}"
        return tokens.reshape(-1, seq_len)
    pieces = _of_pieces(source.tokens(plan.docs), plan, documents)
    assert len(pieces) + n_pad.sum() == len(ends) * seq_len, f"{len(pieces)} tokens gathered, not what was planned"
    return _padded(pieces, seq_len - n_pad, seq_len, pad=pad_id)


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
