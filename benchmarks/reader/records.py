"""The rows that every side stores, and the finished batch that every side must deliver.

A row is stored by the rivals as one record, one array of `width` numbers of the ids' own type, so that no library has
more than one field to decode: its ids, how many of them are padding, then its documents' lengths (the padding's too),
zeros to the end. `finish` makes the batch from records: the same arrays that `cprec.data.collate` makes, in as few
passes. reads: nothing, or a packed folder. writes: `records.bin`. Costs: holds one block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from cprec.errors import DataError
from cprec.format import ITEM_BITS, PackedCorpus, PackedRows, Row, list_corpora, read_manifest
from cprec.loss import IGNORE_INDEX

BLOCK_ROWS = 8192
"""Rows of one shard, and of what is held while building."""
MEAN_DOC_TOKENS, SIGMA = 150.0, 0.9
"""Of generated documents: log-normal, as histories are."""
MOST_DOCS = 40
LEAST_DOC = 8
VOCABULARY = 32_000
RECORDS = "records.bin"
Records = npt.NDArray[Any]


class Finished(NamedTuple):
    """What a training step takes: (1, N), (B, seq_len), (1, N) int64; (D + 1,) int32; a Python int."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def arrays(self) -> list[npt.NDArray[Any]]:
        return [t.numpy() for t in self[:4] if isinstance(t, torch.Tensor)]


@dataclass(frozen=True)
class Shape:
    """How many records of what form."""

    n_rows: int
    seq_len: int
    width: int
    dtype: str

    @property
    def record_bytes(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize


def generated(n_rows: int, seq_len: int, seed: int) -> Iterator[PackedRows]:
    """Rows of documents with lengths like real ones, in blocks; one row in a few ends in padding."""
    for block, first in enumerate(range(0, n_rows, BLOCK_ROWS)):
        n = min(BLOCK_ROWS, n_rows - first)
        rng = np.random.default_rng([seed, block])
        drawn = rng.lognormal(np.log(MEAN_DOC_TOKENS) - SIGMA**2 / 2, SIGMA, (n, MOST_DOCS))
        lens = np.clip(drawn, LEAST_DOC, seq_len).astype(np.int32)
        lens *= np.cumsum(lens, axis=1) <= seq_len
        rest = seq_len - lens.sum(axis=1, dtype=np.int32)
        n_pad = np.where(rest < LEAST_DOC, rest, 0).astype(np.int32)
        lens = np.concatenate([lens, rest[:, None]], axis=1)  # a last document fills the row, or its padding does
        n_lens = (lens > 0).sum(axis=1)
        n_docs = n_lens - (n_pad > 0)
        ids = rng.integers(1, VOCABULARY, (n, seq_len), dtype=np.uint16)
        ids[np.arange(seq_len) >= (seq_len - n_pad)[:, None]] = 0
        histories = (first * MOST_DOCS + np.arange(n_docs.sum(), dtype=np.int64)) << ITEM_BITS
        yield PackedRows(ids, lens[lens > 0], n_lens.astype(np.int64), histories, n_docs.astype(np.int64), n_pad)


def real(packed: Path, n_rows: int) -> Iterator[PackedRows]:
    """Rows of all training corpora below `packed`, again from the start until there are `n_rows`."""
    corpora = [PackedCorpus(packed / name) for name in train_corpora(packed)]
    places = [(corpus, row) for corpus in corpora for row in range(len(corpus))]
    for first in range(0, n_rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, n_rows - first)
        chosen = (places[i % len(places)] for i in range(first, first + n))
        yield stacked([corpus[row] for corpus, row in chosen])


def train_corpora(packed: Path) -> list[str]:
    """Names of the training corpora below `packed`. Raises DataError when there are none, or one has a loss mask,
    which no rival has a place for."""
    known = {name: read_manifest(packed / name) for name in list_corpora(packed)}
    names = [name for name, m in known.items() if m.kind == "train" and m.n_rows > 0]
    if not names:
        raise DataError(f"--packed {packed}: no finished training corpus below it; run launch/prepare.py first")
    masked = [name for name in names if known[name].has_loss_mask]
    if masked:
        raise DataError(f"--packed {packed}: {', '.join(masked)} has a loss mask; give a folder packed by a template "
                        f"without before_target")
    return names


def real_seq_len(packed: Path) -> int:
    """Row length of the training corpora below `packed`."""
    return read_manifest(packed / train_corpora(packed)[0]).seq_len


def stacked(rows: Sequence[Row]) -> PackedRows:
    """Rows as a block."""
    return PackedRows(
        np.stack([row.input_ids for row in rows]), np.concatenate([row.doc_lens for row in rows]),
        np.array([len(row.doc_lens) for row in rows], np.int64), np.concatenate([row.doc_ids for row in rows]),
        np.array([len(row.doc_ids) for row in rows], np.int64), np.array([row.n_pad for row in rows], np.int32))


def records_of(rows: PackedRows, width: int) -> Records:
    """The rows as records, (rows, width)."""
    n, seq_len = rows.input_ids.shape
    made = np.zeros((n, width), rows.input_ids.dtype)
    made[:, :seq_len] = rows.input_ids
    made[:, seq_len] = rows.n_pad
    row = np.repeat(np.arange(n), rows.n_lens)
    place = np.arange(len(row)) - np.repeat(np.cumsum(rows.n_lens) - rows.n_lens, rows.n_lens)
    made[row, seq_len + 1 + place] = rows.doc_lens
    return made


def mapped(folder: Path, shape: Shape) -> Records:
    """All records of a folder as a memory map, (rows, width)."""
    return np.memmap(folder / RECORDS, shape.dtype, "r", shape=(shape.n_rows, shape.width))


def finish(records: Records, seq_len: int) -> Finished:
    """The batch of some records, (B, width)."""
    ids = records[:, :seq_len].astype(np.int64)
    known = records[:, seq_len + 1:]
    lens = known[known > 0].astype(np.int64)
    borders = np.zeros(len(lens) + 1, np.int64)
    np.cumsum(lens, out=borders[1:])
    labels = np.empty_like(ids)
    flat = labels.reshape(-1)
    flat[:-1] = ids.reshape(-1)[1:]
    flat[borders[1:] - 1] = IGNORE_INDEX  # a document's last token predicts nothing
    n_pad = records[:, seq_len]
    for row in np.flatnonzero(n_pad):
        labels[row, seq_len - int(n_pad[row]):] = IGNORE_INDEX
    positions = np.repeat(-borders[:-1], lens)
    positions += np.arange(ids.size)
    return Finished(torch.from_numpy(ids.reshape(1, -1)), torch.from_numpy(labels), torch.from_numpy(positions[None]),
                    torch.from_numpy(borders.astype(np.int32)), int(lens.max()))


def checksum(batch: Finished, seq_len: int) -> tuple[int, int]:
    """How many rows a batch has, and a sum over them that does not depend on their order or on the batches that they
    stand in: of the hash of each row's ids, labels, positions and document borders."""
    ids, labels, positions = (a.reshape(-1, seq_len) for a in batch.arrays()[:3])
    borders = batch.cu_seqlens.numpy()
    assert not np.any(np.diff(borders) > batch.max_seqlen), "max_seqlen is too small"
    total = 0
    for row in range(len(ids)):
        digest = xxhash.xxh3_64()
        for part in (ids, labels, positions):
            digest.update(part[row].tobytes())
        first, end = np.searchsorted(borders, [row * seq_len, (row + 1) * seq_len])
        digest.update(np.diff(borders[first:end + 1]).tobytes())
        total += digest.intdigest()
    return len(ids), total % 2**64
