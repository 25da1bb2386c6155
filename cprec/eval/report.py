"""The table of one or several evaluations: metrics per domain with intervals, macro averages, paired differences.

reads: finished evaluation folders of the same queries. writes: `report.md`, `report.json`. costs: 2,000 bootstrap
resamples per cell, a second or so for some thousands of users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from cprec.errors import DataError, did_you_mean
from cprec.eval.metrics import METRICS, TABLE_METRICS, Floats, chance_hit_rate
from cprec.eval.results import EvalManifest, read_evaluation
from cprec.eval.stats import Observations, mean_interval, paired_difference
from cprec.format import write_atomically

COMPARED = "NDCG@10"
MACRO_NAMES = {"pretrain": "pre-training domains (macro)", "unseen": "unseen domains (macro)"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Record):
    """One evaluated model or baseline: what it was, and what its evaluation counted over all domains."""

    name: str
    what: str
    dtype: str
    n_queries: int
    n_certified: int
    n_histories_cut: int
    """Prompts whose oldest items did not fit the model's context."""
    n_nodes: int
    """Trie prefixes put through the model."""
    seconds: float

    @property
    def line(self) -> str:
        """Itself in words."""
        if not self.dtype:
            return f"{self.name}: {self.what}, {self.n_queries} queries"
        return (f"{self.name}: {self.what}, {self.dtype}, {self.n_certified} of {self.n_queries} ranks certified, "
                f"{self.n_nodes / self.n_queries:.0f} trie prefixes and {self.seconds / self.n_queries:.2f} s a query, "
                f"{self.n_histories_cut} histories cut to the context")


class Row(_Record):
    """One line of the table: a domain, or the macro average over all of one kind."""

    name: str
    kind: Literal["pretrain", "unseen"]
    is_macro: bool
    domains: list[str]
    n_queries: int
    n_items: int
    """Catalogue size; summed in a macro row."""
    chance_hr10: float
    """Expected HR@10 of a random order of the candidates."""


class Cell(_Record):
    """One metric of one model in one row, with its 95 % interval over users."""

    row: str
    model: str
    metric: str
    mean: float
    low: float
    high: float


class Versus(_Record):
    """Difference of a model to the reference in one row, paired over users; `p` by sign-flip permutation."""

    row: str
    model: str
    reference: str
    metric: str
    mean: float
    low: float
    high: float
    p: float


class Report(_Record):
    """All numbers of a comparison, and how the queries were made. A model without a probability has no NLL cell."""

    models: list[Entry]
    regime: Literal["overlap", "disjoint"]
    target: Literal["first", "last"]
    seen: Literal["exclude", "include"]
    split: dict[str, int]
    split_hash: str
    limit: int | None
    rows: list[Row]
    cells: list[Cell]
    differences: list[Versus]


@dataclass(frozen=True)
class _Evaluation:
    manifest: EvalManifest
    tables: dict[str, pa.Table]

    def observations(self, row: Row, metric: str) -> Observations:
        """The metric's value of every query of the row's domains."""
        tables = [self.tables[d] for d in row.domains]
        values = [METRICS[metric](*(_floats(t, c) for c in ("rank", "n_candidates", "nll"))) for t in tables]
        users = [user for t in tables for user in t["user_id"].to_pylist()]
        return Observations(np.concatenate(values), users, np.repeat(np.arange(len(tables)), [len(t) for t in tables]))


def make_report(folders: Mapping[str, str | Path], *, reference: str | None = None) -> Report:
    """Report over evaluation folders by name; with `reference`, every other model's difference to that one.

    Raises DataError when the evaluations did not answer the same queries, or the reference is none of them.
    """
    evaluations = {name: _load(folder) for name, folder in folders.items()}
    _refuse_other_queries(folders, evaluations)
    if reference is not None and reference not in evaluations:
        raise DataError(f"reference {reference!r} is none of the models; {did_you_mean(reference, evaluations)}")
    first = next(iter(evaluations.values()))
    rows = _rows(first)
    cells = [cell for row in rows for name, e in evaluations.items() for metric in METRICS
             if (cell := _cell(row, name, metric, e)) is not None]
    others = [] if reference is None else [name for name in evaluations if name != reference]
    differences = [_versus(row, name, str(reference), evaluations) for row in rows for name in others]
    m = first.manifest
    return Report(models=[_entry(name, e.manifest) for name, e in evaluations.items()], regime=m.regime,
                  target=m.target, seen=m.seen, split=m.split, split_hash=m.split_hash, limit=m.inputs.limit,
                  rows=rows, cells=cells, differences=differences)


def write_report(report: Report, folder: str | Path) -> None:
    """Write `report.md` and `report.json` below `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(folder) / "report.json", report.model_dump_json(indent=1))
    write_atomically(Path(folder) / "report.md", to_markdown(report))


def short_name(manifest: EvalManifest) -> str:
    """What a table calls a model whose user gave no name: a baseline's name, or the end of its path."""
    baseline = manifest.inputs.model.removeprefix("baseline:")
    return baseline if baseline != manifest.inputs.model else "/".join(Path(baseline).parts[-2:])


def _entry(name: str, manifest: EvalManifest) -> Entry:
    domains = list(manifest.domains.values())
    return Entry(name=name, what=manifest.inputs.model, dtype=manifest.inputs.dtype,
                 n_queries=sum(d.n_queries for d in domains), n_certified=sum(d.n_certified for d in domains),
                 n_histories_cut=sum(d.n_histories_cut for d in domains), n_nodes=sum(d.n_nodes for d in domains),
                 seconds=sum(d.seconds for d in domains))


def _load(folder: str | Path) -> _Evaluation:
    manifest = read_evaluation(folder)
    tables = {d: pq.read_table(Path(folder) / f"{d}.parquet", partitioning=None) for d in manifest.domains}
    return _Evaluation(manifest, tables)


