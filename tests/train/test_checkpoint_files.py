"""Checkpoints as files: written beside training, verified, passed over when altered, kept and pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from cprec.config import CheckpointConfig, ParentConfig
from cprec.errors import CheckpointError
from cprec.format import file_hash
from cprec.settings import dump_settings
from cprec.train.checkpoint import (
    BrokenError,
    State,
    list_checkpoints,
    newest_sound,
    read_checkpoint,
    verify_checkpoint,
)
from cprec.train.inventory import take_inventory, unsound, write_table
from cprec.train.partitions import Layout, Place, SavedState, Share, write_file
from cprec.train.retention import give_back_parents, lease, living_branches, prunable, prune, reasons_to_keep
from cprec.train.saving import Saver

EVERYTHING = CheckpointConfig(keep_last=99)


class Weights:
    """Two tensors that training would change, as an engine hands them out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.a, self.b = torch.randn(1000), torch.randn(600).bfloat16()

    def layout(self) -> Layout:
        return Layout([Share("frozen", "lm.b", Place(start=0, shape=[20, 30]), self.b),
                       Share("weight", "lm.a", Place(start=0, shape=[10, 100]), self.a)], {"matrices": 7})


def state(step: int, **changes: Any) -> State:
    return State.model_validate({
        "step": step, "tokens_seen": step * 512, "rows_seen": step * 8, "lr": 1e-3, "phase": "stable", "bad_steps": 0,
        "valid_loss": None, "config_hash": "0", "data_hashes": {}, "tokenizer_fingerprint": "0", "world_size": 1,
        "zero_stage": 3, "parent": None, "files": {}, **changes})


