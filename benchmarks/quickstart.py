"""Measures the quickstart from an empty work folder, and keeps what README shows of it.

    .venv/bin/python benchmarks/quickstart.py

reads: nothing but the repository. writes: `work/quickstart/` (emptied first), `docs/quickstart/` (report, pictures,
`measured.json` with seconds per step, hardware, versions and commit), and the part of README between its quickstart
marks. Costs: about ten minutes on two cores. Prints `measured.json` as its last line.
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
from typing import Any

REPO = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "pyarrow", "duckdb", "ibis-framework", "numpy")


def main() -> None:
    shutil.rmtree(REPO / "work/quickstart", ignore_errors=True)
    measured: dict[str, Any] = {"seconds": run(), **machine()}
    docs = REPO / "docs/quickstart"
    docs.mkdir(parents=True, exist_ok=True)
    for file in (REPO / "work/quickstart/report").iterdir():
        shutil.copy(file, docs / file.name)
    (docs / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    readme = (REPO / "README.md").read_text()
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    report = json.loads((docs / "report.json").read_text())
    (REPO / "README.md").write_text(f"{head}{BEGIN}\n{shown(report, measured)}\n{END}{tail}")
    print(json.dumps(measured))


def shown(report: dict[str, Any], measured: dict[str, Any]) -> str:
    """The part of README: what was run, on what, the macro averages with their intervals, the picture."""
    cells = {(c["row"], c["model"], c["metric"]): c for c in report["cells"]}
    macros = [row for row in report["rows"] if row["is_macro"]]
    asked = [(row, metric) for row in macros for metric in ("HR@10", "NDCG@10", "MRR", "NLL")]

    def cell(model: str, row: str, metric: str) -> str:
        if (c := cells.get((row, model, metric))) is None:
            return "-"
        digits = 1 if metric == "NLL" else 3
        return f"{c['mean']:.{digits}f} [{c['low']:.{digits}f}, {c['high']:.{digits}f}]"

    lines = [
        f"It took {measured['seconds']['all'] / 60:.1f} minutes after installation ({measured['cpu']}, "
        f"{measured['cores']} cores; torch {measured['versions']['torch']}, deepspeed "
        f"{measured['versions']['deepspeed']}; commit {measured['commit'][:10]}; `benchmarks/quickstart.py`; all "
        f"numbers in [docs/quickstart](docs/quickstart/report.md)). Purchases after the test clock, ranked exactly in "
        f"the full catalogue of each department; items bought before are no candidates. Mean over departments with 95 "
        f"% bootstrap intervals over households; NLL in nats per item; a random order has HR@10 "
        f"{' and '.join(format(row['chance_hr10'], '.3f') for row in macros)}.", "",
        "| | " + " | ".join(f"{row['name'].split(' (')[0]}: {metric}" for row, metric in asked) + " |",
        "|---|" + "---:|" * len(asked),
    ]
    names = {"before": "model before pre-training", "stable": "stable checkpoint", "sqrt": "annealed, 1-sqrt",
             "linear": "annealed, linear"}
    lines += [f"| {names.get(e['name'], e['name'])} | "
              + " | ".join(cell(e["name"], row["name"], metric) for row, metric in asked) + " |"
              for e in report["models"]]
    return "\n".join([*lines, "", "![validation loss per department](docs/quickstart/validation_loss.png)"])


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
