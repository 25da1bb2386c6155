"""Whole runs through the launch scripts, on real DeepSpeed ZeRO-3 ranks: the promises of training, end to end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cprec.data.collate import collate
from cprec.data.sampler import permute
from cprec.errors import EXIT_REQUEUE
from cprec.format import PackedCorpus, file_hash
from cprec.loss import IGNORE_INDEX
from cprec.model import load_for_training
from cprec.process import only_writer
from cprec.schedule import Schedule
from cprec.train.checkpoint import list_checkpoints
from cprec.train.metrics import read_metrics
from cprec.train.plan import build_plan
from cprec.train.starts import read_starts

LAUNCH = tiny.REPO / "launch"


def write_config(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def command(script: str, *args: str, ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, str(LAUNCH / script), *args]
    port = str(20000 + os.getpid() % 20000)
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--num_accelerators", str(ranks), "--master_port", port, str(LAUNCH / script), *args]


def launch(script: str, *args: str, ranks: int = 2, expect: int = 0) -> str:
    done = subprocess.run(command(script, *args, ranks=ranks), capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run: Path | str) -> list[tuple[int, float, dict[str, float]]]:
    return [(r["step"], r["loss"], r["loss_by_corpus"]) for r in read_metrics(run)]


def tree_hashes(folder: Path) -> dict[str, str]:
    return {str(p): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trunk(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of 12 steps on two ranks, from one config file."""
    config = write_config(world, tmp_path_factory.mktemp("config") / "run.yaml")
    launch("pretrain.py", "--config", str(config))
    return Path(world["run_dir"])


