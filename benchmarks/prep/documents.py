"""The documents that stage 6 packed, rendered as text, and their way from any tokenizer's ids to the same rows.

reads: a finished run of stages 5 and 6. writes: per part `text.bin` (documents, each ended by a zero byte, which no
title can hold), `ids.npy`, `n_tokens.npy`; and, for a rival, shards with the project's own planner and writer, so that
both sides end with the same rows. Keeps one part in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.prep.ours import TEMPLATE, Packed
from cprec.errors import DataError
from cprec.format import PackedRows, write_shard
from data_prep.config import PackSettings
from data_prep.pack import documents_of, part_tasks
from data_prep.plan import Documents, best_fit
from data_prep.ragged import END, PAD, START, TARGET, Ids, Ints, Ragged
from data_prep.rows import FromSegments, fill_rows

BETWEEN = b"\0"


@dataclass(frozen=True)
class Part:
    """The rendered documents of one part of a corpus: where they lie, how many, how many bytes of text."""

    corpus: str
    number: int
    folder: Path
    n_documents: int
    n_bytes: int

    def text(self) -> bytes:
        return (self.folder / "text.bin").read_bytes()

    def ids(self) -> Ints:
        found: Ints = np.load(self.folder / "ids.npy")
        return found

    def n_tokens(self) -> Ints:
        found: Ints = np.load(self.folder / "n_tokens.npy")
        return found


@dataclass(frozen=True)
class RowSettings:
    """How rows are made: as `pack` makes them for the same tokenizer."""

    seq_len: int
    shard_rows: int
    dtype: str
    bos_id: int | None
    eos_id: int
    pad_id: int


def render_documents(packed: Packed, settings: PackSettings, folder: Path) -> list[Part]:
    """Write the text of every packed document below `folder`."""
    lines = pq.read_table(packed.layout.catalogue, columns=["line"])["line"].to_pylist()
    known = {START: TEMPLATE.lead_in, END: BETWEEN.decode(), TARGET: "", PAD: ""}
    pieces = [known[i].encode() for i in sorted(known)] + [line.encode() for line in lines]
    ends = np.cumsum([len(p) for p in pieces], dtype=np.int64)
    letters: Any = np.frombuffer(b"".join(pieces), np.uint8)  # gathered as ids are, whatever their width
    texts = Ragged(letters, np.concatenate([[0], ends]))
    parts = []
    for corpus in packed.corpora:
        for task in part_tasks(corpus, settings):
            documents, source = documents_of(task)
            assert isinstance(source, FromSegments), "stage 5 ran"
            flat = texts.gather(source.parts.gather(np.arange(len(documents))))
            at = folder / corpus.name / f"{task.number:05d}"
            at.mkdir(parents=True, exist_ok=True)
            flat.tofile(at / "text.bin")
            np.save(at / "ids.npy", documents.ids)
            np.save(at / "n_tokens.npy", documents.n_tokens)
            parts.append(Part(corpus.name, task.number, at, len(documents), len(flat)))
    return parts


@dataclass(frozen=True)
class _Encoded:
    """Documents' ids from a tokenizer that adds no special ids: each gets its begin and end when gathered."""

    lists: Ragged
    has_bos: bool

    @property
    def pad_doc(self) -> int:
        return len(self.lists.offsets) - 2

    def tokens(self, docs: Ints) -> Ids:
        bos, eos = self.pad_doc - 2, self.pad_doc - 1
        parts = np.stack([*[np.full_like(docs, bos)] * self.has_bos, docs, np.full_like(docs, eos)], axis=1)
        is_part = np.ones(parts.shape, bool)
        is_part[docs == self.pad_doc] = [*[False] * self.has_bos, True, False]
        return self.lists.gather(parts[is_part])


def write_rows(part: Part, flat: npt.NDArray[np.uint32], lens: Ints, doc_ids: Ints, expected: Ints, *,
               settings: RowSettings, folder: Path) -> int:
    """Pack a part's documents, given as their plain ids end to end, into shards below `folder`; returns the tokens.

    Raises DataError when a document has another length than ours has.
    """
    n_tokens = lens + 1 + (settings.bos_id is not None)
    if not np.array_equal(n_tokens, expected):
        place = int(np.flatnonzero(n_tokens != expected)[0])
        raise DataError(f"{part.corpus}: document {place} has {n_tokens[place]} tokens there, {expected[place]} here")
    ends = [settings.bos_id or 0, settings.eos_id, settings.pad_id]
    ids = np.concatenate([flat, ends], dtype=settings.dtype, casting="unsafe")
    offsets = np.concatenate([[0], np.cumsum([*lens, 1, 1, 1], dtype=np.int64)])
    source = _Encoded(Ragged(ids, offsets), settings.bos_id is not None)
    none = np.zeros(0, np.int64)
    documents = Documents(ids=doc_ids, n_items=none, n_tokens=n_tokens, n_target_tokens=none, first_event=none,
                          events=none.astype(np.int32), dropped={})
    for name, rows in _shards(part, documents, source, settings):
        write_shard(folder / name, rows)
    return int(n_tokens.sum())


def _shards(part: Part, documents: Documents, source: _Encoded,
            settings: RowSettings) -> Iterator[tuple[str, PackedRows]]:
    plan = best_fit(documents.n_tokens, seq_len=settings.seq_len)
    for number, first in enumerate(range(0, len(plan.pieces_per_row), settings.shard_rows)):
        yield f"shard-{part.number:05d}-{number:03d}.arrow", fill_rows(
            plan.rows(first, settings.shard_rows), documents, source, seq_len=settings.seq_len, dtype=settings.dtype,
            pad_id=settings.pad_id)
