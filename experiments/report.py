"""The report of a form: JSON per table, Markdown, pictures; every number with model, tokens, seeds, device and commit.

    python -m experiments.report --form cpu --world amazon --work work/experiments/cpu [--publish]

reads: what `experiments/run.py` left in the work folder, finished or not. writes: `<work>/report/`; with `--publish`
also `experiments/results/<form>-<world>/` and that part of docs/experiments.md and README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq

from cprec import cli
from cprec.errors import DataError, n_of
from cprec.eval.queries import load_queries
from cprec.format import write_atomically
from cprec.plots import Mark, plot_curves, plot_marks
from experiments.arms import Line
from experiments.claims import deciding, tables
from experiments.compare import PRIMARY, Gap, Number, Outcome, Result, decided, outcomes
from experiments.forms import load_form, load_world
from experiments.steps import REPO, recorded

CLAIMS = {1: "Continual pre-training helps", 2: "All domains help", 3: "Warmup-Stable-Annealing helps",
          4: "It scales", 5: "Plain text is not forgotten"}
TEXT = "replay/held_out"
DIGITS = {"NDCG@10": "z.4f", "HR@10": "z.4f", "NLL": "z.1f"}  # z: no -0.0
SHOWN = tuple(DIGITS)
BY_DOMAIN_DIGITS = {"NDCG@10": ".4f", "NLL": ".1f", "bits/byte": ".2f"}
BY_DOMAIN = {"zero_shot", "corpora", "schedules", "domains", "forgetting"}
"""Tables, one a claim, that are shown by domain too."""
DOCS, README = "docs/experiments.md", "README.md"


@dataclass(frozen=True)
class About:
    """What was run, on what: it goes with every number."""

    key: str
    """`<form>-<world>`."""
    form: dict[str, Any]
    """Its YAML, with what it leaves out."""
    world: dict[str, Any]
    tokens: int
    """Of pre-training, per arm."""
    device: list[str]
    versions: dict[str, list[str]]
    """Of packages, where the steps ran; several: it changed on the way."""
    commits: list[str]
    argv: list[str]
    """The driver's, as started; the data folder's name left out."""
    n_steps: int
    seconds: dict[str, float]
    """Of each step that is done."""
    step_minutes: float
    """Their sum."""
    wall_minutes: float
    """In which at least one of them ran."""
    queried: dict[str, tuple[int, int]]
    """Unseen domain -> of its queries, those whose user has events that pre-training may read; and all."""


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
    found = outcomes([t for t in tables(line) if not args.only or t.claim in args.only], deciding(line))
    out = args.work / "report"
    write_report(found, line, out)
    print((out / "report.md").read_text(encoding="utf-8"))
    if args.publish:
        publish(out, f"{args.form}-{args.world}")


def write_report(found: Sequence[Outcome], line: Line, out: Path) -> None:
    """`report.md`, `<table>.json`, `about.json` and pictures. Raises DataError when nothing has been run."""
    if not any(o.results for o in found):
        raise DataError(f"{line.work} holds no finished evaluation; run experiments/run.py first")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    about = _about(line)
    write_atomically(out / "about.json", json.dumps(asdict(about), indent=1) + "\n")
    write_atomically(out / "summary.md", summary(found, line, about) + "\n")
    for outcome in found:
        write_atomically(out / f"{outcome.key}.json", json.dumps(_without_nan(asdict(outcome)), indent=1) + "\n")
    shown = [_picture(o, out) for o in found]
    parts = [_heading(line, about)]
    for claim, title in CLAIMS.items():
        of_claim = [(o, picture) for o, picture in zip(found, shown, strict=True) if o.claim == claim]
        if of_claim:
            parts.append(f"### {claim}. {title}")
            parts += [_section(o, line, picture) for o, picture in of_claim]
        if claim == 1 and of_claim and about.queried:
            parts.append(_met(about))
        if claim == 3 and of_claim:
            parts.append(_saved(line))
    write_atomically(out / "report.md", "\n\n".join(p for p in parts if p) + "\n")


def summary(found: Sequence[Outcome], line: Line, about: About) -> str:
    """The comparisons that decide the claims, one a line, and plain text before and after."""
    f = line.form
    lines = [f"{f.about}; {f.tokens:,} tokens of pre-training per arm; {'; '.join(about.device)}; commit "
             f"{', '.join(about.commits)}. Differences as the claim has them, with 95 % intervals over users and "
             f"seeds; p is about users, for the seeds that were trained, by Holm over the lines of this table, for "
             f"each metric by itself. A claim holds, or the contrary, where p is below 0.05, the interval leaves 0 "
             f"out and there are several seeds.", "",
             "| claim | compared | seeds | NDCG@10 | p | NLL, nats | p | by NDCG@10; by NLL |",
             "|---|---|---:|---:|---:|---:|---:|---|"]
    for asked in deciding(line):
        of = decided(found, asked)
        if of:
            cells = [f"{asked.claim}. {CLAIMS[asked.claim]}", f"{asked.better} − {asked.than}",
                     str(of[PRIMARY].n_seeds)]
            for metric in (PRIMARY, "NLL"):
                cells += [_number(of.get(metric), f"+{DIGITS[metric]}"),
                          f"{of[metric].p_holm:.4f}" if metric in of else "-"]
            lines.append(f"| {' | '.join(cells)} | {'; '.join(_holds(of.get(m)) for m in (PRIMARY, 'NLL'))} |")
        elif any(o.key == asked.table for o in found):
            cells = [f"{asked.claim}. {CLAIMS[asked.claim]}", f"{asked.better} − {asked.than}", "0", "not run"]
            lines.append(f"| {' | '.join(cells)} | | | | |")
    for r in (r for o in found if o.claim == 5 for r in o.results if TEXT in r.losses):
        lines.append(f"| 5. {CLAIMS[5]} | {r.label}: perplexity of text {math.exp(r.losses[TEXT]):.1f} | {r.n_seeds} "
                     f"| | | | | |")
    return "\n".join(lines)


def _holds(gap: Gap | None) -> str:
    """What a comparison, turned as the claim has it, says of the claim."""
    words = {"better": "holds", "worse": "the contrary", "no difference shown": "not shown"}
    return "-" if gap is None else words.get(gap.verdict, gap.verdict)


def publish(report: Path, key: str, repo: Path = REPO) -> None:
    """Copy the report to experiments/results/<key> and into the pages, between the key's marks. Raises DataError, and
    changes nothing, where a page lacks them."""
    folder = f"experiments/results/{key}"
    text = (report / "report.md").read_text(encoding="utf-8")
    filled = {DOCS: re.sub(r"\]\((\w+\.png)\)", rf"](../{folder}/\1)", text),
              README: (report / "summary.md").read_text(encoding="utf-8")}
    if (report / "zero_shot.png").is_file():
        filled[README] += f"\n![zero-shot ranking of unseen domains]({folder}/zero_shot.png)\n"
    pages = {repo / name: _filled(repo / name, key, part) for name, part in filled.items()}
    shutil.rmtree(repo / folder, ignore_errors=True)
    shutil.copytree(report, repo / folder)
    for page, whole in pages.items():
        write_atomically(page, whole)


def _filled(page: Path, key: str, text: str) -> str:
    """The page with the text between the key's marks. Raises DataError where they are missing."""
    begin, end = f"<!-- experiments:{key}:begin -->", f"<!-- experiments:{key}:end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise DataError(f"{page} lacks the marks {begin} and {end}; put them where the report is to stand")
    return f"{head}{begin}\n{text}{end}{tail}"


