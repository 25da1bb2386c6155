"""k documents of a packed corpus as a corpus of its own: what few-shot fine-tuning learns from.

reads: a packed corpus. writes: a packed corpus of one shard. costs: holds the drawn documents' tokens, and the places
of all documents.

Documents are drawn by user: users come in an order that a seed decides, each with all documents of one of their
histories before the next. So the first 64 of them are among the first 256, and those among the first 1,000.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cprec.errors import ConfigError, DataError, n_of
from cprec.format import (
    ITEM_BITS,
    MANIFEST,
    Manifest,
    PackedCorpus,
    PackedRows,
    file_hash,
    write_manifest,
    write_row_facts,
    write_shard,
)
from data_prep.plan import best_fit
from data_prep.ragged import Ints


@dataclass(frozen=True)
class _Places:
    """Where every document of a corpus stands."""

    ids: Ints
    rows: Ints
    starts: Ints
    n_tokens: Ints


def draw_shots(corpus: str | Path, out: str | Path, *, n_shots: int, seed: int, name: str) -> Manifest:
    """Write `n_shots` documents of the corpus in the folder `corpus` as corpus `name` to `out`, unless it is there.

    Raises ConfigError when the corpus has fewer documents, DataError when it is not readable.
    """
    source, folder = PackedCorpus(corpus), Path(out)
    drawn_from = {str(corpus): file_hash(Path(corpus) / MANIFEST)}
    if (folder / MANIFEST).is_file():
        there = PackedCorpus(folder).manifest
        if (there.corpus, there.seed, there.n_documents, there.sources) == (name, seed, n_shots, drawn_from):
            return there
    places = _places(source)
    if n_shots > len(places.ids):
        raise ConfigError(f"{n_of(n_shots, 'shot')} of {corpus}, which has {n_of(len(places.ids), 'document')}; give "
                          f"fewer, or all")
    drawn = shot_order(places.ids, seed=seed)[:n_shots]
    rows = _pack(source, places, drawn)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # unfinished from here on
    shards = [write_shard(folder / "shard-00000-000.arrow", rows)]
    n_pad = int(rows.n_pad.sum())
    manifest = source.manifest.model_copy(update={
        "corpus": name, "seed": seed, "sources": drawn_from, "n_rows": len(rows.input_ids),
        "n_tokens": rows.input_ids.size - n_pad, "n_pad": n_pad, "n_documents": n_shots,
        "n_documents_by_domain": dict.fromkeys(source.manifest.n_documents_by_domain, n_shots),
        "sum_squared_doc_lens": int((places.n_tokens[drawn] ** 2).sum()), "shards": shards,
        "row_facts": write_row_facts(folder, shards)})
    write_manifest(folder, manifest)
    return manifest


def shot_order(document_ids: Ints, *, seed: int) -> Ints:
    """Places of the documents in the order in which they are drawn."""
    histories, place = np.unique(document_ids >> ITEM_BITS, return_inverse=True)
    lots = [hashlib.md5(f"{seed}\x1f{h}".encode()).hexdigest() for h in histories.tolist()]
    turn = np.empty(len(lots), dtype=np.int64)
    turn[sorted(range(len(lots)), key=lots.__getitem__)] = np.arange(len(lots))
    return np.lexsort((document_ids, turn[place]))


def _places(corpus: PackedCorpus) -> _Places:
    ids, rows, starts, lens = [], [], [], []
    for number, row in enumerate(corpus):
        n_tokens = row.real_doc_lens.astype(np.int64)
        ids.append(row.doc_ids.copy())
        rows.append(np.full(len(n_tokens), number))
        starts.append(np.cumsum(n_tokens) - n_tokens)
        lens.append(n_tokens)
    places = _Places(*(np.concatenate(parts) for parts in (ids, rows, starts, lens)))
    if len(np.unique(places.ids)) < len(places.ids):
        raise DataError(f"{corpus.folder} has documents in pieces; shots are drawn of whole ones: prepare it with "
                        f"pack.mode: best_fit")
    return places


def _pack(corpus: PackedCorpus, places: _Places, drawn: Ints) -> PackedRows:
    """The drawn documents in as few rows as possible."""
    m = corpus.manifest
    plan = best_fit(places.n_tokens[drawn], seq_len=m.seq_len)
    n_rows, ends = len(plan.pieces_per_row), np.cumsum(plan.pieces_per_row)
    input_ids = np.full((n_rows, m.seq_len), m.tokenizer.pad_id, dtype=m.dtype)
    mask = np.zeros((n_rows, m.seq_len), dtype=np.bool_) if m.has_loss_mask else None
    n_pad = np.zeros(n_rows, dtype=np.int32)
    lens: list[int] = []
    for r in range(n_rows):
        at = 0
        for doc in drawn[plan.docs[ends[r] - plan.pieces_per_row[r]:ends[r]]].tolist():
            n, start, row = int(places.n_tokens[doc]), int(places.starts[doc]), corpus[int(places.rows[doc])]
            input_ids[r, at:at + n] = row.input_ids[start:start + n]
            if mask is not None and row.loss_mask is not None:
                mask[r, at:at + n] = row.loss_mask[start:start + n]
            lens.append(n)
            at += n
        n_pad[r] = m.seq_len - at
        if n_pad[r]:
            lens.append(int(n_pad[r]))
    return PackedRows(
        input_ids=input_ids, doc_lens=np.array(lens, dtype=np.int32), n_lens=plan.pieces_per_row + (n_pad > 0),
        doc_ids=places.ids[drawn[plan.docs]], n_docs=plan.pieces_per_row, n_pad=n_pad, loss_mask=mask)
