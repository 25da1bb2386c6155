"""Stage 5, encode: the token ids of every template segment, once each, in one ragged array; and the proof of it.

reads: `catalogue.parquet`, `histories/`. writes: `segments.arrow` (one column of lists of ids: row 0 is what a document
starts with, row 1 what it ends with, row 2 what stands before a supervised target, row 3 one token of padding, row 4 +
i the text of item i), `segments.json`. Keeps 24 bytes per item in memory while writing, and the tokens of the tasks
under way; the proof keeps the lines that its documents are made of.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import TokenizerInfo, write_atomically
from cprec.template import Template
from cprec.tokenizer import Tokenizer
from data_prep.ragged import (
    FIRST_ITEM,
    Ints,
    Ragged,
    document_rows,
    dtype_for,
    map_ragged,
    ragged,
    write_parts,
)
from data_prep.records import Counts, Layout
from data_prep.workers import Workers, cached_tokenizer

LINES_PER_TASK = 16384
SEGMENTS_VERSION = 2
SAMPLED_PER_CORPUS = 64


@dataclass(frozen=True)
class Lines:
    """A task: items' texts to encode, with the tokenizer of that name, as they stand behind `before`."""

    tokenizer: str
    before: str
    lines: list[str]


def encode_lines(task: Lines) -> Ragged:
    """Ids of each item's text as it stands in a document. Raises DataError where the tokenizer merges across items."""
    return ragged(cached_tokenizer(task.tokenizer).encode_after(task.before, task.lines))


def encode_frame(tokenizer: Tokenizer, template: Template) -> list[list[int]]:
    """Ids of what every document has: its start, its end, what stands before a supervised target (else none); and one
    token of padding."""
    tail, before_target = tokenizer.encode_after(template.any_line, [template.tail, template.before_target or ""])
    return [tokenizer.encode_start(template.lead_in), [*tail, tokenizer.eos_id], before_target, [tokenizer.pad_id]]


