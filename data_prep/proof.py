"""Proof, part by part, that the packed rows are exactly their documents, each packed once and whole.

reads: shards, `parts/`, histories, `segments.arrow` (or the tokens of documents tokenized whole). writes: nothing.
Keeps one part's documents and one shard in memory per worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cprec.errors import DataError
from cprec.format import PackedRows, ShardInfo, file_hash
from data_prep.pack import PartTask, documents_of, read_part
from data_prep.plan import Documents, RowPlan
from data_prep.ragged import Ints, dtype_for, spans
from data_prep.rows import TokenSource, fill_rows


@dataclass(frozen=True)
class PartProof:
    """What was looked at in one part, and what is wrong there."""

    n_documents: int
    n_rows: int
    wrong_documents: int
    """Documents that are missing, packed twice or not whole, and packed ones that no history gives."""
    lost_events: int
    """Events of the histories that are neither in a document nor counted as dropped."""
    wrong_rows: int
    """Rows whose tokens, borders, padding or mask are not those of their documents."""


@dataclass(frozen=True)
class _Pieces:
    """The pieces of documents in a shard's rows, as they stand there."""

    ids: Ints
    n_tokens: Ints
    per_row: Ints


def prove_part(task: PartTask) -> PartProof:
    """Compare every row of the part with what its documents give, and count the documents. Raises DataError for a shard
    whose bytes are not those that were written."""
    part = read_part(task)
    assert part is not None, "asked for before the part was looked up"
    documents, source = documents_of(task)
    n_packed = np.zeros(len(documents), np.int64)  # tokens of each document found in the rows
    unknown = wrong_rows = 0
    last_doc, skip = -1, 0
    for info in part.shards:
        _require_unaltered(task.corpus.folder / info.file, info)
        batch = pa.ipc.open_file(pa.memory_map(str(task.corpus.folder / info.file))).get_batch(0)
        pieces = _pieces(batch)
        docs = np.searchsorted(documents.ids, pieces.ids)
        known = (docs < len(documents)) & (documents.ids[np.minimum(docs, len(documents) - 1)] == pieces.ids)
        docs = np.where(known, docs, -1)
        np.add.at(n_packed, docs[known], pieces.n_tokens[known])
        unknown += int((~known).sum())
        skips = _skips(docs, pieces.n_tokens, last_doc, skip)
        wrong_rows += _wrong_rows(task, batch, pieces, docs, skips, documents, source)
        if len(docs):
            last_doc, skip = int(docs[-1]), int(skips[-1] + pieces.n_tokens[-1])
    lost = 0
    if task.corpus.template is not None:
        n_dropped = sum(part.dropped.values()) + part.n_alone
        lost = abs(len(documents.events) - int(documents.n_items.sum()) - n_dropped)
    return PartProof(n_documents=len(documents), n_rows=sum(s.rows for s in part.shards), wrong_rows=wrong_rows,
                     lost_events=lost,
                     wrong_documents=unknown + int((n_packed != documents.n_tokens).sum()))


def _require_unaltered(path: Path, info: ShardInfo) -> None:
    found = file_hash(path)
    if found != info.xxh3_128:
        raise DataError(f"shard {path} has hash {found}, its manifest says {info.xxh3_128}: its bytes were altered; "
                        f"delete it and run launch/prepare.py again, which makes this shard anew")


def _pieces(batch: pa.RecordBatch) -> _Pieces:
    ids, offsets = batch["doc_ids"].flatten().to_numpy(), batch["doc_ids"].offsets.to_numpy().astype(np.int64)
    per_row = np.diff(offsets)
    lens, ends = batch["doc_lens"].flatten().to_numpy().astype(np.int64), batch["doc_lens"].offsets.to_numpy()[1:]
    real = np.delete(lens, ends[batch["n_pad"].to_numpy() > 0] - 1)
    n = np.zeros(len(ids), np.int64)
    n[:min(len(ids), len(real))] = real[:len(ids)]
    return _Pieces(ids, n, per_row)