def _about(line: Line) -> About:
    done = recorded(line.work, line.steps)
    seconds = {n: float(str(d["seconds"])) for n, d in done.items()}
    versions: dict[str, set[str]] = {}
    for d in done.values():
        for package, version in cast(dict[str, str], d.get("versions", {})).items():
            versions.setdefault(package, set()).add(version)
    return About(
        key=f"{line.form_name}-{line.world_name}", form=line.form.model_dump(), world=line.world.model_dump(),
        tokens=line.form.tokens, device=sorted({str(d["device"]) for d in done.values()}),
        versions={p: sorted(v) for p, v in versions.items()}, commits=sorted({str(d["commit"]) for d in done.values()}),
        argv=sorted({_shown_argv(cast(list[str], d["argv"])) for d in done.values() if "argv" in d}),
        n_steps=len(line.steps), seconds=seconds, step_minutes=round(sum(seconds.values()) / 60, 1),
        wall_minutes=round(wall_seconds(done.values()) / 60, 1), queried=_queried(line))


def _shown_argv(argv: Sequence[str]) -> str:
    """A command without the names of the reader's own folders."""
    words = [re.sub(r"^(--data|--work)=.*", r"\1=FOLDER", word) for word in argv]
    return shlex.join("FOLDER" if before in ("--data", "--work") else Path(word).name if i == 0 else word
                      for i, (before, word) in enumerate(zip(["", *words], words, strict=False)))


def wall_seconds(done: Iterable[Mapping[str, Any]]) -> float:
    """Of the time in which at least one of the steps ran; what lies between two runs is not counted."""
    total, until = 0.0, -math.inf
    ends = ((datetime.fromisoformat(d["finished"]).timestamp(), d["seconds"]) for d in done)
    for start, end in sorted((end - seconds, end) for end, seconds in ends):
        total += max(end - max(start, until), 0)
        until = max(until, end)
    return total


def _queried(line: Line) -> dict[str, tuple[int, int]]:
    """Of each unseen domain's queries, how many are of users with events that pre-training may read, and all."""
    prepared = Path(line.prepared())
    if not (prepared / "interactions/train.parquet").is_file():
        return {}
    learned = set(pq.read_table(prepared / "interactions/train.parquet", columns=["user_id"])["user_id"].to_pylist())
    users = {d: load_queries(prepared / "queries", d).user_ids for d in line.world.unseen}
    return {d: (sum(u in learned for u in of), len(of)) for d, of in users.items()}


