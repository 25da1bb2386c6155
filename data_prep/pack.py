"""Stage 6, pack: histories become documents, documents become rows of exactly `seq_len` tokens, rows become shards.

reads: `histories/<corpus>.parquet` and `segments.arrow` (or `catalogue.parquet`), or `texts/<name>.parquet`.
writes: `packed/<corpus>/`: `plan.json`, `shard-00000-000.arrow`, ... (part, number in it), `parts/00000.json` when all
shards of a part are there (with `00000.tokens.arrow` where documents are tokenized whole), last `manifest.json`.
A part is about `pack.window` histories; it is planned from lengths alone, then its tokens are gathered straight into
rows. Parts are independent: a worker keeps one in memory (8 bytes per event, about 80 per document), one shard, and 8
bytes per item of the catalogue. The bytes depend neither on the number of workers nor on how often the run was killed,
and a restart redoes unfinished parts only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cprec.errors import DataError
from cprec.format import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    write_atomically,
    write_manifest,
    write_row_facts,
    write_shard,
)
from cprec.log import get_logger
from cprec.template import Template
from data_prep.config import PackSettings
from data_prep.engine import ROW_GROUP_ROWS
from data_prep.plan import PACK_MODES, Documents, cut_histories, document_ids
from data_prep.ragged import END, FIRST_ITEM, START, TARGET, Ints, Ragged, dtype_for, map_ragged
from data_prep.records import Counts, digest
from data_prep.rows import FromSegments, FromWhole, TokenSource, fill_rows, parts_of_documents
from data_prep.whole import map_whole, tokenize_histories, tokenize_texts, write_whole
from data_prep.workers import Workers, cached_tokenizer

log = get_logger(__name__)

PLAN_VERSION = 2
"""To be raised when other rows are made of the same histories: parts of two ways to pack must not stand together."""
LOW_FILL, MANY_ROWS = 0.95, 32
"""Below this share of tokens in so many rows the user is told how to pack better; the last rows of few are never
full."""


@dataclass(frozen=True)
class Corpus:
    """What is packed, and all that its manifest says about where it came from."""

    name: str
    kind: Literal["train", "valid"]
    domain: str
    folder: Path
    histories: Path
    """Histories, or of plain text the texts."""
    segments: Path | None
    """None where every document is tokenized whole: plain text, and histories with `exact: slow`."""
    catalogue: Path
    tokenizer_name: str
    """What loads the tokenizer here."""
    tokenizer: TokenizerInfo
    template: Template | None
    """None for plain text."""
    seed: int
    split_hash: str
    sources: dict[str, str]
    inputs_key: str
    """Hash of everything upstream that decides the tokens."""

    @property
    def has_loss_mask(self) -> bool:
        """Whether the loss is taken on some tokens only."""
        return self.template is not None and self.template.is_supervised


@dataclass(frozen=True)
class PartTask:
    """One part of a corpus: its row groups in the histories."""

    corpus: Corpus
    settings: PackSettings
    number: int
    row_groups: range
    first_history: int
    n_histories: int

    @property
    def key(self) -> str:
        """Hash of what decides the part's bytes."""
        return digest([plan_key(self.corpus, self.settings), self.number, [*self.row_groups], self.first_history])

    @property
    def record(self) -> Path:
        return self.corpus.folder / "parts" / f"{self.number:05d}.json"

    @property
    def whole_tokens(self) -> Path:
        """Of `exact: slow`: the part's documents, each tokenized whole."""
        return self.corpus.folder / "parts" / f"{self.number:05d}.tokens.arrow"


