"""The numbers of a table: every arm's metrics with intervals, and paired differences to the arms it is held against.

reads: evaluation folders (`launch/rank.py`) and losses (`experiments.measure`). writes: nothing. costs: seconds per
table. Statistics are `cprec.eval.stats`: the unit is the user, seeds are the second level; the primary endpoint is
NDCG@10, macro over the table's domains. Holm's adjustment is over the primary endpoints of all tables, and separately
over the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from cprec.eval.answers import Evaluation, load_evaluation
from cprec.eval.stats import Observations, holm, mean_intervals, paired_differences, seed_deviations
from cprec.format import MANIFEST
from experiments.arms import Answers
from experiments.claims import Row, Table

METRICS = ("NDCG@10", "HR@10", "NLL")
"""The first is the primary endpoint. NLL: nats of the target's line."""
ALPHA = 0.05


@dataclass(frozen=True)
class Number:
    """A macro average with its 95 % interval over users and seeds."""

    mean: float
    low: float
    high: float
    seed_sd: float | None


@dataclass(frozen=True)
class Gap:
    """A row minus another: the same users, the same queries."""

    row: str
    against: str
    metric: str
    mean: float
    low: float
    high: float
    p: float
    p_holm: float = math.nan

    @property
    def verdict(self) -> str:
        """Of the primary endpoint, in a word."""
        if self.p_holm >= ALPHA:
            return "no difference shown"
        return "better" if (self.mean > 0) != (self.metric == "NLL") else "worse"


@dataclass(frozen=True)
class Result:
    """What became of one row."""

    label: str
    n_seeds: int
    n_queries: int
    tokens: int | None
    numbers: dict[str, Number]
    losses: dict[str, float]
    """Nats per token by corpus, over seeds."""
    x: float | None


@dataclass(frozen=True)
class Outcome:
    """A table with its numbers. `missing`: labels of rows that have not been run."""

    key: str
    claim: int
    title: str
    domains: tuple[str, ...]
    results: tuple[Result, ...]
    gaps: tuple[Gap, ...]
    missing: tuple[str, ...]
    x_label: str | None


def outcomes(tables: Sequence[Table]) -> list[Outcome]:
    """Every table, with what of it is finished."""
    found = [_outcome(t) for t in tables]
    gaps = [g for o in found for g in o.gaps]
    adjusted: dict[int, float] = {}
    for is_primary in (True, False):
        family = [g for g in gaps if (g.metric == METRICS[0]) is is_primary]
        adjusted |= zip(map(id, family), holm([g.p for g in family]), strict=True)
    return [replace(o, gaps=tuple(replace(g, p_holm=adjusted[id(g)]) for g in o.gaps)) for o in found]


def _outcome(table: Table) -> Outcome:
    there = {r.label: r for r in table.rows if _is_finished(r)}
    seen = {label: [observations(a, table.domains) for a in row.seeds] for label, row in there.items()}
    gaps = [gap for label, row in there.items() for other in row.against if other in there
            for gap in _gaps(label, other, seen[label], seen[other])]
    return Outcome(table.key, table.claim, table.title, table.domains,
                   tuple(_result(row, seen[label]) for label, row in there.items()), tuple(gaps),
                   tuple(r.label for r in table.rows if r.label not in there), table.x_label)


def _is_finished(row: Row) -> bool:
    folders = [f for a in row.seeds for f in a.folders]
    losses = [a.losses for a in row.seeds if a.losses]
    return all((Path(f) / MANIFEST).is_file() for f in folders) and all(Path(p).is_file() for p in losses)


def observations(answers: Answers, domains: Sequence[str]) -> Observations:
    """The metrics of all queries of the domains, (queries, metrics), out of the folders that together hold them."""
    evaluations = [_load(f) for f in answers.folders]
    parts = []
    for domain in domains:
        holder = next(e for e in evaluations if domain in e.domains)
        parts.append(holder.observations(METRICS, [domain]))
    return Observations(np.concatenate([p.values for p in parts]), [u for p in parts for u in p.users],
                        np.concatenate([np.full(len(p.values), i) for i, p in enumerate(parts)]))


@lru_cache(maxsize=256)
def _load(folder: str) -> Evaluation:
    return load_evaluation(folder)


def _defined(seeds: Sequence[Observations]) -> list[int]:
    """Columns that have a value for every query: baselines have no likelihood."""
    return [k for k in range(len(METRICS)) if not any(np.isnan(o.values[:, k]).any() for o in seeds)]


def _columns(seeds: Sequence[Observations], kept: Sequence[int]) -> list[Observations]:
    return [Observations(o.values[:, list(kept)], o.users, o.domains) for o in seeds]


def _result(row: Row, seeds: Sequence[Observations]) -> Result:
    kept = _defined(seeds)
    chosen = _columns(seeds, kept)
    deviations: Sequence[float | None] = seed_deviations(chosen) or [None] * len(kept)
    numbers = {METRICS[k]: Number(i.mean, i.low, i.high, sd)
               for k, i, sd in zip(kept, mean_intervals(chosen), deviations, strict=True)}
    losses = [json.loads(Path(a.losses).read_text(encoding="utf-8")) for a in row.seeds if a.losses]
    return Result(row.label, len(seeds), len(seeds[0].values), row.tokens, numbers,
                  {c: float(np.mean([m[c] for m in losses])) for c in losses[0]} if losses else {}, row.x)


def _gaps(label: str, other: str, a: Sequence[Observations], b: Sequence[Observations]) -> list[Gap]:
    kept = [k for k in _defined(a) if k in _defined(b)]
    if len(a) > 1 and len(b) > 1:  # one may have more seeds; the first ones are of the same seeds
        n = min(len(a), len(b))
        a, b = a[:n], b[:n]
    found = paired_differences(_columns(a, kept), _columns(b, kept))
    return [Gap(label, other, METRICS[k], d.mean, d.low, d.high, d.p) for k, d in zip(kept, found, strict=True)]
