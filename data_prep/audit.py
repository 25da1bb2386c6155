"""Stage 7, audit: proof over the finished artifacts that nothing held out is in a training corpus.

reads: everything below `out` that training or ranking will read, back from disk. writes: `audit.json`, and the
finding into every corpus' manifest. Relational checks run out of core; a seeded sample of rows is decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import Audit, Manifest, PackedCorpus, Row, list_corpora, write_atomically, write_manifest
from cprec.tokenizer import Tokenizer
from data_prep.engine import Engine, Table, event_hash
from data_prep.records import Corpora, Counts, Layout, Split, title_key
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
    corpora: Corpora
    split: Split
    tokenizer: Tokenizer
    regime: str
    seed: int
    lines: pa.ChunkedArray
    """The catalogue's lines by item number."""
    unseen_keys: frozenset[str]
    """Normalised titles of every item of the unseen domains."""
    leaking_items: frozenset[int]
    """Items of the catalogue that no training corpus may hold: of an unseen domain, or with the title of one."""


def audit(engine: Engine, layout: Layout, *, corpora: Corpora, split: Split, tokenizer: str, regime: str,
          seed: int) -> Counts:
    """Check every corpus, write the findings, and raise DataError if any check failed."""
    auditor = _auditor(engine, layout, corpora, split, tokenizer, regime, seed)
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


def _auditor(engine: Engine, layout: Layout, corpora: Corpora, split: Split, tokenizer: str, regime: str,
             seed: int) -> Auditor:
    unseen_keys: set[str] = set()
    for batch in pq.ParquetFile(layout.titled_items).iter_batches(columns=["domain", "title"]):
        unseen_keys.update(title_key(row["title"]) for row in batch.to_pylist()
                           if row["domain"] in corpora.unseen and row["title"])
    leaking: set[int] = set()
    for batch in pq.ParquetFile(layout.catalogue).iter_batches(columns=["item", "domain", "title"]):
        leaking.update(row["item"] for row in batch.to_pylist()
                       if row["domain"] in corpora.unseen or title_key(row["title"]) in unseen_keys)
    lines = pq.read_table(layout.catalogue, columns=["line"])["line"]
    return Auditor(engine, layout, corpora, split, cached_tokenizer(tokenizer), regime, seed, lines,
                   frozenset(unseen_keys), frozenset(leaking))


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
        if auditor.regime == "disjoint":
            _check_users(auditor, events, findings)
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
    named = events.mutate(h=event_hash(events, seed=auditor.seed))
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
    """(iii) No item of an unseen domain, none with the title of one."""
    items = {row["item"] for row in auditor.engine.rows(events.select("item").distinct())}
    findings.add("no unseen item or title", len(items & auditor.leaking_items),
                 f"{len(items):,} items are of an unseen domain or have a title of its {len(auditor.unseen_keys):,}")


def _check_users(auditor: Auditor, events: Table, findings: Findings) -> None:
    """(v) Disjoint regime: nobody with a held-out event in an unseen domain."""
    clean = auditor.engine.read(auditor.layout.interactions)
    later = clean.filter((clean.ts_ms >= auditor.split.t_valid) & clean.domain.isin(list(auditor.corpora.unseen)))
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


def _check_text(auditor: Auditor, corpus: PackedCorpus, findings: Findings, *, is_train: bool) -> None:
    """Decode a seeded sample of rows: every document's lines are those of its items; in training none is unseen."""
    rng = np.random.default_rng(auditor.seed)
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


def read_audit(path: Path) -> dict[str, Audit]:
    """The findings of a prepared folder, corpus -> audit."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: Audit.model_validate(a) for name, a in found.items()}