class Part(BaseModel):
    """What a finished part holds; written when all its shards are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    n_histories: int
    n_documents: int
    n_events: int
    """Events in its documents."""
    n_tokens: int
    sum_squared_doc_lens: int
    dropped: dict[int, int]
    """Item (its catalogue number) whose line does not fit into a row -> its events, dropped."""
    n_alone: int
    """Events dropped because nothing stood before them to be their history (templates with a target)."""
    shards: list[ShardInfo]


def pack(corpora: Sequence[Corpus], settings: PackSettings, *, workers: Workers, counts: Counts) -> None:
    """Pack the corpora, all their parts on one pool; each gets its manifest as soon as its parts are there.

    Raises DataError for a corpus of which no document fits into a row.
    """
    tasks = [task for corpus in corpora for task in part_tasks(corpus, settings)]
    for corpus in corpora:
        _keep_only_same_plan(corpus, settings)
    packed = workers.run(pack_part, tasks, n_tasks=len(tasks), label="pack")
    n_parts = Counter(task.corpus.name for task in tasks)
    waiting: list[Part] = []
    for task, part in zip(tasks, packed, strict=True):
        waiting.append(part)
        if len(waiting) == n_parts[task.corpus.name]:
            _finish(task.corpus, settings, waiting, counts)
            waiting = []


def part_tasks(corpus: Corpus, settings: PackSettings) -> list[PartTask]:
    """The parts of a corpus, in order: runs of whole row groups of about `window` histories; single row groups where
    documents are tokenized whole, which takes far longer."""
    metadata = _file(corpus.histories).metadata
    per_part = max(round(settings.window / ROW_GROUP_ROWS), 1) if corpus.segments else 1
    starts = np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])
    firsts = range(0, metadata.num_row_groups, per_part)
    groups = [range(g, min(g + per_part, metadata.num_row_groups)) for g in firsts]
    return [PartTask(corpus, settings, number, g, first_history=int(starts[g.start]),
                     n_histories=int(starts[g.stop] - starts[g.start])) for number, g in enumerate(groups)]


def plan_key(corpus: Corpus, settings: PackSettings) -> str:
    """Hash of what decides a corpus' shards."""
    return digest([PLAN_VERSION, FORMAT_VERSION, corpus.inputs_key, corpus.name, settings.model_dump(mode="json")])


def pack_part(task: PartTask) -> Part:
    """Write the part's shards and then its record, unless an earlier run finished it."""
    if finished := read_part(task):
        return finished
    corpus, settings = task.corpus, task.settings
    documents, source = documents_of(task)
    plan = PACK_MODES[settings.mode](documents.n_tokens, seq_len=settings.seq_len)
    shards = []
    for number, first in enumerate(range(0, len(plan.pieces_per_row), settings.shard_rows)):
        rows = fill_rows(plan.rows(first, settings.shard_rows), documents, source, seq_len=settings.seq_len,
                         dtype=dtype_for(corpus.tokenizer.vocab_size), pad_id=corpus.tokenizer.pad_id,
                         has_loss_mask=corpus.has_loss_mask)
        shards.append(write_shard(corpus.folder / f"shard-{task.number:05d}-{number:03d}.arrow", rows))
    part = Part(
        key=task.key, n_histories=task.n_histories, n_documents=len(documents),
        n_events=int(documents.n_items.sum()), n_tokens=int(documents.n_tokens.sum()),
        sum_squared_doc_lens=int((documents.n_tokens * documents.n_tokens).sum()), dropped=documents.dropped,
        n_alone=documents.n_alone, shards=shards)
    write_atomically(task.record, part.model_dump_json(indent=1))
    return part


def read_part(task: PartTask) -> Part | None:
    """The record of a finished part: of the same plan, with all its shards there at their sizes."""
    if not task.record.is_file():
        return None
    try:
        part = Part.model_validate_json(task.record.read_text(encoding="utf-8"))
    except ValidationError:
        return None  # of another version of this program
    folder = task.corpus.folder
    is_there = part.key == task.key and all(
        (folder / s.file).is_file() and (folder / s.file).stat().st_size == s.bytes for s in part.shards)
    return part if is_there else None


def documents_of(task: PartTask) -> tuple[Documents, TokenSource]:
    """The part's documents, and where their tokens come from."""
    corpus, settings = task.corpus, task.settings
    if corpus.template is None:
        return _texts_of(task)
    items, lengths = read_histories(corpus.histories, task.row_groups)
    history_ids = task.first_history + np.arange(len(lengths))
    if corpus.segments is not None:
        segments = _mapped(corpus.segments, corpus.inputs_key)
        _require_known(items, len(segments.lens) - FIRST_ITEM, corpus)
        return gathered_documents(items, lengths, history_ids, segments, seq_len=settings.seq_len,
                                  has_target=corpus.has_loss_mask)
    _require_known(items, _file(corpus.catalogue).metadata.num_rows, corpus)
    if not task.whole_tokens.is_file():
        made = tokenize_histories(
            items, lengths, history_ids, line_of=_lines(corpus.catalogue, corpus.inputs_key).of,
            template=corpus.template, tokenizer=cached_tokenizer(corpus.tokenizer_name), room=settings.seq_len)
        write_whole(task.whole_tokens, *made, dtype=dtype_for(corpus.tokenizer.vocab_size))
    documents, lists = map_whole(task.whole_tokens, items)
    return documents, FromWhole(lists)


