"""A comparison for people: Markdown, JSON, one self-contained HTML page, pictures; and as text for a terminal.

reads: nothing. writes: `report.md`, `report.json`, `report.html`, and beside them `metrics.png` and, where models are
held against a reference, `differences.png`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from cprec.eval.comparison import COMPARED, Cell, Report, Row, Versus
from cprec.eval.metrics import LOWER_IS_BETTER, METRICS, TABLE_METRICS
from cprec.format import write_atomically
from cprec.plots import Mark, plot_marks

DIGITS = {"NLL": 3, "bits/byte": 3, "ARP@10": 1}
"""Places behind the point; 4 for all others."""
OTHER_METRICS = tuple(m for m in METRICS if m not in TABLE_METRICS)
SLICED = "NDCG@10"
PICTURED = ("HR@10", "NDCG@10")
METRICS_PICTURE, DIFFERENCES_PICTURE = "metrics.png", "differences.png"
STYLE = ("body{font:15px/1.45 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}table{border-collapse:collapse;"
         "font-size:13px}td,th{border:1px solid #ccc;padding:.2em .6em}tr:nth-child(even){background:#f6f6f6}")


def write_report(report: Report, folder: str | Path) -> None:
    """Write the report's files below `folder`."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    _draw(report, out)
    markdown = to_markdown(report)
    write_atomically(out / "report.json", report.model_dump_json(indent=1))
    write_atomically(out / "report.html", to_html(markdown, [out / METRICS_PICTURE, out / DIFFERENCES_PICTURE]))
    write_atomically(out / "report.md", markdown)


def to_markdown(report: Report) -> str:
    """The report as Markdown: how it was made, a table per metric, slices, differences. It names the pictures."""
    lines = ["# Ranking", "", _conditions(report), "", *(f"- {e.line}" for e in report.models)]
    if any(c.metric in PICTURED for c in report.cells):
        lines += ["", f"![{' and '.join(PICTURED)} with their intervals]({METRICS_PICTURE})"]
    for metric in TABLE_METRICS:
        lines += ["", f"## {metric}", "", f"{_explained(metric)}.", "", *_as_table(_table(report, report.rows, metric))]
    lines += ["", "## Other measures", "", _OTHERS, "", *_as_table(_others(report))]
    if report.slices:
        lines += ["", f"## {SLICED} by slice", "", f"{_explained(SLICED)}. Head: the most bought items that make up "
                  "half of the training events; cold: first seen after the training window.", "",
                  *_as_table(_table(report, report.slices, SLICED))]
    if report.differences:
        lines += ["", f"## Differences to {report.differences[0].reference}", "", _TESTS, "",
                  f"![differences in {COMPARED[0]} with their intervals]({DIFFERENCES_PICTURE})", "",
                  *_as_table(_differences(report.differences))]
    return "\n".join(lines) + "\n"


