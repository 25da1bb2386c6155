"""Many lists of token ids as one flat array, in memory or mapped from an Arrow file, and gathering from it.

reads and writes: one uncompressed Arrow IPC file with one column, `ids: large_list<uint32>`. Mapped, it costs no
memory but what is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

START, END, FIRST_ITEM = 0, 1, 2
"""Rows of the segment table: what a document starts with, what it ends with, the line of item 0."""
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Ragged:
    """Lists of ids laid end to end: list i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Ids
    offsets: Ints

    @property
    def lens(self) -> Ints:
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> Ids:
        return self.ids[self.offsets[i]:self.offsets[i + 1]]

    def gather(self, rows: Ints) -> Ids:
        """The lists `rows`, laid end to end in that order."""
        return self.ids[spans(self.offsets[rows], self.lens[rows])]


def spans(starts: Ints, lens: Ints) -> Ints:
    """Indices start, start + 1, ... of every span, laid end to end: spans([5, 0], [2, 3]) is 5 6 0 1 2."""
    ends = np.cumsum(lens)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lens, lens) + np.arange(total, dtype=np.int64)


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    """The lists as one ragged array."""
    lens = np.fromiter(map(len, lists), np.int64, len(lists))
    flat = np.fromiter((i for ids in lists for i in ids), np.uint32, int(lens.sum()))
    return Ragged(flat, np.concatenate([[0], np.cumsum(lens)]))


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The lists of all parts, in order."""
    lens = np.concatenate([np.zeros(0, np.int64), *(p.lens for p in parts)])
    ids = np.concatenate([np.zeros(0, np.uint32), *(p.ids for p in parts)])
    return Ragged(ids, np.concatenate([[0], np.cumsum(lens)]).astype(np.int64))


def write_ragged(path: Path, lists: Ragged) -> None:
    """Write as one uncompressed Arrow batch, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.LargeListArray.from_arrays(pa.array(lists.offsets), pa.array(lists.ids))
    batch = pa.record_batch({"ids": column})
    partial = path.with_name(path.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)


def map_ragged(path: Path) -> Ragged:
    """The lists as views into the mapped file."""
    column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)["ids"]
    return Ragged(column.values.to_numpy(), column.offsets.to_numpy())
