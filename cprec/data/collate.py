"""Packed rows to one batch of tensors: labels, positions and document borders, built once, on the CPU.

The rows of a micro-batch are laid end to end as one row of (1, B * seq_len) tokens with `cu_seqlens`; the padding of a
row is a document of its own without labels. Costs: one copy of the tokens, from the mapped shard into the batch's own
tensor (in page-locked memory where a GPU will want it); little more time than writing the batch's bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cprec.format import Row
from cprec.loss import IGNORE_INDEX


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
        self._kept: list[npt.NDArray[np.int64]] = []

    def take(self, n: int) -> Tensor:
        """(3, n) int64, of any values."""
        if self.pin:
            return torch.empty((3, n), dtype=torch.int64, pin_memory=True)  # torch keeps and reuses these itself
        for block in self._kept:
            if block.shape[1] == n and sys.getrefcount(block) == _REFERENCES_WHEN_FREE:
                return torch.from_numpy(block)
        block = np.empty((3, n), dtype=np.int64)
        self._kept.append(block)
        return torch.from_numpy(block)


def _references_when_free() -> int:
    """How often a block in a list is referred to where nobody else holds it, asked in the way of `Memory.take`: whether
    the loop's name and the question's argument count differs between versions of Python."""
    for block in [np.empty(0)]:
        return sys.getrefcount(block)
    raise AssertionError


_REFERENCES_WHEN_FREE = _references_when_free()


def collate(rows: Sequence[Row], corpus: Sequence[int], memory: Memory | None = None) -> Batch:
    """Batch of `rows`, of which row i comes from corpus number `corpus[i]`, in `memory` or memory of its own."""
    n_rows, seq_len = len(rows), len(rows[0].input_ids)
    input_ids, labels, positions = (memory or Memory(pin=False)).take(n_rows * seq_len).unbind()
    ids, targets = input_ids.numpy().reshape(n_rows, seq_len), labels.numpy().reshape(n_rows, seq_len)
    for out, target, row in zip(ids, targets, rows, strict=True):
        out[:] = row.input_ids
        target[:-1] = row.input_ids[1:]
        if row.loss_mask is not None:
            target[:-1][~row.is_label[1:]] = IGNORE_INDEX
        elif row.n_pad:
            target[-row.n_pad:] = IGNORE_INDEX
    lens = np.concatenate([row.doc_lens for row in rows])
    borders = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=borders[1:])
    targets.reshape(-1)[borders[1:] - 1] = IGNORE_INDEX  # a document's last token: the next one is not its to predict
    n_valid = np.array([row.n_labels for row in rows], dtype=np.int64)
    n_lens = [len(row.doc_lens) for row in rows]
    batch = Batch(
        input_ids=input_ids[None], labels=labels.view(n_rows, seq_len),
        position_ids=_count_up(positions, borders)[None], cu_seqlens=torch.from_numpy(borders),
        max_seqlen=int(lens.max()), corpus=torch.tensor(corpus, dtype=torch.int64),
        doc_ids=torch.from_numpy(_doc_ids(rows)),
        doc_corpus=torch.from_numpy(np.repeat(np.asarray(corpus, dtype=np.int64), n_lens)),
        n_valid=int(n_valid.sum()), n_valid_by_row=torch.from_numpy(n_valid), n_pad=sum(row.n_pad for row in rows))
    return batch.pin_memory() if memory and memory.pin else batch


def _count_up(positions: Tensor, borders: npt.NDArray[np.int32]) -> Tensor:
    """0, 1, 2, ... from each border on: a running sum of ones that falls back to 0 at each."""
    steps = positions.numpy()
    steps.fill(1)
    steps[0] = 0
    steps[borders[1:-1]] = 1 - np.diff(borders[:-1])
    return torch.cumsum(positions, 0, out=positions)


def _doc_ids(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Ids of all documents, with -1 where a row ends in padding."""
    padding = np.array([-1])
    parts = [part for row in rows for part in ((row.doc_ids, padding) if row.n_pad else (row.doc_ids,))]
    return np.concatenate(parts)
