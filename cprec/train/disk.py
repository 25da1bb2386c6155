"""A run folder that takes no more, as one clear error, wherever in a run it is met.

reads: the free space of a folder. writes: nothing. Costs nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cprec.errors import CheckpointError

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def name_refused_writes(run_dir: Path) -> Iterator[None]:
    """Turn what a write says that found no room, a read-only or a failing disk, into CheckpointError."""
    try:
        yield
    except OSError as e:
        if e.errno not in REFUSED:
            raise
        there = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
        error = CheckpointError(
            f"cannot write {e.filename or f'below {run_dir}'}: {os.strerror(e.errno)} "
            f"({shutil.disk_usage(there).free:,} bytes are free there). Make room, or let it be written to (quota, "
            f"file size limit, mount options); the same command then goes on from the newest complete checkpoint")
        error.on_one_rank = True
        raise error from e
