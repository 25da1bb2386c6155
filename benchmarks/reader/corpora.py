"""The corpora of a run, one folder each, in every side's own format; kept for the next run of the same rows.

reads: nothing, or a packed folder. writes: below the work folder, per corpus: `records.bin` and a folder per side; a
file `done` in each says that it is whole. Costs: holds one block of rows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.reader import ours
from benchmarks.reader.records import RECORDS, Shape, generated, real, records_of
from benchmarks.reader.rivals import OURS, SIDES
from cprec.format import PackedRows

DONE = "done"


@dataclass(frozen=True)
class Corpus:
    """One corpus on disk."""

    folder: Path
    shape: Shape
    seed: int


def build(folder: Path, n_rows: int, *, seq_len: int, seed: int, packed: Path | None) -> Corpus:
    """Our shards and the records, unless an earlier run left the same; the other sides come by `add`."""
    stamp = f"{n_rows} rows of {seq_len}, seed {seed}, {packed or 'generated'}\n"
    done = folder / DONE
    if not (done.is_file() and done.read_text().startswith(stamp)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        blocks = real(packed, n_rows) if packed else generated(n_rows, seq_len, seed)
        width, dtype = _write(folder, blocks, seed)
        (folder / OURS / DONE).touch()
        done.write_text(f"{stamp}{width} {dtype}")
    width_text, dtype = done.read_text().splitlines()[1].split()
    return Corpus(folder, Shape(n_rows, seq_len, int(width_text), dtype), seed)


def _write(folder: Path, blocks: Iterator[PackedRows], seed: int) -> tuple[int, str]:
    """Write our shards, then the records with the width that the fullest row needs; returns width and dtype."""
    most, dtype = 0, ""
    for rows in ours.write(folder / OURS, blocks, seed=seed):
        most, dtype = max(most, int(rows.n_lens.max())), rows.input_ids.dtype.name
    width = 0
    with (folder / RECORDS).open("wb") as f:
        for rows in ours.blocks(folder / OURS):
            width = rows.input_ids.shape[1] + 1 + most
            records_of(rows, width).tofile(f)
    return width, np.dtype(dtype).name


def add(corpus: Corpus, side: str) -> float | None:
    """Make a side's files; the seconds that it took, None where they were there."""
    folder = corpus.folder / side.replace(" ", "-")
    if (folder / DONE).is_file():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    begin_s = time.perf_counter()
    SIDES[side].write(corpus.folder, corpus.shape, folder, corpus.seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).touch()
    return time.perf_counter() - begin_s
