"""One writer per folder, and no orphans."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cprec.errors import ConfigError
from cprec.process import only_writer

HOLD = """
import sys, pathlib
from cprec.process import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
PARENT = """
import signal, subprocess, sys
from cprec.process import die_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
                         preexec_fn=lambda: die_with_parent(signal.SIGKILL))
print(child.pid, flush=True)
child.wait()
"""


def test_a_second_writer_is_refused_by_name_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=f"run is being written by process {holder.pid}"), \
            only_writer(folder, wait_s=0):
        pytest.fail("two writers")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with only_writer(folder, wait_s=30):
        assert not folder.exists()  # the lock stands beside it


def test_a_folder_on_a_file_system_without_locks_is_refused_by_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        def refuse(fd: int, operation: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("cprec.process.fcntl.flock", refuse)
        why = rf"{tmp_path}/run: .*cannot be locked \({os.strerror(number)}\).*-o flock"
        with pytest.raises(ConfigError, match=why), only_writer(tmp_path / "run"):
            pytest.fail("nobody holds it")


def test_a_grandchild_ends_with_the_process_that_it_was_bound_to() -> None:
    bound = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    script = "import sys, time; from cprec.process import end_with; end_with(int(sys.argv[1])); print('up', flush=True)"
    child = subprocess.Popen([sys.executable, "-c", script + "; time.sleep(600)", str(bound.pid)],
                             stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    bound.kill()
    bound.wait()
    assert child.wait(timeout=60) == -signal.SIGKILL
    late = subprocess.run([sys.executable, "-c", script, str(bound.pid)], check=False)
    assert late.returncode == -signal.SIGKILL  # it was gone already


def test_a_child_does_not_outlive_its_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == b"up\n"
    child_handle = os.pidfd_open(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    import select

    assert select.select([child_handle], [], [], 30)[0], "the child still lives"
    os.close(child_handle)
