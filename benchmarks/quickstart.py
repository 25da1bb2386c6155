"""Measures the quickstart from an empty work folder, and keeps what README shows of it.

    .venv/bin/python benchmarks/quickstart.py

reads: nothing but the repository. writes: `work/quickstart/` (emptied first), `docs/quickstart/` (report, pictures,
`measured.json` with seconds per step, hardware, versions and commit). Costs: about ten minutes on two cores. Prints
`measured.json` as its last line.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "pyarrow", "duckdb", "ibis-framework", "numpy")


def main() -> None:
    shutil.rmtree(REPO / "work/quickstart", ignore_errors=True)
    measured = {"seconds": run(), **machine()}
    docs = REPO / "docs/quickstart"
    docs.mkdir(parents=True, exist_ok=True)
    for file in (REPO / "work/quickstart/report").iterdir():
        shutil.copy(file, docs / file.name)
    (docs / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured))


def run() -> dict[str, float]:
    """Wall seconds of every step of the line, and of all."""
    seconds: dict[str, float] = {}
    started = last = time.monotonic()
    label = "start"
    process = subprocess.Popen([sys.executable, "launch/quickstart.py"], cwd=REPO, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if begun := re.match(r"=== (.+?): ", line):
            now = time.monotonic()
            seconds[label] = round(seconds.get(label, 0.0) + now - last, 1)
            label, last = begun[1], now
    if process.wait():
        sys.exit(process.returncode)
    seconds[label] = round(seconds.get(label, 0.0) + time.monotonic() - last, 1)
    return {**seconds, "all": round(time.monotonic() - started, 1)}


def machine() -> dict[str, object]:
    """Hardware, versions and commit."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_kb = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
    return {
        "cpu": cpu[1] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory_kb[1]) * 1024 / 1e9) if memory_kb else None,
        "python": platform.python_version(), "versions": {p: version(p) for p in PACKAGES},
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
