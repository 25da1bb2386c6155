"""One preparation as users run it, measured from outside: wall seconds per stage, and the memory of all its processes.

reads: /proc (Linux). writes: what the preparation writes. Memory is the sum of the proportional set sizes (PSS) of the
process and its descendants, which counts shared pages once, sampled every quarter of a second.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPO = Path(__file__).parents[2]
SAMPLE_EVERY_S = 0.25
DONE = re.compile(r"stage (\w+): done in ([\d.]+) s")


@dataclass(frozen=True)
class Run:
    """One process tree from start to end."""

    seconds: float
    peak_mb: float
    """Of the sum over its processes, in 10^6 bytes."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    packed_s: float = 0.0
    """Seconds from the start until stage pack was done; what comes after, no rival does."""


def prepare(config: Path) -> Run:
    """Run `launch/prepare.py` with this config. Raises RuntimeError with its last lines when it fails."""
    return run_measured([sys.executable, "launch/prepare.py", "--config", str(config)])


def run_measured(command: list[str]) -> Run:
    """Run `command` from the repository, its memory sampled."""
    begin_s = time.monotonic()
    process = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = _Peak(process.pid)
    lines: list[str] = []
    stages: dict[str, float] = {}
    packed_s = 0.0
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if done := DONE.search(line):
            stages[done[1]] = float(done[2])
            packed_s = time.monotonic() - begin_s if done[1] == "pack" else packed_s
    failed = process.wait()
    seconds = time.monotonic() - begin_s
    peak.stop()
    if failed:
        raise RuntimeError(f"{' '.join(command)} ended with {failed}:\n{''.join(lines[-30:])}")
    return Run(seconds, peak.bytes / 1e6, stages, packed_s)


class _Peak:
    """Samples the memory of a process and its descendants until `stop`; `bytes` is the largest sum."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_EVERY_S):
            try:
                root = psutil.Process(self._pid)
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.bytes = max(self.bytes, sum(pss(p.pid) for p in tree))


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes: its own pages, and its share of those that others map too. 0 for
    one that is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