def _heading(line: Line, about: About) -> str:
    f = line.form
    users = (f"{f.data.users_pretrain:.0%} of the pre-training domains' users, {f.data.users_unseen:.0%} of the unseen "
             f"ones'" if line.world.sources else "All users")
    versions = ", ".join(f"{package} {'/'.join(v)}" for package, v in about.versions.items())
    return (
        f"**{line.form_name} form.** Model: {f.about}. Data: {line.world.about}. {users}. Every pre-trained arm saw "
        f"{f.tokens:,} tokens; planned are {n_of(f.seeds, 'seed')} ({f.headline_seeds} of zero-shot CPRec), each table "
        f"says how many there are. {'; '.join(about.device)}; {versions}; commit {', '.join(about.commits)}; "
        f"{len(about.seconds)} of {about.n_steps} steps done, {about.step_minutes} minutes of steps in "
        f"{about.wall_minutes} minutes.\n\n"
        f"Full-catalogue exact ranking; {PRIMARY} is the primary endpoint. In brackets 95 % intervals over users "
        f"(and seeds); differences are paired over users, p by sign flips, about users, for the seeds that were "
        f"trained. In brackets behind p, for the comparisons that decide a claim: adjusted by Holm over these, for "
        f"each metric by itself. The others explore: nothing is shown by one of them alone.")


def _section(o: Outcome, line: Line, picture: str | None) -> str:
    if not o.results:
        return f"**{o.title}**: not run ({'; '.join(o.missing)})."
    lines = [f"**{o.title}** ({', '.join(o.domains)}; macro average over {o.results[0].n_queries:,} queries)", ""]
    with_losses = any(r.losses for r in o.results)
    columns = ["arm", "seeds", "tokens", "NDCG@10", "HR@10", "NLL, nats"]
    columns += ["text, perplexity", "unseen, nats/token", "pre-trained, nats/token"] if with_losses else []
    lines += [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [_table_row(r, line, with_losses) for r in o.results]
    if o.gaps:
        lines += ["", "| difference | seeds | NDCG@10 | p (Holm) | HR@10 | NLL | p (Holm) | by NDCG@10; by NLL |",
                  "|---|---:|---:|---:|---:|---:|---:|---|"]
        lines += _gap_rows(o.gaps)
    if o.key in BY_DOMAIN:
        lines += ["", *_by_domain(o)]
    if o.missing:
        lines += ["", f"Not run: {'; '.join(o.missing)}."]
    if picture:
        lines += ["", f"![{o.title}]({picture})"]
    return "\n".join(lines)


def _table_row(r: Result, line: Line, with_losses: bool) -> str:
    cells = [r.label, str(r.n_seeds), f"{r.tokens:,}" if r.tokens else "-"]
    cells += [_number(r.numbers.get(m), DIGITS[m]) for m in SHOWN]
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
        shown = {m: _number(of.get(m), f"+{DIGITS[m]}") for m in SHOWN}
        cells = [f"{row} − {against}", str(of[PRIMARY].n_seeds), shown[PRIMARY], _p(of[PRIMARY]), shown["HR@10"],
                 shown["NLL"], _p(of.get("NLL")), _verdict(of)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _verdict(of: Mapping[str, Gap]) -> str:
    if math.isnan(of[PRIMARY].p_holm):
        return "explores"
    return "; ".join(of[m].verdict for m in (PRIMARY, "NLL") if m in of)


def _p(gap: Gap | None) -> str:
    if gap is None:
        return "-"
    return f"{gap.p:.4f}" + ("" if math.isnan(gap.p_holm) else f" ({gap.p_holm:.4f})")


def _by_domain(o: Outcome) -> list[str]:
    lines = ["By domain: NDCG@10 / NLL in nats / bits per byte of the title.", "",
             f"| arm | {' | '.join(o.domains)} |", "|---|" + "---:|" * len(o.domains)]
    for r in o.results:
        cells = [" / ".join(f"{of[m]:{digits}}" if m in of else "-" for m, digits in BY_DOMAIN_DIGITS.items())
                 for of in (r.by_domain[d] for d in o.domains)]
        lines.append(f"| {r.label} | {' | '.join(cells)} |")
    return lines


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
                     for m in SHOWN}, path, x_label=o.x_label)
    else:
        panels = {m: [Mark(r.label[:38], n.mean, n.low, n.high) for r in o.results if (n := r.numbers.get(m))]
                  for m in SHOWN}
        plot_marks({m: marks for m, marks in panels.items() if marks}, path)
    return path.name


def _met(about: About) -> str:
    """How many of those who are asked about may have been learned from: what the arm without them leaves out."""
    n_met, n = (sum(of[i] for of in about.queried.values()) for i in (0, 1))
    return (f"The users of {n_met:,} of the {n:,} queries have events that pre-training may read ("
            + ", ".join(f"{d} {met} of {of}" for d, (met, of) in about.queried.items())
            + "): the arm that learns from no user of the queries leaves these out. It is another training run too, "
            "and its difference is over all queries.")


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