def test_a_run_killed_in_the_middle_and_started_again_logs_the_very_losses_of_an_unbroken_one(
        world: dict[str, Any], trunk: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    config = write_config({**world, "run_dir": str(run)}, tmp_path / "run.yaml")
    args = command("pretrain.py", "--config", str(config), ranks=2)
    started = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints/step_00000004/state.json").exists():
        assert started.poll() is None and time.monotonic() < deadline, "the run ended or hung before step 4"
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    kill_ranks_of(run)
    started.wait()
    assert not (run / "checkpoints/step_00000012/state.json").exists(), "the kill came too late to prove anything"
    last = max(run.glob("checkpoints/step_*/state.json")).parent
    rest = last.with_name(f"step_{int(last.name[5:]) + 4:08d}")  # what a kill inside the next save leaves
    shutil.rmtree(rest, ignore_errors=True)
    shutil.copytree(last, rest, ignore=lambda *_: {"state.json"})
    next(rest.glob("rank_*.safetensors")).write_bytes(b"cut short")
    launch("pretrain.py", "--config", str(config))
    assert losses(run) == losses(trunk)
    assert [s.how for s in read_starts(run)] == [None, "complete"]


def kill_ranks_of(run: Path) -> None:
    """The launcher puts its ranks into sessions of their own; find them by the config they were given."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(run.parent / "run.yaml") in words and int(proc.name) != os.getpid():
            os.kill(int(proc.name), signal.SIGKILL)


def test_sigterm_saves_and_exits_with_the_requeue_code_and_the_run_goes_on_with_the_same_losses(
        world: dict[str, Any], tmp_path: Path) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    one_rank = {**world, "schedule": {"total": {"steps": 60}, "warmup": {"steps": 2}}, "checkpoint": {"every": 1000}}
    launch("pretrain.py", "--config", str(write_config({**one_rank, "run_dir": str(unbroken)}, tmp_path / "a.yaml")),
           ranks=1)
    config = write_config({**one_rank, "run_dir": str(stopped)}, tmp_path / "b.yaml")
    started = subprocess.Popen(command("pretrain.py", "--config", str(config), ranks=1), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_metrics(stopped)) < 3:
        assert started.poll() is None and time.monotonic() < deadline, "the run ended or hung before step 3"
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=100) == EXIT_REQUEUE
    assert len(list((stopped / "checkpoints").glob("step_*/state.json"))) == 1
    launch("pretrain.py", "--config", str(config), ranks=1)
    assert losses(stopped) == losses(unbroken)
    first, second = read_starts(stopped)
    assert (first.how, second.how) == ("stopped", "complete") and 0 < first.end_step == second.step < 60


def test_stopping_the_deepspeed_command_makes_its_ranks_save_and_leaves_none_behind(
        world: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {**world, "run_dir": str(run), "schedule": {"total": {"steps": 2000}, "warmup": {"steps": 2}},
              "checkpoint": {"every": 2000}}
    config = write_config(values, tmp_path / "run.yaml")
    args = command("pretrain.py", "--config", str(config), ranks=2)
    started = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_metrics(run)) < 5:
        assert started.poll() is None and time.monotonic() < deadline, "the run ended or hung before step 5"
        time.sleep(0.01)
    started.terminate()
    started.wait()
    with only_writer(run, wait_s=100):  # free once the last rank that writes is gone
        (saved,) = list_checkpoints(run)
    assert 4 <= saved.state.step < 2000 and saved.state.phase == "stable"


def test_a_run_goes_on_only_with_the_data_that_it_began_with(
        world: dict[str, Any], trunk: Path, tmp_path: Path) -> None:
    model = Path(world["model"]["path"])
    other = shutil.copytree(world["data"]["packed"], tmp_path / "packed")
    shutil.rmtree(other / "mixed")
    tiny.write_corpus(other, "mixed", model=model, n_rows=25, seed=99)
    values = {**world, "data": {**world["data"], "packed": str(other)}}
    said = launch("pretrain.py", "--config", str(write_config(values, tmp_path / "run.yaml")), ranks=1, expect=3)
    assert "mixed below" in said and "not what" in said
    moved = shutil.copytree(world["data"]["packed"], tmp_path / "moved")
    values = {**world, "data": {**world["data"], "packed": str(moved)}}
    values["batch"] = {**world["batch"], "micro_batch_size": 1}
    run = shutil.copytree(trunk, tmp_path / "trunk")
    values["run_dir"] = str(run)
    values["schedule"] = {"total": {"steps": 13}, "warmup": {"steps": 2}}  # longer, moved, in smaller pieces: still it
    values["checkpoint"] = {"every": 5, "keep_last": 1, "keep_stable_every": 4}
    launch("pretrain.py", "--config", str(write_config(values, tmp_path / "run.yaml")), ranks=2)
    assert [c.state.step for c in list_checkpoints(run)] == [4, 8, 12, 13]  # stable ones outlive another `every`
    assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["total"]["steps"] == 13


def test_a_first_start_that_failed_can_be_mended_in_place(world: dict[str, Any], tmp_path: Path) -> None:
    values = {**world, "run_dir": str(tmp_path / "run"), "schedule": {"total": {"steps": 1}, "warmup": {"steps": 1}}}
    config = write_config(values, tmp_path / "run.yaml")
    said = launch("pretrain.py", "--config", str(config), "model.attention=flash2", ranks=1, expect=2)
    assert "flash2" in said and "cannot run here" in said and "Traceback" not in said
    launch("pretrain.py", "--config", str(config), ranks=1)


def test_a_run_on_data_at_a_url_trains_like_one_on_the_folder(
        world: dict[str, Any], trunk: Path, tmp_path: Path) -> None:
    data = {**world["data"], "packed": f"file://{world['data']['packed']}", "cache_dir": str(tmp_path / "cache")}
    config = write_config({**world, "run_dir": str(tmp_path / "run"), "data": data}, tmp_path / "run.yaml")
    launch("pretrain.py", "--config", str(config))
    assert losses(tmp_path / "run") == losses(trunk)
    packed = Path(world["data"]["packed"])
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == len(list(packed.rglob("*.arrow")))


def test_two_ranks_with_unequal_padding_train_like_one_rank_with_everything(
        world: dict[str, Any], trunk: Path, tmp_path: Path) -> None:
    run = tmp_path / "one"
    launch("pretrain.py", "--config", str(write_config({**world, "run_dir": str(run)}, tmp_path / "run.yaml")), ranks=1)
    two, one = losses(trunk), losses(run)
    assert [step for step, _, _ in one] == [step for step, _, _ in two]
    differences = [abs(a - b) for (_, a, _), (_, b, _) in zip(one, two, strict=True)]
    print("largest difference of a loss between 1 and 2 ranks:", max(differences))
    assert max(differences) < 2e-5  # float32 sums in another order, over 12 updates
    norms = [[r["grad_norm"] for r in read_metrics(d) if r["kind"] == "train"] for d in (trunk, run)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # AdamW and clipping would hide a gradient of another scale
    pads = {r["pad_share"] for r in read_metrics(trunk) if r["kind"] == "train"}
    assert len(pads) > 3, "the steps must differ in padding for this to prove anything"


def test_the_first_steps_loss_and_gradient_norm_are_those_of_plain_torch(world: dict[str, Any], trunk: Path) -> None:
    plan = build_plan(tiny.run_config(world), 1)
    at = plan.sampler.rows(0, 8)
    corpora = [PackedCorpus(Path(world["data"]["packed"]) / name) for name in plan.sampler.names]
    batch = collate([corpora[c][int(r)] for c, r in zip(at.corpus, at.row, strict=True)], at.corpus.tolist())
    model = load_for_training(world["model"]["path"], backend="sdpa", dtype=torch.float32, seq_len=tiny.SEQ_LEN,
                              vocab_size=258, activation_checkpointing=False, trust_remote_code=False)
    loss = model(batch).sum() / batch.n_valid
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first = next(r for r in read_metrics(trunk) if r["kind"] == "train")
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("overrides", [
    ["model.activation_checkpointing=1"], ["model.dtype=bfloat16", "model.attention=sdpa"],
])
def test_a_run_with_other_memory_or_precision_starts_and_learns_like_the_plain_one(
        world: dict[str, Any], trunk: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = write_config({**world, "run_dir": str(tmp_path / "run")}, tmp_path / "run.yaml")
    launch("pretrain.py", "--config", str(config), "schedule.total.steps=4", "schedule.warmup.steps=2", *overrides)
    plain = {r["step"]: r["loss"] for r in read_metrics(trunk) if r["kind"] == "train"}
    log = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    exact = "bfloat16" not in overrides[0]
    for r in log:
        assert r["loss"] == pytest.approx(plain[r["step"]], rel=1e-5 if exact else 2e-2)


@pytest.fixture(scope="module")
def branches(trunk: Path) -> dict[str, Path]:
    """Two branches of different shape from the stable checkpoint of step 8; the trunk must not change by it."""
    before = tree_hashes(trunk)  # nothing changes but that the branches leave a lease on their parent
    launch("anneal.py", "--from", f"{trunk}@8", "--steps", "4", "--shape", "sqrt", "--final-lr-ratio", "0")
    launch("anneal.py", "--from", str(trunk / "checkpoints" / "step_00000008"), "--steps", "6", "--shape", "linear",
           "--run-dir", f"{trunk}-b", "--mix", "mixed=1")
    after = tree_hashes(trunk)
    assert {p: after[p] for p in before} == before
    assert {str(Path(p).parent) for p in {*after} - {*before}} == {str(trunk / "branches")}
    return {"sqrt": Path(f"{trunk}-sqrt-4"), "linear": Path(f"{trunk}-b")}


def test_a_branch_starts_at_its_parents_rate_on_its_parents_rows_and_falls_along_its_shape(
        trunk: Path, branches: dict[str, Path]) -> None:
    trunk_log = {r["step"]: r for r in read_metrics(trunk) if r["kind"] == "train"}
    log = [r for r in read_metrics(branches["sqrt"]) if r["kind"] == "train"]
    assert [r["step"] for r in log] == [9, 10, 11, 12]
    assert log[0]["lr"] == trunk_log[9]["lr"] == 1e-2
    assert log[0]["loss"] == trunk_log[9]["loss"]  # same weights, same rows: computed before the first update
    expected = [1e-2 * (1 - math.sqrt(x / 4)) for x in range(4)]
    assert [r["lr"] for r in log] == pytest.approx(expected, rel=1e-12)
    assert {r["phase"] for r in log} == {"anneal"}
    assert json.loads((branches["sqrt"] / "checkpoints/step_00000012/state.json").read_text())["parent"]["step"] == 8


def test_a_branch_with_its_own_mixture_reads_only_that(branches: dict[str, Path]) -> None:
    log = [r for r in read_metrics(branches["linear"]) if r["kind"] == "train"]
    assert [r["step"] for r in log] == [9, 10, 11, 12, 13, 14]
    assert {tuple(r["loss_by_corpus"]) for r in log} == {("mixed",)}


def test_an_annealed_checkpoint_is_no_parent(branches: dict[str, Path]) -> None:
    said = launch("anneal.py", "--from", str(branches["sqrt"] / "checkpoints/step_00000012"), "--steps", "2", ranks=1,
                  expect=4)
    assert "is in the anneal phase" in said
    said = launch("anneal.py", "--from", str(branches["sqrt"]), "--share", "2", ranks=1, expect=2)
    assert "share=2.0" in said and "Traceback" not in said


def test_an_export_loads_in_transformers_and_has_the_validation_loss_that_was_logged(
        world: dict[str, Any], trunk: Path, tmp_path: Path) -> None:
    launch("export.py", "--from", str(trunk), "--out", str(tmp_path / "hf"), ranks=1)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "</s>"
    assert "branch" not in (tmp_path / "hf" / "README.md").read_text()
    logged = [r for r in read_metrics(trunk) if r["kind"] == "valid"][-1]["loss_by_corpus"]
    for name in ("valid/toys", "valid/games"):
        corpus = PackedCorpus(Path(world["data"]["packed"]) / name)
        rows = permute(np.arange(min(4, len(corpus))), len(corpus), key=(0, name, 0))
        total, n = 0.0, 0
        for i in rows:
            row = corpus[int(i)]
            start = 0
            for length in row.real_doc_lens:  # every document alone, as transformers sees any text
                ids = torch.from_numpy(row.input_ids[start:start + length].astype(np.int64))[None]
                total += float(lm(ids, labels=ids).loss) * (int(length) - 1) if length > 1 else 0.0
                n += int(length) - 1
                start += length
            assert collate([row], [0]).labels.ne(IGNORE_INDEX).sum() == sum(row.real_doc_lens) - len(row.real_doc_lens)
        assert total / n == pytest.approx(logged[name], abs=2e-5)


def test_a_checkpoint_with_a_flipped_byte_is_named_and_not_loaded(world: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {**world, "run_dir": str(run), "schedule": {"total": {"steps": 2}, "warmup": {"steps": 1}}}
    launch("pretrain.py", "--config", str(write_config(values, tmp_path / "run.yaml")), ranks=1)
    victim = next((run / "checkpoints/step_00000002").glob("rank_*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    values["schedule"]["total"]["steps"] = 4
    said = launch("pretrain.py", "--config", str(write_config(values, tmp_path / "run.yaml")), ranks=1, expect=4)
    assert victim.name in said and "altered" in said and "Traceback" not in said


def test_a_packed_shard_with_a_flipped_byte_stops_the_run_before_its_first_step(
        world: dict[str, Any], tmp_path: Path) -> None:
    packed = shutil.copytree(world["data"]["packed"], tmp_path / "packed")
    shard = packed / "specific/toys/shard-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    values = {**world, "run_dir": str(tmp_path / "run"), "data": {**world["data"], "packed": str(packed)}}
    said = launch("pretrain.py", "--config", str(write_config(values, tmp_path / "run.yaml")), ranks=2, expect=3)
    assert said.count("shard-00001.arrow has hash") == 1 and "Traceback" not in said
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_folder_of_another_config_is_refused_and_left_as_it_was(
        world: dict[str, Any], trunk: Path, tmp_path: Path) -> None:
    before = tree_hashes(trunk)
    other = {**world, "optimizer": {"peak_lr": 5e-3}}
    said = launch("pretrain.py", "--config", str(write_config(other, tmp_path / "run.yaml")), ranks=1, expect=2)
    assert "optimizer.peak_lr: 0.01" in said and "0.005 now" in said
    assert tree_hashes(trunk) == before


def test_dry_run_prints_a_config_that_is_valid_and_what_follows_from_it(world: dict[str, Any], tmp_path: Path) -> None:
    config = write_config({**world, "run_dir": str(tmp_path / "never")}, tmp_path / "run.yaml")
    done = subprocess.run([sys.executable, str(LAUNCH / "pretrain.py"), "--config", str(config), "--dry-run",
                           "--world-size", "5,4"], capture_output=True, text=True, check=True)  # 5 do not share 8 rows
    resolved, _, plan = done.stdout.partition("\n\n")
    again = tiny.run_config(yaml.safe_load(resolved))
    assert again.data.mix.stable == {"mixed": 1.0, "specific/toys": 2.0}
    assert "accumulation 1: 8 rows of 64 = 512 tokens per step" in plan
    assert "checkpoints at steps 4, 8, 12" in plan
    lr = Schedule(1e-2, 2, 12).lr
    assert f"{lr(0):.3e} at step 0 (warmup), {lr(2):.3e} at step 2 (stable)" in plan
    assert not (tmp_path / "never").exists()