def tokenizer_info(name: str, shown_name: str) -> TokenizerInfo:
    """What manifests say about the tokenizer."""
    tokenizer = cached_tokenizer(name)
    return TokenizerInfo(name=shown_name, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                         eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def encode_catalogue(layout: Layout, *, tokenizer: str, info: TokenizerInfo, template: Template,
                     workers: Workers) -> Counts:
    """Write the segment table and its description."""
    frame = encode_frame(cached_tokenizer(tokenizer), template)
    n_items = pq.ParquetFile(layout.catalogue).metadata.num_rows
    tasks = (Lines(tokenizer, template.any_line, lines) for lines in read_lines(layout))
    n_tasks = -(-n_items // LINES_PER_TASK)
    parts = workers.run(encode_lines, tasks, n_tasks=n_tasks, label="encode")
    segments = write_parts(layout.segments, chain([ragged(frame)], parts), dtype=dtype_for(info.vocab_size))
    write_atomically(layout.segments_info, info.model_dump_json(indent=1))
    counts = Counts("encode")
    counts.add("segments", len(segments.lens))
    counts.add("tokens in them", len(segments.ids))
    counts.add("tokens of the longest item", int(segments.lens[FIRST_ITEM:].max(initial=0)))
    return counts


def read_lines(layout: Layout) -> Iterator[list[str]]:
    """The texts of the catalogue's items, `LINES_PER_TASK` at a time."""
    for batch in pq.ParquetFile(layout.catalogue).iter_batches(LINES_PER_TASK, columns=["line"]):
        yield batch["line"].to_pylist()


@dataclass(frozen=True)
class SomeLines:
    """The texts of some items of the catalogue."""

    items: Ints
    """Their numbers, ascending."""
    lines: pa.ChunkedArray

    def of(self, items: Ints | Sequence[int]) -> list[str]:
        """Texts of the items with these numbers, all of them among `items`."""
        lines: list[str] = self.lines.take(pa.array(np.searchsorted(self.items, items))).to_pylist()
        return lines


def read_some_lines(catalogue: Path, items: Ints) -> SomeLines:
    """The texts of the items with these numbers, repeated or not; reads only the row groups that it needs."""
    wanted = np.unique(items)
    found = [group["line"].take(pa.array(inside)) for group, inside in _chosen_rows(catalogue, wanted, "line")]
    lines = pa.chunked_array([chunk for column in found for chunk in column.chunks], pa.string())
    if len(lines) != len(wanted):
        raise DataError(f"{catalogue} has no item {wanted[len(lines)]}, which a history names: it was altered; run "
                        f"launch/prepare.py into another folder")
    return SomeLines(wanted, lines)


def prove(layout: Layout, corpora: Sequence[str], *, tokenizer: str, template: Template, seed: int) -> int:
    """Compare gathered with whole-text ids; returns for how many documents.

    They are a seeded sample of every corpus' histories, and documents in which every kind of beginning that an item of
    the catalogue has stands after every kind of end. Raises DataError showing the first that differs.
    """
    known, segments = cached_tokenizer(tokenizer), map_ragged(layout.segments)
    documents = [items for number, corpus in enumerate(corpora)
                 for items in _sampled_histories(layout.histories(corpus), np.random.default_rng([seed, number]))]
    batches = pq.ParquetFile(layout.catalogue).iter_batches(LINES_PER_TASK, columns=["line"])
    documents += border_documents((batch["line"] for batch in batches), template)
    lines = read_some_lines(layout.catalogue, np.concatenate(documents))
    for items in documents:
        text = template.render(lines.of(items))
        require_same(known, text, gathered=segments.gather(document_rows(items)).tolist(),
                     whole=[*known.encode_start(text), known.eos_id])
    return len(documents)


def border_documents(lines: Iterable[pa.Array], template: Template) -> Iterator[Ints]:
    """Documents, as catalogue numbers, that together hold each kind of item beginning after each kind of item end;
    `lines` are the catalogue's, batch by batch.

    A kind is a sign of ASCII, or the Unicode category of any other character: at most some 60 of either. The end is
    what stands before the text that every item ends with.
    """
    n_fixed = len(template.item) - (template.item.rfind("}") + 1)
    first_start: dict[str, int] = {}
    first_end: dict[str, int] = {}
    n_before = 0
    for batch in lines:
        _add_kinds(first_start, pc.utf8_slice_codeunits(batch, 0, 1), n_before)
        _add_kinds(first_end, pc.utf8_slice_codeunits(batch, -n_fixed - 1, -n_fixed or None), n_before)
        n_before += len(batch)
    starts, ends = (np.array([*first.values()], dtype=np.int64) for first in (first_start, first_end))
    for start in starts:
        yield np.array([start], dtype=np.int64)
        yield np.array([start, start], dtype=np.int64)
    for end in ends:
        yield np.stack([np.full(len(starts), end), starts], axis=1).reshape(-1)


def _add_kinds(first: dict[str, int], characters: pa.Array, n_before: int) -> None:
    """Note the place of the first character of each kind that is not yet in `first`, `n_before` before these."""
    for character in characters.unique().to_pylist():  # in the order of their first places
        is_sign = character.isascii() and not character.isalnum()
        kind = character if is_sign else unicodedata.category(character)
        if kind not in first:
            first[kind] = n_before + characters.index(character).as_py()


def require_same(tokenizer: Tokenizer, text: str, *, gathered: list[int], whole: list[int]) -> None:
    """Raise DataError that shows text and ids around the first difference, if there is one."""
    if gathered == whole:
        return
    at = next((i for i, (a, b) in enumerate(zip(gathered, whole, strict=False)) if a != b),
              min(len(gathered), len(whole)))
    near = slice(max(at - 4, 0), at + 5)
    raise DataError(
        f"tokenizer {tokenizer.name}: encoding part by part differs from encoding the whole text, at token {at}\n"
        f"  part by part: {gathered[near]} {tokenizer.decode(gathered[near])!r}\n"
        f"  whole text:   {whole[near]} {tokenizer.decode(whole[near])!r}\n"
        f"  of the document {text[:400]!r}\n  set tokenizer.exact: slow, or use another tokenizer or template")


def _sampled_histories(path: Path, rng: np.random.Generator) -> Iterator[Ints]:
    """Catalogue numbers of up to `SAMPLED_PER_CORPUS` histories; reads only the row groups that it needs."""
    n_rows = pq.ParquetFile(path).metadata.num_rows
    chosen = np.sort(rng.choice(n_rows, size=min(SAMPLED_PER_CORPUS, n_rows), replace=False))
    for group, inside in _chosen_rows(path, chosen, "items"):
        yield from (np.asarray(items, dtype=np.int64) for items in group["items"].take(pa.array(inside)).to_pylist())


def _chosen_rows(path: Path, chosen: Ints, column: str) -> Iterator[tuple[pa.Table, Ints]]:
    """The column of each row group that has some of the chosen rows (ascending), with their places in it."""
    file = pq.ParquetFile(path)
    first = 0
    for group in range(file.num_row_groups):
        n_group = file.metadata.row_group(group).num_rows
        inside = chosen[np.searchsorted(chosen, first):np.searchsorted(chosen, first + n_group)] - first
        if len(inside):
            yield file.read_row_group(group, columns=[column]), inside
        first += n_group
