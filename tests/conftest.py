"""Fixtures that several parts' tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("cprec", deadline=None, derandomize=True)  # no test depends on time or chance
settings.load_profile("cprec")


@pytest.fixture(scope="session", autouse=True)
def own_extensions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What deepspeed compiles goes to a folder of this session: a process killed while compiling leaves a lock in the
    common one, at which every later start would wait for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """No test leaves behind what others would fail at: a broken pipe that ends the process, a rendezvous whose port
    is taken."""
    before = signal.getsignal(signal.SIGPIPE), os.environ.get("MASTER_PORT")
    yield
    assert (signal.getsignal(signal.SIGPIPE), os.environ.get("MASTER_PORT")) == before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is absent: no folder {folder}")
    return folder
