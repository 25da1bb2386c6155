"""The scripts of launch/, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_script(name: str, *arguments: str, n_processes: int | None = None,
               cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`launch/<name>` with these arguments, by torchrun where a number of processes is given."""
    start = [sys.executable] if n_processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    return subprocess.run([*start, str(REPOSITORY / "launch" / name), *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, timeout=300,
                          cwd=cwd)
