"""Bad steps: which updates are left out, how many may be, and the rows that are not read again.

reads: `run/quarantine.json`, if there. writes: it, when a run stops for too many bad steps. What it holds is part of a
run's state: it is saved in every checkpoint, and a branch goes on with its trunk's. Costs: a median of some hundred
numbers per step. docs/watching.md says what a user sees of it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

from cprec import dist
from cprec.config import GuardConfig
from cprec.errors import CheckpointError
from cprec.format import write_atomically

Judge = Callable[[float, float | None], str | None]
"""From a step's loss and gradient norm (None where the engine knows none), over all ranks, to why its update is left
out, or None."""
QUARANTINE = "quarantine.json"


def judge_finite(loss: float, grad_norm: float | None) -> str | None:
    """Leaves out what is not finite."""
    if not math.isfinite(loss):
        return f"loss {loss}"
    if grad_norm is not None and not math.isfinite(grad_norm):
        return f"gradient norm {grad_norm} at loss {loss:.4f}"
    return None


class Guard:
    """What a run has learned about its bad steps. Every rank holds the same."""

    def __init__(self, config: GuardConfig, *, bad_steps: int = 0, recent_norms: Iterable[float] = (),
                 quarantine: Mapping[str, Iterable[int]] | None = None) -> None:
        self._config = config
        self.bad_steps = bad_steps
        self._recent = deque(recent_norms, maxlen=config.window)
        self._quarantine: dict[str, set[int]] = {}
        self.put_aside(quarantine or {})

    @property
    def recent_norms(self) -> list[float]:
        """Gradient norms of the last good steps, at most `window`, oldest first."""
        return list(self._recent)

    @property
    def quarantine(self) -> dict[str, list[int]]:
        """Rows that are not read again, sorted, by corpus."""
        return {name: sorted(rows) for name, rows in sorted(self._quarantine.items())}

    @property
    def bound(self) -> float | None:
        """Largest gradient norm of a good step; None while there is no bound."""
        if self._config.norm_factor is None or len(self._recent) < self._config.window:
            return None
        return self._config.norm_factor * median(self._recent)

    @property
    def is_exhausted(self) -> bool:
        """Whether there were more bad steps than the run may have."""
        return self.bad_steps > self._config.max_bad_steps

    def judge(self, loss: float, grad_norm: float | None) -> str | None:
        """Why the update of a step with this loss and gradient norm is left out, or None; a `Judge`."""
        reason, bound = judge_finite(loss, grad_norm), self.bound
        if reason is None and None not in (grad_norm, bound) and grad_norm > bound:  # type: ignore[operator]
            return (f"gradient norm {grad_norm:.3f} at loss {loss:.4f}, more than {self._config.norm_factor:g} x the "
                    f"median of the last {len(self._recent)} good steps (guard.norm_factor)")
        return reason

    def note_good(self, grad_norm: float | None) -> None:
        """Count a step that was taken: its norm moves the bound."""
        if grad_norm is not None:
            self._recent.append(grad_norm)

    def note_bad(self, rows: Mapping[str, Iterable[int]]) -> None:
        """Count a step whose update was left out, and put its rows aside; the bound stays."""
        self.bad_steps += 1
        self.put_aside(rows)

    def put_aside(self, rows: Mapping[str, Iterable[int]]) -> None:
        """Add rows, by corpus, to those that are not read again."""
        for name, of in rows.items():
            self._quarantine.setdefault(name, set()).update(of)


def read_quarantine(run_dir: Path) -> dict[str, list[int]]:
    """The rows, by corpus, that `run/quarantine.json` lists, as rank 0 finds them; none without the file. Collective.

    Raises CheckpointError when the file is not a mapping from corpora to lists of rows.
    """
    path = run_dir / QUARANTINE
    text = path.read_text(encoding="utf-8") if dist.rank() == 0 and path.is_file() else "{}"
    text = dist.gather_texts([text])[0]
    try:
        listed = json.loads(text)
        if all(isinstance(rows, list) and all(type(r) is int and r >= 0 for r in rows) for rows in listed.values()):
            return dict(listed)
    except (json.JSONDecodeError, AttributeError):
        pass
    raise CheckpointError(f'{path} is not of the form {{"corpus": [row, row, ...]}}; mend it or remove it')


def write_quarantine(run_dir: Path, rows: Mapping[str, list[int]]) -> None:
    """Leave the list where the next start of the run finds it. Rank 0 only."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(of)}" for name, of in rows.items())
    write_atomically(run_dir / QUARANTINE, f"{{\n{lines}\n}}\n")