def to_html(markdown: str, pictures: Iterable[Path]) -> str:
    """The Markdown, which begins with its title, as one page with those of the pictures that there are inside it. Names
    are text, whatever they hold."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for picture in pictures:
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            body = body.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{data}"')
    title = html.escape(markdown.partition("\n")[0].removeprefix("# "))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
            f"</head><body>\n{body}</body></html>\n")


def to_text(report: Report) -> str:
    """The report for a terminal: one aligned table per metric, and the differences in the macro averages."""
    blocks = [_conditions(report), *(e.line for e in report.models)]
    for metric in TABLE_METRICS:
        table = _table(report, report.rows, metric)
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        blocks += ["", f"{metric}: {_explained(metric)}"]
        blocks += ["  ".join([name.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))])
                   for name, *rest in table]
    macros = {row.name for row in report.rows if row.is_macro}
    blocks += ["", *(f"{d.row}: {d.model} against {d.reference} in {d.metric}: {_signed(d)}, p={d.p:.4f}, Holm "
                     f"{d.p_holm:.4f}{', primary' if d.is_primary else ''}"
                     for d in report.differences if d.row in macros or d.is_primary)]
    return "\n".join(blocks).rstrip()


def _draw(report: Report, out: Path) -> None:
    shown = [row for row in report.rows if row.is_macro] or report.rows
    panels, chance = {}, {}
    for row in shown:
        for metric in PICTURED:
            title = f"{metric}, {row.name}\n{row.n_users} users, {row.n_items} items"
            marks = [Mark(c.model, c.mean, c.low, c.high) for c in _cells_of(report, row, metric)]
            if marks:
                panels[title] = marks
            if metric == "HR@10":
                chance[title] = row.chance_hr10
    if panels:
        plot_marks(panels, out / METRICS_PICTURE, lines=chance)
    compared = [d for d in report.differences if d.metric == COMPARED[0]]
    if compared:
        names = dict.fromkeys(d.model for d in compared)
        by_model = {f"{n} - {compared[0].reference}, {COMPARED[0]}": [
            Mark(d.row, d.mean, d.low, d.high) for d in compared if d.model == n] for n in names}
        plot_marks(by_model, out / DIFFERENCES_PICTURE, lines=dict.fromkeys(by_model, 0.0))


def _cells_of(report: Report, row: Row, metric: str) -> list[Cell]:
    return [c for c in report.cells if c.row == row.name and c.metric == metric]


def _table(report: Report, rows: Iterable[Row], metric: str) -> list[list[str]]:
    """Header and rows of one metric: a domain or slice a line, a model a column."""
    table = [["domain", "queries", "items", "users", "chance HR@10", *(e.name for e in report.models)]]
    for row in rows:
        cells = {c.model: c for c in _cells_of(report, row, metric)}
        table.append([row.name, str(row.n_queries), str(row.n_items), str(row.n_users), f"{row.chance_hr10:.4f}",
                      *(_with_interval(cells.get(e.name)) for e in report.models)])
    return table


_OTHERS = (
    "Means; - where a measure is not defined for all answers. AUC: share of the other candidates that the target "
    "beats; none where ranks are infinite. bits/byte: of the target's line, whatever the tokenizer. ARP@10: training "
    "events of the ten best items. valid: generated texts that are lines of the catalogue as they stand, 1 by "
    "construction where lines are ranked. coverage: share of the catalogue in somebody's ten best.")


def _others(report: Report) -> list[list[str]]:
    """Header and rows of what is not in a table of its own: a model of a domain a line."""
    covered = {(c.row, c.model): c.share for c in report.coverage}
    table = [["domain", "queries", "items", "users", "model", *OTHER_METRICS, "coverage"]]
    for row in report.rows:
        for entry in report.models:
            cells = {c.metric: c for c in report.cells if (c.row, c.model) == (row.name, entry.name)}
            table.append([row.name, str(row.n_queries), str(row.n_items), str(row.n_users), entry.name,
                          *(_rounded(m, cells[m].mean) if m in cells else "-" for m in OTHER_METRICS),
                          f"{covered[row.name, entry.name]:.4f}" if (row.name, entry.name) in covered else "-"])
    return table


_TESTS = (
    "Paired over users (and over seeds, where there are several): mean with its 95 % bootstrap interval; p of a "
    "two-sided sign-flip permutation over users; Holm's adjustment over the primary endpoint's comparisons, and over "
    "all others; McNemar's exact p of hits, with one query a user and one seed: not adjusted.")


def _differences(differences: Sequence[Versus]) -> list[list[str]]:
    table = [["domain", "metric", "model", "difference", "p", "Holm", "McNemar", "endpoint"]]
    for d in differences:
        table.append([d.row, d.metric, d.model, _signed(d), f"{d.p:.4f}", f"{d.p_holm:.4f}",
                      "-" if d.p_mcnemar is None else f"{d.p_mcnemar:.4f}", "primary" if d.is_primary else "secondary"])
    return table


def _as_table(table: Sequence[Sequence[str]]) -> list[str]:
    header, *body = (f"| {' | '.join(cells)} |" for cells in table)
    return [header, f"|---|{'---:|' * (len(table[0]) - 1)}", *body]


def _explained(metric: str) -> str:
    unit = "nats per item, " if metric == "NLL" else ""
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    return f"mean with its 95 % bootstrap interval over users; {unit}{better} is better"


def _signed(d: Versus) -> str:
    return f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


def _conditions(report: Report) -> str:
    target = {"first": "first event after the test clock", "last": "last event", "successive": "every event after the "
              "test clock, one after the other", "leave_one_out": "every user's last event, which LEAKS: training "
              "corpora hold later events, and the last ones of users who were quiet after the clock"}[report.target]
    seen = {"exclude": "items seen before are no candidates", "include": "items seen before are candidates"}
    regime = {"overlap": "users may occur in the training window (never after its clock)",
              "disjoint": "users of unseen domains' queries occur in no training corpus"}
    limited = "" if report.limit is None else f" Only the first {report.limit} queries of each domain."
    orders = "" if report.n_query_sets == 1 else f" {report.n_query_sets} orders of tied events, a seed each."
    power = "; ".join(f"{row.name}: {row.detectable_hr10:.4f}" for row in report.rows)
    how = "Full catalogue, exact ranks" if report.protocol == "full" else f"Protocol {report.protocol}"
    warm = "" if report.items == "all" else "; only items of the training window are candidates"
    return (f"{how}, ties count half. Target: {target}; {seen[report.seen]}{warm}; "
            f"{regime[report.regime]}. Clock: validation from {report.split['t_valid']} ms, test from "
            f"{report.split['t_test']} ms (split {report.split_hash[:8]}).{limited}{orders} Detectable difference in "
            f"HR@10 (80 % power, 8 % of users discordant): {power}.")


def _with_interval(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = "" if cell.seed_sd is None else f" (sd {_rounded(cell.metric, cell.seed_sd)})"
    low, high = (_rounded(cell.metric, x) for x in (cell.low, cell.high))
    return f"{_rounded(cell.metric, cell.mean)} [{low}, {high}]{spread}"


def _rounded(metric: str, value: float) -> str:
    return f"{value:.{DIGITS.get(metric, 4)}f}"
