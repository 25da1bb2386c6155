"""Measures the reader: rows per second, first batch, resume, memory and balance, against the libraries at hand.

    make bench-reader                                     # or, where the pinned rivals are installed:
    python -m benchmarks.reader.run [--packed FOLDER] [--rows 10240,512000] [--only rate,spread] [--out docs]

reads: a packed folder, or nothing (rows are generated). writes: the work folder (corpora are kept in it between runs;
about 2.2 GB per side at the default size); with --out, OUT/reader_bench.json and the tables between the marks of
OUT/reader.md. Prints tables, then, as its last line, one JSON object. Costs: about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.reader import balance, corpora, ours
from benchmarks.reader.measure import REPO, Case, Limits, Result, Setup, race, same_rows
from benchmarks.reader.records import real_seq_len, train_corpora
from benchmarks.reader.rivals import COLD_COPY, COPY, LIBRARIES, OURS, READERS, REFERENCES, installed
from benchmarks.reader.tables import tables
from cprec.errors import CPRecError

SMALL, LARGE = "small corpus", "large corpus"
PARTS = ("check", "rate", "two", "cold", "resume", "spread")
PACKAGES = ("torch", "numpy", "pyarrow", *LIBRARIES)
MARKS = "<!-- reader:begin -->", "<!-- reader:end -->"
MAIN, TWO, COLD = Case(LARGE), Case(LARGE, processes=2), Case(LARGE, cold=True)


@dataclass(frozen=True)
class Options:
    """The command line."""

    packed: Path | None
    rows: tuple[int, int]
    seq_len: int
    limits: Limits
    sides: tuple[str, ...]
    only: tuple[str, ...]
    work: Path
    out: Path | None


def options(argv: list[str] | None = None) -> Options:
    """The command line, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--packed", type=Path, help="a packed folder whose training rows to take; default: generated rows")
    p.add_argument("--rows", default="10240,512000", help="rows of the small and of the large corpus")
    p.add_argument("--seq-len", type=int, default=2048, help="of generated rows")
    p.add_argument("--micro-batch-size", type=int, default=8)
    p.add_argument("--global-batch-size", type=int, default=64)
    p.add_argument("--seconds", type=float, default=2.0, help="that each process reads, at most")
    p.add_argument("--most-rows", type=int, default=40_000, help="that each process reads, at most")
    p.add_argument("--repeats", type=int, default=3, help="processes of every side; medians count")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--sides", default=",".join(READERS), help="comma list")
    p.add_argument("--only", default=",".join(PARTS), help="comma list of parts")
    p.add_argument("--work", type=Path, default=REPO / "work" / "bench-reader")
    p.add_argument("--out", type=Path, help="folder of reader.md: keep what was measured there")
    a = p.parse_args(argv)
    small, large = (int(float(n)) for n in a.rows.split(","))
    for name, chosen, known in (("only", a.only, PARTS), ("sides", a.sides, READERS)):
        if unknown := set(chosen.split(",")) - set(known):
            p.error(f"--{name} {','.join(sorted(unknown))}: choose from {', '.join(known)}")
    if uneven := [n for n in (small, large) if n % a.global_batch_size]:
        p.error(f"--rows {uneven[0]}: not a multiple of --global-batch-size {a.global_batch_size}, so that an epoch "
                f"would end inside a step")
    if a.global_batch_size % (2 * a.micro_batch_size):
        p.error(f"--global-batch-size {a.global_batch_size}: two ranks need a multiple of {2 * a.micro_batch_size}, "
                f"twice --micro-batch-size")
    limits = Limits(a.micro_batch_size, a.global_batch_size, a.seconds, a.most_rows, a.repeats, a.seed)
    return Options(a.packed and a.packed.absolute(), (small, large), a.seq_len, limits, tuple(a.sides.split(",")),
                   tuple(a.only.split(",")), a.work.absolute(), a.out)


def main() -> None:
    o = options()
    begin_s = time.monotonic()
    try:
        found = measure(o)
    except CPRecError as e:
        sys.exit(f"{e}")
    found["minutes"] = round((time.monotonic() - begin_s) / 60, 1)
    print("\n" + tables(found), flush=True)
    if o.out is not None:
        keep(found, o.out)
    print(json.dumps(headline(found)))


def measure(o: Options) -> dict[str, Any]:
    """Every chosen part's results, as JSON-able values, with the machine they are from."""
    seq_len = real_seq_len(o.packed) if o.packed else o.seq_len
    here = {name: build(o, name, n, seq_len) for name, n in zip((SMALL, LARGE), o.rows, strict=True)}
    sides = [side for side in o.sides if installed(side)]
    skipped = {side: "not installed" for side in o.sides if side not in sides}
    for name, corpus in here.items():
        for side in (*sides, *REFERENCES):
            seconds = corpora.add(corpus, side)
            if seconds is not None and seconds > 1:
                say(f"{name}: {side} written in {seconds:.0f} s")
    own = [Setup(side) for side in sides]
    everyone = [*own, *(Setup(side, 1) for side in sides if side in LIBRARIES)]
    found: dict[str, Any] = {"machine": machine(), "data": {
        "rows": f"of {o.packed.name}" if o.packed else "generated", "seq_len": seq_len,
        "micro_batch_size": o.limits.micro_batch_size, "repeats": o.limits.repeats, "corpora": ", ".join(
            f"{name} {c.shape.n_rows:,} rows" for name, c in here.items())}}
    if "check" in o.only:
        say("every side's epoch holds every row once")
        found["same_rows"] = same_rows(here[SMALL], everyone, o.limits)
    found["cases"] = []
    for part, case, setups in _cases(own, everyone):
        if part in o.only:
            say(case.label)
            results = race(here, setups, case, o.limits)
            found["cases"].append({"case": case.label, "seq_len": seq_len, "skipped": skipped,
                                   "setups": [_values(r) for r in results]})
    if "spread" in o.only:
        say("spread of the ranks' work")
        packed, names = (o.packed, train_corpora(o.packed)) if o.packed else (here[LARGE].folder / OURS, [ours.CORPUS])
        found["spread"] = [asdict(s) for s in balance.measure(packed, names, seq_len=seq_len, seed=o.limits.seed)]
    return found


