"""Stage 7, audit: proof over the finished artifacts that nothing held out is in a training corpus.

reads: everything below `out` that training or ranking will read, back from disk. writes: `audit.json`, and the
finding into every corpus' manifest. Relational checks run out of core. Every row of every shard is compared with what
its documents are made of; a seeded sample of rows is decoded. Keeps one shard in memory, and of one corpus 4 bytes per
event and, while they are read, about 70 per document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import ibis
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import Audit, Manifest, PackedCorpus, Row, list_corpora, write_atomically, write_manifest
from cprec.tokenizer import Tokenizer
from data_prep.config import PrepConfig
from data_prep.engine import Engine, Table, event_hash
from data_prep.pack import WHOLE_TOKENS, ShardTask, fill_rows, read_histories, segments_of
from data_prep.ragged import Ints, map_ragged, spans
from data_prep.records import Counts, Layout, Split, title_key
from data_prep.workers import cached_tokenizer

SAMPLED_ROWS = 32


@dataclass
class Findings:
    """Checks of one corpus: what was looked at, and how many offences were found."""

    checks: dict[str, str] = field(default_factory=dict)
    passed: bool = True

    def add(self, check: str, n_offences: int, looked_at: str) -> None:
        """Record a check; more than 0 offences fail the audit."""
        self.passed = self.passed and n_offences == 0
        self.checks[check] = f"{'ok' if n_offences == 0 else 'FAILED'}: {n_offences:,} of {looked_at}"

    @property
    def audit(self) -> Audit:
        return Audit(passed=self.passed, checks=self.checks)


@dataclass(frozen=True)
class Auditor:
    """What all corpora are checked against."""

    engine: Engine
    layout: Layout
    config: PrepConfig
    split: Split
    tokenizer: Tokenizer
    lines: pa.ChunkedArray
    """The catalogue's lines by item number."""
    unseen_keys: frozenset[str]
    """Normalised titles of every item of the unseen domains."""
    leaking_items: frozenset[int]
    """Items of the catalogue that no training corpus may hold: of an unseen domain, with the title of one, or, where
    ids are shared, with the id of one."""
    n_unlisted: int
    """Items of pre-training domains with a title of an unseen domain that `duplicates.parquet` does not list."""


def audit(engine: Engine, layout: Layout, config: PrepConfig, *, split: Split, tokenizer: str) -> Counts:
    """Check every corpus, write the findings, and raise DataError if any check failed."""
    auditor = _auditor(engine, layout, config, split, tokenizer)
    audits: dict[str, Audit] = {}
    counts = Counts("audit")
    for name in list_corpora(layout.packed):
        corpus = PackedCorpus(layout.packed / name)
        audits[name] = _audit_corpus(auditor, corpus)
        write_manifest(corpus.folder, corpus.manifest.model_copy(update={"audit": audits[name]}))
    found = {name: a.model_dump(mode="json") for name, a in audits.items()}
    write_atomically(layout.audit, json.dumps(found, indent=1))
    failed = [f"  {name}: {check}: {finding}" for name, a in audits.items()
              for check, finding in a.checks.items() if finding.startswith("FAILED")]
    if failed:
        raise DataError(f"the audit of {layout.out} failed ({layout.audit} has all findings); do not train on it, "
                        f"prepare again into another folder:\n" + "\n".join(failed))
    counts.add("corpora audited", len(audits))
    counts.add("checks passed", sum(len(a.checks) for a in audits.values()))
    return counts


def _auditor(engine: Engine, layout: Layout, config: PrepConfig, split: Split, tokenizer: str) -> Auditor:
    unseen = config.domains.unseen
    unseen_keys: set[str] = set()
    unseen_ids: set[str] = set()  # stays empty where the same id need not be the same thing
    for batch in pq.ParquetFile(layout.titled_items).iter_batches(columns=["domain", "item_id", "title"]):
        rows = [row for row in batch.to_pylist() if row["domain"] in unseen]
        unseen_keys.update(title_key(row["title"]) for row in rows if row["title"])
        if config.clean.shared_item_ids:
            unseen_ids.update(row["item_id"] for row in rows)
    leaking: set[int] = set()
    for batch in pq.ParquetFile(layout.catalogue).iter_batches(columns=["item", "domain", "item_id", "title"]):
        leaking.update(row["item"] for row in batch.to_pylist()
                       if row["domain"] in unseen or row["item_id"] in unseen_ids
                       or title_key(row["title"]) in unseen_keys)
    lines = pq.read_table(layout.catalogue, columns=["line"])["line"]
    return Auditor(engine, layout, config, split, cached_tokenizer(tokenizer), lines, frozenset(unseen_keys),
                   frozenset(leaking), _count_unlisted(engine, layout, config))


