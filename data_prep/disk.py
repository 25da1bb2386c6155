"""A full disk as one clear error, wherever in a preparation it is met.

reads: the free space of a folder. writes: nothing. Costs nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cprec.errors import DataError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = tuple(os.strerror(n) for n in FULL)
"""How the engines' own messages say it."""


def disk_full(folder: Path, cause: str) -> DataError:
    """The error of a write below `folder` that found no room; `cause` is the system's word for it."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    return DataError(f"cannot write below {folder}: {cause} ({free:,} bytes are free there); make room (or raise the "
                     f"quota or file size limit), then start the same command again: it goes on from where it was")


@contextmanager
def name_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn an OSError that says that there is no room into `disk_full` of `folder`."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise disk_full(folder, os.strerror(e.errno)) from None
