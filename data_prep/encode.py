"""Stage 5, encode: the token ids of every template segment, once each, in one ragged array; and the proof of it.

reads: `catalogue.parquet`, `histories/`. writes: `segments.arrow` (one large_list<uint32> column: row 0 is what a
document starts with, row 1 what it ends with, row 2 + i the line of item i), `segments.json`. Keeps the tokens of
the catalogue in memory once (4 bytes each); readers map the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import Template, TokenizerInfo, write_atomically
from cprec.tokenizer import Tokenizer
from data_prep.ragged import END, FIRST_ITEM, START, Ints, Ragged, concatenate, map_ragged, ragged, write_ragged
from data_prep.records import Counts, Layout
from data_prep.workers import Workers, cached_tokenizer

LINES_PER_TASK = 16384
SAMPLED_PER_CORPUS = 64


@dataclass(frozen=True)
class Lines:
    """A task: lines to encode with the tokenizer of that name."""

    tokenizer: str
    lines: list[str]


def encode_lines(task: Lines) -> Ragged:
    """Ids of each line as it stands inside a text. Raises DataError when the tokenizer merges across lines."""
    return ragged(cached_tokenizer(task.tokenizer).encode_lines(task.lines))


def tokenizer_info(name: str, shown_name: str) -> TokenizerInfo:
    """What manifests say about the tokenizer."""
    tokenizer = cached_tokenizer(name)
    return TokenizerInfo(name=shown_name, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                         eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def encode_catalogue(layout: Layout, *, tokenizer: str, info: TokenizerInfo, template: Template,
                     workers: Workers) -> Counts:
    """Write the segment table and its description."""
    known = cached_tokenizer(tokenizer)
    start = ([] if known.bos_id is None else [known.bos_id]) + known.encode([template.lead_in])[0]
    n_items = pq.ParquetFile(layout.catalogue).metadata.num_rows
    tasks = (Lines(tokenizer, lines) for lines in read_lines(layout))
    n_tasks = -(-n_items // LINES_PER_TASK)
    parts = workers.run(encode_lines, tasks, n_tasks=n_tasks, label="encode")
    segments = concatenate([ragged([start, [known.eos_id]]), *parts])
    write_ragged(layout.segments, segments)
    write_atomically(layout.segments_info, info.model_dump_json(indent=1))
    counts = Counts("encode")
    counts.add("segments", len(segments.lens))
    counts.add("tokens in them", len(segments.ids))
    counts.add("tokens of the longest line", int(segments.lens[FIRST_ITEM:].max(initial=0)))
    return counts


def read_lines(layout: Layout) -> Iterator[list[str]]:
    """The catalogue's lines, `LINES_PER_TASK` at a time."""
    for batch in pq.ParquetFile(layout.catalogue).iter_batches(LINES_PER_TASK, columns=["line"]):
        yield batch["line"].to_pylist()


def render(template: Template, lines: Sequence[str]) -> str:
    """A document's whole text."""
    return template.lead_in + "".join(lines)


def prove(layout: Layout, corpora: Sequence[str], *, tokenizer: str, template: Template, seed: int) -> int:
    """Compare gathered with whole-text ids on a seeded sample of every corpus' histories; returns how many.

    Raises DataError showing the first document that differs.
    """
    known, segments = cached_tokenizer(tokenizer), map_ragged(layout.segments)
    lines = pq.read_table(layout.catalogue, columns=["line"])["line"]
    n_proved = 0
    for number, corpus in enumerate(corpora):
        rng = np.random.default_rng([seed, number])
        for items in _sampled_histories(layout.histories(corpus), rng):
            rows = np.concatenate([[START], items + FIRST_ITEM, [END]])
            text = render(template, lines.take(pa.array(items)).to_pylist())
            whole = ([] if known.bos_id is None else [known.bos_id]) + known.encode([text])[0] + [known.eos_id]
            require_same(known, text, gathered=segments.gather(rows).tolist(), whole=whole)
            n_proved += 1
    return n_proved


def require_same(tokenizer: Tokenizer, text: str, *, gathered: list[int], whole: list[int]) -> None:
    """Raise DataError that shows text and ids around the first difference, if there is one."""
    if gathered == whole:
        return
    at = next((i for i, (a, b) in enumerate(zip(gathered, whole, strict=False)) if a != b),
              min(len(gathered), len(whole)))
    near = slice(max(at - 4, 0), at + 5)
    raise DataError(
        f"tokenizer {tokenizer.name}: encoding line by line differs from encoding the whole text, at token {at}\n"
        f"  line by line: {gathered[near]} {tokenizer.decode(gathered[near])!r}\n"
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
