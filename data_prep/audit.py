"""Stage 6', audit: proof over the finished artifacts that nothing held out is in a training corpus.

reads: everything below `out` that training or ranking will read, back from disk. writes: `audit.json`, and the
finding into every corpus' manifest; while it runs, `audit.partial/`. Relational checks run out of core. Every shard is
hashed, and every row of it compared with what its documents are made of, part by part on the worker pool; a seeded
sample of rows is decoded, and kept in memory with the texts of its items.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.format import ITEM_BITS, Audit, Manifest, PackedCorpus, Row, list_corpora, write_atomically, write_manifest
from cprec.log import get_logger
from cprec.template import Template
from cprec.tokenizer import Tokenizer
from data_prep.config import PrepConfig
from data_prep.encode import read_some_lines
from data_prep.engine import Engine, Table, event_hash, write_parquet
from data_prep.pack import Corpus, parts_of
from data_prep.proof import prove_part
from data_prep.records import Counts, Layout, Split, title_key
from data_prep.workers import Workers, cached_tokenizer

log = get_logger(__name__)

SAMPLED_ROWS = 32
KEYED = pa.schema([("item", pa.int32()), ("domain", pa.string()), ("item_id", pa.string()), ("title_key", pa.string())])
"""Items with the key of their title, made anew from the title."""
LEAKING = pa.schema([("item", pa.int32())])


@dataclass
class Findings:
    """Checks of one corpus: what was looked at, and how many offences were found."""

    checks: dict[str, str] = field(default_factory=dict)
    passed: bool = True

    def add(self, check: str, n_offences: int, looked_at: str) -> None:
        """Record a check; more than 0 offences fail the audit."""
        self.passed = self.passed and n_offences == 0
        self.checks[check] = f"{'ok' if n_offences == 0 else 'FAILED'}: {n_offences:,} of {looked_at}"

    def note(self, check: str, finding: str) -> None:
        """Record what does not decide the verdict."""
        self.checks[check] = finding

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
    unseen: Path
    """Every item of the unseen domains, as `KEYED`, without number; no key where it has no title."""
    n_unseen_titles: int
    leaking: Path
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
    audits: dict[str, Audit] = {}
    counts = Counts("audit")
    scratch = layout.audit.with_name("audit.partial")
    try:
        auditor = _auditor(engine, layout, config, split, corpora, workers, scratch)
        for name in list_corpora(layout.packed):
            corpus = PackedCorpus(layout.packed / name)
            audits[name] = _audit_corpus(auditor, corpus, counts)
            write_manifest(corpus.folder, corpus.manifest.model_copy(update={"audit": audits[name]}))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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
             workers: Workers, scratch: Path) -> Auditor:
    unseen, keyed, leaking = (scratch / f"{name}.parquet" for name in ("unseen", "catalogue", "leaking"))
    write_parquet(_keyed(layout.titled_items, of=config.domains.unseen), unseen, schema=KEYED)
    write_parquet(_keyed(layout.catalogue), keyed, schema=KEYED)
    forbidden, items = engine.read(unseen), engine.read(keyed)
    keys = forbidden.filter(forbidden.title_key.notnull()).select("title_key").distinct()
    found = [items.filter(items.domain.isin(config.domains.unseen)), items.semi_join(keys, "title_key")]
    if config.clean.shared_item_ids:  # else the same id need not be the same thing
        found.append(items.semi_join(forbidden.select("item_id").distinct(), "item_id"))
    engine.write(engine.union([t.select("item") for t in found]).distinct(), leaking, schema=LEAKING, order_by=["item"])
    return Auditor(engine, layout, config, split, cached_tokenizer(corpora[0].tokenizer_name), unseen,
                   engine.count(keys), leaking, {c.name: c for c in corpora}, workers,
                   _count_unlisted(engine, layout, config))


def _keyed(path: Path, *, of: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The items of a Parquet file, of these domains or of all, as `KEYED`."""
    file = pq.ParquetFile(path)
    for batch in file.iter_batches(columns=[n for n in (*KEYED.names[:3], "title") if n in file.schema_arrow.names]):
        rows = [row for row in batch.to_pylist() if of is None or row["domain"] in of]
        keyed = [{**row, "title_key": title_key(row["title"]) if row["title"] else None} for row in rows]
        yield pa.RecordBatch.from_pylist(keyed, schema=KEYED)


