"""Packed rows to batches of tensors: labels, positions and document borders, built once, on the CPU.

The rows of a micro-batch are laid end to end as one row of (1, B * seq_len) tokens with `cu_seqlens`; the padding of a
row is a document of its own without labels. Many micro-batches are built at once and are then views of the same arrays:
what a call of numpy or torch costs is paid for all of them together. Costs: the tokens are widened to int64 once, into
the batch's own tensor (in page-locked memory where a GPU will want it); little more time than writing the bytes.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cprec.format import PackedRows, Row, Tokens
from cprec.loss import IGNORE_INDEX

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows of `seq_len` tokens, N = B * seq_len in all, with D documents (padding included)."""

    input_ids: Tensor
    """(1, N) int64."""
    labels: Tensor
    """(B, seq_len) int64: the token to predict at each position, IGNORE_INDEX at a document's end, in padding and where
    the loss mask is not set for that token."""
    position_ids: Tensor
    """(1, N) int64: position within the document."""
    cu_seqlens: Tensor
    """(D + 1,) int32."""
    max_seqlen: int
    corpus: Tensor
    """(B,) int64: number of each row's corpus."""
    doc_ids: Tensor
    """(D,) int64: which document of its corpus each is (see `cprec.format.ITEM_BITS`), -1 for padding."""
    doc_corpus: Tensor
    """(D,) int64: number of each document's corpus."""
    n_valid: int
    """Labels that are predicted."""
    n_valid_by_row: Tensor
    """(B,) int64."""
    n_pad: int

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`; copies from pinned memory do not wait."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; what lies there already is not copied."""
        pinned: dict[str, Any] = {
            f.name: getattr(self, f.name).pin_memory()
            for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)


class Memory:
    """Where batches are written: page-locked for a GPU, else memory of earlier batches that nobody holds any more.
    Touching fresh memory costs several times what filling it does."""

    def __init__(self, *, pin: bool) -> None:
        self.pin = pin
        self._kept: deque[Ints] = deque()

    def __getstate__(self) -> dict[str, Any]:  # what is kept does not travel to another process
        return {"pin": self.pin, "_kept": deque()}

    def take(self, n: int) -> Tensor:
        """(3, n) int64, of any values."""
        if self.pin:
            return torch.empty((3, n), dtype=torch.int64, pin_memory=True)  # torch keeps and reuses these itself
        for _ in range(len(self._kept)):
            try:
                block = self._kept.pop()  # the latest, which the processor's cache may hold; now no other thread's
            except IndexError:
                break
            if block.shape[1] == n and sys.getrefcount(block) == _REFERENCES_WHEN_FREE:
                return self._keep(block)
            self._kept.appendleft(block)
        return self._keep(np.empty((3, n), dtype=np.int64))

    def _keep(self, block: Ints) -> Tensor:
        taken = torch.from_numpy(block)  # before it is kept, so that it is never free there while it is in use
        self._kept.append(block)
        return taken


def _references_when_free() -> int:
    """How often a block is referred to that nobody else holds, asked in the way of `Memory.take`: whether a name and
    the question's argument count differs between versions of Python."""
    block = np.empty(0)
    return sys.getrefcount(block)


_REFERENCES_WHEN_FREE = _references_when_free()


def collate(rows: Sequence[Row], corpus: Sequence[int]) -> Batch:
    """Batch of `rows`, of which row i comes from corpus number `corpus[i]`."""
    mask = None
    if any(row.loss_mask is not None for row in rows):
        mask = np.stack([np.ones(len(row.input_ids), np.bool_) if row.loss_mask is None else row.loss_mask
                         for row in rows])
    ids: Tokens = np.stack([row.input_ids for row in rows])  # type: ignore[assignment]  # of one type, as they were
    packed = PackedRows(
        ids, np.concatenate([row.doc_lens for row in rows]),
        np.array([len(row.doc_lens) for row in rows]), np.concatenate([row.doc_ids for row in rows]),
        np.array([len(row.doc_ids) for row in rows]), np.array([row.n_pad for row in rows], dtype=np.int32), mask)
    n_labels = np.array([row.n_labels for row in rows], dtype=np.int64)
    return assemble(packed, np.array(corpus, dtype=np.int64), n_labels, micro_batch_size=len(rows))[0]


def assemble(rows: PackedRows, corpus: Ints, n_labels: Ints, *, micro_batch_size: int,
             memory: Memory | None = None) -> list[Batch]:
    """The rows as micro-batches, in their order, in `memory` or memory of their own; nothing in them is a view of
    `rows`. `corpus`, `n_labels`: (n,), of each row. All the batches lie side by side: who holds one holds all of them.
    """
    n_rows, seq_len = rows.input_ids.shape
    n_batches = n_rows // micro_batch_size
    memory = memory or Memory(pin=False)
    block = memory.take(n_rows * seq_len)
    lens, n_docs = rows.doc_lens, rows.n_lens.reshape(n_batches, -1).sum(axis=1)  # n_docs: of each batch
    ends = np.cumsum(lens, dtype=np.int64)
    _write(rows, lens, ends, block.numpy())

    def of_each(values: npt.NDArray[Any], sizes: list[int]) -> tuple[Tensor, ...]:
        tensor = torch.from_numpy(values)
        return torch.split_with_sizes(tensor.pin_memory() if memory.pin else tensor, sizes)

    n_docs_list, row_counts = n_docs.tolist(), [micro_batch_size] * n_batches
    first_docs = np.cumsum(n_docs) - n_docs
    parts = zip(
        block[0].view(n_batches, 1, -1).unbind(), block[1].view(n_batches, micro_batch_size, seq_len).unbind(),
        block[2].view(n_batches, 1, -1).unbind(),
        of_each(_borders(ends, n_docs, micro_batch_size * seq_len), (n_docs + 1).tolist()),
        np.maximum.reduceat(lens, first_docs).tolist(), of_each(corpus, row_counts),
        of_each(_doc_ids(rows), n_docs_list), of_each(np.repeat(corpus, rows.n_lens), n_docs_list),
        n_labels.reshape(n_batches, -1).sum(axis=1).tolist(), of_each(n_labels, row_counts),
        rows.n_pad.reshape(n_batches, -1).sum(axis=1).tolist(), strict=True)
    return [Batch(*part) for part in parts]


def _write(rows: PackedRows, lens: npt.NDArray[np.int32], ends: Ints, block: Ints) -> None:
    """Fill the (3, N) of ids, labels and positions. `ends`: where each document ends among the N tokens."""
    ids, labels = (part.reshape(rows.input_ids.shape) for part in block[:2])
    np.copyto(ids, rows.input_ids)
    np.copyto(labels[:, :-1], rows.input_ids[:, 1:])
    if rows.loss_mask is not None:
        labels[:, :-1][~rows.loss_mask[:, 1:]] = IGNORE_INDEX
    block[1, ends - 1] = IGNORE_INDEX  # a document's last token: the next one is not its to predict
    padded = np.flatnonzero(rows.n_pad)
    if len(padded):
        n_pad = rows.n_pad[padded]
        before = np.cumsum(n_pad) - n_pad
        first = (padded + 1) * rows.input_ids.shape[1] - n_pad
        block[1, np.repeat(first - before, n_pad) + np.arange(n_pad.sum())] = IGNORE_INDEX
    # positions, 0, 1, 2, ... of each document: a running sum of ones that falls back to 0 at each start
    steps = block[2]
    steps.fill(1)
    steps[0] = 0
    steps[ends[:-1]] = 1 - lens[:-1]
    torch.cumsum(torch.from_numpy(steps), 0, out=torch.from_numpy(steps))  # eight times as fast as numpy's


def _borders(ends: Ints, n_docs: Ints, batch_tokens: int) -> npt.NDArray[np.int32]:
    """`cu_seqlens` of every batch, one after the other: 0, then the ends of its documents."""
    number = np.repeat(np.arange(len(n_docs)), n_docs)  # of each document's batch
    borders = np.zeros(len(ends) + len(n_docs), dtype=np.int32)
    borders[np.arange(1, len(ends) + 1) + number] = ends - number * batch_tokens
    return borders


def _doc_ids(rows: PackedRows) -> Ints:
    """Ids of all documents, with -1 where a row ends in padding."""
    ids = np.full(len(rows.doc_lens), -1, dtype=np.int64)
    is_document = np.ones(len(ids), dtype=np.bool_)
    is_document[np.cumsum(rows.n_lens)[rows.n_pad > 0] - 1] = False
    ids[is_document] = rows.doc_ids
    return ids