def _texts_of(task: PartTask) -> tuple[Documents, FromWhole]:
    corpus = task.corpus
    if not task.whole_tokens.is_file():
        texts = _file(corpus.histories).read_row_groups([*task.row_groups], columns=["text"])["text"]
        made = tokenize_texts(
            texts.to_pylist(), task.first_history + np.arange(len(texts)),
            tokenizer=cached_tokenizer(corpus.tokenizer_name), room=task.settings.seq_len)
        write_whole(task.whole_tokens, *made, dtype=dtype_for(corpus.tokenizer.vocab_size))
    documents, lists = map_whole(task.whole_tokens)
    return documents, FromWhole(lists)


def gathered_documents(items: npt.NDArray[np.int32], lengths: Ints, history_ids: Ints, segments: Ragged, *,
                       seq_len: int, has_target: bool) -> tuple[Documents, FromSegments]:
    """Documents of histories (their items end to end, and how many each has), cut where a row would not hold them."""
    overhead = int(segments.lens[START] + segments.lens[TARGET] + segments.lens[END])
    line_lens = segments.lens[FIRST_ITEM:].astype(np.int32)
    runs = cut_histories(items, lengths, line_lens, room=seq_len - overhead, min_items=2 if has_target else 1)
    first_event = (np.cumsum(lengths) - lengths)[runs.place] + runs.first_item
    n_tokens = runs.n_tokens + overhead
    n_target = n_tokens
    if has_target:
        n_target = line_lens[items[first_event + runs.n_items - 1]] + segments.lens[END]
    documents = Documents(
        ids=document_ids(history_ids[runs.place], runs.first_item), n_items=runs.n_items, n_tokens=n_tokens,
        n_target_tokens=n_target, first_event=first_event, events=items, dropped=runs.dropped,
        n_alone=runs.n_alone)
    return documents, FromSegments(segments, parts_of_documents(documents))


def read_histories(path: Path, row_groups: range) -> tuple[npt.NDArray[np.int32], Ints]:
    """Items of the histories in these row groups, end to end, and how many each history has."""
    column = _file(path).read_row_groups([*row_groups], columns=["items"])["items"].combine_chunks()
    return column.flatten().to_numpy().astype(np.int32, copy=False), column.value_lengths().to_numpy().astype(np.int64)


def _require_known(items: npt.NDArray[np.int32], n_items: int, corpus: Corpus) -> None:
    """Raise DataError where a history names what the catalogue of `n_items` does not have."""
    if len(items) and not 0 <= (least := int(items.min())) <= (most := int(items.max())) < n_items:
        odd = least if least < 0 else most
        raise DataError(f"{corpus.histories} names item {odd}, the catalogue has items 0 to {n_items - 1}: it was "
                        f"altered; delete it and run launch/prepare.py again, which makes it and all that depends on "
                        f"it anew")


def _file(path: Path) -> pq.ParquetFile:
    """The file, its footer parsed once per process: it grows with the parts, each of which asks for it."""
    found = path.stat()
    return pq.ParquetFile(path, metadata=_footer(path, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=4)
def _footer(path: Path, mtime_ns: int, n_bytes: int) -> pq.FileMetaData:
    return pq.read_metadata(path)


@lru_cache(maxsize=1)
def _mapped(path: Path, key: str) -> Ragged:
    """The segment table, mapped once per process; `key` tells one preparation's from another's at the same path."""
    return map_ragged(path)


class _Lines:
    """The catalogue's lines, kept in memory once per process."""

    def __init__(self, path: Path) -> None:
        self._lines = pq.read_table(path, columns=["line"])["line"].combine_chunks()

    def of(self, items: npt.NDArray[np.int32]) -> list[str]:
        """Lines of the items with these catalogue numbers."""
        lines: list[str] = self._lines.take(pa.array(items)).to_pylist()
        return lines


@lru_cache(maxsize=1)
def _lines(path: Path, key: str) -> _Lines:
    return _Lines(path)


def _keep_only_same_plan(corpus: Corpus, settings: PackSettings) -> None:
    """What a killed run left is kept only if that run packed the same things in the same way."""
    path = corpus.folder / "plan.json"
    plan = plan_key(corpus, settings)
    known = json.loads(path.read_text(encoding="utf-8"))["plan"] if path.is_file() else None
    if known != plan:
        (corpus.folder / MANIFEST).unlink(missing_ok=True)  # first: a folder without one is unfinished
        for stale in [*corpus.folder.glob("shard-*"), *corpus.folder.glob("parts/*")]:
            stale.unlink()
    (corpus.folder / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"plan": plan}))


