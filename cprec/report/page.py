"""One page about one run: lineage, config, data, charts, speed, bad steps, starts, checkpoints, ranking. Works offline.

reads: a run folder, its family's, its evaluations. writes: nothing. Costs: about two seconds, and a second for every
evaluation (the bootstraps of its intervals). Works on a run that goes on, has not logged yet, or was killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from cprec.compare import ranking_lines, tree_lines
from cprec.data.corpora import DataRecord, read_data_record
from cprec.data.sampler import PERIOD
from cprec.errors import CheckpointError, n_of
from cprec.process import is_being_written
from cprec.report import markup as m
from cprec.report.charts import charts_of
from cprec.settings import dump_settings
from cprec.train.family import Member, find_family
from cprec.train.inventory import Entry, take_inventory
from cprec.train.metrics import duration
from cprec.train.order import build_order
from cprec.train.run_folder import flatten
from cprec.train.starts import Start, read_starts

MOST_BAD_STEPS = 20
DASH = "-"


@dataclass(frozen=True)
class Run:
    """What the page is about."""

    member: Member
    family: list[Member]
    data: DataRecord
    starts: list[Start]
    is_going_on: bool

    @property
    def train(self) -> list[dict[str, Any]]:
        return [r for r in self.member.records if r["kind"] == "train"]

    @property
    def state(self) -> str:
        """Whether it is complete, goes on, or how it ended."""
        if self.is_going_on:
            return f"training, {self.member.state}"
        if self.member.is_complete or not self.starts:
            return self.member.state
        how = self.starts[-1].how
        return f"{'killed or hung' if how is None else how}, {self.member.state}; the same command goes on"


def run_page(folder: Path, *, refresh_s: float | None = None) -> str:
    """The page of the run in `folder`; with `refresh_s` it asks for itself anew, so often, while it is open.

    Raises CheckpointError for a folder that is no run, or whose data record is missing.
    """
    run = read_run(folder)
    sections = {"Lineage": _lineage(run), "Curves": _curves(run), "Speed": _speed(run), "Data": _data(run),
                "Bad steps": _bad_steps(run), "Starts": _starts(run), "Checkpoints": _checkpoints(run),
                "Ranking": _ranking(run), "Config": _config(run)}
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    live = f"; follows the run, every {refresh_s:g} s" if refresh_s else ""
    head = [f"<h1>{m.escaped(run.member.name)}</h1>", m.paragraph(run.state[0].upper() + run.state[1:]),
            m.paragraph(f"{run.member.folder}, as of {made}{live}", kind="soft"), m.contents(sections), _tiles(run)]
    body = [*head, *(m.section(title, *parts) for title, parts in sections.items())]
    return m.page(f"{run.member.name}: {run.state}", body, refresh_s=refresh_s)


def read_run(folder: Path) -> Run:
    """Everything that the page tells, but checkpoints and evaluations."""
    family = find_family([folder])
    member = next(x for x in family if x.folder == folder.resolve())
    return Run(member, family, read_data_record(member.folder), read_starts(member.folder),
               is_being_written(member.folder))


def _tiles(run: Run) -> str:
    last = {field: value for r in run.train for field, value in r.items() if value is not None}
    valid = run.member.validation_at() or {}
    n_killed = sum(s.how is None for s in run.starts[:-1])
    values = [
        ("step", f"{run.member.step:,} of {run.member.schedule.total_steps:,}"),
        ("tokens seen", _in_units(last.get("tokens_seen"))),
        ("training loss", _number(last.get("loss"), ".4f")),
        ("validation loss", _number(valid.get("loss"), ".4f")),
        ("tokens per second", _number(last.get("tokens_per_s"), ",.0f")),
        ("MFU", _number(last.get("mfu"), ".1%")),
        ("time left", duration(last["eta_s"]) if last and run.is_going_on else DASH),
        ("bad steps", _number(last.get("bad_steps"), ",")),
        ("starts", f"{len(run.starts)}{f', {n_killed} killed' if n_killed else ''}" if run.starts else DASH),
    ]
    return m.tiles(values)


def _lineage(run: Run) -> list[str]:
    parts = [m.preformatted("\n".join(tree_lines(run.family))),
             m.paragraph(f"Base model: {run.member.config.model.path}")]
    if parent := run.member.config.parent:
        parts.append(m.paragraph(f"Branch of {parent.run_dir} at step {parent.step:,}; its state.json has the hash "
                                 f"{parent.state_hash}."))
    return parts + [m.paragraph(note, kind="bad") for note in run.member.notes]


def _curves(run: Run) -> list[str]:
    if not run.member.records:
        return [m.paragraph("Nothing is logged yet.")]
    figures = [f for f in charts_of(run.member.records, run.starts, run.member.schedule, run.member.first_step) if f]
    said = ["Over the steps.", "Dotted upright: started again there." if len(run.starts) > 1 else "",
            "Red ticks at the top: steps whose update was left out." if _bad(run) else ""]
    if run.train and all(r["mfu"] is None for r in run.train):
        said.append("No MFU: the peak of this device is not known.")
    return [m.paragraph(" ".join(s for s in said if s), kind="soft"), m.charts(figures)]


def _speed(run: Run) -> list[str]:
    """Where the time of all steps went, and the memory."""
    if not run.train:
        return [m.paragraph("Nothing is logged yet.")]
    spent: dict[str, float] = {}
    for r in run.train:
        for part, seconds in r["time_s"].items():
            spent[part] = spent.get(part, 0.0) + seconds * r["n_steps"]
    total = sum(spent.values()) or 1.0
    rows = [[part, duration(s), f"{s / total:.1%}"] for part, s in sorted(spent.items(), key=lambda kv: -kv[1])]
    memory, n_steps = run.train[-1]["memory"], sum(r["n_steps"] for r in run.train)
    gpu = ("" if memory["allocated_gb"] is None else f"{memory['allocated_gb']:.2f} GB of tensors at most, "
           f"{memory['reserved_gb']:.2f} GB held, of the device; ")
    stalls = sum(r["save_stall_s"] or 0.0 for r in run.train)
    return [m.table(["part of a step", "time", "share"], rows),
            m.paragraph(f"{n_of(n_steps, 'step')}, {duration(total)} of rank 0's time; training stood still for "
                        f"{stalls:.1f} s for checkpoints. Memory of rank 0: {gpu}{memory['rss_gb']:.2f} GB of the "
                        f"host. docs/watching.md says what is measured.", kind="soft")]


def _data(run: Run) -> list[str]:
    """The corpora: how full their rows are, and how much of each is read, now and at the end."""
    data, member = run.data, run.member
    batch = member.config.batch.global_batch_size
    sampler = build_order(member.config, data).sampler
    start, now, end = (batch * n for n in (member.first_step, member.step, member.schedule.total_steps))
    so_far, at_end = sampler.drawn(now), sampler.drawn(end)
    phases = [(max(first, start) // batch, quotas) for (first, quotas), (last, _) in pairwise(
        [*sampler.phases_until(end), (end, {})]) if last > start]
    rows = [[name, f"{data.corpora[name].n_documents:,}", f"{size:,}", f"{data.corpora[name].n_tokens:,}",
             f"{data.corpora[name].n_tokens / (size * data.seq_len):.2%}",
             *(f"{quotas.get(name, 0) / PERIOD:.2%}" for _, quotas in phases), f"{b / size:.2f}", f"{z / size:.2f}"]
            for name, size, b, z in zip(sampler.names, sampler.sizes, so_far, at_end, strict=True)]
    template = f"prompt template {data.template.name!r}" if data.template else "plain text only"
    header = ["corpus", "documents", "rows", "tokens", "fill", *(f"share from step {n:,}" for n, _ in phases),
              "epochs now", "epochs at the end"]
    return [m.paragraph(f"Rows of {data.seq_len:,} tokens, {batch:,} to a step; {template}; leak audit "
                        f"{'passed' if data.is_audited else 'NOT PASSED'}. Share: of the rows that a step reads; "
                        f"epochs: since step 0."), m.table(header, rows)]


def _bad(run: Run) -> list[dict[str, Any]]:
    return [r for r in run.member.records if r["kind"] == "bad_step"]


def _bad_steps(run: Run) -> list[str]:
    bad = _bad(run)
    if not bad:
        n = run.train[-1]["bad_steps"] if run.train else 0
        return [m.paragraph("No step was left out." if not n else f"None since the fork, {n} before it.")]
    rows = [[f"{r['step']:,}", m.Text(r["reason"]), _number(r["loss"], ".4f"), _number(r["grad_norm"], ".3f"),
             m.Text(", ".join(f"{len(of)} of {name}" for name, of in r["rows"].items()))]
            for r in bad[-MOST_BAD_STEPS:]]
    more = f"The last {MOST_BAD_STEPS} of {len(bad)}. " if len(bad) > MOST_BAD_STEPS else ""
    return [m.paragraph(f"{more}Their updates were left out and their rows are not read again; "
                        f"launch/peek.py {run.member.folder} --step N shows them."),
            m.table(["step", m.Text("why"), "loss", "gradient norm", m.Text("rows")], rows)]


def _starts(run: Run) -> list[str]:
    """Every life of the run; what the watchdog wrote of those that hung."""
    if not run.starts:
        return [m.paragraph("Training has not started in this folder since starts are recorded.")]
    rows = [[_utc(s.time_s), f"{s.step:,}", DASH if s.end_step is None else f"{s.end_step:,}",
             DASH if s.end_time_s is None else duration(s.end_time_s - s.time_s), n_of(s.world_size, "rank"),
             m.Text(s.host), m.Text(s.launcher), m.Text(_ended(run, s))] for s in run.starts]
    hangs = sorted((run.member.folder / "hang").glob("*/summary.txt"))
    return [m.table(["started", "from step", "to step", "for", "", m.Text("rank 0 on"), m.Text("by"), m.Text("ended")],
                    rows),
            *(m.folded(f"hang of {path.parent.name}", m.preformatted(path.read_text(encoding="utf-8")))
              for path in hangs)]


def _ended(run: Run, start: Start) -> str:
    if start.how is not None:
        return {"stopped": "told to stop, saved"}.get(start.how, start.how)
    return "training" if run.is_going_on and start is run.starts[-1] else "killed or hung"


def _checkpoints(run: Run) -> list[str]:
    try:
        found = take_inventory(run.member.folder, run.member.config.checkpoint)
    except CheckpointError as e:
        return [m.paragraph(str(e), kind="bad")]
    rows = [[f"{e.step:,}", m.Text(e.phase), f"{e.tokens_seen:,}", _number(e.valid_loss, ".4f"),
             f"{e.n_bytes / 1e9:.3f}", f"{e.world_size} x ZeRO-{e.zero_stage}", m.Text(_kept(e))]
            for e in found.checkpoints]
    notes = [*found.broken, *(f"{name}: incomplete, or being written" for name in found.incomplete)]
    notes += [f"{name}: half pruned, or being pruned" for name in found.half_pruned]
    notes += [f"{name}: put aside, its files were altered" for name in found.put_aside]
    header = ["step", m.Text("phase next"), "tokens", "validation loss", "GB", "saved by", m.Text("kept as")]
    return [m.table(header, rows) if rows else m.paragraph("None is complete yet."),
            *(m.paragraph(note, kind="bad") for note in notes)]


def _kept(entry: Entry) -> str:
    return ", ".join(entry.kept_as) or "(nothing keeps it)"


def _ranking(run: Run) -> list[str]:
    markdown = "\n".join(ranking_lines([run.member]))
    return [m.framed_tables(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))]


def _config(run: Run) -> list[str]:
    """What differs from the parent, and all of it."""
    config, parts = run.member.config, []
    parent = next((x for x in run.family if x.folder == run.member.parent), None)
    if parent:
        ours, theirs = (flatten(c.model_dump(mode="json")) for c in (config, parent.config))
        rows = [[m.Text(k), m.Text(str(theirs.get(k, DASH))), m.Text(str(ours.get(k, DASH)))]
                for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k) and not k.startswith("parent.")]
        parts = [m.paragraph("What differs from its parent's:"),
                 m.table([m.Text("setting"), m.Text("parent"), m.Text("this run")], rows)]
    return [*parts, m.folded("config.yaml", m.preformatted(dump_settings(config)))]


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def _in_units(n: float | None) -> str:
    if n is None:
        return DASH
    scale, unit = next(((s, u) for s, u in ((1e12, " T"), (1e9, " B"), (1e6, " M")) if n >= s), (1, ""))
    return f"{n / scale:,.{2 if unit else 0}f}{unit}"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
