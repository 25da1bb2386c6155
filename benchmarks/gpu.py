"""Measures one GPU: kernels against float64, tokens/s and MFU of training per attention backend, against the bare step,
`transformers.Trainer` and the card's own ceiling. One command, under ten minutes on an H200:

    python -m benchmarks.gpu [--parts ceiling,parity,bare,ours,trainer,memory] [--backends varlen,flash2] [--out FILE]

Needs torch >= 2.11, deepspeed and what cprec itself needs; no hub, no data. `--tiny` runs every part, so small that a
CPU does it too. writes: the work folder (models of random weights, generated rows), and to --out every record as one
JSON line as soon as it is measured. Every measurement is a process of its own: one that fails is reported and the
others go on. The last line printed is one JSON object: `mfu_1p5b`, `of_bare_step`, `vs_trainer`, per backend.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_parts import Asked, Record, backends, device, dtype, run
from benchmarks.gpu_world import FULL, SHORT, known_models, make_model, make_rows
from benchmarks.train.measure import own_extensions, versions
from cprec.attention import select
from cprec.launcher import free_port

REPO = Path(__file__).parents[1]
SPOKEN = ("ceiling", "parity", "bare", "ours", "trainer", "memory")
SLOW = ("sdpa", "doc_sdpa")
"""Backends that a GPU run would not choose: checked for parity, timed only when named."""
LIMIT_S = 180
PREFIX = "record "


@dataclass(frozen=True)
class Options:
    """The command line."""

    parts: tuple[str, ...]
    backends: tuple[str, ...] | None
    models: tuple[str, ...]
    steps: int
    tiny: bool
    packed: Path | None
    work: Path
    out: Path


def options(argv: list[str] | None = None) -> Options:
    """The command line, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default=",".join(SPOKEN), help="comma list")
    p.add_argument("--backends", help="comma list; default: all that run here, slow ones for parity only")
    p.add_argument("--models", default="1p5b,135m", help="comma list")
    p.add_argument("--steps", type=int, default=12, help="timed optimizer steps")
    p.add_argument("--tiny", action="store_true", help="models and rows of a test's size")
    p.add_argument("--packed", type=Path, help="a packed folder to take the short documents from")
    p.add_argument("--work", type=Path, default=REPO / "work" / "bench-gpu")
    p.add_argument("--out", type=Path, help="JSON lines; default: records.jsonl in the work folder")
    a = p.parse_args(argv)
    for name, chosen, known in (("parts", a.parts, SPOKEN), ("models", a.models, known_models(tiny=True))):
        if unknown := set(chosen.split(",")) - set(known):
            p.error(f"--{name} {','.join(sorted(unknown))}: choose from {', '.join(known)}")
    return Options(tuple(a.parts.split(",")), tuple(a.backends.split(",")) if a.backends else None,
                   tuple(a.models.split(",")), a.steps, a.tiny, a.packed, a.work.absolute(),
                   (a.out or a.work / "records.jsonl").absolute())


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        child(Asked(**json.loads(sys.argv[2])))
        return
    o = options()
    o.out.parent.mkdir(parents=True, exist_ok=True)
    begin_s = time.monotonic()
    make_world(o)
    records = []
    with own_extensions(), o.out.open("a", encoding="utf-8") as out:
        for asked in plan(o):
            for record in measured(asked):
                records.append(record)
                out.write(json.dumps(asdict(record)) + "\n")
                out.flush()
                print(line(record), flush=True)
    print(json.dumps({**headline(records), **card(), "minutes": round((time.monotonic() - begin_s) / 60, 1)}))


def make_world(o: Options) -> None:
    """Models and rows."""
    parity = ("parity",) if "parity" in o.parts else ()
    timed = {"bare", "ours", "trainer"} & set(o.parts)
    known = known_models(tiny=o.tiny)
    if parity:
        small = known_models(tiny=True)["135m"]
        make_model(small, o.work / "parity", device=device())
        make_rows(small, o.work / "parity", o.work / f"parity-{SHORT}", kind=SHORT, n_rows=40, packed=None)
    for name in o.models if timed else ():
        make_model(known[name], o.work / name, device=device())
        for kind in (SHORT, FULL):  # enough documents for the Trainer to group by length over all timed steps
            make_rows(known[name], o.work / name, o.work / f"{name}-{kind}", kind=kind, packed=o.packed,
                      n_rows=4 * known[name].rows_per_step * o.steps)


