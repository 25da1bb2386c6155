"""The report of a preparation, with pictures: what each stage kept and dropped, and what came out.

reads: the finished stages' counts and artifacts. writes: `report.md`, `report/*.png` and last `report.json`. Everything
is counted by the engine, out of core: one pass over the events, one over the users, one over titles and histories.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import ibis
import numpy as np

from cprec.format import Audit, Manifest, list_corpora, read_manifest, write_atomically
from data_prep import pictures
from data_prep.duplicates import count_duplicates
from data_prep.engine import Engine, Table
from data_prep.pictures import Matrix
from data_prep.records import STAGES, Corpora, Layout, Split, Stamp, utc

PARTS = ("train", "valid", "test")
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Events:
    """Cleaned events, counted: domain -> part of the split -> day since 1970 -> events."""

    counted: dict[str, dict[str, dict[int, int]]]

    def n(self, domain: str, part: str) -> int:
        return sum(self.counted[domain][part].values())

    def by_day(self, domain: str) -> dict[int, int]:
        days: dict[int, int] = {}
        for of_part in self.counted[domain].values():
            for day, n in of_part.items():
                days[day] = days.get(day, 0) + n
        return days


def write_report(engine: Engine, layout: Layout, *, corpora: Corpora, stamps: Mapping[str, Stamp]) -> None:
    """Report what `stamps`, the finished stages, did; when not all are finished, what is known so far.

    Does nothing when the report is that of these stages already.
    """
    counts = {stage: stamps[stage].counts for stage in STAGES if stage in stamps}
    text = json.dumps(counts, indent=1, ensure_ascii=False)
    summary = layout.out / "report.json"
    if summary.is_file() and summary.read_text(encoding="utf-8") == text and (layout.out / "report.md").is_file():
        return
    write_atomically(layout.out / "report.md", "\n".join(_lines(engine, layout, corpora, counts)) + "\n")
    write_atomically(summary, text)


def _lines(engine: Engine, layout: Layout, corpora: Corpora, counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    yield "# What this preparation read, kept and made\n"
    if missing := [s for s in STAGES if s not in counts and s != "vocabulary"]:
        yield f"Not finished: {', '.join(missing)}.\n"
    if "pack" in counts:
        yield from _packed(layout)
    if "split" in counts:
        yield from _domains(engine, layout, corpora)
        yield from _overlap(engine, layout, corpora)
    if "sequences" in counts:
        yield from _lengths(engine, layout, corpora)
    if "audit" in counts:  # while packing is redone, the file is still the old one
        yield from _audited(layout.audit)
    yield "## What each stage kept and dropped\n"
    yield from _table(("stage", "what", "n"), ((s, what, n) for s, reasons in counts.items()
                                               for what, n in reasons.items()))


def _packed(layout: Layout) -> Iterator[str]:
    manifests = [read_manifest(layout.packed / name) for name in list_corpora(layout.packed)]
    yield "## Tokens\n"
    yield from _table(
        ("corpus", "for", "documents", "rows", "tokens", "padding", "tokens per document", "fill"),
        ((m.corpus, m.kind, m.n_documents, m.n_rows, m.n_tokens, m.n_pad,
          f"{m.n_tokens / max(m.n_documents, 1):.1f}", f"{m.fill:.3%}") for m in manifests))
    total = _total([m for m in manifests if m.kind == "train"])
    yield f"{total}\n"
    pictures.draw_tokens(manifests, _picture(layout, "tokens"))
    yield "![tokens and fill per corpus](report/tokens.png)\n"


def _total(manifests: Sequence[Manifest]) -> str:
    n_rows, n_tokens = sum(m.n_rows for m in manifests), sum(m.n_tokens for m in manifests)
    room = sum(m.n_rows * m.seq_len for m in manifests)
    return f"Training corpora together: {n_rows:,} rows, {n_tokens:,} tokens, {n_tokens / max(room, 1):.3%} full."


def _domains(engine: Engine, layout: Layout, corpora: Corpora) -> Iterator[str]:
    split = Split.model_validate_json(layout.split.read_text(encoding="utf-8"))
    domains = sorted((*corpora.pretrain, *corpora.unseen))
    events = count_events(engine, layout, split, domains)
    items = engine.read(layout.items)
    n_items = {r["domain"]: r["n"] for r in engine.rows(items.group_by("domain").agg(n=items.count()))}
    yield "## Domains and the clock\n"
    yield (f"Training ends before {utc(split.t_valid)}, validation before {utc(split.t_test)} (UTC); events and "
           f"items after cleaning.\n")
    yield from _table(("domain", "use", "items", *(f"events in {p}" for p in PARTS)), (
        (d, "pretrain" if d in corpora.pretrain else "unseen", n_items.get(d, 0), *(events.n(d, p) for p in PARTS))
        for d in domains))
    pictures.draw_times({d: events.by_day(d) for d in domains},
                        {"t_valid": split.t_valid, "t_test": split.t_test}, _picture(layout, "time"))
    yield "![events over time and the two clocks](report/time.png)\n"


def count_events(engine: Engine, layout: Layout, split: Split, domains: Sequence[str]) -> Events:
    """Cleaned events by domain, part and day; in one pass."""
    events = engine.read(layout.interactions)
    part = ibis.cases((events.ts_ms < split.t_valid, "train"), (events.ts_ms < split.t_test, "valid"), else_="test")
    by_day = events.mutate(part=part, day=(events.ts_ms // DAY_MS).cast("int64")).group_by(["domain", "part", "day"])
    counted: dict[str, dict[str, dict[int, int]]] = {d: {p: {} for p in PARTS} for d in domains}
    for row in engine.rows(by_day.agg(n=ibis._.count()).order_by(["domain", "part", "day"])):
        counted[row["domain"]][row["part"]][row["day"]] = int(row["n"])
    return Events(counted)


def _overlap(engine: Engine, layout: Layout, corpora: Corpora) -> Iterator[str]:
    domains = sorted((*corpora.pretrain, *corpora.unseen))
    titled = engine.read(layout.titled_items)
    shared = {"users": count_shared(engine, engine.read(layout.interactions), "user_id", domains),
              "titles": count_shared(engine, titled.filter(titled.title_key.notnull()), "title_key", domains)}
    yield "## Users that domains share\n"
    yield from _table(("", *domains), ((d, *map(int, row)) for d, row in zip(domains, shared["users"], strict=True)))
    duplicates = count_duplicates(engine, layout)
    yield "## Titles that domains share\n"
    yield ("Different titles, normalised and (in brackets) exactly equal ones; on the diagonal those that several of "
           "the domain's items have. Before items with a title of an unseen domain were dropped; `duplicates.parquet` "
           "lists them.\n")
    cells = {pair: f"{n.normalised:,} ({n.exact:,})" for pair, n in duplicates.items()}
    yield from _table(("", *domains), ((d, *(cells.get((d, other), "0") for other in domains)) for d in domains))
    pictures.draw_overlap(domains, shared, _picture(layout, "overlap"))
    yield "![users and titles that domains share](report/overlap.png)\n"


def count_shared(engine: Engine, table: Table, key: str, domains: Sequence[str]) -> Matrix:
    """How many different values of `key` each two domains share (on the diagonal: one domain has); symmetric.

    One pass: a flag per domain for every value, then the sums of their products.
    """
    flags = {f"d{i}": (table.domain == d).cast("int8").max() for i, d in enumerate(domains)}
    of_key = table.group_by(key).agg(**flags)
    pairs = list(combinations_with_replacement(range(len(domains)), 2))
    products = {f"n_{i}_{j}": (of_key[f"d{i}"] * of_key[f"d{j}"]).cast("int64").sum() for i, j in pairs}
    (sums,) = engine.rows(of_key.agg(**products))
    shared = np.zeros((len(domains), len(domains)), np.int64)
    for i, j in pairs:
        shared[i, j] = shared[j, i] = sums[f"n_{i}_{j}"] or 0
    return shared


def _lengths(engine: Engine, layout: Layout, corpora: Corpora) -> Iterator[str]:
    lengths = {corpus: counted for corpus in corpora.all if (counted := count_lengths(engine, layout, corpus))}
    yield "## Histories\n"
    yield from _table(("corpus", "histories", "events", "shortest", "median", "mean", "longest"),
                      ((corpus, *_spread(counted)) for corpus, counted in lengths.items()))
    pictures.draw_lengths(lengths, _picture(layout, "histories"))
    yield "![lengths of histories per corpus](report/histories.png)\n"


def count_lengths(engine: Engine, layout: Layout, corpus: str) -> dict[int, int]:
    """Items -> how many histories of the corpus have so many, shortest first."""
    histories = engine.read(layout.histories(corpus))
    of_length = histories.mutate(n_items=histories["items"].length()).group_by("n_items").agg(n=ibis._.count())
    return {int(r["n_items"]): int(r["n"]) for r in engine.rows(of_length.order_by("n_items"))}


def _spread(counted: Mapping[int, int]) -> tuple[Any, ...]:
    """Histories, events, and shortest, (lower) median, mean and longest length of what `count_lengths` counted."""
    n_items, n = np.array(list(counted)), np.array(list(counted.values()))
    median = int(n_items[np.searchsorted(np.cumsum(n), (n.sum() + 1) // 2)])
    total = int((n_items * n).sum())
    return int(n.sum()), total, int(n_items[0]), median, f"{total / n.sum():.1f}", int(n_items[-1])


def _audited(path: Path) -> Iterator[str]:
    audits = {name: Audit.model_validate(a) for name, a in json.loads(path.read_text(encoding="utf-8")).items()}
    failed = [(name, check, finding) for name, a in audits.items() for check, finding in a.checks.items()
              if finding.startswith("FAILED")]
    yield "## The audit\n"
    yield (f"{'FAILED: do not train on this' if failed else 'Passed'}. Every finding is in `audit.json` and in the "
           f"corpora's manifests.\n")
    yield from _table(("corpus", "check", "finding"), failed)
    n_checked: dict[str, int] = {}
    for audit in audits.values():
        for check in audit.checks:
            n_checked[check] = n_checked.get(check, 0) + 1
    yield from _table(("check", "corpora looked at"), n_checked.items())


def _table(names: Sequence[str], rows: Any) -> Iterator[str]:
    """A Markdown table with numbers to the right and thousands parted; nothing when there are no rows."""
    rows = list(rows)
    if not rows:
        return
    yield f"| {' | '.join(names)} |"
    yield f"|{'|'.join('---:' if not isinstance(v, str) or v[:1].isdigit() else '---' for v in rows[0])}|"
    for row in rows:
        yield f"| {' | '.join(_cell(v) for v in row)} |"
    yield ""


def _cell(value: Any) -> str:
    if isinstance(value, str):  # a quoted line of a source may hold anything
        return " ".join(value.split()).replace("|", "\\|")
    return f"{value:,}"


def _picture(layout: Layout, name: str) -> Path:
    return layout.out / "report" / f"{name}.png"