def _count_unlisted(engine: Engine, layout: Layout, config: PrepConfig) -> int:
    titled, listed = engine.read(layout.titled_items), engine.read(layout.duplicates)
    of_unseen = titled.filter(titled.domain.isin(config.domains.unseen)).select("title_key").distinct()
    shared = titled.filter(titled.domain.isin(config.domains.pretrain)).semi_join(of_unseen, "title_key")
    return engine.count(shared.anti_join(listed, ["title_key", "domain", "item_id"]))


def _audit_corpus(auditor: Auditor, corpus: PackedCorpus) -> Audit:
    findings = Findings()
    manifest = corpus.manifest
    is_train = manifest.kind == "train"
    events = _events(auditor, manifest)
    _check_packed_once(corpus, findings)
    _check_times(auditor, events, findings, is_train=is_train)
    if is_train:
        _check_held_out(auditor, events, findings)
        _check_items(auditor, events, findings)
        if auditor.config.regime == "disjoint":
            _check_users(auditor, events, findings)
    _check_tokens(auditor, corpus, findings)
    _check_text(auditor, corpus, findings, is_train=is_train)
    return findings.audit


def _events(auditor: Auditor, manifest: Manifest) -> Table:
    """Every event inside the corpus' documents, named as in the cleaned interactions."""
    engine, layout = auditor.engine, auditor.layout
    documents = engine.read(layout.packed / manifest.corpus / "documents.parquet")
    histories = engine.read(layout.histories(manifest.corpus)).select("history_id", "user_id", "items", "ts")
    inside = documents.inner_join(histories, "history_id")
    at = inside.mutate(place=ibis.range(inside.first_item, inside.first_item + inside.n_items).unnest())
    events = at.select("user_id", item=at["items"][at.place], ts_ms=at.ts[at.place])
    catalogue = engine.read(layout.catalogue).select("item", "domain", "item_id")
    return events.left_join(catalogue, "item").select("user_id", "item", "ts_ms", "domain", "item_id")


def _check_held_out(auditor: Auditor, events: Table, findings: Findings) -> None:
    """(i) No event of the validation or test part."""
    named = events.mutate(h=event_hash(events, seed=auditor.config.seed))
    held_out = auditor.engine.read(auditor.layout.holdout)
    n = auditor.engine.count(named.semi_join(held_out, "h"))
    findings.add("no held-out event", n, f"{auditor.engine.count(events):,} events are in holdout.parquet")


def _check_times(auditor: Auditor, events: Table, findings: Findings, *, is_train: bool) -> None:
    """(ii) Everything before the validation clock; of a validation corpus, everything between the two."""
    clock = auditor.split
    wrong = events.ts_ms >= clock.t_valid
    if not is_train:
        wrong = (events.ts_ms < clock.t_valid) | (events.ts_ms >= clock.t_test)
    latest = auditor.engine.rows(events.agg(latest=events.ts_ms.max()))[0]["latest"]
    findings.add("inside the clock", auditor.engine.count(events.filter(wrong)),
                 f"the events lie outside (latest {latest}, t_valid {clock.t_valid}, t_test {clock.t_test})")


def _check_items(auditor: Auditor, events: Table, findings: Findings) -> None:
    """(iii) No item of an unseen domain, none with the title of one, nor with the id of one where ids are shared."""
    items = {row["item"] for row in auditor.engine.rows(events.select("item").distinct())}
    or_id = ", or an id of its catalogue" if auditor.config.clean.shared_item_ids else ""
    findings.add("no unseen item or title", len(items & auditor.leaking_items),
                 f"{len(items):,} items are of an unseen domain or have a title of its {len(auditor.unseen_keys):,}"
                 f"{or_id}")
    findings.add("titles shared with an unseen domain are listed", auditor.n_unlisted,
                 "the items of pre-training domains with such a title are missing in duplicates.parquet")


def _check_users(auditor: Auditor, events: Table, findings: Findings) -> None:
    """(v) Disjoint regime: nobody with a held-out event in an unseen domain."""
    clean = auditor.engine.read(auditor.layout.interactions)
    later = clean.filter((clean.ts_ms >= auditor.split.t_valid) & clean.domain.isin(auditor.config.domains.unseen))
    users = events.select("user_id").distinct()
    n = auditor.engine.count(users.semi_join(later.select("user_id").distinct(), "user_id"))
    findings.add("users disjoint", n, f"{auditor.engine.count(users):,} users have held-out events in unseen domains")


