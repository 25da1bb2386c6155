"""Stage 6, pack: histories become documents, documents become rows of exactly `seq_len` tokens, rows become shards.

reads: `histories/<corpus>.parquet`, `segments.arrow`. writes: `packed/<corpus>/`: `documents.parquet`, `plan.json`,
`shard-00000.arrow`, ... and last `manifest.json`. Rows are planned from lengths alone; workers then gather tokens
straight into a shard's buffer. Keeps of one corpus 4 bytes per event (8 while they are joined) and 85 to 110 bytes
per document in memory (40 in arrays, the rest in the planned rows' Python lists: the fewer documents a row has, the
more), about 55 more per document of a window while that is planned, and one shard per worker; `exact: slow` also
keeps the corpus' tokens. The bytes depend neither on the number of workers nor on how often the run was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import (
    Manifest,
    PackedRows,
    ShardInfo,
    Template,
    TokenizerInfo,
    file_hash,
    write_atomically,
    write_manifest,
    write_shard,
)
from cprec.log import get_logger
from data_prep.config import PackSettings
from data_prep.engine import write_parquet
from data_prep.ragged import END, FIRST_ITEM, START, Ints, Ragged, concatenate, map_ragged, ragged, spans, write_ragged
from data_prep.records import Counts, digest
from data_prep.workers import Workers, cached_tokenizer

log = get_logger(__name__)

DOCUMENTS = pa.schema([
    ("doc_id", pa.int64()),  # its row
    ("history_id", pa.int64()),
    ("first_item", pa.int32()),  # place in the history's items
    ("n_items", pa.int32()),
    ("n_tokens", pa.int32()),
])
HISTORIES_PER_TASK = 4096
WHOLE_TOKENS = "tokens.arrow"
"""Of `exact: slow`: the corpus' documents, each tokenized whole."""
LOW_FILL, MANY_ROWS = 0.95, 32
"""Below this share of tokens in so many rows the user is told how to pack better; the last rows of few are never
full."""


@dataclass(frozen=True)
class Documents:
    """The documents of one corpus, one entry per document, and the catalogue numbers of all histories end to end."""

    history_id: Ints
    first_item: Ints
    n_items: Ints
    n_tokens: Ints
    first_event: Ints
    """Where its items start in `events`."""
    events: npt.NDArray[np.int32]
    max_ts: int
    dropped: dict[int, int]
    """Item whose line alone does not fit into a row -> how many of its events were dropped."""

    def __len__(self) -> int:
        return len(self.history_id)


@dataclass(frozen=True)
class Corpus:
    """What is packed, and all that its manifest says about where it came from."""

    name: str
    kind: Literal["train", "valid"]
    domain: str
    folder: Path
    histories: Path
    segments: Path
    tokenizer_name: str
    """What loads the tokenizer here (for `exact: slow`)."""
    tokenizer: TokenizerInfo
    template: Template
    seed: int
    split_hash: str
    sources: dict[str, str]
    inputs_key: str
    """Hash of everything upstream that decides the tokens."""


@dataclass(frozen=True)
class ShardTask:
    """One shard's documents in row order, and the segments that make up each of them, end to end."""

    path: Path
    segments: Path
    seq_len: int
    dtype: str
    pad_id: int
    doc_ids: Ints
    doc_tokens: Ints
    docs_per_row: Ints
    rows_of_segments: Ints


