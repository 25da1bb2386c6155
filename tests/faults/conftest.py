"""The world of the fault tests, the process that forks its ranks, and the unbroken runs to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from killable import EVERY, STABLE_EVERY, STEPS, Run

from benchmarks.faults.checks import Reference, read_reference
from benchmarks.faults.lives import build_moments, stand_by


@pytest.fixture(scope="session")
def standing_by(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process that forks ranks waits; skips where there is no gcc."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is absent: the library that ends a process at a chosen file operation cannot be built")
    stand_by(build_moments(tmp_path_factory.mktemp("moments")))


@pytest.fixture(scope="session")
def fault_world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 24 steps on one rank, saved at every second, kept for good at every fourth."""
    return tiny.write_world(tmp_path_factory.mktemp("faults")) | {
        "schedule": {"total": {"steps": STEPS}, "warmup": {"steps": 2}}, "validation": {"every": 8},
        "checkpoint": {"every": EVERY, "keep_last": 1, "keep_stable_every": STABLE_EVERY}}


def _unbroken(values: dict[str, Any], folder: Path, ranks: int) -> Reference:
    config = folder / "unbroken.yaml"
    config.write_text(yaml.safe_dump(values | {"run_dir": str(folder / "unbroken"),
                                               "checkpoint": {"every": 1, "keep_last": STEPS}}))
    Run(folder / "unbroken", config, ranks, Reference({}, {})).ends()
    return read_reference(folder / "unbroken")


@pytest.fixture(scope="session")
def unbroken(standing_by: None, fault_world: dict[str, Any],
             tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Reference]:
    """The unbroken run on so many ranks, trained once."""
    known: dict[int, Reference] = {}

    def on(ranks: int) -> Reference:
        if ranks not in known:
            known[ranks] = _unbroken(fault_world, tmp_path_factory.mktemp(f"unbroken-{ranks}"), ranks)
        return known[ranks]

    return on


@pytest.fixture(scope="session")
def run_in(fault_world: dict[str, Any], unbroken: Callable[[int], Reference]) -> Callable[..., Run]:
    """Makes runs of the world: `run_in(folder, ranks=2, run_dir=..., data=...)`; the config lies in the folder."""

    def make(folder: Path, *, ranks: int = 1, run_dir: Path | None = None, **overrides: Any) -> Run:
        run = Run(run_dir or folder / "run", folder / "run.yaml", ranks, unbroken(ranks))
        run.config.write_text(yaml.safe_dump(fault_world | {"run_dir": str(run.run_dir)} | overrides))
        return run

    return make


@pytest.fixture
def new_run(run_in: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """`run_in` the test's own folder."""
    return partial(run_in, tmp_path)