def _finish(corpus: Corpus, settings: PackSettings, parts: Sequence[Part], counts: Counts) -> None:
    """Write the manifest of a corpus whose parts are all there, and count what it holds."""
    n_documents = sum(p.n_documents for p in parts)
    if n_documents == 0:
        raise DataError(f"corpus {corpus.name}: no document fits into seq_len={settings.seq_len} tokens; raise "
                        f"pack.seq_len")
    shards = [s for p in parts for s in p.shards]
    n_rows, n_tokens = sum(s.rows for s in shards), sum(p.n_tokens for p in parts)
    manifest = Manifest(
        corpus=corpus.name, kind=corpus.kind, seq_len=settings.seq_len,
        dtype=dtype_for(corpus.tokenizer.vocab_size), n_rows=n_rows, n_tokens=n_tokens,
        n_pad=n_rows * settings.seq_len - n_tokens, n_documents=n_documents,
        n_documents_by_domain={corpus.domain: n_documents},
        sum_squared_doc_lens=sum(p.sum_squared_doc_lens for p in parts), tokenizer=corpus.tokenizer,
        template=corpus.template, template_hash=corpus.template.hash if corpus.template else "",
        has_loss_mask=corpus.has_loss_mask, seed=corpus.seed, split_hash=corpus.split_hash,
        max_timestamp_ms=latest_time(corpus.histories) if corpus.template else 0,
        sources=corpus.sources, shards=shards,
        row_facts=write_row_facts(corpus.folder, shards))
    write_manifest(corpus.folder, manifest)
    _count(corpus, parts, manifest, counts)


def latest_time(histories: Path) -> int:
    """Time of the latest event in the histories (ms), from the file's statistics."""
    metadata = _file(histories).metadata
    column = next(c for c in range(metadata.num_columns)
                  if metadata.row_group(0).column(c).path_in_schema.startswith("ts."))
    return max(int(metadata.row_group(g).column(column).statistics.max) for g in range(metadata.num_row_groups))


def _count(corpus: Corpus, parts: Sequence[Part], manifest: Manifest, counts: Counts) -> None:
    is_text = corpus.template is None
    if manifest.n_rows >= MANY_ROWS and manifest.fill < LOW_FILL:
        log.warning("corpus %s: only %.1f %% of its rows is tokens: %s of %d tokens (mean) pack badly into rows of %d; "
                    "try another %spack.seq_len", corpus.name, 100 * manifest.fill,
                    "pieces of text" if is_text else "documents", manifest.n_tokens // manifest.n_documents,
                    manifest.seq_len, "" if is_text else "sequences.max_items or ")
    made = [("pieces of text", manifest.n_documents)] if is_text else [
        ("documents", manifest.n_documents), ("events in them", sum(p.n_events for p in parts))]
    for what, n in (*made, ("rows", manifest.n_rows), ("tokens", manifest.n_tokens), ("padding", manifest.n_pad)):
        counts.add(f"{corpus.name}: {what}", n)
    items = {item for p in parts for item in p.dropped}
    if items:
        counts.add(f"{corpus.name}: events dropped, the line of their item does not fit into a row (items "
                   f"{', '.join(map(str, sorted(items)[:5]))}{', ...' if len(items) > 5 else ''}; all in parts/)",
                   sum(n for p in parts for n in p.dropped.values()))
    if corpus.has_loss_mask:
        counts.add(f"{corpus.name}: events dropped, nothing stands before them in a document",
                   sum(p.n_alone for p in parts))


def parts_of(corpus: Corpus, settings: PackSettings) -> Iterator[tuple[PartTask, Part]]:
    """Every part with its record. Raises DataError where one is missing or of another plan."""
    for task in part_tasks(corpus, settings):
        part = read_part(task)
        if part is None:
            raise DataError(f"{task.record} is missing or does not belong to its shards: the corpus was altered; "
                            f"delete {corpus.folder} and run launch/prepare.py again")
        yield task, part