def saved(run: Path, *steps: int, config: CheckpointConfig = EVERYTHING, **changes: Any) -> list[Path]:
    """Checkpoints of `steps` in the run folder; those that the config keeps."""
    run.mkdir(exist_ok=True)
    saver = Saver(Weights(), run, config)
    for step in steps:
        saver.save(state(step, **changes))
    saver.finish()
    return [c.folder for c in list_checkpoints(run)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_saved_file_is_plain_safetensors_with_the_hash_that_state_json_says(tmp_path: Path,
                                                                             asynchronous: bool) -> None:
    (folder,) = saved(tmp_path / "run", 4, config=CheckpointConfig(asynchronous=asynchronous))
    (name, info), = read_checkpoint(folder).state.files.items()
    assert (info.bytes, info.xxh3_128) == ((folder / name).stat().st_size, file_hash(folder / name))
    tensors, source = load_file(folder / name), Weights()
    assert torch.equal(tensors["weight/lm.a"], source.a) and torch.equal(tensors["frozen/lm.b"], source.b)
    assert SavedState(folder).updates == {"matrices": 7}


def test_a_save_holds_the_weights_of_its_step_although_training_goes_on_before_it_is_complete(tmp_path: Path) -> None:
    run, source = tmp_path / "run", Weights()
    run.mkdir()
    saver, before = Saver(source, run, EVERYTHING), source.a.clone()
    saver.save(state(4))
    source.a.add_(1.0)
    assert not list_checkpoints(run)  # complete only when a later step's border says so
    checkpoint = saver.finish()
    assert checkpoint is not None and torch.equal(SavedState(checkpoint.folder).read("weight/lm.a"), before)
    assert saver.poll() is None and saver.finish() is None


def test_what_is_written_later_is_what_was_copied(tmp_path: Path) -> None:
    source, path = Weights(), tmp_path / "rank_00000.safetensors"
    layout, expected = source.layout(), source.a.clone()
    copy = torch.empty(layout.n_bytes, dtype=torch.uint8)
    layout.copy_to(copy)
    source.a.zero_()
    write_file(path, layout.head, [copy], lambda: False)
    assert torch.equal(load_file(path)["weight/lm.a"], expected)


def test_shares_of_any_cut_are_one_tensor_again(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    for rank, (start, stop) in enumerate([(0, 3), (3, 4), (4, 10)]):
        share = Share("weight", "lm.a", Place(start=start, shape=[2, 5]), whole[start:stop])
        layout = Layout([share], {})
        write_file(tmp_path / f"rank_{rank:05d}.safetensors", layout.head, layout.stream(), lambda: False)
    state = SavedState(tmp_path)
    for start in range(10):
        for n in range(11 - start):
            assert torch.equal(state.read("weight/lm.a", start, n), whole[start:start + n])
    (tmp_path / "rank_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not hold the whole of weight/lm.a: 9 of 10"):
        SavedState(tmp_path).read("weight/lm.a")


def test_a_save_that_fails_is_removed_and_names_the_newest_complete_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, 4)
    saver = Saver(Weights(), run, EVERYTHING)
    with tiny.largest_file(2000), pytest.raises(
            CheckpointError, match=r"step_00000008 could not be saved.*complete one is step_00000004"):
        saver.save(state(8))
        saver.finish()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000004"]
    saver.save(state(8))
    assert saver.finish() is not None  # once there is room, it goes on


@pytest.mark.parametrize("harm", ["flipped", "short", "missing", "state flipped", "state not JSON"])
def test_the_newest_checkpoint_when_altered_is_passed_over_loudly_and_an_error_when_named(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    run = tmp_path / "run"
    folder = saved(run, 4, 8)[-1]
    file = folder / "rank_00000.safetensors"
    if harm == "flipped":
        flip(file)
    elif harm == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "missing":
        file.unlink()
    elif harm == "state flipped":
        text = (folder / "state.json").read_text()
        (folder / "state.json").write_text(text.replace('"lr": 0.001', '"lr": 0.002'))
    else:
        (folder / "state.json").write_text("{")
    assert len(unsound(run)) == 1
    listed = [line for line in write_table(run, take_inventory(run, EVERYTHING)) if line.startswith("BROKEN")]
    assert [str(folder) in line for line in listed] == [True] * harm.startswith("state")  # without reading other files
    with pytest.raises(BrokenError, match="step_00000008"):
        verify_checkpoint(read_checkpoint(folder))
    with caplog.at_level("WARNING"):
        found = newest_sound(run)
    assert found is not None and found.state.step == 4
    assert "PASSED OVER" in caplog.text and "step_00000008" in caplog.text and "going on from" in caplog.text
    assert (run / "checkpoints/broken_step_00000008").is_dir() and not folder.exists()
    assert not unsound(run) and "put aside" in "\n".join(write_table(run, take_inventory(run, EVERYTHING)))


def test_a_run_without_a_sound_checkpoint_is_an_error_and_nothing_is_moved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in saved(run, 4, 8):
        flip(folder / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint.*is sound.*step_00000008.*step_00000004"):
        newest_sound(run)
    assert len(list_checkpoints(run)) == 2
    assert newest_sound(tmp_path / "another") is None


def test_the_rest_of_an_interrupted_save_is_removed_at_the_next_start(tmp_path: Path,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    older, newer = saved(run, 4, 8)
    (newer / "state.json").unlink()
    with caplog.at_level("WARNING"):
        found = newest_sound(run)
    assert found is not None and found.folder == older and not newer.exists() and str(newer) in caplog.text


def test_what_is_kept_and_why(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, phase, loss in ((2, "warmup", None), (4, "stable", 3.0), (6, "stable", 1.0), (8, "stable", 2.0),
                              (10, "anneal", 1.5), (12, "anneal", 4.0)):
        saved(run, step, phase=phase, valid_loss=loss)
    config = CheckpointConfig(keep_last=1, keep_stable_every=4, keep_best=2)
    reasons = reasons_to_keep(list_checkpoints(run), config, {2: ["runs/b"]})
    assert reasons == {2: ["parent of runs/b"], 4: ["stable"], 6: ["best"], 8: ["stable"], 10: ["best"], 12: ["last"]}
    assert prunable(run, config) == ["step_00000002"]
    assert prune(run, CheckpointConfig(keep_last=2)) == [f"step_{n:08d}" for n in (2, 4, 6, 8)]
    assert [c.state.step for c in list_checkpoints(run)] == [10, 12]


def branch(folder: Path, parent: ParentConfig, like: Path) -> Path:
    """A branch's run folder, as far as its parent looks at it."""
    folder.mkdir()
    values = yaml.safe_load(like.read_text()) | {"parent": parent.model_dump()}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """Some run's config."""
    path = tmp_path / "like.yaml"
    path.write_text(dump_settings(tiny.run_config({
        "run_dir": "b", "model": {"path": "m"}, "data": {"packed": "p"}, "optimizer": {"peak_lr": 1e-3},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2}, "schedule": {"total": {"steps": 9}}})))
    return path


def test_the_parent_of_a_living_branch_is_never_pruned(tmp_path: Path, like: Path) -> None:
    run, config = tmp_path / "run", CheckpointConfig(keep_last=1)
    folder = saved(run, 4, 6, 8)[0]
    parent = ParentConfig(run_dir=str(run), step=4, state_hash=read_checkpoint(folder).state_hash)
    living = branch(tmp_path / "branch", parent, like)
    lease(run, 4, run_dir=living)
    lease(run, 4, run_dir=tmp_path / "never began")
    assert living_branches(run) == {4: [str(living)]}
    assert prune(run, config) == ["step_00000006"]
    (living / "config.yaml").unlink()
    assert prune(run, config) == ["step_00000004"]  # the branch is gone


def test_a_pruning_that_was_killed_is_undone_only_where_a_living_branch_needs_all_of_it(
        tmp_path: Path, like: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    folders = saved(run, 2, 4, 6, 8)
    for folder in folders[:3]:
        lease(run, read_checkpoint(folder).state.step, run_dir=tmp_path / folder.name)
    for folder in folders[:2]:  # 2: it lives, but a file of its parent is gone already; 4: all is there; 6: it is gone
        branch(tmp_path / folder.name, ParentConfig(run_dir=str(run), step=int(folder.name[5:]), state_hash="0"), like)
    for folder in folders[:3]:
        (folder / "state.json").rename(folder / "state.json.pruned")
    (folders[0] / "rank_00000.safetensors").unlink()
    give_back_parents(run)
    assert f"kept {folders[1]}" in caplog.text and f"parent of {tmp_path / folders[1].name}" in caplog.text
    found = newest_sound(run)
    assert found is not None and found.folder == folders[3]
    assert sorted((run / "checkpoints").iterdir()) == [folders[1], folders[3]] and not unsound(run)
    (folders[3] / "state.json").rename(folders[3] / "state.json.pruned")
    (run / "branches/x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"branches/x.json is no lease of a branch"):
        give_back_parents(run)


def test_a_parent_that_cannot_be_given_back_is_an_error_that_every_rank_hears_of(tmp_path: Path, like: Path) -> None:
    run = tmp_path / "run"
    folder = saved(run, 4, 8)[0]
    parent = ParentConfig(run_dir=str(run), step=4, state_hash=read_checkpoint(folder).state_hash)
    lease(run, 4, run_dir=branch(tmp_path / "branch", parent, like))
    (folder / "state.json").rename(folder / "state.json.pruned")
    (folder / "state.json").mkdir()  # no file can take this name
    with pytest.raises(CheckpointError, match=r"could not be given its state.json back: .*Is a directory"):
        give_back_parents(run)


def test_a_half_pruned_checkpoint_is_listed_as_such_and_its_removal_told(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    two, four, _ = saved(run, 2, 4, 8)
    (two / "state.json").unlink()
    (four / "state.json").rename(four / "state.json.pruned")
    inventory = take_inventory(run, EVERYTHING)
    assert (inventory.incomplete, inventory.half_pruned) == (["step_00000002"], ["step_00000004"])
    assert "step_00000004: half pruned; when the run starts again, taken" in "\n".join(write_table(run, inventory))
    newest_sound(run)
    assert f"removed {two}: an interrupted save" in caplog.text
    assert f"removed {four}: an interrupted pruning" in caplog.text


def test_an_inventory_reads_each_state_once_so_that_no_save_comes_in_between(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    folders = saved(run, 4, 8)
    read: list[Path] = []
    as_it_was = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: read.append(path) or as_it_was(path, *a, **k))
    take_inventory(run, EVERYTHING)
    assert read == [folder / "state.json" for folder in folders]
