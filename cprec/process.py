"""Processes that belong together: a child that does not outlive its parent, a folder that has one writer.

A SIGKILL reaches one process. Without this its children would write on, into folders that the restarted job also
writes. Linux only (prctl, pidfd, flock).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cprec.errors import ConfigError
from cprec.log import get_logger

log = get_logger(__name__)
PR_SET_PDEATHSIG = 1


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process `signal_number` when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)


def stop_with_launcher() -> None:
    """Have a rank get SIGTERM when its launcher is gone: its parent, and above deepspeed's per-node launcher also the
    runner, which is the process that a user sees and stops."""
    die_with_parent(signal.SIGTERM)
    parent = os.getppid()
    if b"deepspeed.launcher" in _command(parent):
        status = Path(f"/proc/{parent}/status").read_text()
        runner = int(status.partition("PPid:")[2].split()[0])
        if b"deepspeed" in _command(runner):
            end_with(runner, signal.SIGTERM)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def end_with(pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have this process get `signal_number` once process `pid` is gone, also when others stand between the two."""

    def watch(handle: int) -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal_number)

    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal_number)
    else:
        threading.Thread(target=watch, args=(handle,), daemon=True).start()


@contextmanager
def only_writer(folder: Path, *, wait_s: float = 60.0) -> Iterator[None]:
    """Be the only writer of `folder` while inside; the lock goes with the process, however it ends.

    The lock file stands beside the folder, which is not touched. Waits up to `wait_s` seconds for another holder to
    finish, then raises ConfigError naming the folder and its holder; at once where files cannot be locked.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder")
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
    except OSError as e:
        raise ConfigError(f"cannot write beside {folder}: {e.strerror}; name a folder where you may write") from None
    with lock as f:
        _wait_for(f.fileno(), path, folder, wait_s)
        f.seek(0)
        f.truncate()
        f.write(str(os.getpid()))
        f.flush()
        yield


def is_being_written(folder: Path) -> bool:
    """Whether some process is the folder's only writer now, as far as locks reach."""
    try:
        with (folder.parent / f".{folder.name}.lock").open("r") as f:
            fcntl.flock(f.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock was ever taken, or it may not be looked at
        return False
    return False


def _wait_for(fd: int, path: Path, folder: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    said = False
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text() or "unknown"
            if time.monotonic() > deadline:
                raise ConfigError(f"{folder} is being written by process {holder}; wait for it or stop it, or use "
                                  f"another folder") from None
            if not said:
                log.warning("%s is being written by process %s: waiting up to %.0f s", folder, holder, wait_s)
                said = True
            time.sleep(0.2)
        except OSError as e:
            raise ConfigError(f"{folder}: files beside it cannot be locked ({e.strerror}), so nothing would keep a "
                              f"second writer out; mount its file system with flock (Lustre: -o flock; NFS: its lock "
                              f"service) or name a folder on another one") from None
