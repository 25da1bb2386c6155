"""Many lists of token ids as one flat array, in memory or mapped from an Arrow file, and gathering from it.

reads and writes: one uncompressed Arrow IPC file with one column, `ids: large_list<uint16 or uint32>`. Mapped, it
costs 8 bytes per list (16 once their lengths are asked for) and what is touched. Written part by part, it costs 24
bytes per list; its ids pass through a second file beside it, which is gone when it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cprec.format import replacing

START, END, TARGET, PAD, FIRST_ITEM = range(5)
"""Rows of the segment table: what a document starts with, what it ends with, what stands before its last item (of a
supervised template; else an empty list), one token of padding, the text of item 0."""
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ragged:
    """Lists of ids laid end to end: list i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Ids
    offsets: Ints

    @cached_property
    def lens(self) -> Ints:
        """Ids of each list; computed when first asked for, and kept."""
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> Ids:
        return self.ids[self.offsets[i]:self.offsets[i + 1]]

    def gather(self, rows: Ints | Ids) -> Ids:
        """The lists `rows`, laid end to end in that order; one copy of memory per list."""
        taken = self._as_bytes.take(pa.array(rows)).buffers()[2]
        return np.frombuffer(b"" if taken is None else taken, dtype=self.ids.dtype)  # type: ignore[return-value]

    @cached_property
    def _as_bytes(self) -> pa.LargeBinaryArray:
        """The lists as byte strings, which Arrow gathers whole, where it gathers a list's numbers one by one."""
        offsets = self.offsets * self.ids.itemsize
        return pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(self.ids)])


def document_rows(items: Ints) -> Ints:
    """Rows of the segment table that make up the document of these catalogue numbers, at least one."""
    return np.concatenate([[START], items[:-1] + FIRST_ITEM, [TARGET], items[-1:] + FIRST_ITEM, [END]])


def spans(starts: Ints, lens: Ints) -> Ints:
    """Indices start, start + 1, ... of every span, laid end to end: spans([5, 0], [2, 3]) is 5 6 0 1 2."""
    ends = np.cumsum(lens)
    total = int(ends[-1]) if len(ends) else 0
    indices = np.arange(total, dtype=np.int64)
    indices += np.repeat(starts - ends + lens, lens)
    return indices


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    """The lists as one ragged array."""
    lens = np.fromiter(map(len, lists), np.int64, len(lists))
    flat = np.fromiter((i for ids in lists for i in ids), np.uint32, int(lens.sum()))
    return Ragged(flat, np.concatenate([[0], np.cumsum(lens)]))


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The lists of all parts, in order."""
    lens = np.concatenate([np.zeros(0, np.int64), *(p.lens for p in parts)])
    ids = np.concatenate([p.ids for p in parts]) if parts else np.zeros(0, np.uint32)
    return Ragged(ids, np.concatenate([[0], np.cumsum(lens)]).astype(np.int64))


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type that holds every id: uint16 up to 65,536 of them."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_ragged(path: Path, lists: Ragged) -> None:
    """Write as one uncompressed Arrow batch, ids of the type that they have, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.LargeListArray.from_arrays(pa.array(lists.offsets), pa.array(lists.ids))
    batch = pa.record_batch({"ids": column})
    write_batch(path, batch)


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Write one uncompressed Arrow IPC file with this batch, by rename."""
    with (replacing(path) as partial, pa.OSFile(str(partial), "wb") as sink,
          pa.ipc.new_file(sink, batch.schema) as writer):
        writer.write_batch(batch)


def write_parts(path: Path, parts: Iterable[Ragged], *, dtype: Literal["uint16", "uint32"]) -> Ragged:
    """Write the lists of all parts, in order, as `write_ragged` writes them joined; returns them as views into
    the file.

    One part's ids are in memory at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = path.with_name(path.name + ".ids.partial")
    lens = [np.zeros(1, np.int64)]
    try:
        with flat.open("wb") as sink:
            for part in parts:
                part.ids.astype(dtype).tofile(sink)
                lens.append(part.lens)
        ids: Ids = np.memmap(flat, dtype, "r") if flat.stat().st_size else np.zeros(0, dtype)
        write_ragged(path, Ragged(ids, np.cumsum(np.concatenate(lens))))
    finally:
        flat.unlink(missing_ok=True)
    return map_ragged(path)


def map_ragged(path: Path) -> Ragged:
    """The lists as views into the mapped file."""
    column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)["ids"]
    return Ragged(column.values.to_numpy(), column.offsets.to_numpy())
