"""Stage 5, encode: the token ids of every template segment, once each, in one ragged array; and the proof of it.

reads: `catalogue.parquet`, `histories/`. writes: `segments.arrow` (one column of lists of ids: row 0 is what a document
starts with, row 1 what it ends with, row 2 what stands before a supervised target, row 3 + i the text of item i),
`segments.json`. Keeps the tokens of the catalogue in memory once (4 bytes each); readers map the file.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import Template, TokenizerInfo, write_atomically
from cprec.tokenizer import Tokenizer
from data_prep.ragged import (
    FIRST_ITEM,
    Ints,
    Ragged,
    concatenate,
    document_rows,
    dtype_for,
    map_ragged,
    ragged,
    write_ragged,
)
from data_prep.records import Counts, Layout
from data_prep.workers import Workers, cached_tokenizer

LINES_PER_TASK = 16384
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
    """Ids of what every document has: its start, its end, and what stands before a supervised target (else none)."""
    tail, before_target = tokenizer.encode_after(template.any_line, [template.tail, template.before_target or ""])
    return [tokenizer.encode_start(template.lead_in), [*tail, tokenizer.eos_id], before_target]


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
    segments = concatenate([ragged(frame), *parts])
    narrow = segments.ids.astype(dtype_for(info.vocab_size))
    write_ragged(layout.segments, Ragged(narrow, segments.offsets))
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


def prove(layout: Layout, corpora: Sequence[str], *, tokenizer: str, template: Template, seed: int) -> int:
    """Compare gathered with whole-text ids; returns for how many documents.

    They are a seeded sample of every corpus' histories, and documents in which every kind of beginning that an item of
    the catalogue has stands after every kind of end. Raises DataError showing the first that differs.
    """
    known, segments = cached_tokenizer(tokenizer), map_ragged(layout.segments)
    lines = pq.read_table(layout.catalogue, columns=["line"])["line"]
    sampled = (items for number, corpus in enumerate(corpora)
               for items in _sampled_histories(layout.histories(corpus), np.random.default_rng([seed, number])))
    n_proved = 0
    for items in chain(sampled, border_documents(lines, template)):
        text = template.render(lines.take(pa.array(items)).to_pylist())
        require_same(known, text, gathered=segments.gather(document_rows(items)).tolist(),
                     whole=[*known.encode_start(text), known.eos_id])
        n_proved += 1
    return n_proved


def border_documents(lines: pa.ChunkedArray, template: Template) -> Iterator[Ints]:
    """Documents, as catalogue numbers, that together hold each kind of item beginning after each kind of item end.

    A kind is a sign of ASCII, or the Unicode category of any other character: at most some 60 of either. The end is
    what stands before the text that every item ends with.
    """
    n_fixed = len(template.item) - (template.item.rfind("}") + 1)
    starts = _one_of_each_kind(pc.utf8_slice_codeunits(lines, 0, 1))
    ends = _one_of_each_kind(pc.utf8_slice_codeunits(lines, -n_fixed - 1, None if n_fixed == 0 else -n_fixed))
    for start in starts:
        yield np.array([start], dtype=np.int64)
        yield np.array([start, start], dtype=np.int64)
    for end in ends:
        yield np.stack([np.full(len(starts), end), starts], axis=1).reshape(-1)


def _one_of_each_kind(characters: pa.ChunkedArray) -> Ints:
    """Place of the first character of each kind."""
    first: dict[str, str] = {}
    for character in characters.unique().to_pylist():  # in the order of their first places
        is_sign = character.isascii() and not character.isalnum()
        first.setdefault(character if is_sign else unicodedata.category(character), character)
    return np.array([characters.index(character).as_py() for character in first.values()], dtype=np.int64)


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
    file = pq.ParquetFile(path)
    n_rows = file.metadata.num_rows
    chosen = np.sort(rng.choice(n_rows, size=min(SAMPLED_PER_CORPUS, n_rows), replace=False))
    first = 0
    for group in range(file.num_row_groups):
        n_group = file.metadata.row_group(group).num_rows
        inside = chosen[(chosen >= first) & (chosen < first + n_group)] - first
        if len(inside):
            lists = file.read_row_group(group, columns=["items"])["items"].take(pa.array(inside))
            yield from (np.asarray(items, dtype=np.int64) for items in lists.to_pylist())
        first += n_group