def plan(o: Options) -> Iterator[Asked]:
    """What is measured, in order: first whether it is right, then how fast."""
    here = backends()
    named = [b for b in here if o.backends is None or b in o.backends]
    best = select("auto", device(), dtype())
    timed = sorted((b for b in named if o.backends is not None or b not in SLOW or b == best),
                   key=lambda b: b != best)  # what `auto` chooses comes first
    base = Asked("ceiling", str(o.work), tiny=o.tiny, steps=o.steps)
    if "ceiling" in o.parts:
        yield base
    if "parity" in o.parts:
        yield replace(base, part="loss_parity", rows=SHORT)
        yield from (replace(base, part="parity", backend=b) for b in named)
    if "memory" in o.parts:
        yield replace(base, part="memory")
    for model in o.models:
        for rows in (SHORT, FULL):
            one = replace(base, model=model, rows=rows)
            chosen = timed if model == "1p5b" or o.backends is not None else timed[:1]  # the time is limited
            for part in ("bare", "ours"):
                if part in o.parts:
                    yield from (replace(one, part=part, backend=b) for b in chosen)
            if "trainer" in o.parts:
                yield replace(one, part="trainer")


def measured(asked: Asked) -> Iterator[Record]:
    """Run one measurement as a process; its records, or one that says how it failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--child", json.dumps(asdict(asked))]
    about = Record(asked.part, asked.model, asked.rows, asked.backend)
    try:
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S,
                              env=os.environ | {"PYTHONPATH": str(REPO)})
    except subprocess.TimeoutExpired:
        yield replace(about, failed=f"no end after {LIMIT_S} s")
        return
    for text in done.stdout.splitlines():
        if text.startswith(PREFIX):
            yield Record(**json.loads(text.removeprefix(PREFIX)))
    if done.returncode:
        yield replace(about, failed=f"ended with {done.returncode}: {done.stderr.strip()[-1500:]}")


def child(asked: Asked) -> None:
    """One measurement in this process."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for record in run(asked):
        print(PREFIX + json.dumps(asdict(record)), flush=True)


def line(r: Record) -> str:
    """A record to read."""
    what = "  ".join(x for x in (f"{r.part:<8}", r.model, r.rows, r.backend) if x)
    numbers = "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in r.values.items())
    return f"{what}  {numbers}" + (f"  FAILED: {r.failed}" if r.failed else "")


def headline(records: list[Record]) -> dict[str, Any]:
    """The numbers that count: MFU of our run on the 1.5B model with full-length documents; per backend the lowest ratio
    over models and documents to the bare step, and to the Trainer on short documents. Null or absent: not measured."""
    fine = [r for r in records if r.failed is None]

    def rates(part: str) -> dict[tuple[Any, ...], float]:
        return {(r.model, r.rows, r.backend): float(r.values["useful_tokens_per_s"] or 0) for r in fine
                if r.part == part}

    ours, bare = rates("ours"), rates("bare")
    trainer = {(model, rows): rate for (model, rows, _), rate in rates("trainer").items()}
    names = sorted({backend for _, _, backend in ours})

    def lowest(found: list[float]) -> float | None:
        return round(min(found), 3) if found else None

    big = {str(r.values["what"]): r.values["tflops"] for r in fine if r.part == "ceiling" and "tflops" in r.values}
    peaks = {r.rows: r.values["peak_gb"] for r in fine if r.part == "memory"}
    return {
        "mfu_1p5b": {r.backend: r.values["mfu"] for r in fine
                     if (r.part, r.model, r.rows) == ("ours", "1p5b", FULL)},
        "of_bare_step": {b: lowest([ours[k] / bare[k] for k in ours if k[2] == b and k in bare]) for b in names},
        "vs_trainer": {b: lowest([ours[k] / trainer[k[:2]] for k in ours if k[2] == b and k[1] == SHORT
                                  and k[:2] in trainer]) for b in names},
        "vs_trainer_full": {b: lowest([ours[k] / trainer[k[:2]] for k in ours if k[2] == b and k[1] == FULL
                                       and k[:2] in trainer]) for b in names},
        "of_ceiling_1p5b": {r.backend: round(float(r.values["tflops"] or 0) / float(big["square"] or 0), 3)
                            for r in fine if (r.part, r.model, r.rows) == ("ours", "1p5b", FULL) and "square" in big},
        "parity_holds": {b: all(r.failed is None for r in records if r.part == "parity" and r.backend == b)
                         for b in sorted({str(r.backend) for r in records if r.part == "parity"})},
        "loss_peak_memory_vs_full_logits": round(float(peaks["ours"]) / float(peaks["full"]), 3)
        if peaks.get("ours") and peaks.get("full") else None,
        "median_ours_of_bare": round(median(ours[k] / bare[k] for k in ours if k in bare), 3)
        if any(k in bare for k in ours) else None,
        "failed": [line(r).split("FAILED")[0].strip() for r in records if r.failed]}


def card() -> dict[str, Any]:
    """Hardware, versions and commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"], cwd=REPO,
                            capture_output=True, text=True)
    return {"device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
            "cuda": torch.version.cuda, "versions": versions(), "commit": commit.stdout.strip() or "unknown"}


if __name__ == "__main__":
    main()
