"""A real run of the tiny world that can be ended anywhere, and is then compared with an unbroken one."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.checks import Findings, Reference, examine, resumed_at
from benchmarks.faults.lives import ForkedLife, Moment, fork
from cprec.errors import EXIT_REQUEUE

STEPS, EVERY, STABLE_EVERY = 24, 2, 4


@dataclass(frozen=True)
class Run:
    """A run folder with its config; the same command starts it and goes on with it."""

    run_dir: Path
    config: Path
    ranks: int
    reference: Reference

    def start(self, *, moment: Moment | None = None, dying_rank: int = 0, env: dict[str, str] | None = None,
              log: str = "log") -> ForkedLife:
        """Start it; `dying_rank` is killed at `moment`."""
        return fork(self.config, self.config.with_suffix(f".{log}"), ranks=self.ranks, moment=moment,
                    dying_rank=dying_rank, env=env)

    def started(self, **how: Any) -> ForkedLife:
        """Start it, and wait until it has logged a step."""
        metrics = self.run_dir / "metrics.jsonl"
        before = metrics.read_bytes() if metrics.exists() else b""
        life = self.start(**how)
        deadline = time.monotonic() + 200
        while not metrics.exists() or metrics.stat().st_size == 0 or metrics.read_bytes() == before:
            assert not life.is_over() and time.monotonic() < deadline, life.said()
            time.sleep(0.01)
        return life

    def ends(self, *codes: int, **how: Any) -> str:
        """What a start said that ends with these exit codes (by default: 0 on every rank)."""
        life = self.start(**how)
        assert life.end() == list(codes or [0] * self.ranks), life.said()
        return life.said()

    def findings(self) -> Findings:
        """Everything in the run folder compared with the unbroken run."""
        return examine(self.run_dir, self.reference, stable_every=STABLE_EVERY)

    def stops(self, *, saving: int = 10) -> str:
        """What it said that was stopped by SIGTERM while it saved that step: the last one it did is saved, too."""
        said = self.ends(EXIT_REQUEUE, moment=Moment("write", f"/step_{saving:08d}/", signal=signal.SIGTERM))
        found = self.unharmed()
        assert saving < found.newest == found.logged < STEPS, found
        return said

    def unharmed(self) -> Findings:
        """The findings, none of which is bad."""
        found = self.findings()
        assert not (found.other_losses or found.damaged or found.damaged_stable), found
        return found

    def goes_on_to_the_end(self, *, after: int | None = None, env: dict[str, str] | None = None) -> str:
        """It goes on from the newest complete checkpoint (or from `after`) and ends like the unbroken run."""
        newest = self.findings().newest if after is None else after
        said = self.ends(env=env)
        assert resumed_at(said) == newest, said
        found = self.unharmed()
        assert (found.newest, found.logged) == (STEPS, STEPS)
        assert len(self.reference.losses) == len((self.run_dir / "metrics.jsonl").read_text().splitlines())
        return said
