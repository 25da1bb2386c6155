"""Fixtures that several parts' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("cprec", deadline=None, derandomize=True)  # no test depends on time or chance
settings.load_profile("cprec")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is absent: no folder {folder}")
    return folder
