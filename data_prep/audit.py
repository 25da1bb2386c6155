"""Stage 7, audit: proof over the finished artifacts that nothing held out is in a training corpus.

reads: everything below `out` that training or ranking will read, back from disk. writes: `audit.json`, and the
finding into every corpus' manifest. Relational checks run out of core. Every row of every shard is compared with what
its documents are made of, part by part on the worker pool; a seeded sample of rows is decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import (
    ITEM_BITS,
    Audit,
    Manifest,
    PackedCorpus,
    Row,
    Template,
    list_corpora,
    write_atomically,
    write_manifest,
)
from cprec.tokenizer import Tokenizer
from data_prep.config import PrepConfig
from data_prep.engine import Engine, Table, event_hash
from data_prep.pack import Corpus, parts_of
from data_prep.proof import prove_part
from data_prep.records import Counts, Layout, Split, title_key
from data_prep.workers import Workers, cached_tokenizer

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
    corpora: Mapping[str, Corpus]
    """How each corpus was packed, by name."""
    workers: Workers
    n_unlisted: int
    """Items of pre-training domains with a title of an unseen domain that `duplicates.parquet` does not list."""


def audit(engine: Engine, layout: Layout, config: PrepConfig, *, split: Split, corpora: Sequence[Corpus],
          workers: Workers) -> Counts:
    """Check every corpus, write the findings, and raise DataError if any check failed."""
    auditor = _auditor(engine, layout, config, split, corpora, workers)
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


def _auditor(engine: Engine, layout: Layout, config: PrepConfig, split: Split, corpora: Sequence[Corpus],
             workers: Workers) -> Auditor:
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
    return Auditor(engine, layout, config, split, cached_tokenizer(corpora[0].tokenizer_name), lines,
                   frozenset(unseen_keys), frozenset(leaking), {c.name: c for c in corpora}, workers,
                   _count_unlisted(engine, layout, config))


def _count_unlisted(engine: Engine, layout: Layout, config: PrepConfig) -> int:
    titled, listed = engine.read(layout.titled_items), engine.read(layout.duplicates)
    of_unseen = titled.filter(titled.domain.isin(config.domains.unseen)).select("title_key").distinct()
    shared = titled.filter(titled.domain.isin(config.domains.pretrain)).semi_join(of_unseen, "title_key")
    return engine.count(shared.anti_join(listed, ["title_key", "domain", "item_id"]))


def _audit_corpus(auditor: Auditor, corpus: PackedCorpus) -> Audit:
    findings = Findings()
    manifest = corpus.manifest
    is_train = manifest.kind == "train"
    _check_rows(auditor, corpus, findings)
    if manifest.template is None:
        return findings.audit  # plain text: no event, no user, no item
    events = _events(auditor, manifest)
    _check_times(auditor, events, findings, is_train=is_train)
    if is_train:
        _check_held_out(auditor, events, findings)
        _check_items(auditor, events, findings)
        if auditor.config.regime == "disjoint":
            _check_users(auditor, events, findings)
    _check_text(auditor, corpus, manifest.template, findings, is_train=is_train)
    return findings.audit


def _events(auditor: Auditor, manifest: Manifest) -> Table:
    """Every event of the histories that the corpus' documents are cut from, named as in the cleaned interactions."""
    engine, layout = auditor.engine, auditor.layout
    histories = engine.read(layout.histories(manifest.corpus))
    at = histories.mutate(place=ibis.range(0, histories["items"].length()).unnest())
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


def _check_rows(auditor: Auditor, corpus: PackedCorpus, findings: Findings) -> None:
    """(iv) Every document exactly once and whole; every row the tokens of its documents; bytes as in the manifest."""
    corpus.verify()
    packed = auditor.corpora[corpus.manifest.corpus]
    tasks = [task for task, _ in parts_of(packed, auditor.config.pack)]
    shards = [s for _, part in parts_of(packed, auditor.config.pack) for s in part.shards]
    if [s.file for s in shards] != [s.file for s in corpus.manifest.shards]:
        raise DataError(f"{corpus.folder}: the manifest names other shards than parts/ does: the corpus was altered; "
                        f"delete {corpus.folder} and run launch/prepare.py again")
    proofs = [*auditor.workers.run(prove_part, tasks, n_tasks=len(tasks), label=f"audit {packed.name}")]
    n_documents = sum(p.n_documents for p in proofs)
    wrong = sum(p.wrong_documents for p in proofs) + int(corpus.manifest.n_documents != n_documents)
    findings.add("every document once", wrong, f"{n_documents:,} documents are missing, repeated or not whole")
    findings.add("rows are their documents' tokens", sum(p.wrong_rows for p in proofs),
                 f"{sum(p.n_rows for p in proofs):,} rows, all compared, are not what their documents give")