def build(o: Options, name: str, n_rows: int, seq_len: int) -> corpora.Corpus:
    """One of the two corpora."""
    say(f"{name}: {n_rows:,} rows")
    return corpora.build(o.work / name.replace(" ", "-"), n_rows, seq_len=seq_len, seed=o.limits.seed,
                         packed=o.packed)


def _cases(own: list[Setup], everyone: list[Setup]) -> list[tuple[str, Case, list[Setup]]]:
    """Part, case, setups. Workers only where they may be the faster way."""
    references = [Setup(side) for side in REFERENCES]
    return [
        ("rate", Case(SMALL), [*own, *references]), ("rate", MAIN, [*everyone, *references]), ("two", TWO, own),
        ("cold", COLD, own), ("resume", Case(SMALL, resume=True), own), ("resume", Case(LARGE, resume=True), own)]


def _values(r: Result) -> dict[str, Any]:
    values: dict[str, Any] = {"label": r.setup.label, "side": r.setup.side, "workers": r.setup.workers,
                              "failed": r.failed}
    if r.failed is None:
        values |= {"rows_per_s": None if r.case.resume else r.rows_per_s, "first_batch_ms": r.first_batch_ms,
                   "imports_s": r.imports_s, "anon_mb": r.mb("anon_mb"), "anon_before_mb": r.mb("anon_before_mb"),
                   "file_mb": r.mb("file_mb"), "cached": sum(r.cached) / len(r.cached),
                   "all_rows_per_s": [round(sum(a.rows / a.seconds for a in ranks)) for ranks in r.answers]}
    return values


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that count, one value each; null: not measured. Of one and two processes the worse ratio counts;
    of a library's ways (with a worker, without) the faster; of the spreads the worst, over the settings in which a rank
    has more than one row per step."""
    cases = {c["case"]: {s["label"]: s for s in c["setups"] if s["failed"] is None} for c in found["cases"]}
    ratios: list[tuple[float, str]] = []
    for case in (MAIN, TWO):
        setups = cases.get(case.label, {})
        libraries = [s for s in setups.values() if s["side"] in LIBRARIES]
        if libraries and OURS in setups:
            best = max(libraries, key=lambda s: s["rows_per_s"])
            ratios.append((setups[OURS]["rows_per_s"] / best["rows_per_s"], best["label"]))
    worst = min(ratios) if ratios else None

    def of_ours(case: Case, name: str) -> float | None:
        value = cases.get(case.label, {}).get(OURS, {}).get(name)
        return None if value is None else round(value, 1)

    def over(name: str) -> float | None:
        setups = cases.get(MAIN.label, {})
        known = OURS in setups and name in setups
        return round(setups[OURS]["rows_per_s"] / setups[name]["rows_per_s"], 3) if known else None

    spreads = [s for s in found.get("spread", []) if balance.Spread(**s).has_choice]
    return {
        "rows_per_s_vs_fastest_library": round(worst[0], 2) if worst else None,
        "fastest_library": worst[1] if worst else None, "rows_per_s": of_ours(MAIN, "rows_per_s"),
        "rows_per_s_two": of_ours(TWO, "rows_per_s"), "rows_per_s_cold": of_ours(COLD, "rows_per_s"),
        "vs_memcpy": over(COPY), "vs_memcpy_from_memory": over(COLD_COPY),
        **{f"{what}_ms": {name.split()[0]: of_ours(Case(name, resume=what == "resume"), "first_batch_ms")
                          for name in (SMALL, LARGE)} for what in ("first_batch", "resume")},
        "rss_mb": {name.split()[0]: {"anon": of_ours(Case(name), "anon_mb"), "file": of_ours(Case(name), "file_mb")}
                   for name in (SMALL, LARGE)},
        "flops_spread_before": round(max(s["before"] for s in spreads), 4) if spreads else None,
        "flops_spread_after": round(max(s["after"] for s in spreads), 4) if spreads else None,
        "same_rows": all(ok is True for checks in found["same_rows"].values() for ok in checks.values())
        if "same_rows" in found else None,
        "data": found["data"]["rows"], **found["machine"], "minutes": found["minutes"]}


def keep(found: dict[str, Any], out: Path) -> None:
    """Write OUT/reader_bench.json and the tables between the marks of OUT/reader.md, where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "reader_bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = out / "reader.md"
    if page.is_file():
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with its tables."""
    begin, end = MARKS
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{tables(found)}\n{end}", page, flags=re.DOTALL)


def machine() -> dict[str, Any]:
    """Hardware, versions and commit."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_kb = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"], cwd=REPO,
                            capture_output=True, text=True)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": cpu[1] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(int(memory_kb[1]) * 1024 / 1e9) if memory_kb else None,
            "python": platform.python_version(), "versions": versions, "commit": commit.stdout.strip() or "unknown"}


def say(what: str) -> None:
    print(f"=== {time.strftime('%H:%M:%S')} {what}", flush=True)


if __name__ == "__main__":
    main()
