"""The report of a form: JSON per table, Markdown, pictures; every number with model, tokens, seeds, device and commit.

    python -m experiments.report --form cpu --world amazon --work work/experiments/cpu [--publish]

reads: what `experiments/run.py` left in the work folder, finished or not. writes: `<work>/report/`; with `--publish`
also `experiments/results/<form>/` and the form's part of docs/experiments.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from cprec import cli
from cprec.errors import DataError, n_of
from cprec.format import write_atomically
from cprec.plots import Mark, plot_curves, plot_marks
from experiments.arms import Line
from experiments.claims import (
    BASE,
    CONSTANT,
    CONSTANT_TUNED,
    COSINE,
    CPREC,
    MIXED,
    SPECIFIC,
    TITLES,
    TUNED,
    TUNED_BASE,
    tables,
)
from experiments.compare import METRICS, Gap, Number, Outcome, Result, outcomes
from experiments.forms import load_form, load_world
from experiments.steps import REPO, device, recorded

CLAIMS = {1: "Continual pre-training helps", 2: "All domains help", 3: "Warmup-Stable-Annealing helps",
          4: "It scales", 5: "Plain text is not forgotten"}
TEXT = "replay/held_out"
DIGITS = {"NDCG@10": ".4f", "HR@10": ".4f", "NLL": ".1f"}
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "duckdb")
DOCS = REPO / "docs/experiments.md"
DECIDING = ((1, "zero_shot", CPREC, BASE), (1, "shots", TUNED, TUNED_BASE), (2, "corpora", SPECIFIC, CPREC),
            (2, "corpora", MIXED, CPREC), (2, "corpora", TITLES, CPREC), (3, "schedules", COSINE, CPREC),
            (3, "schedules", CONSTANT, CPREC), (3, "schedules_tuned", CONSTANT_TUNED, TUNED))
"""Of each claim, the comparisons that a summary shows: table, row, what it is held against."""


@dataclass(frozen=True)
class About:
    """What was run, on what: it goes with every number."""

    form: str
    model: str
    world: str
    tokens: int
    """Of pre-training, per arm."""
    seeds: int
    headline_seeds: int
    device: str
    versions: dict[str, str]
    commits: list[str]
    n_done: int
    n_steps: int
    step_minutes: float
    """Summed over the steps that are done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", required=True)
    parser.add_argument("--world", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of claims; default: all")
    parser.add_argument("--publish", action="store_true")
    args = parser.parse_args()
    world, form = load_world(None, args.world), load_form(args.form)
    line = Line(args.form, form, args.world, world, None, args.work)
    found = outcomes([t for t in tables(line) if not args.only or t.claim in args.only])
    out = args.work / "report"
    write_report(found, line, out)
    print((out / "report.md").read_text(encoding="utf-8"))
    if args.publish:
        publish(out, args.form)


def write_report(found: Sequence[Outcome], line: Line, out: Path) -> None:
    """`report.md`, `<table>.json`, `about.json` and pictures. Raises DataError when nothing has been run."""
    if not any(o.results for o in found):
        raise DataError(f"{line.work} holds no finished evaluation; run experiments/run.py first")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    about = _about(line)
    write_atomically(out / "about.json", json.dumps(asdict(about), indent=1) + "\n")
    write_atomically(out / "summary.md", summary(found, about) + "\n")
    for outcome in found:
        write_atomically(out / f"{outcome.key}.json", json.dumps(_without_nan(asdict(outcome)), indent=1) + "\n")
    shown = [_picture(o, out) for o in found]
    parts = [_heading(line, about)]
    for claim, title in CLAIMS.items():
        of_claim = [(o, picture) for o, picture in zip(found, shown, strict=True) if o.claim == claim]
        if of_claim:
            parts.append(f"### {claim}. {title}")
            parts += [_section(o, line, picture) for o, picture in of_claim]
        if claim == 3 and of_claim:
            parts.append(_saved(line))
    write_atomically(out / "report.md", "\n\n".join(p for p in parts if p) + "\n")


def summary(found: Sequence[Outcome], about: About) -> str:
    """The comparisons that decide the claims, one a line, and plain text before and after."""
    lines = [f"{about.model}; {about.tokens:,} tokens of pre-training per arm; {about.seeds} to {about.headline_seeds} "
             f"seeds; {about.device}; commit {', '.join(about.commits)}.", "",
             "| claim | compared | NDCG@10 | p (Holm) | NLL, nats | by NDCG@10 |", "|---|---|---:|---:|---:|---|"]
    for claim, key, row, against in DECIDING:
        of = {g.metric: g for o in found if o.key.startswith(key) for g in o.gaps
              if (g.row, g.against) == (row, against)}
        if first := of.get(METRICS[0]):
            lines.append(f"| {claim}. {CLAIMS[claim]} | {row} − {against} | {_number(first, '+.4f')} | "
                         f"{first.p_holm:.4f} | {_number(of.get('NLL'), '+.1f')} | {first.verdict} |")
    lines += [f"| 5. {CLAIMS[5]} | {r.label} | perplexity of text: {math.exp(r.losses[TEXT]):.1f} | | | |"
              for o in found if o.claim == 5 for r in o.results if TEXT in r.losses]
    return "\n".join(lines)


def publish(report: Path, form: str) -> None:
    """Copy the report to experiments/results and into the documentation, between the form's marks."""
    folder = REPO / "experiments/results" / form
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(report, folder)
    text = (report / "report.md").read_text(encoding="utf-8")
    _fill(DOCS, form, re.sub(r"\]\((\w+\.png)\)", rf"](../experiments/results/{form}/\1)", text))
    _fill(REPO / "README.md", form, (report / "summary.md").read_text(encoding="utf-8") +
          f"\n![zero-shot ranking of unseen domains](experiments/results/{form}/zero_shot.png)\n")


def _fill(page: Path, form: str, text: str) -> None:
    """Put the text between the form's marks in a page. Raises DataError where they are missing."""
    begin, end = f"<!-- experiments:{form}:begin -->", f"<!-- experiments:{form}:end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise DataError(f"{page} lacks the marks {begin} and {end}; put them where the report is to stand")
    write_atomically(page, f"{head}{begin}\n{text}{end}{tail}")


def _about(line: Line) -> About:
    done = recorded(line.work, line.steps)
    devices = {str(d["device"]) for d in done.values() if "device" in d} or {device()}
    f = line.form
    return About(
        form=line.form_name, model=f.about, world=line.world.about, tokens=f.tokens, seeds=f.seeds,
        headline_seeds=f.headline_seeds, device="; ".join(sorted(devices)), versions={p: version(p) for p in PACKAGES},
        commits=sorted({str(d["commit"]) for d in done.values()}), n_done=len(done), n_steps=len(line.steps),
        step_minutes=round(sum(float(str(d["seconds"])) for d in done.values()) / 60, 1))


def _heading(line: Line, about: About) -> str:
    f = line.form
    users = (f"{f.data.users_pretrain:.0%} of the pre-training domains' users, {f.data.users_unseen:.0%} of the unseen "
             f"ones'" if line.world.sources else "All users")
    return (
        f"**{about.form} form.** Model: {f.about}. Data: {about.world}. {users}. Every pre-trained arm saw "
        f"{f.tokens:,} tokens; {n_of(f.seeds, 'seed')} ({f.headline_seeds} of zero-shot CPRec). {about.device}; "
        f"{', '.join(f'{k} {v}' for k, v in about.versions.items())}; commit {', '.join(about.commits)}; "
        f"{about.n_done} of {about.n_steps} steps done, {about.step_minutes} minutes of steps.\n\n"
        f"Full-catalogue exact ranking; {METRICS[0]} is the primary endpoint. In brackets 95 % intervals over users "
        f"(and seeds); differences are paired over users, p by sign flips, adjusted by Holm over all primary "
        f"comparisons here.")


def _section(o: Outcome, line: Line, picture: str | None) -> str:
    lines = [f"**{o.title}** ({', '.join(o.domains)}; macro average"
             + (f" over {o.results[0].n_queries:,} queries" if o.results else "") + ")", ""]
    with_losses = any(r.losses for r in o.results)
    columns = ["arm", "seeds", "tokens", "NDCG@10", "HR@10", "NLL, nats"]
    columns += ["text, perplexity", "unseen, nats/token", "pre-trained, nats/token"] if with_losses else []
    lines += [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [_table_row(r, line, with_losses) for r in o.results]
    if o.gaps:
        lines += ["", "| difference | NDCG@10 | p (Holm) | HR@10 | NLL | |", "|---|---:|---:|---:|---:|---|"]
        lines += _gap_rows(o.gaps)
    if o.missing:
        lines += ["", f"Not run: {'; '.join(o.missing)}."]
    if picture:
        lines += ["", f"![{o.title}]({picture})"]
    return "\n".join(lines)


def _table_row(r: Result, line: Line, with_losses: bool) -> str:
    cells = [r.label, str(r.n_seeds), f"{r.tokens:,}" if r.tokens else "-"]
    cells += [_number(r.numbers.get(m), DIGITS[m]) for m in METRICS]
    if with_losses:
        cells.append(f"{math.exp(r.losses[TEXT]):.1f}" if TEXT in r.losses else "-")
        cells += [f"{loss:.3f}" if (loss := _mean_loss(r, domains)) is not None else "-"
                  for domains in (line.world.unseen, line.world.pretrain)]
    return f"| {' | '.join(cells)} |"


def _gap_rows(gaps: Sequence[Gap]) -> list[str]:
    pairs = dict.fromkeys((g.row, g.against) for g in gaps)
    rows = []
    for row, against in pairs:
        of = {g.metric: g for g in gaps if (g.row, g.against) == (row, against)}
        first = of[METRICS[0]]
        shown = [_number(of.get(m), f"+{DIGITS[m]}") for m in METRICS]
        rows.append(f"| {row} − {against} | {shown[0]} | {first.p:.4f} ({first.p_holm:.4f}) | {shown[1]} | "
                    f"{shown[2]} | {first.verdict} |")
    return rows


def _number(n: Number | Gap | None, digits: str) -> str:
    return "-" if n is None else f"{n.mean:{digits}} [{n.low:{digits}}, {n.high:{digits}}]"


def _mean_loss(r: Result, domains: Sequence[str]) -> float | None:
    """Macro average over those of the domains that have validation histories."""
    found = [r.losses[f"valid/{d}"] for d in domains if f"valid/{d}" in r.losses]
    return sum(found) / len(found) if found else None


def _picture(o: Outcome, out: Path) -> str | None:
    """Curves where a table has an axis, else its marks; the file's name."""
    if len(o.results) < 2:
        return None
    path = out / f"{o.key}.png"
    if o.x_label:
        at = [r for r in o.results if r.x is not None]
        plot_curves({m: [(float(r.x or 0), n.mean, n.low, n.high) for r in at if (n := r.numbers.get(m))]
                     for m in METRICS}, path, x_label=o.x_label)
    else:
        panels = {m: [Mark(r.label[:38], n.mean, n.low, n.high) for r in o.results if (n := r.numbers.get(m))]
                  for m in METRICS}
        plot_marks({m: marks for m, marks in panels.items() if marks}, path)
    return path.name


def _saved(line: Line) -> str:
    """What branches of one trunk cost against runs of their own."""
    done = recorded(line.work, line.steps)
    branches = [float(str(d["seconds"])) for n, d in done.items() if n.startswith("branch/") and n.endswith("-0")]
    whole = [float(str(d["seconds"])) for n, d in done.items() if n.startswith("train/")]
    trunk = done.get("trunk/0")
    if not branches or not whole or trunk is None:
        return ""
    alone = len(branches) * sum(whole) / len(whole)
    shared = float(str(trunk["seconds"])) + sum(branches)
    return (f"{len(branches)} annealings of one trunk took {shared / 60:.1f} minutes, the trunk included; as runs of "
            f"their own they would have taken about {alone / 60:.1f} (the mean of the {len(whole)} arms that were).")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    cli.run(main)