def pack_corpus(corpus: Corpus, settings: PackSettings, *, lines: pa.ChunkedArray | None, workers: Workers,
                counts: Counts) -> Manifest:
    """Pack one corpus; finished shards of the same plan are kept. `lines` (the catalogue's) are given for
    `exact: slow` only: then every document is tokenized whole instead of gathered."""
    corpus.folder.mkdir(parents=True, exist_ok=True)
    if lines is None:
        documents = plan_documents(corpus.histories, map_ragged(corpus.segments), seq_len=settings.seq_len)
        source = corpus.segments
    else:
        source = corpus.folder / WHOLE_TOKENS
        documents = encode_whole(corpus, lines, seq_len=settings.seq_len, target=source, workers=workers)
    if len(documents) == 0:
        raise DataError(f"corpus {corpus.name}: no document fits into seq_len={settings.seq_len} tokens; raise "
                        f"pack.seq_len")
    _write_documents(corpus.folder / "documents.parquet", documents)
    rows = plan_rows(documents.n_tokens, seq_len=settings.seq_len, window=settings.window)
    _keep_only_same_plan(corpus, settings)
    tasks = _shard_tasks(corpus, settings, documents, rows, source, whole=lines is not None)
    n_shards = -(-len(rows) // settings.shard_rows)
    shards = list(workers.run(write_or_keep, tasks, n_tasks=n_shards, label=f"pack {corpus.name}"))
    manifest = _manifest(corpus, settings, documents, shards)
    write_manifest(corpus.folder, manifest)
    _count(corpus, documents, manifest, counts)
    return manifest


def plan_documents(path: Path, segments: Ragged, *, seq_len: int) -> Documents:
    """Cut each history at item borders into documents of at most `seq_len` tokens.

    An item whose line alone does not fit is dropped and counted; the history is cut there.
    """
    overhead = int(segments.lens[START] + segments.lens[END])
    line_lens = segments.lens[FIRST_ITEM:]
    found: list[Documents] = []
    n_events = 0
    for history_ids, items, lengths, max_ts in read_histories(path):
        found.append(_cut(history_ids, items, lengths, max_ts, line_lens, room=seq_len - overhead, overhead=overhead,
                          first_event=n_events))
        n_events += len(items)
    return _joined(found)


def read_histories(path: Path) -> Iterator[tuple[Ints, npt.NDArray[np.int32], Ints, int]]:
    """Per row group: history ids, their items end to end, their lengths, the latest time."""
    for batch in pq.ParquetFile(path).iter_batches(1 << 16, columns=["history_id", "items", "ts"]):
        lengths = batch["items"].value_lengths().to_numpy().astype(np.int64)
        yield (batch["history_id"].to_numpy(), batch["items"].flatten().to_numpy().astype(np.int32), lengths,
               int(batch["ts"].flatten().to_numpy().max(initial=0)))


def _cut(history_ids: Ints, items: npt.NDArray[np.int32], lengths: Ints, max_ts: int, line_lens: Ints, *, room: int,
         overhead: int, first_event: int) -> Documents:
    starts = np.cumsum(lengths) - lengths
    item_tokens = line_lens[items]
    totals = np.add.reduceat(item_tokens, starts) if len(starts) else np.zeros(0, np.int64)
    pieces: list[Ints] = []  # each: (history's place here, first item, items)
    whole = np.flatnonzero(totals <= room)
    pieces.append(np.stack([whole, np.zeros_like(whole), lengths[whole]]))
    dropped: dict[int, int] = {}
    for place in np.flatnonzero(totals > room):  # few: only histories longer than a row
        mine = slice(starts[place], starts[place] + lengths[place])
        for item in items[mine][item_tokens[mine] > room]:
            dropped[int(item)] = dropped.get(int(item), 0) + 1
        cuts = [[place, first, n] for first, n in cut_to_fit(item_tokens[mine].tolist(), room=room)]
        pieces.append(np.array(cuts, dtype=np.int64).reshape(-1, 3).T)
    place, first, n = np.concatenate(pieces, axis=1)
    order = np.lexsort((first, place))
    place, first, n = place[order], first[order], n[order]
    sums = np.concatenate([[0], np.cumsum(item_tokens)])
    begin = starts[place] + first
    return Documents(history_id=history_ids[place], first_item=first, n_items=n,
                     n_tokens=sums[begin + n] - sums[begin] + overhead, first_event=begin + first_event,
                     events=items, max_ts=max_ts, dropped=dropped)


def cut_to_fit(item_tokens: Sequence[int], *, room: int) -> list[tuple[int, int]]:
    """Runs (first, n) of consecutive items of at most `room` tokens each, as few as possible, covering every item
    that fits on its own."""
    runs: list[tuple[int, int]] = []
    first, used = 0, 0
    for i, n_tokens in enumerate([*item_tokens, room + 1]):  # the sentinel closes the last run
        if used + n_tokens > room:
            if i > first:
                runs.append((first, i - first))
            first, used = i, 0
        if n_tokens > room:
            first = i + 1
        else:
            used += n_tokens
    return runs


def _joined(parts: Sequence[Documents]) -> Documents:
    dropped: dict[int, int] = {}
    for part in parts:
        for item, n in part.dropped.items():
            dropped[item] = dropped.get(item, 0) + n

    def all_of(name: str) -> Any:
        return np.concatenate([np.zeros(0, np.int64), *(getattr(p, name) for p in parts)]).astype(np.int64)

    events = np.concatenate([np.zeros(0, np.int32), *(p.events for p in parts)])
    return Documents(history_id=all_of("history_id"), first_item=all_of("first_item"), n_items=all_of("n_items"),
                     n_tokens=all_of("n_tokens"), first_event=all_of("first_event"), events=events,
                     max_ts=max((p.max_ts for p in parts), default=0), dropped=dropped)


@dataclass(frozen=True)
class WholeTask:
    """Histories to tokenize whole, as lines of text."""

    tokenizer: str
    lead_in: str
    histories: list[list[str]]
    room: int


@dataclass(frozen=True)
class WholeResult:
    """Documents of a `WholeTask`: (history's place in the task, first item, items), their ids, what did not fit."""

    cuts: list[tuple[int, int, int]]
    tokens: Ragged
    dropped: list[tuple[int, int]]
    """(history's place, item's place) of single items that do not fit into a row."""


def tokenize_whole(task: WholeTask) -> WholeResult:
    """Tokenize every history's text whole, halving those that do not fit into a row, at an item border."""
    tokenizer = cached_tokenizer(task.tokenizer)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    cuts: list[tuple[int, int, int]] = []
    tokens: list[list[int]] = []
    dropped: list[tuple[int, int]] = []
    for place, lines in enumerate(task.histories):
        todo = [(0, len(lines))]
        while todo:
            first, n = todo.pop()
            text = task.lead_in + "".join(lines[first:first + n])
            ids = [*bos, *tokenizer.encode([text])[0], tokenizer.eos_id]
            if len(ids) <= task.room:
                cuts.append((place, first, n))
                tokens.append(ids)
            elif n == 1:
                dropped.append((place, first))
            else:
                todo += [(first + n // 2, n - n // 2), (first, n // 2)]
    return WholeResult(cuts, ragged(tokens), dropped)


def encode_whole(corpus: Corpus, lines: pa.ChunkedArray, *, seq_len: int, target: Path, workers: Workers) -> Documents:
    """Documents of a corpus, each tokenized as one text; their tokens go to `target`, list i = document i."""
    flat: list[npt.NDArray[np.int32]] = []
    heads: list[tuple[Ints, Ints]] = []
    max_ts = 0
    for history_ids, items, lengths, latest in read_histories(corpus.histories):
        flat.append(items)
        heads.append((history_ids, lengths))
        max_ts = max(max_ts, latest)
    events = np.concatenate(flat)
    lengths = np.concatenate([h[1] for h in heads])
    starts = np.cumsum(lengths) - lengths

    def tasks() -> Iterator[WholeTask]:
        for a in range(0, len(lengths), HISTORIES_PER_TASK):
            texts = [lines.take(pa.array(events[s:s + n])).to_pylist()
                     for s, n in zip(starts[a:a + HISTORIES_PER_TASK], lengths[a:a + HISTORIES_PER_TASK], strict=True)]
            yield WholeTask(corpus.tokenizer_name, corpus.template.lead_in, texts, seq_len)

    n_tasks = -(-len(lengths) // HISTORIES_PER_TASK)
    results = list(workers.run(tokenize_whole, tasks(), n_tasks=n_tasks, label=f"encode {corpus.name}"))
    cuts = np.array([(t * HISTORIES_PER_TASK + place, first, n) for t, r in enumerate(results)
                     for place, first, n in r.cuts], dtype=np.int64).reshape(-1, 3)
    tokens = concatenate([r.tokens for r in results])
    write_ragged(target, tokens)
    dropped: dict[int, int] = {}
    for t, result in enumerate(results):
        for place, at in result.dropped:
            item = int(events[starts[t * HISTORIES_PER_TASK + place] + at])
            dropped[item] = dropped.get(item, 0) + 1
    history_ids = np.concatenate([h[0] for h in heads])
    return Documents(history_id=history_ids[cuts[:, 0]], first_item=cuts[:, 1], n_items=cuts[:, 2],
                     n_tokens=tokens.lens, first_event=starts[cuts[:, 0]] + cuts[:, 1], events=events, max_ts=max_ts,
                     dropped=dropped)


def plan_rows(lengths: Ints, *, seq_len: int, window: int) -> list[list[int]]:
    """Which documents share a row, planned over `window` documents at a time; every document is in exactly one."""
    rows: list[list[int]] = []
    for first in range(0, len(lengths), window):
        rows += [[first + d for d in row] for row in
                 best_fit_decreasing(lengths[first:first + window].tolist(), capacity=seq_len)]
    return rows


def best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Bins of at most `capacity`, each a list of indices into `lengths`: the longest first, each into the fullest bin
    that still takes it. Ties go to the smaller index.

    `open_spaces` has bit s set when some bin has exactly s free; the smallest s >= n is one shift and one lowest bit.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_spaces = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        assert 0 < n <= capacity, f"a document of {n} tokens for rows of {capacity}"
        if fitting := open_spaces >> n:
            space = n + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                open_spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(i)
        if space > n:
            by_space[space - n].append(chosen)
            open_spaces |= 1 << (space - n)
    return bins


def _write_documents(path: Path, documents: Documents) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield pa.record_batch([
            pa.array(np.arange(len(documents))), pa.array(documents.history_id),
            *(pa.array(column.astype(np.int32))
              for column in (documents.first_item, documents.n_items, documents.n_tokens))], names=DOCUMENTS.names)

    write_parquet(batches(), path, schema=DOCUMENTS)


def _keep_only_same_plan(corpus: Corpus, settings: PackSettings) -> None:
    """Shards left by a killed run are kept only if that run packed the same things in the same way."""
    path = corpus.folder / "plan.json"
    plan = digest([corpus.inputs_key, corpus.name, settings.model_dump(mode="json")])
    known = json.loads(path.read_text(encoding="utf-8"))["plan"] if path.is_file() else None
    if known != plan:
        for stale in corpus.folder.glob("shard-*.arrow"):
            stale.unlink()
    write_atomically(path, json.dumps({"plan": plan}))


def _shard_tasks(corpus: Corpus, settings: PackSettings, documents: Documents, rows: list[list[int]], source: Path, *,
                 whole: bool) -> Iterator[ShardTask]:
    # numpy names: a row's dtype decides how every reader maps the shard
    dtype = "uint16" if corpus.tokenizer.vocab_size <= 1 << 16 else "uint32"
    for number, first in enumerate(range(0, len(rows), settings.shard_rows)):
        mine = rows[first:first + settings.shard_rows]
        doc_ids = np.array([d for row in mine for d in row], dtype=np.int64)
        yield ShardTask(
            path=corpus.folder / f"shard-{number:05d}.arrow", segments=source, seq_len=settings.seq_len, dtype=dtype,
            pad_id=corpus.tokenizer.pad_id, doc_ids=doc_ids, doc_tokens=documents.n_tokens[doc_ids],
            docs_per_row=np.array([len(row) for row in mine], dtype=np.int64),
            rows_of_segments=doc_ids if whole else segments_of(
                documents.events, first_event=documents.first_event[doc_ids], n_items=documents.n_items[doc_ids]))


def segments_of(events: npt.NDArray[np.int32], *, first_event: Ints, n_items: Ints) -> Ints:
    """Rows of the segment table that make up the documents: start, its items' lines, end, for each in turn.

    A document's items are `n_items` of `events`, from `first_event` on; there is at least one document.
    """
    ends = np.cumsum(n_items + 2)
    rows = np.full(int(ends[-1]), END, dtype=np.int64)
    starts = ends - n_items - 2
    rows[starts] = START
    rows[spans(starts + 1, n_items)] = events[spans(first_event, n_items)] + FIRST_ITEM
    return rows


def write_or_keep(task: ShardTask) -> ShardInfo:
    """Write the shard, unless it is already there, whole, with exactly these documents."""
    return _kept(task) or write_shard(task.path, fill_rows(task))


def fill_rows(task: ShardTask) -> PackedRows:
    """Gather the shard's tokens into its rows; what is left of a row is padding."""
    tokens = map_ragged(task.segments).gather(task.rows_of_segments)
    n_rows = len(task.docs_per_row)
    first_doc = np.cumsum(task.docs_per_row) - task.docs_per_row
    row_tokens = np.add.reduceat(task.doc_tokens, first_doc)
    assert len(tokens) == row_tokens.sum(), f"{len(tokens)} tokens gathered, {row_tokens.sum()} planned"
    n_pad = task.seq_len - row_tokens
    buffer = np.full(n_rows * task.seq_len, task.pad_id, dtype=task.dtype)
    buffer[spans(np.arange(n_rows) * task.seq_len, row_tokens)] = tokens
    padded = np.flatnonzero(n_pad)
    lens = np.insert(task.doc_tokens, (first_doc + task.docs_per_row)[padded], n_pad[padded])
    return PackedRows(input_ids=buffer.reshape(n_rows, task.seq_len), doc_lens=lens.astype(np.int32),
                      n_lens=task.docs_per_row + (n_pad > 0), doc_ids=task.doc_ids, n_docs=task.docs_per_row,
                      n_pad=n_pad.astype(np.int32))


def _kept(task: ShardTask) -> ShardInfo | None:
    """The existing shard, if it can be read and holds the planned documents."""
    if not task.path.is_file():
        return None
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(task.path))).get_batch(0)
    except (pa.ArrowInvalid, OSError):
        return None  # cut short by a crash of the machine: written again
    same = (batch.num_rows == len(task.docs_per_row) and batch["input_ids"].type.list_size == task.seq_len
            and np.array_equal(batch["doc_ids"].flatten().to_numpy(), task.doc_ids)
            and np.array_equal(batch["n_pad"].to_numpy(), task.seq_len - np.add.reduceat(
                task.doc_tokens, np.cumsum(task.docs_per_row) - task.docs_per_row)))
    if not same:
        return None
    return ShardInfo(file=task.path.name, rows=batch.num_rows, bytes=task.path.stat().st_size,
                     xxh3_128=file_hash(task.path))


def _manifest(corpus: Corpus, settings: PackSettings, documents: Documents, shards: list[ShardInfo]) -> Manifest:
    n_rows = sum(s.rows for s in shards)
    n_tokens = int(documents.n_tokens.sum())
    return Manifest(
        corpus=corpus.name, kind=corpus.kind, seq_len=settings.seq_len,
        dtype="uint16" if corpus.tokenizer.vocab_size <= 1 << 16 else "uint32",
        n_rows=n_rows, n_tokens=n_tokens, n_pad=n_rows * settings.seq_len - n_tokens, n_documents=len(documents),
        n_documents_by_domain={corpus.domain: len(documents)},
        sum_squared_doc_lens=int((documents.n_tokens * documents.n_tokens).sum()), tokenizer=corpus.tokenizer,
        template=corpus.template, template_hash=corpus.template.hash, seed=corpus.seed, split_hash=corpus.split_hash,
        max_timestamp_ms=documents.max_ts, sources=corpus.sources, shards=shards)


def _count(corpus: Corpus, documents: Documents, manifest: Manifest, counts: Counts) -> None:
    if manifest.n_rows >= MANY_ROWS and manifest.fill < LOW_FILL:
        log.warning("corpus %s: only %.1f %% of its rows is tokens: documents of %d tokens (median) pack badly into "
                    "rows of %d; try another sequences.max_items or pack.seq_len", corpus.name, 100 * manifest.fill,
                    int(np.median(documents.n_tokens)), manifest.seq_len)
    counts.add(f"{corpus.name}: documents", manifest.n_documents)
    counts.add(f"{corpus.name}: rows", manifest.n_rows)
    counts.add(f"{corpus.name}: tokens", manifest.n_tokens)
    counts.add(f"{corpus.name}: padding", manifest.n_pad)
    for item, n in sorted(documents.dropped.items()):
        counts.add(f"{corpus.name}: events of item {item} dropped, its line does not fit into a row", n)