def _check_packed_once(corpus: PackedCorpus, findings: Findings) -> None:
    """(iv) Every document exactly once over the shards, with its tokens; the shards' bytes as in the manifest."""
    corpus.verify()
    documents = pq.read_table(corpus.folder / "documents.parquet", columns=["doc_id", "n_tokens"])
    n_tokens = documents["n_tokens"].to_numpy()
    ids, lens = _packed(corpus)
    known = (ids >= 0) & (ids < len(n_tokens))
    times = np.bincount(ids[known], minlength=len(n_tokens))
    wrong = int((~known).sum() + (times != 1).sum() + (n_tokens[ids[known]] != lens[known]).sum())
    wrong += int(corpus.manifest.n_documents != len(n_tokens)) + int(corpus.manifest.n_tokens != n_tokens.sum())
    findings.add("every document once", wrong,
                 f"{len(n_tokens):,} documents are missing, repeated or of another length")


def _packed(corpus: PackedCorpus) -> tuple[np.ndarray, np.ndarray]:
    """Document ids and lengths as they stand in the shards, end to end."""
    ids, lens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for info in corpus.manifest.shards:
        batch = pa.ipc.open_file(pa.memory_map(str(corpus.folder / info.file))).get_batch(0)
        flat, ends = batch["doc_lens"].flatten().to_numpy(), batch["doc_lens"].offsets.to_numpy()[1:]
        padding = ends[batch["n_pad"].to_numpy() > 0] - 1
        ids.append(batch["doc_ids"].flatten().to_numpy())
        lens.append(np.delete(flat, padding))
    return np.concatenate(ids), np.concatenate(lens)


def _check_tokens(auditor: Auditor, corpus: PackedCorpus, findings: Findings) -> None:
    """Every row of every shard: ids, lengths and padding are those that its documents give."""
    origin = _Origin(auditor, corpus)
    n_wrong = sum(_wrong_rows(origin, corpus.manifest, pa.ipc.open_file(
        pa.memory_map(str(corpus.folder / info.file))).get_batch(0)) for info in corpus.manifest.shards)
    findings.add("rows are their documents' tokens", n_wrong,
                 f"{len(corpus):,} rows, all compared, are not what {origin.path.name} gives for their documents")


class _Origin:
    """What the documents of a corpus are made of, as `documents.parquet` and the histories say."""

    def __init__(self, auditor: Auditor, corpus: PackedCorpus) -> None:
        self.is_whole = auditor.config.tokenizer.exact == "slow"
        self.path = corpus.folder / WHOLE_TOKENS if self.is_whole else auditor.layout.segments
        self._lens = map_ragged(self.path).lens
        documents = pq.read_table(corpus.folder / "documents.parquet")
        history, first, n_items = (documents[n].to_numpy() for n in ("history_id", "first_item", "n_items"))
        read = [(items, lengths) for _, items, lengths, _ in read_histories(
            auditor.layout.histories(corpus.manifest.corpus))]
        self._events = np.concatenate([np.zeros(0, np.int32), *(items for items, _ in read)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(lengths for _, lengths in read), np.zeros(1, np.int64)])
        place = np.where((history >= 0) & (history < len(lengths)), history, len(lengths) - 1)  # else an empty one
        self._first_event, self._n_items = (np.cumsum(lengths) - lengths)[place] + first, n_items.astype(np.int64)
        self._is_inside = (first >= 0) & (n_items > 0) & (first + n_items <= lengths[place])
        if self.is_whole:
            self._is_inside &= np.arange(len(first)) < len(self._lens)

    def known(self, doc_ids: Ints) -> npt.NDArray[np.bool_]:
        """Whether there is such a document, inside its history."""
        there = (doc_ids >= 0) & (doc_ids < len(self._is_inside))
        known: npt.NDArray[np.bool_] = there & self._is_inside[np.where(there, doc_ids, 0)]
        return known

    def rows(self, doc_ids: Ints) -> Ints:
        """The lists of `path` that give the (known) documents, end to end."""
        return doc_ids if self.is_whole else segments_of(
            self._events, first_event=self._first_event[doc_ids], n_items=self._n_items[doc_ids])

    def n_tokens(self, doc_ids: Ints) -> Ints:
        """Tokens of each of the (known) documents."""
        n_lists = np.ones_like(doc_ids) if self.is_whole else self._n_items[doc_ids] + 2
        sums = np.concatenate([[0], np.cumsum(self._lens[self.rows(doc_ids)])])
        ends = np.cumsum(n_lists)
        tokens: Ints = sums[ends] - sums[ends - n_lists]
        return tokens