def _count_unlisted(engine: Engine, layout: Layout, config: PrepConfig) -> int:
    titled, listed = engine.read(layout.titled_items), engine.read(layout.duplicates)
    of_unseen = titled.filter(titled.domain.isin(config.domains.unseen)).select("title_key").distinct()
    shared = titled.filter(titled.domain.isin(config.domains.pretrain)).semi_join(of_unseen, "title_key")
    return engine.count(shared.anti_join(listed, ["title_key", "domain", "item_id"]))


def _audit_corpus(auditor: Auditor, corpus: PackedCorpus, counts: Counts) -> Audit:
    findings = Findings()
    manifest = corpus.manifest
    is_train = manifest.kind == "train"
    _check_rows(auditor, corpus, findings)
    if manifest.template is None:  # plain text: no event, no user, no item
        _check_plain_text(auditor, corpus, findings, counts)
        return findings.audit
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
    """Every event of the histories that the corpus' documents are cut from."""
    histories = auditor.engine.read(auditor.layout.histories(manifest.corpus))
    at = histories.mutate(place=ibis.range(0, histories["items"].length()).unnest())
    return at.select("user_id", item=at["items"][at.place], ts_ms=at.ts[at.place])


def _check_held_out(auditor: Auditor, events: Table, findings: Findings) -> None:
    """(i) No event of the validation or test part."""
    catalogue = auditor.engine.read(auditor.layout.catalogue).select("item", "domain", "item_id")
    named = events.inner_join(catalogue, "item")
    hashed = named.mutate(h=event_hash(named, seed=auditor.config.seed))
    held_out = auditor.engine.read(auditor.layout.holdout)
    n = auditor.engine.count(hashed.semi_join(held_out, "h"))
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
    items = events.select("item").distinct()
    or_id = ", or an id of its catalogue" if auditor.config.clean.shared_item_ids else ""
    leaking = auditor.engine.read(auditor.leaking).rename(leaks="item")
    found = items.left_join(leaking, items["item"] == leaking.leaks).agg(n=ibis._.count(), leaks=ibis._.leaks.count())
    n = auditor.engine.rows(found)[0]
    findings.add("no unseen item or title", n["leaks"],
                 f"{n['n']:,} items are of an unseen domain or have a title of its {auditor.n_unseen_titles:,}{or_id}")
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
    packed = auditor.corpora[corpus.manifest.corpus]
    parts = [*parts_of(packed, auditor.config.pack)]
    tasks = [task for task, _ in parts]
    if [s for _, part in parts for s in part.shards] != corpus.manifest.shards:  # also their hashes, proved below
        raise DataError(f"{corpus.folder}: the manifest names other shards than parts/ does: the corpus was altered; "
                        f"delete {corpus.folder} and run launch/prepare.py again")
    proofs = [*auditor.workers.run(prove_part, tasks, n_tasks=len(tasks), label=f"audit {packed.name}")]
    n_documents = sum(p.n_documents for p in proofs)
    wrong = sum(p.wrong_documents for p in proofs) + int(corpus.manifest.n_documents != n_documents)
    findings.add("every document once", wrong, f"{n_documents:,} documents are missing, repeated or not whole")
    if corpus.manifest.template is not None:
        findings.add("every event in a document, or counted as dropped", sum(p.lost_events for p in proofs),
                     "the histories' events are neither")
    findings.add("rows are their documents' tokens", sum(p.wrong_rows for p in proofs),
                 f"{sum(p.n_rows for p in proofs):,} rows, all compared, are not what their documents give")


