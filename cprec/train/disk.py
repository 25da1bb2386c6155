"""Disks: a folder that takes no more, as one clear error wherever it is met; files that are to be on the disk itself.

reads: the free space of a folder. writes: nothing of its own.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cprec.errors import CheckpointError, CPRecError
from cprec.format import sync

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only a write is told; a failing disk (EIO) says the same of a read."""


@contextmanager
def name_refused_writes(folder: Path) -> Iterator[None]:
    """Turn what a write at or below `folder` says that found no room, a read-only or a failing disk, into
    CheckpointError. Libraries in Rust (safetensors, tokenizers) say it in errors of their own, without the file's name
    and without what was done to it: of those a failing disk stays what it is."""
    try:
        yield
    except CPRecError:
        raise
    except Exception as e:
        refusal = _refusal_in(e, folder.absolute())
        if refusal is None:
            raise
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        name = getattr(e, "filename", None) or f"below {folder}"
        error = CheckpointError(
            f"cannot write {name}: {refusal} ({shutil.disk_usage(there).free:,} bytes are free there). "
            f"Make room, or let it be written to (quota, file size limit, mount options), and give the same command "
            f"again; training goes on from the newest complete checkpoint")
        error.on_one_rank = True
        raise error from e


def _refusal_in(error: Exception, folder: Path) -> str | None:
    """What a refused write said; None for any other error, such as of a disk that fails where something is read."""
    if isinstance(error, OSError):
        name = error.filename
        is_ours = not isinstance(name, (str, Path)) or str(Path(name).absolute()).startswith(str(folder))
        return error.strerror if error.errno in REFUSED or (error.errno == errno.EIO and is_ours) else None
    number = re.search(r"\(os error (\d+)\)", str(error))  # `No space left on device (os error 28)`
    return str(error) if number and int(number[1]) in REFUSED else None


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
