"""The page cache: bring files in, put them out, and see which share of them is there.

reads: files, Linux. Putting out is advice that a system may not take (a file that is not written to disk yet, a file
system in memory), so `cached_share` looks (mincore) and the tables say what it saw.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PIECE = 8 << 20


def files_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def warm(files: Sequence[Path]) -> None:
    """Read the files once."""
    for path in files:
        with path.open("rb", buffering=0) as f:
            while f.read(PIECE):
                pass


def drop(files: Sequence[Path]) -> None:
    """Advise the system to let go of the files' pages, once they are on the disk."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached_share(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    there = total = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        with path.open("rb") as f, mmap.mmap(f.fileno(), size, prot=mmap.PROT_READ) as mapped:
            n = -(-size // mmap.PAGESIZE)
            known = np.zeros(n, np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            failed = libc.mincore(view.ctypes.data, size, known.ctypes.data)
            del view
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
            there, total = there + int((known & 1).sum()), total + n
    return there / max(total, 1)
