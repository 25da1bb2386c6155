"""The engines by name.

reads: nothing. writes: nothing; an engine's library is loaded when it is asked for.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.config import EngineSettings
from data_prep.engine import Engine


def connect(settings: EngineSettings, *, spill: Path) -> Engine:
    """The engine that the settings name. Raises ConfigError when it cannot start."""
    if settings.name == "spark":
        from data_prep.engines.spark import SparkEngine

        return SparkEngine(memory_limit=settings.memory_limit, threads=settings.threads, master=settings.master,
                           spill=spill)
    from data_prep.engines.duckdb import DuckDBEngine

    return DuckDBEngine(memory_limit=settings.memory_limit, threads=settings.threads, spill=spill)
