"""What one process of the benchmark is told, and what it answers: values, sent as JSON."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from benchmarks.reader.records import Shape


class Job(BaseModel):
    """Read with one side, as one rank."""

    model_config = ConfigDict(frozen=True)

    side: str
    workers: int
    """DataLoader workers; 0 reads in the process itself."""
    folder: Path
    """Of one corpus; every side has its own below it."""
    shape: Shape
    micro_batch_size: int
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    port: int = 0
    """Where the ranks of a library that wants to talk can meet."""
    first_row: int = 0
    """Rows of the epoch that all ranks have read before: where a run resumes."""
    most_rows: int | None = None
    """None: to the end of the epoch."""
    seconds: float = 1e9
    check: bool = False

    @property
    def at(self) -> Path:
        """This side's own files."""
        return self.folder / self.side.replace(" ", "-")


class Answer(BaseModel):
    """What one process measured."""

    model_config = ConfigDict(frozen=True)

    imports_s: float
    first_batch_s: float
    """From opening the corpus to the first finished batch, libraries imported."""
    rows: int
    seconds: float
    """Reading `rows` more rows."""
    anon_mb: float
    """RssAnon in 10^6 bytes at the end, of the process and its workers."""
    file_mb: float
    """RssFile: pages of files it maps, which the system takes back when it wants."""
    anon_before_mb: float
    """RssAnon when all was imported and nothing opened."""
    checksum: int = 0
    checked_rows: int = 0