def _refuse_other_queries(folders: Mapping[str, str | Path], evaluations: Mapping[str, _Evaluation]) -> None:
    names = list(evaluations)
    for name in names[1:]:
        a, b = (evaluations[n].manifest.inputs for n in (names[0], name))
        for field in ("queries_hash", "domains", "limit"):
            if getattr(a, field) != getattr(b, field):
                raise DataError(f"{folders[names[0]]} and {folders[name]} answered different queries: {field} is "
                                f"{getattr(a, field)} and {getattr(b, field)}; evaluate both on the same folder")


def _rows(evaluation: _Evaluation) -> list[Row]:
    """Every domain of a kind, then the kind's macro average; pre-training domains first."""
    summaries, rows = evaluation.manifest.domains, []
    for kind in MACRO_NAMES:
        domains = [d for d, s in summaries.items() if s.kind == kind]
        rows += [_row(evaluation, d, [d]) for d in domains]
        if len(domains) > 1:
            rows.append(_row(evaluation, MACRO_NAMES[kind], domains))
    return rows


def _row(evaluation: _Evaluation, name: str, domains: list[str]) -> Row:
    summaries = [evaluation.manifest.domains[d] for d in domains]
    chance = [chance_hit_rate(_floats(evaluation.tables[d], "n_candidates")) for d in domains]
    return Row(name=name, kind=summaries[0].kind, is_macro=len(domains) > 1, domains=domains,
               n_queries=sum(s.n_queries for s in summaries), n_items=sum(s.n_items for s in summaries),
               chance_hr10=float(np.mean(chance)))


def _cell(row: Row, name: str, metric: str, evaluation: _Evaluation) -> Cell | None:
    observed = evaluation.observations(row, metric)
    if np.isnan(observed.values).any():
        return None
    i = mean_interval(observed)
    return Cell(row=row.name, model=name, metric=metric, mean=i.mean, low=i.low, high=i.high)


def _versus(row: Row, name: str, reference: str, evaluations: Mapping[str, _Evaluation]) -> Versus:
    a, b = (evaluations[n].observations(row, COMPARED) for n in (name, reference))
    d = paired_difference(a, b)
    return Versus(row=row.name, model=name, reference=reference, metric=COMPARED, mean=d.mean, low=d.low, high=d.high,
                  p=d.p)


def _floats(table: pa.Table, column: str) -> Floats:
    """A numeric column as float64, null as NaN."""
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


def to_markdown(report: Report) -> str:
    """The report as Markdown: how it was made, one table per metric, the differences."""
    lines = ["# Ranking", "", *_conditions(report), "", *(f"- {e.line}" for e in report.models)]
    for metric in TABLE_METRICS:
        header, *body = _table(report, metric)
        lines += ["", f"## {metric}", "", f"{_explained(metric)}.", "", _line(header),
                  f"|---|{'---:|' * (len(header) - 1)}", *map(_line, body)]
    if report.differences:
        lines += ["", f"## Difference in {COMPARED} to {report.differences[0].reference}", "",
                  "Paired over users; p: sign-flip permutation, two-sided, not corrected for the number of rows.", "",
                  "| domain | model | difference | p |", "|---|---|---:|---:|"]
        lines += [f"| {d.row} | {d.model} | {_signed(d)} | {d.p:.4f} |" for d in report.differences]
    return "\n".join(lines) + "\n"


def to_text(report: Report) -> str:
    """The report for a terminal: one aligned table per metric, and the differences in the macro averages."""
    blocks = [*_conditions(report), *(e.line for e in report.models)]
    for metric in TABLE_METRICS:
        table = _table(report, metric)
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        blocks += ["", f"{metric}: {_explained(metric)}"]
        blocks += ["  ".join([name.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))])
                   for name, *rest in table]
    macros = {row.name for row in report.rows if row.is_macro}
    blocks += ["", *(f"{d.row}: {d.model} against {d.reference} in {d.metric}: {_signed(d)}, p={d.p:.4f}"
                     for d in report.differences if d.row in macros)]
    return "\n".join(blocks).rstrip()


def _table(report: Report, metric: str) -> list[list[str]]:
    """Header and rows of one metric: a domain a line, a model a column."""
    cells = {(c.row, c.model): c for c in report.cells if c.metric == metric}
    table = [["domain", "queries", "items", "chance HR@10", *(e.name for e in report.models)]]
    for row in report.rows:
        table.append([row.name, str(row.n_queries), str(row.n_items), f"{row.chance_hr10:.4f}",
                      *(_with_interval(cells.get((row.name, e.name)), metric) for e in report.models)])
    return table


def _explained(metric: str) -> str:
    what = "nats per item, lower is better" if metric == "NLL" else "higher is better"
    return f"mean with its 95 % bootstrap interval over users; {what}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _signed(d: Versus) -> str:
    return f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


def _conditions(report: Report) -> list[str]:
    target = {"first": "first event after the test clock", "last": "last event"}[report.target]
    seen = {"exclude": "items seen before are no candidates", "include": "items seen before are candidates"}
    regime = {"overlap": "users may occur in the training window (never after its clock)",
              "disjoint": "users of unseen domains' queries occur in no training corpus"}
    limited = "" if report.limit is None else f" Only the first {report.limit} queries of each domain."
    return [f"Full catalogue, exact likelihood ranks, ties count half. Target: {target}; {seen[report.seen]}; "
            f"{regime[report.regime]}. Clock: validation from {report.split['t_valid']} ms, test from "
            f"{report.split['t_test']} ms (split {report.split_hash[:8]}).{limited}"]


def _with_interval(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return "-"
    digits = 3 if metric == "NLL" else 4
    return f"{cell.mean:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
