"""Measures the preparation: encode-and-pack, the whole line, growth, fill; against the fastest rivals at hand.

    make bench-prep                                       # or, where the extra [bench] is installed:
    python -m benchmarks.prep.run [--data FOLDER] [--events 1e6,1e7] [--only growth,fill] [--out docs]

reads: Complete Journey from PyPI, or FOLDER/{interactions,items}/<domain>.parquet. writes: the work folder (made
anew; raw files are kept in it between runs); with --out, OUT/prep_bench.json and the tables between the marks of
OUT/scale.md. Costs: about a quarter of an hour and 5 GB of disk on two cores. Prints tables, then, as its last line,
one JSON object. The part names are those of the modules: growth, encode_pack, pipeline, fill.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prep import encode_pack, fill, growth, inputs, pipeline, vocabularies
from benchmarks.prep.preparation import REPO, prepare
from benchmarks.prep.tables import tables
from cprec.errors import CPRecError

PARTS = ("growth", "encode_pack", "pipeline", "fill")
PACKAGES = ("duckdb", "ibis-framework", "pyarrow", "numpy", "tokenizers", "gigatoken", "datasets", "datatrove")
SEQ_LENS = (2048, 4096)
MAIN_SEQ_LEN = 2048


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: Path | None
    domains: tuple[str, ...] | None
    events: tuple[int, ...]
    pipeline_events: int
    vocabularies: tuple[str, ...]
    repeats: int
    stride: int
    cores: int
    memory_limit: str
    only: tuple[str, ...]
    work: Path
    out: Path | None


def options(argv: list[str] | None = None) -> Options:
    """The command line, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="folder with interactions/ and items/; default: Complete Journey")
    p.add_argument("--domains", help="comma list; default: all that there are")
    p.add_argument("--events", default="1e6,1e7", help="sizes of growth, comma list; the largest is also raced on")
    p.add_argument("--pipeline-events", type=float, default=5e5, help="size of the whole-line race")
    p.add_argument("--vocabularies", default=",".join(vocabularies.MAKERS))
    p.add_argument("--repeats", type=int, default=3, help="runs of every side; medians count")
    p.add_argument("--stride", type=int, default=64, help="slow tokenizers take every so-manieth document")
    p.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--memory-limit", default="1200MB", help="engine.memory_limit of all preparations")
    p.add_argument("--only", default=",".join(PARTS), help="comma list of parts")
    p.add_argument("--work", type=Path, default=REPO / "work" / "bench-prep")
    p.add_argument("--out", type=Path, help="folder of scale.md: keep what was measured there")
    a = p.parse_args(argv)
    only = tuple(a.only.split(","))
    if unknown := set(only) - set(PARTS):
        p.error(f"--only {','.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    return Options(
        data=a.data and a.data.absolute(), domains=tuple(a.domains.split(",")) if a.domains else None,
        events=tuple(sorted(int(float(e)) for e in a.events.split(","))), pipeline_events=int(a.pipeline_events),
        vocabularies=tuple(a.vocabularies.split(",")), repeats=a.repeats, stride=a.stride, cores=a.cores,
        memory_limit=a.memory_limit, only=only, work=a.work.absolute(), out=a.out)


def main() -> None:
    o = options()
    begin_s = time.monotonic()
    try:
        found = measure(o)
    except CPRecError as e:
        sys.exit(f"{e}")
    found["argv"] = sys.argv[1:]
    found["minutes"] = round((time.monotonic() - begin_s) / 60, 1)
    print("\n" + tables(found), flush=True)
    if o.out is not None:
        keep(found, o.out)
    print(json.dumps(headline(found)))


def measure(o: Options) -> dict[str, Any]:
    """Every chosen part's results, as JSON-able values, with the machine they are from."""
    source = inputs.source(o.data, o.domains)
    say(f"{source.name}: the real data, prepared")
    folders = {name: vocabularies.tokenizer_folder(name, o.work) for name in o.vocabularies}
    small = folders[o.vocabularies[0]]
    prepared_real = prepare_real(source, o, small)
    real = inputs.real_data(source.name, prepared_real)
    found: dict[str, Any] = {"machine": machine(o.cores), "data": {
        "name": real.name, "events": real.events.num_rows, "items": real.items.num_rows, "domains": source.domains},
        "memory_limit": o.memory_limit, "seq_len": MAIN_SEQ_LEN, "vocabularies": o.vocabularies}
    if "growth" in o.only or "encode_pack" in o.only:
        sizes = [size_of(real, source, n, o, small) for n in (o.events if "growth" in o.only else o.events[-1:])]
        found["growth"] = {"sizes": [asdict(s) for s in sizes], "exponent": growth.exponent(sizes),
                           "last_exponent": growth.exponent(sizes[-2:])}
    if "encode_pack" in o.only:
        races = []
        for name, folder in folders.items():
            say(f"encode and pack, {o.events[-1]:,} events, {name}")
            race = encode_pack.Race(o.work / f"{o.events[-1]}" / "out", o.work / "race", o.cores, o.repeats, o.stride,
                                    MAIN_SEQ_LEN)
            result = encode_pack.measure(race, folder)
            races.append(asdict(result) | {"ratios": {s.name: result.ratio(s.name) for s in result.sides}})
        found["encode_pack"] = {"events": o.events[-1], "stride": o.stride, "vocabularies": races}
    if "pipeline" in o.only:
        found["pipeline"] = whole_line(real, source, o, small)
    if "fill" in o.only:
        say("fill of the real data's rows")
        fills = fill.measure(prepared_real, o.work / "real", tokenizer=small, seq_lens=SEQ_LENS, cores=o.cores)
        found["fill"] = [asdict(f) for f in fills]
    return found


