"""A trace of chosen steps: what ran when, on the host and on the device, for chrome://tracing or ui.perfetto.dev.

writes: `run/profile/steps-10-13.json.gz`, of rank 0. Costs: nothing outside the chosen steps; within them, time and
memory for every operator call.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cprec import dist
from cprec.errors import ConfigError
from cprec.log import get_logger

log = get_logger(__name__)


def parse_steps(text: str | None) -> range:
    """The steps that `--profile FIRST:LAST` means, both included; none for None. Raises ConfigError."""
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile {text}: give the first and the last step, such as 10:13")
    return range(int(first), int(last) + 1)


class Trace:
    """Traces `steps` of a run on rank 0; the others hold one that does nothing."""

    def __init__(self, run_dir: Path, steps: range, *, next_step: int, last_step: int) -> None:
        if steps and not next_step <= steps[0] <= steps[-1] <= last_step:
            raise ConfigError(f"--profile {steps[0]}:{steps[-1]}: this start runs steps {next_step:,} to {last_step:,}")
        self._folder, self._steps = run_dir / "profile", steps if dist.rank() == 0 else range(0)
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Begin to trace, if `step` (counted from 1) is the first one chosen."""
        if self._steps and step == self._steps[0]:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=devices, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> None:
        """Write the trace, if `step` is the last one chosen."""
        if self._running and step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was traced, also where the run ends before the last chosen step."""
        if self._running is None:
            return
        self._running.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{self._steps[0]}-{self._steps[-1]}.json.gz"
        self._running.export_chrome_trace(str(path))
        self._running = None
        log.info("wrote the trace of steps %d to %d to %s", self._steps[0], self._steps[-1], path)