def _skips(docs: Ints, n_tokens: Ints, last_doc: int, skip: int) -> Ints:
    """Tokens of each piece's document that stood before it, where one document goes on over several rows."""
    before = np.concatenate([[0], np.cumsum(n_tokens)[:-1]]) if len(docs) else np.zeros(0, np.int64)
    is_new = np.ones(len(docs), bool)
    is_new[1:] = docs[1:] != docs[:-1]
    first = np.maximum.accumulate(np.where(is_new, np.arange(len(docs)), 0)) if len(docs) else docs
    skips: Ints = before - before[first] + np.where((first == 0) & (docs == last_doc), skip, 0)
    return skips


def _wrong_rows(task: PartTask, batch: pa.RecordBatch, pieces: _Pieces, docs: Ints, skips: Ints,
                documents: Documents, source: TokenSource) -> int:
    """How many rows of a shard are not what its writer makes of their pieces."""
    seq_len, corpus = task.settings.seq_len, task.corpus
    n_rows = len(pieces.per_row)
    row_of = np.repeat(np.arange(n_rows), pieces.per_row)
    lens = np.append(documents.n_tokens, 0)  # the last for unknown ones
    is_inside = (docs >= 0) & (pieces.n_tokens > 0) & (skips + pieces.n_tokens <= lens[docs])
    row_tokens = np.bincount(row_of, weights=pieces.n_tokens, minlength=n_rows)
    possible = ((pieces.per_row > 0) & (row_tokens <= seq_len)
                & (np.bincount(row_of[~is_inside], minlength=n_rows) == 0))
    if not possible.any():
        return n_rows
    mine = possible[row_of]
    plan = RowPlan(docs[mine], pieces.n_tokens[mine], pieces.per_row[possible], skips[mine])
    expected = fill_rows(plan, documents, source, seq_len=seq_len, dtype=dtype_for(corpus.tokenizer.vocab_size),
                         pad_id=corpus.tokenizer.pad_id, has_loss_mask=corpus.has_loss_mask)
    wrong = ~possible
    wrong[possible] = _differ(batch, possible, expected)
    return int(wrong.sum())


def _differ(batch: pa.RecordBatch, chosen: npt.NDArray[np.bool_], expected: PackedRows) -> npt.NDArray[np.bool_]:
    """Which of the chosen rows are not as expected in any column; the others are compared by the caller."""
    differ: npt.NDArray[np.bool_] = ((_rows(batch, "input_ids")[chosen] != expected.input_ids).any(axis=1)
              | (batch["n_pad"].to_numpy()[chosen] != expected.n_pad)
              | _lists_differ(batch["doc_lens"], chosen, expected.doc_lens, expected.n_lens))
    if expected.loss_mask is not None:
        differ |= (_rows(batch, "loss_mask")[chosen] != expected.loss_mask).any(axis=1)
    return differ


def _rows(batch: pa.RecordBatch, column: str) -> npt.NDArray[np.generic]:
    flat: npt.NDArray[np.generic] = batch[column].flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(batch.num_rows, -1)


def _lists_differ(column: pa.ListArray, chosen: npt.NDArray[np.bool_], values: npt.NDArray[np.int32],
                  counts: Ints) -> npt.NDArray[np.bool_]:
    """Which of the chosen lists of `column` are not those that `values` has end to end, `counts` of them each."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    starts, lens = offsets[:-1][chosen], np.diff(offsets)[chosen]
    differ: npt.NDArray[np.bool_] = lens != counts
    same = np.flatnonzero(~differ)
    mine = column.values.to_numpy()[spans(starts[same], counts[same])]
    theirs = values[spans((np.cumsum(counts) - counts)[same], counts[same])]
    differ[np.repeat(same, counts[same])[mine != theirs]] = True
    return differ