def size_of(real: inputs.RealData, source: inputs.Source, n_events: int, o: Options, tokenizer: Path) -> growth.Size:
    """Prepare `n_events`, measured; the folder is kept."""
    say(f"growth, {n_events:,} events")
    at = o.work / f"{n_events}"
    inputs.write_resampled(real, n_events, at / "raw")
    shutil.rmtree(at / "out", ignore_errors=True)
    config = inputs.write_config(
        at / "config.yaml", out=at / "out", datasets=inputs.resampled_dataset(at / "raw"), domains=source.domains,
        tokenizer=tokenizer, seq_len=MAIN_SEQ_LEN, cores=o.cores, memory_limit=o.memory_limit)
    return growth.measured(at, n_events, prepare(config))


def whole_line(real: inputs.RealData, source: inputs.Source, o: Options, tokenizer: Path) -> dict[str, Any]:
    """Benchmark 2 on raw files of its own size."""
    say(f"raw files to packed rows, {o.pipeline_events:,} events")
    raw = inputs.write_resampled(real, o.pipeline_events, o.work / f"{o.pipeline_events}" / "raw")
    result = pipeline.measure(pipeline.Setup(
        raw, o.pipeline_events, source.domains, tokenizer, o.work / "line", MAIN_SEQ_LEN, o.cores, o.repeats,
        o.memory_limit))
    return asdict(result) | {"ratios": {name: result.ratio(name) for name in pipeline.RIVALS}}


def prepare_real(source: inputs.Source, o: Options, tokenizer: Path) -> Path:
    """Prepare the real data as they are: what is resampled, and what fill is measured on."""
    at = o.work / "real"
    shutil.rmtree(at, ignore_errors=True)
    prepare(inputs.write_config(
        at / "config.yaml", out=at / "out", datasets=source.datasets, domains=source.domains, tokenizer=tokenizer,
        seq_len=MAIN_SEQ_LEN, cores=o.cores, memory_limit=o.memory_limit))
    return at / "out"


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that count, one value each: of both vocabularies the worse one. null: not measured."""
    sizes = found.get("growth", {}).get("sizes", [])
    fills = {f["seq_len"]: f["fill"] for f in found.get("fill", [])}
    races = found.get("encode_pack", {}).get("vocabularies", [])

    def worst(side: str) -> float | None:
        ratios = [r["ratios"].get(side) for r in races]
        return rounded(min(ratios)) if ratios and None not in ratios else None

    return {
        "encode_pack_vs_hf": worst(encode_pack.HF), "encode_pack_vs_gigatoken": worst(encode_pack.GIGATOKEN),
        "encode_pack_vs_datasets": worst(encode_pack.DATASETS), "encode_pack_vs_memcpy": worst(encode_pack.COPY),
        "encode_pack_vs_memcpy_in_memory": worst(encode_pack.COPY_IN_MEMORY),
        **{f"pipeline_vs_{name}": rounded(found.get("pipeline", {}).get("ratios", {}).get(name))
           for name in pipeline.RIVALS},
        **{f"fill_{n}": rounded(fills.get(n), 6) for n in SEQ_LENS},
        "peak_mb": {str(s["n_events"]): round(s["run"]["peak_mb"]) for s in sizes},
        "seconds": {str(s["n_events"]): round(s["run"]["seconds"], 1) for s in sizes},
        "growth_exponent": rounded(found.get("growth", {}).get("exponent")),
        "memory_limit": found["memory_limit"], "data": found["data"]["name"], **found["machine"],
        "minutes": found["minutes"]}


def rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def keep(found: dict[str, Any], out: Path) -> None:
    """Write OUT/prep_bench.json and the tables between the marks of OUT/scale.md, where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "prep_bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    scale = out / "scale.md"
    if scale.is_file():
        from benchmarks.prep.extrapolate import filled

        scale.write_text(filled(scale.read_text(encoding="utf-8"), found), encoding="utf-8")


def machine(cores: int) -> dict[str, Any]:
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
    return {"cpu": cpu[1] if cpu else platform.processor(), "cores": cores,
            "memory_gb": round(int(memory_kb[1]) * 1024 / 1e9) if memory_kb else None,
            "python": platform.python_version(), "versions": versions, "commit": commit.stdout.strip() or "unknown"}


def say(what: str) -> None:
    print(f"=== {time.strftime('%H:%M:%S')} {what}", flush=True)


if __name__ == "__main__":
    main()