def _wrong_rows(origin: _Origin, manifest: Manifest, shard: pa.RecordBatch) -> int:
    """How many rows of a shard are not what its writer would make of their documents."""
    doc_ids, offsets = shard["doc_ids"].flatten().to_numpy(), shard["doc_ids"].offsets.to_numpy().astype(np.int64)
    n_docs = np.diff(offsets)
    row_of = np.repeat(np.arange(len(n_docs)), n_docs)
    known = origin.known(doc_ids)
    doc_tokens = np.zeros(len(doc_ids), np.int64)
    if known.any():
        doc_tokens[known] = origin.n_tokens(doc_ids[known])
    room = np.bincount(row_of, weights=doc_tokens, minlength=len(n_docs)) <= manifest.seq_len
    possible = room & (n_docs > 0) & (np.bincount(row_of[~known], minlength=len(n_docs)) == 0)
    if not possible.any():
        return len(n_docs)
    mine = possible[row_of]
    expected = fill_rows(ShardTask(
        path=origin.path, segments=origin.path, seq_len=manifest.seq_len, dtype=manifest.dtype,
        pad_id=manifest.tokenizer.pad_id, doc_ids=doc_ids[mine], doc_tokens=doc_tokens[mine],
        docs_per_row=n_docs[possible], rows_of_segments=origin.rows(doc_ids[mine])))
    ids = shard["input_ids"].flatten().to_numpy().reshape(len(n_docs), -1)
    wrong = ~possible
    wrong[possible] = ((ids[possible] != expected.input_ids).any(axis=1)
                       | (shard["n_pad"].to_numpy()[possible] != expected.n_pad)
                       | _lists_differ(shard["doc_lens"], possible, expected.doc_lens, expected.n_lens))
    return int(wrong.sum())


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


def _check_text(auditor: Auditor, corpus: PackedCorpus, findings: Findings, *, is_train: bool) -> None:
    """Decode a seeded sample of rows: every document's lines are those of its items; in training none is unseen."""
    rng = np.random.default_rng(auditor.config.seed)
    chosen = np.sort(rng.choice(len(corpus), size=min(SAMPLED_ROWS, len(corpus)), replace=False))
    items_of = _DocumentItems(auditor.layout, corpus)
    n_lines = n_other = n_unseen = 0
    for row in (corpus[int(i)] for i in chosen):
        for doc_id, ids in _documents(row):
            decoded = _lines(auditor.tokenizer, ids)
            expected = [None, *auditor.lines.take(pa.array(items_of[doc_id])).to_pylist()]
            n_lines += len(expected) - 1
            n_other += abs(len(decoded) - len(expected))
            for line, wanted in list(zip(decoded, expected, strict=False))[1:]:
                n_other += not _same_line(auditor.tokenizer, line, wanted)
                n_unseen += title_key(line) in auditor.unseen_keys
    findings.add("decoded lines are the items' lines", n_other, f"{n_lines:,} lines in {len(chosen)} rows differ")
    if is_train:
        findings.add("no decoded line is an unseen title", n_unseen, f"{n_lines:,} lines in {len(chosen)} rows are")


class _DocumentItems:
    """Catalogue numbers of a document's items, by its id."""

    def __init__(self, layout: Layout, corpus: PackedCorpus) -> None:
        documents = pq.read_table(corpus.folder / "documents.parquet")
        self._columns = [documents[n].to_numpy() for n in ("history_id", "first_item", "n_items")]
        self._items = pq.read_table(layout.histories(corpus.manifest.corpus), columns=["items"])["items"]

    def __getitem__(self, doc_id: int) -> list[int]:
        history_id, first, n = (int(c[doc_id]) for c in self._columns)
        items: list[int] = self._items[history_id].as_py()
        return items[first:first + n]


def _documents(row: Row) -> Iterator[tuple[int, list[int]]]:
    ends = np.cumsum(row.real_doc_lens)
    for doc_id, end, n in zip(row.doc_ids, ends, row.real_doc_lens, strict=True):
        yield int(doc_id), row.input_ids[end - n:end].tolist()


def _lines(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The document's text by lines, control tokens off."""
    ids = ids[1:] if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else ids
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
    return tokenizer.decode(ids).removesuffix("\n").split("\n")


def _same_line(tokenizer: Tokenizer, decoded: str, line: str) -> bool:
    """Equal up to what the tokenizer cannot give back (a normaliser, an unknown character)."""
    if title_key(decoded) == title_key(line):
        return True
    return title_key(decoded) == title_key(tokenizer.decode(tokenizer.encode([line])[0]))
