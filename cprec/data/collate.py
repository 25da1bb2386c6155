"""Packed rows to one batch of tensors: labels, positions and document borders, built once, on the CPU.

The rows of a micro-batch are laid end to end as one row of (1, B * seq_len) tokens with `cu_seqlens`; the padding of a
row is a document of its own without labels. Costs: one copy of the tokens, into the batch's own tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
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

    def pin(self) -> Batch:
        """The batch in page-locked memory, for asynchronous copies to a GPU."""
        pinned = {f.name: getattr(self, f.name).pin_memory()
                  for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **pinned)


def collate(rows: Sequence[Row], corpus: Sequence[int]) -> Batch:
    """Batch of `rows`, of which row i comes from corpus number `corpus[i]`."""
    n_rows, seq_len = len(rows), len(rows[0].input_ids)
    ids = np.empty((n_rows, seq_len), dtype=np.int64)
    labels = np.full((n_rows, seq_len), IGNORE_INDEX, dtype=np.int64)
    n_valid = np.empty(n_rows, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i] = row.input_ids
        is_label = row.is_label  # never a document's first token: it is not the document before it's to predict
        labels[i, :-1] = np.where(is_label[1:], ids[i, 1:], IGNORE_INDEX)
        n_valid[i] = is_label.sum()
    lens = np.concatenate([row.doc_lens for row in rows])
    starts = np.concatenate([[0], np.cumsum(lens)])
    positions = np.arange(n_rows * seq_len) - np.repeat(starts[:-1], lens)
    return Batch(
        input_ids=torch.from_numpy(ids.reshape(1, -1)), labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions[None]), cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lens.max()), corpus=torch.tensor(list(corpus), dtype=torch.int64),
        n_valid=int(n_valid.sum()), n_valid_by_row=torch.from_numpy(n_valid), n_pad=sum(row.n_pad for row in rows),
    )
