"""Faults of what a run stands on: disk, run folder, data, checkpoints, clock. Each is named; then the run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from killable import STEPS, Run

from benchmarks.faults.checks import resumed_at
from benchmarks.faults.lives import KILLED, ForkedLife, Moment
from cprec.config import ParentConfig
from cprec.format import file_hash
from cprec.train.checkpoint import list_checkpoints, read_checkpoint
from cprec.train.retention import lease

BAD_CONFIG, BAD_DATA, BAD_CHECKPOINT = 2, 3, 4


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [truncate, flip_a_bit, Path.unlink]


@pytest.fixture(scope="module", autouse=True)
def two_starts(run_in: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
               ) -> Iterator[tuple[Run, ForkedLife, ForkedLife]]:
    """A run, held in the middle, and a second start of it, which waits for a minute while other tests run."""
    run = run_in(tmp_path_factory.mktemp("two"))
    first = run.start(moment=Moment("write", "/step_00000010/", signal=signal.SIGSTOP))
    deadline = time.monotonic() + 200
    while psutil.Process(first.ranks[0].pid).status() != psutil.STATUS_STOPPED:
        assert not first.is_over() and time.monotonic() < deadline, first.said()
        time.sleep(0.01)
    second = run.start(log="second")
    yield run, first, second
    for life in (first, second):
        life.kill()
        life.end()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True,
                             text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_disk_that_is_full_in_a_save_is_named_and_with_room_the_run_goes_on(
        new_run: Callable[..., Run], small_disk: Path) -> None:
    run = new_run(run_dir=small_disk / "run")
    said = run.ends(BAD_CHECKPOINT)
    assert "Traceback" not in said and str(run.run_dir) in said and "ake room" in said
    assert run.unharmed().newest == 2
    remount(small_disk, "size=16m")
    run.goes_on_to_the_end(after=2)


def test_a_run_folder_that_cannot_be_written_is_refused_and_left_as_it_was(
        new_run: Callable[..., Run], small_disk: Path) -> None:
    remount(small_disk, "size=16m")
    run = new_run(run_dir=small_disk)
    run.stops()
    remount(small_disk, "ro")
    said = run.ends(BAD_CHECKPOINT)
    assert "Traceback" not in said and str(small_disk) in said and "Read-only file system" in said
    remount(small_disk, "rw")
    run.goes_on_to_the_end()


def test_a_packed_shard_that_is_damaged_is_named_before_a_step_is_done_and_the_mended_run_goes_on(
        new_run: Callable[..., Run], fault_world: dict[str, Any], tmp_path: Path) -> None:
    packed = Path(shutil.copytree(fault_world["data"]["packed"], tmp_path / "packed"))
    run = new_run(data={**fault_world["data"], "packed": str(packed)})
    run.stops()
    before = run.unharmed()
    shard = packed / "specific/toys/shard-00001.arrow"
    whole = shard.read_bytes()
    for damage in DAMAGES:
        damage(shard)
        said = run.ends(BAD_DATA)
        assert shard.name in said and "Traceback" not in said, damage
        shard.write_bytes(whole)
        assert run.unharmed() == before, damage
    run.goes_on_to_the_end()


def test_a_clock_that_runs_backwards_changes_no_loss_and_no_choice_of_checkpoint(new_run: Callable[..., Run]) -> None:
    run, backwards = new_run(), {"FAULT_CLOCK": str(7 * 24 * 3600)}
    run.stops()  # today
    run.goes_on_to_the_end(env=backwards)  # last week, and further back with every second


def test_a_newest_checkpoint_that_is_damaged_is_named_and_the_run_goes_on_from_the_one_before(
        new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.stops(saving=4)
    cases = [(truncate, ""), (flip_a_bit, ""), (Path.unlink, ""), (flip_a_bit, "state.json")]
    for saving, (damage, name) in zip((6, 10, 14, 18), cases, strict=True):
        *_, before, last = list_checkpoints(run.run_dir)
        victim = last.folder / (name or next(iter(last.state.files)))
        damage(victim)
        said = run.stops(saving=saving)
        assert resumed_at(said) == before.state.step, (damage, victim, said)
        assert victim.name in said and last.folder.name in said, (damage, said)
    run.goes_on_to_the_end()


def test_a_pruning_killed_while_a_branch_takes_its_lease_gives_the_parent_back(
        new_run: Callable[..., Run], tmp_path: Path) -> None:
    """The lease comes after what is to go was listed, the kill before the name is given back."""
    run = new_run()
    run.ends(KILLED, moment=Moment("unlink", "/step_00000006/"))
    parent = run.run_dir / "checkpoints/step_00000006"
    assert (parent / "state.json.pruned").is_file()
    config = yaml.safe_load((run.run_dir / "config.yaml").read_text())
    fork = ParentConfig(run_dir=str(run.run_dir), step=6, state_hash=file_hash(parent / "state.json.pruned"))
    (tmp_path / "branch").mkdir()
    (tmp_path / "branch/config.yaml").write_text(yaml.safe_dump(config | {"parent": fork.model_dump()}))
    lease(run.run_dir, 6, run_dir=tmp_path / "branch")
    said = run.goes_on_to_the_end()
    assert f"kept {parent}, which was being pruned" in said
    kept = read_checkpoint(parent)  # its bytes are compared by `unharmed`
    assert kept.state_hash == fork.state_hash


def test_a_checkpoint_under_another_steps_name_and_a_file_named_latest_mislead_nobody(
        new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.stops(saving=4)
    *_, before, last = list_checkpoints(run.run_dir)
    stale = last.folder.rename(last.folder.with_name("step_00000099"))
    (stale.parent / "latest").write_text(stale.name)
    said = run.ends()
    assert resumed_at(said) == before.state.step, said
    assert "PASSED OVER" in said and "step_00000099/state.json was altered" in said
    shutil.rmtree(stale.with_name(f"broken_{stale.name}"))
    found = run.unharmed()
    assert (found.newest, found.logged) == (STEPS, STEPS)


def test_a_second_start_on_a_run_folder_is_refused_while_the_first_goes_on(
        two_starts: tuple[Run, ForkedLife, ForkedLife]) -> None:
    run, first, second = two_starts
    assert second.end() == [BAD_CONFIG]
    assert f"is being written by process {first.ranks[0].pid}" in second.said() and "Traceback" not in second.said()
    first.signal(signal.SIGCONT)
    assert first.end() == [0], first.said()
    run.unharmed()
