"""A family of runs side by side: its tree, what differs, losses per domain, ranking with paired intervals, one picture.

reads: run folders and, where there are any, evaluations in `run/eval/`. writes: `compare.md`, `compare.html` (all
in one file) and `compare.png`. Costs: the bootstraps of the ranking report, a second or so per evaluation. Works on
runs that have not finished or not begun, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cprec.errors import DataError
from cprec.eval.comparison import make_report
from cprec.eval.report import to_html, to_markdown
from cprec.eval.results import ASKED, INPUTS, EvalManifest, read_evaluation
from cprec.format import MANIFEST, write_atomically
from cprec.plots import FamilyLine, plot_family
from cprec.train.family import Member, find_family, is_control_of
from cprec.train.run_folder import flatten

PICTURE = "compare.png"
OF_ITSELF = ("run_dir", "parent", "schedule.returns", "schedule.total")
"""Settings that always differ between members of a family; the tree tells them."""


def compare(folders: Sequence[Path], out: Path) -> str:
    """Write the comparison of the runs in `folders` and of their families into `out`; its Markdown.

    Raises CheckpointError for a folder that is no run.
    """
    members = find_family(folders)
    out.mkdir(parents=True, exist_ok=True)
    plot_family([_line(m, members) for m in members], out / PICTURE)
    text = to_text(members)
    write_atomically(out / "compare.md", text)
    write_atomically(out / "compare.html", to_html(text, [out / PICTURE]))
    return text


@dataclass(frozen=True)
class Summary:
    """A run of the family for a script: how far it is, where it came from, its last validation loss."""

    name: str
    folder: str
    parent: str | None
    first_step: int
    step: int
    last_step: int
    what: str
    validated_at: int | None
    valid_loss: float | None
    valid_loss_by_corpus: dict[str, float]
    evaluations: list[str]


def summarize(folders: Sequence[Path]) -> list[Summary]:
    """The runs in `folders` and their families, parents first. Raises CheckpointError for a folder that is no run."""
    return [_summary(m) for m in find_family(folders)]


def _summary(m: Member) -> Summary:
    valid = m.validation_at() or {"step": None, "loss": None, "loss_by_corpus": {}}
    done = [str(folder) for folder, found in _evaluations(m) if not isinstance(found, str)]
    return Summary(m.name, str(m.folder), str(m.parent) if m.parent else None, m.first_step, m.step,
                   m.schedule.total_steps, m.what, valid["step"], valid["loss"], valid["loss_by_corpus"], done)


def to_text(members: Sequence[Member]) -> str:
    """The comparison as Markdown."""
    title = f"# {members[0].name} and its family" if len(members) > 1 else f"# {members[0].name}"
    notes = [f"- {m.name}: {note}" for m in members for note in m.notes]
    return "\n".join([title, "", "```", *tree_lines(members), "```", "", *notes, *([""] if notes else []),
                      f"![the tree of runs, learning rates, losses]({PICTURE})", "", *_settings(members),
                      *_losses(members), "## Ranking", "", *ranking_lines(members)]) + "\n"


def tree_lines(members: Sequence[Member]) -> list[str]:
    """The tree of the runs, a line each: name, fork, what it does, how far it has come."""
    by_folder = {m.folder: m for m in members}
    children: dict[Path | None, list[Member]] = {}
    for m in members:
        children.setdefault(m.parent if m.parent in by_folder else None, []).append(m)

    def lines(m: Member, before: str, own: str) -> Iterator[tuple[str, str]]:
        fork = f"at step {m.first_step:,}: " if m.config.parent else ""
        yield own + m.name, f"{fork}{m.what}; {m.state}"
        below = children.get(m.folder, [])
        for i, child in enumerate(below):
            last = i == len(below) - 1
            yield from lines(child, before + ("   " if last else "│  "), before + ("└─ " if last else "├─ "))

    rows = [row for root in children.get(None, []) for row in lines(root, "", "")]
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {rest}" for name, rest in rows]


def _line(m: Member, members: Sequence[Member]) -> FamilyLine:
    """The run as it is drawn; a branch's curves begin with its parent's last points, so that they leave it."""
    parent = next((p for p in members if p.folder == m.parent), None)
    before = [r for r in parent.records if r["step"] <= m.first_step] if parent else []
    of_kind = {kind: [*[r for r in before if r["kind"] == kind][-1:], *(r for r in m.records if r["kind"] == kind)]
               for kind in ("train", "valid")}
    return FamilyLine(
        m.name, parent.name if parent else None, m.first_step, m.step, m.schedule.total_steps,
        [(r["step"], r["lr"]) for r in of_kind["train"]], [(r["step"], r["loss"]) for r in of_kind["train"]],
        [(r["step"], r["loss"]) for r in of_kind["valid"]])


def _settings(members: Sequence[Member]) -> list[str]:
    flat = [flatten(m.config.model_dump(mode="json")) for m in members]
    keys = sorted({k for f in flat for k in f if not any(k == o or k.startswith(f"{o}.") for o in OF_ITSELF)})
    differing = [k for k in keys if len({repr(f.get(k)) for f in flat}) > 1]
    if not differing:
        return []
    rows = [[f"`{k}`", *(_value(f.get(k)) for f in flat)] for k in differing]
    return ["## Settings that differ", "", *_table(["setting", *(m.name for m in members)], rows), ""]


def _losses(members: Sequence[Member]) -> list[str]:
    """Last validation losses; the change of each branch since its fork and against its control."""
    last = {m.name: r for m in members if (r := m.validation_at())}
    lines = ["## Validation loss", "", "Nats per predicted token, per validation corpus."]
    without = [m.name for m in members if m.name not in last]
    if without:
        lines[-1] += f" Nothing measured yet: {', '.join(without)}."
    if not last:
        return [*lines, ""]
    corpora = sorted({c for r in last.values() for c in r["loss_by_corpus"]})
    header = ["run", "step", "all", *(c.removeprefix("valid/") for c in corpora)]
    lines += ["", *_table(header, [[name, f"{r['step']:,}", *_numbers(r, corpora, "{:.4f}")] for name, r in
                                   last.items()]), ""]
    since = [(m, p, last[m.name], r) for m in members for p in members if p.folder == m.parent and m.name in last
             and (r := p.validation_at(m.first_step))]
    against = [(m, c, last[m.name], last[c.name]) for m in members for c in members
               if is_control_of(c, m) and m.name in last and c.name in last and
               last[m.name]["step"] == last[c.name]["step"]]
    for title, pairs in (("since its fork", since), ("against its control, the same annealing on the trunk's mixture",
                                                     against)):
        if pairs:
            rows = [[m.name, f"{of.name} at {b['step']:,}", *_numbers(_minus(a, b), corpora, "{:+.4f}")]
                    for m, of, a, b in pairs]
            lines += [f"Change {title} (negative: better):", "", *_table(["run", "to", *header[2:]], rows), ""]
    return [*lines, "The same rows for all, but a run logs their sums only: no interval can be given here. Ranking has "
                    "intervals, over users.", ""]


def ranking_lines(members: Sequence[Member]) -> list[str]:
    """Reports over the members' evaluations, as Markdown, one for all that answer the same queries by the same
    protocol."""
    groups: dict[str, dict[str, Path]] = {}
    lines: list[str] = []
    for m in members:
        for folder, manifest in _evaluations(m):
            if isinstance(manifest, str):
                lines += [f"- {m.name}: {manifest}", ""]
                continue
            i = manifest.inputs
            group = groups.setdefault(str([i.queries_hash, *(getattr(i, field) for field in ASKED)]), {})
            group[m.name if m.name not in group else f"{m.name}/{folder.name}"] = folder
    if not groups:
        return [*lines, "No run has a finished evaluation in `eval/`; make one with `launch/export.py` and "
                        "`launch/rank.py --out RUN/eval`.", ""]
    for group in groups.values():
        lines += _report(members, group)
    return lines


def _report(members: Sequence[Member], group: dict[str, Path]) -> list[str]:
    """The ranking report over evaluations by name; differences to the first that has no control among them, and those
    of each other branch to its control."""
    pairs = [(c.name, m.name) for m in members for c in members
             if is_control_of(c, m) and m.name in group and c.name in group]
    first = next(name for name in group if name not in {branch for _, branch in pairs})
    text = _below(to_markdown(make_report(group, reference=first if len(group) > 1 else None)))
    lines = [text.removeprefix("# Ranking\n\n")]
    for control, branch in pairs:
        if control != first:
            two = make_report({n: group[n] for n in (control, branch)}, reference=control)
            _, title, differences = _below(to_markdown(two)).partition("### Difference")
            lines += [title + differences]
    return lines


def _below(text: str) -> str:
    """A report's sections as sections of ours, without its pictures, which are not drawn here."""
    return re.sub(r"!\[[^]]*\]\([^)]*\)\n\n?", "", text).replace("\n## ", "\n### ")


def _evaluations(m: Member) -> Iterator[tuple[Path, EvalManifest | str]]:
    """Evaluations in the run's folder: `eval/`, or folders in it; in place of an unfinished one what is the matter."""
    for folder in [m.folder / "eval", *sorted((m.folder / "eval").glob("*/"))]:
        if (folder / INPUTS).is_file() or (folder / MANIFEST).is_file():
            try:
                yield folder, read_evaluation(folder)
            except DataError as e:
                yield folder, str(e)


def _minus(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = {*a["loss_by_corpus"]} & {*b["loss_by_corpus"]}
    return {"loss": a["loss"] - b["loss"],
            "loss_by_corpus": {c: a["loss_by_corpus"][c] - b["loss_by_corpus"][c] for c in both}}


def _numbers(record: dict[str, Any], corpora: Sequence[str], form: str) -> list[str]:
    by_corpus = record["loss_by_corpus"]
    return [form.format(record["loss"]), *(form.format(by_corpus[c]) if c in by_corpus else "-" for c in corpora)]


def _value(value: Any) -> str:
    return "-" if value is None else f"`{value}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