def _check_text(auditor: Auditor, corpus: PackedCorpus, template: Template, findings: Findings, *,
                is_train: bool) -> None:
    """Decode a seeded sample of rows: every document is its items' text; in training none of its titles is unseen."""
    rows = _sampled_rows(auditor, corpus)
    # rows of `concat` may begin and end inside a document
    whole = slice(1, -1) if auditor.config.pack.mode == "concat" else slice(None)
    documents = [document for row in rows for document in [*_documents(row)][whole]]
    items_of = _HistoryItems(auditor.layout.histories(corpus.manifest.corpus))
    items = [items_of[doc_id >> ITEM_BITS][doc_id & (1 << ITEM_BITS) - 1:] for doc_id, _ in documents]
    lines = read_some_lines(auditor.layout.catalogue, np.array([i for run in items for i in run], dtype=np.int64))
    texts = [_text(auditor.tokenizer, ids) for _, ids in documents]
    n_other = sum(not _is_text_of(text, lines.of(run), template, auditor.tokenizer)
                  for text, run in zip(texts, items, strict=True))
    looked_at = f"{len(documents):,} documents in {len(rows)} rows"
    findings.add("decoded documents are their items' text", n_other, f"{looked_at} differ")
    if not is_train:
        return
    if _shows_titles(template):
        n_unseen = _count_unseen(auditor, [title for text in texts for title in _titles(text, template)])
        findings.add("no decoded title is unseen", n_unseen, f"the titles in {looked_at} are")
    else:
        findings.note("no decoded title is unseen", f"not checked: where a title ends in a text is not to be seen with "
                      f"template {template.name}; the items of all documents were checked")


def _check_plain_text(auditor: Auditor, corpus: PackedCorpus, findings: Findings, counts: Counts) -> None:
    """Decode a seeded sample of rows, and look for lines that are titles of unseen items. Such a line may be a heading
    that means something else, so the finding says how many there are and leaves the verdict to the reader."""
    rows = _sampled_rows(auditor, corpus)
    lines = [line for row in rows for _, ids in _documents(row) for line in _text(auditor.tokenizer, ids).splitlines()]
    lines = [line for line in lines if line.strip()]
    n_unseen = _count_unseen(auditor, lines)
    findings.note("no line of the text is an unseen title",
                  f"{'NOTED' if n_unseen else 'ok'}: {n_unseen:,} of {len(lines):,} lines in {len(rows)} rows of "
                  f"{len(corpus):,} are")
    counts.add(f"{corpus.manifest.corpus}: sampled lines that are titles of an unseen domain", n_unseen)
    if n_unseen:
        log.warning("corpus %s: %d of %d lines in %d sampled rows are titles of an unseen domain: headings that mean "
                    "something else, or a text about its items; in that case take it out of `replay`",
                    corpus.manifest.corpus, n_unseen, len(lines), len(rows))


def _sampled_rows(auditor: Auditor, corpus: PackedCorpus) -> list[Row]:
    rng = np.random.default_rng(auditor.config.seed)
    chosen = np.sort(rng.choice(len(corpus), size=min(SAMPLED_ROWS, len(corpus)), replace=False))
    return [corpus[int(i)] for i in chosen]


def _count_unseen(auditor: Auditor, titles: Sequence[str]) -> int:
    """How many of the titles are those of items of an unseen domain."""
    keys = [title_key(title) for title in titles]
    wanted = pa.array(sorted({*keys}), pa.string())
    unseen: set[str] = set()
    for batch in pq.ParquetFile(auditor.unseen).iter_batches(columns=["title_key"]):
        unseen.update(batch["title_key"].filter(pc.is_in(batch["title_key"], value_set=wanted)).to_pylist())
    return sum(key in unseen for key in keys)


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


def _shows_titles(template: Template) -> bool:
    """Whether items are the title and a fixed end that no title can hold: one with a line break."""
    before, _, after = template.any_line.partition("x")
    return not before.strip() and "x" not in after and "\n" in after


def _titles(text: str, template: Template) -> list[str]:
    """The titles in a document's text, of a template that shows them."""
    body = text.removeprefix(template.lead_in).removesuffix(template.tail)
    if template.before_target:
        history, _, target = body.rpartition(template.before_target)
        body = history + target
    return [piece for piece in body.split(template.any_line.partition("x")[2]) if piece]


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