def _check_text(auditor: Auditor, corpus: PackedCorpus, template: Template, findings: Findings, *,
                is_train: bool) -> None:
    """Decode a seeded sample of rows: every document is its items' text; in training none of its titles is unseen."""
    rng = np.random.default_rng(auditor.config.seed)
    chosen = np.sort(rng.choice(len(corpus), size=min(SAMPLED_ROWS, len(corpus)), replace=False))
    items_of = _HistoryItems(auditor.layout.histories(corpus.manifest.corpus))
    n_documents = n_other = n_unseen = 0
    for row in (corpus[int(i)] for i in chosen):
        documents = [*_documents(row)]
        if auditor.config.pack.mode == "concat":
            documents = documents[1:-1]  # the first and the last may be cut
        for doc_id, ids in documents:
            text = _text(auditor.tokenizer, ids)
            history, first = divmod(doc_id, 1 << ITEM_BITS)
            lines = auditor.lines.take(pa.array(items_of[history][first:], pa.int64())).to_pylist()
            n_documents += 1
            n_other += not _is_text_of(text, lines, template, auditor.tokenizer)
            n_unseen += sum(title_key(title) in auditor.unseen_keys for title in _titles(text, template))
    looked_at = f"{n_documents:,} documents in {len(chosen)} rows"
    findings.add("decoded documents are their items' text", n_other, f"{looked_at} differ")
    if is_train:
        findings.add("no decoded title is unseen", n_unseen, f"the titles in {looked_at} are")


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The document's text, control tokens off."""
    ids = ids[1:] if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else ids
    return tokenizer.decode(ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids)


def _is_text_of(text: str, lines: Sequence[str], template: Template, tokenizer: Tokenizer) -> bool:
    """Whether `text` is that of the first of these items, as many as it has room for; equal up to what the tokenizer
    cannot give back (a normaliser, an unknown character)."""
    if not lines:
        return False
    lens = np.abs(len(text) - len(template.render(lines[:1])) - np.cumsum([0, *map(len, lines[1:])]))
    nearest = np.argsort(lens, kind="stable")[:3]  # the tokenizer may have changed the length a little
    expected = [template.render(lines[:n + 1]) for n in nearest]
    key = title_key(text)
    return (any(title_key(e) == key for e in expected)
            or any(title_key(tokenizer.decode(tokenizer.encode_start(e))) == key for e in expected))


def _titles(text: str, template: Template) -> list[str]:
    """The titles in a document's text, for templates whose items are the title and a fixed end."""
    before, _, after = template.any_line.partition("x")
    if "x" in after or not after or before.strip():
        return []
    return [piece for piece in text.removeprefix(template.lead_in).split(after) if piece]


class _HistoryItems:
    """Catalogue numbers of histories' items, read by row group; the last group is kept."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        self._starts = np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])
        self._read: tuple[int, pa.ChunkedArray | None] = (-1, None)

    def __getitem__(self, history: int) -> list[int]:
        """Empty where there is no such history."""
        group = int(np.searchsorted(self._starts, history, side="right")) - 1
        if not 0 <= group < len(self._starts) - 1:
            return []
        if self._read[0] != group:
            self._read = (group, self._file.read_row_group(group, columns=["items"])["items"])
        assert self._read[1] is not None
        items: list[int] = self._read[1][history - int(self._starts[group])].as_py()
        return items


def _documents(row: Row) -> Iterator[tuple[int, list[int]]]:
    ends = np.cumsum(row.real_doc_lens)
    for doc_id, end, n in zip(row.doc_ids, ends, row.real_doc_lens, strict=True):
        yield int(doc_id), row.input_ids[end - n:end].tolist()
