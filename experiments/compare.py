"""The numbers of a table: every arm's metrics with intervals, and paired differences to the arms it is held against.

reads: evaluation folders (`launch/rank.py`) and losses (`experiments.measure`). writes: nothing. costs: seconds per
table. Statistics are `cprec.eval.stats`: the unit is the user, seeds are the second level; the primary endpoint is
NDCG@10, macro over the table's domains. Holm's adjustment is over the comparisons that decide claims, for each metric
by itself, those that are not run yet included; what explores keeps its plain p.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from cprec.errors import n_of
from cprec.eval.answers import Evaluation, load_evaluation
from cprec.eval.metrics import LOWER_IS_BETTER
from cprec.eval.stats import Observations, holm, mean_intervals, paired_differences, seed_deviations
from cprec.format import MANIFEST
from experiments.arms import Answers
from experiments.claims import BASELINE, Deciding, Row, Table

METRICS = ("NDCG@10", "HR@10", "NLL", "bits/byte")
"""The first is the primary endpoint. NLL: nats of the target's line."""
PRIMARY = METRICS[0]
OF_LIKELIHOOD = {"NLL", "bits/byte"}
"""What baselines do not have."""
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
    n_seeds: int
    """Trainings that the comparison rests on: pairs, or those of the one side that is trained."""
    p_holm: float = math.nan
    """Of a comparison that decides a claim; NaN for others."""

    @property
    def verdict(self) -> str:
        """Of a comparison that decides a claim, in a word. P is about users, for the seeds that were trained, and the
        interval about both; there is none about other seeds where there was one."""
        if not self.p_holm < ALPHA or self.low <= 0 <= self.high:
            return "no difference shown"
        if self.n_seeds < 2:
            return "of one seed"
        return "better" if (self.mean > 0) != (self.metric in LOWER_IS_BETTER) else "worse"

    def turned(self) -> Gap:
        """The other minus the row."""
        return replace(self, row=self.against, against=self.row, mean=-self.mean, low=-self.high, high=-self.low)


@dataclass(frozen=True)
class Result:
    """What became of one row."""

    label: str
    n_seeds: int
    n_queries: int
    tokens: int | None
    numbers: dict[str, Number]
    by_domain: dict[str, dict[str, float]]
    """Domain -> metric -> its mean over queries and seeds."""
    losses: dict[str, float]
    """Nats per token by corpus, over seeds."""
    x: float | None


@dataclass(frozen=True)
class Outcome:
    """A table with its numbers. `missing`: rows, or seeds of them, that have not been run."""

    key: str
    claim: int
    title: str
    domains: tuple[str, ...]
    results: tuple[Result, ...]
    gaps: tuple[Gap, ...]
    missing: tuple[str, ...]
    x_label: str | None


def outcomes(tables: Sequence[Table], deciding: Sequence[Deciding]) -> list[Outcome]:
    """Every table, with what of it is finished."""
    found = [_outcome(t) for t in tables]
    rows = {(d.table, frozenset((d.better, d.than))) for d in deciding}
    family = [g for o in found for g in o.gaps if (o.key, frozenset((g.row, g.against))) in rows]
    adjusted: dict[int, float] = {}
    for metric in METRICS:
        of_metric = [g for g in family if g.metric == metric]
        planned = sum(metric not in OF_LIKELIHOOD or not d.than.startswith(BASELINE) for d in deciding)
        ps = [g.p for g in of_metric] + [1.0] * (planned - len(of_metric))
        adjusted |= zip(map(id, of_metric), holm(ps), strict=False)
    return [replace(o, gaps=tuple(replace(g, p_holm=adjusted.get(id(g), math.nan)) for g in o.gaps)) for o in found]


def decided(found: Sequence[Outcome], asked: Deciding) -> dict[str, Gap]:
    """The gaps of a comparison by metric, as what the claim says is better minus the other; empty: not run."""
    rows = {asked.better, asked.than}
    gaps = [g for o in found if o.key == asked.table for g in o.gaps if {g.row, g.against} == rows]
    return {g.metric: g if g.row == asked.better else g.turned() for g in gaps}


def _outcome(table: Table) -> Outcome:
    seen = {r.label: {i: observations(a, table.domains) for i, a in enumerate(r.seeds) if _is_finished(a)}
            for r in table.rows}
    there = {r.label: r for r in table.rows if seen[r.label]}
    gaps = [gap for label, row in there.items() for other in row.against if other in there
            for gap in _gaps(row, there[other], seen[label], seen[other])]
    return Outcome(table.key, table.claim, table.title, table.domains,
                   tuple(_result(row, seen[label], table.domains) for label, row in there.items()), tuple(gaps),
                   tuple(_unfinished(r, len(seen[r.label])) for r in table.rows if len(seen[r.label]) < len(r.seeds)),
                   table.x_label)


def _is_finished(answers: Answers) -> bool:
    return all((Path(f) / MANIFEST).is_file() for f in answers.folders) and (
        answers.losses is None or Path(answers.losses).is_file())


def _unfinished(row: Row, n_done: int) -> str:
    return f"{row.label}, {len(row.seeds) - n_done} of {n_of(len(row.seeds), 'seed')}" if n_done else row.label


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


def _result(row: Row, seeds: Mapping[int, Observations], domains: Sequence[str]) -> Result:
    """The row over those of its seeds that are finished, by their numbers."""
    of = list(seeds.values())
    kept = _defined(of)
    chosen = _columns(of, kept)
    deviations: Sequence[float | None] = seed_deviations(chosen) or [None] * len(kept)
    numbers = {METRICS[k]: Number(i.mean, i.low, i.high, sd)
               for k, i, sd in zip(kept, mean_intervals(chosen), deviations, strict=True)}
    by_domain = {domain: {METRICS[k]: float(np.mean([o.values[o.domains == i, k] for o in of])) for k in kept}
                 for i, domain in enumerate(domains)}
    losses = [json.loads(Path(path).read_text(encoding="utf-8")) for i in seeds if (path := row.seeds[i].losses)]
    return Result(row.label, len(of), len(of[0].values), row.tokens, numbers, by_domain,
                  {c: float(np.mean([m[c] for m in losses])) for c in losses[0]} if losses else {}, row.x)


def _gaps(row: Row, other: Row, a: Mapping[int, Observations], b: Mapping[int, Observations]) -> list[Gap]:
    """Seed by seed, those that both have, if any; what is the same whatever the seed against every one."""
    both = sorted(a.keys() & b.keys())
    of_a = list(a.values()) if row.is_fixed or other.is_fixed else [a[i] for i in both]
    of_b = list(b.values()) if row.is_fixed or other.is_fixed else [b[i] for i in both]
    if not of_a:
        return []
    kept = [k for k in _defined(of_a) if k in _defined(of_b)]
    found = paired_differences(_columns(of_a, kept), _columns(of_b, kept))
    return [Gap(row.label, other.label, METRICS[k], d.mean, d.low, d.high, d.p, max(len(of_a), len(of_b)))
            for k, d in zip(kept, found, strict=True)]
