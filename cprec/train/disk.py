"""Disks: a folder that takes no more, as one clear error wherever it is met; files that are to be on the disk itself.

reads: the free space of a folder. writes: nothing of its own.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cprec.errors import CheckpointError, CPRecError
from cprec.format import sync

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def name_refused_writes(folder: Path) -> Iterator[None]:
    """Turn what a write at or below `folder` says that found no room, a read-only or a failing disk, into
    CheckpointError. Libraries in Rust (safetensors, tokenizers) say it in errors of their own."""
    try:
        yield
    except CPRecError:
        raise
    except Exception as e:
        number = e.errno if isinstance(e, OSError) else _number_in(e)
        if number not in REFUSED:
            raise
        assert number is not None
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        name = getattr(e, "filename", None) or f"below {folder}"
        error = CheckpointError(
            f"cannot write {name}: {os.strerror(number)} ({shutil.disk_usage(there).free:,} bytes are free there). "
            f"Make room, or let it be written to (quota, file size limit, mount options), and give the same command "
            f"again; training goes on from the newest complete checkpoint")
        error.on_one_rank = True
        raise error from e


def _number_in(error: Exception) -> int | None:
    """What the system said, of an error of a library in Rust: `No space left on device (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files to, which becomes `folder` once all of them are on the disk itself, and is removed
    when that fails: on a full disk its room is what the next attempt needs."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)
