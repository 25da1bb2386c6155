"""Bad steps: a run that meets them equals, bit for bit, one that never ran them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM

from cprec.config import GuardConfig
from cprec.data.dataset import PackedDataset
from cprec.errors import CheckpointError
from cprec.train.checkpoint import State, read_checkpoint
from cprec.train.guard import Guard, read_quarantine, write_quarantine
from cprec.train.metrics import read_metrics
from cprec.train.partitions import SavedState
from cprec.train.plan import build_plan

NAN_TOKEN, SPIKE_TOKEN = 200, 201
BAD_STEPS = {1: NAN_TOKEN, 3: NAN_TOKEN, 5: SPIKE_TOKEN}  # 1-based; the bound of 2 good steps (2, 4) holds at step 5
STEPS = 12  # two epochs of 24 rows in steps of 4: in the second one the rows of the bad steps are met again


def write_world(root: Path) -> dict[str, Any]:
    """A model in which one token's embedding is NaN and another's so small that its gradient is huge, and a corpus in
    which one row of each bad step begins with such a token."""
    model = tiny.write_model(root / "model", tie_word_embeddings=False)
    lm = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        lm.get_input_embeddings().weight[NAN_TOKEN] = float("nan")
        lm.get_input_embeddings().weight[SPIKE_TOKEN] = 1e-9
    lm.save_pretrained(model)
    values: dict[str, Any] = {
        "run_dir": str(root / "run"), "model": {"path": str(model)}, "data": {"packed": str(root / "clean")},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2}, "optimizer": {"peak_lr": 1e-3},
        "schedule": {"total": {"steps": STEPS}, "warmup": {"steps": 2}},
        "deepspeed": str(tiny.REPO / "ds_configs/zero3.json"), "checkpoint": {"every": 4, "keep_last": 9},
        "validation": {"every": None}, "log_every": 1, "guard": {"window": 2, "norm_factor": 5},
    }
    tiny.write_corpus(root / "clean", "mixed", model=model, n_rows=24, seed=1)
    poison = {rows_of_step(values, n)["mixed"][0]: token for n, token in BAD_STEPS.items()}
    tiny.write_corpus(root / "packed", "mixed", model=model, n_rows=24, seed=1, poison=poison)
    return {**values, "data": {"packed": str(root / "packed")}}


def rows_of_step(values: dict[str, Any], step: int) -> dict[str, list[int]]:
    plan = build_plan(tiny.run_config(values), 1)
    batch = plan.config.batch.global_batch_size
    at = plan.sampler.rows((step - 1) * batch, batch)
    return {"mixed": sorted(at.row.tolist())}


def bad_rows(values: dict[str, Any], *, before: int = STEPS) -> dict[str, list[int]]:
    return {"mixed": sorted(r for n in BAD_STEPS if n < before for r in rows_of_step(values, n)["mixed"])}


def train(root: Path, runs: list[dict[str, Any]], *, ranks: int = 1) -> str:
    """Train the runs in turn, in one process per rank; what they print."""
    paths = []
    for number, values in enumerate(runs):
        paths.append(root / f"{number}-{Path(values['run_dir']).name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values))
    start = [sys.executable] if ranks == 1 else [
        str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), "--master_port",
        str(29000 + os.getpid() % 900)]
    done = subprocess.run([*start, str(Path(__file__).with_name("in_turn.py")), *map(str, paths)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=550,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    return done.stdout


def zero(root: Path, stage: int) -> str:
    path = root / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


def poisoned_and_spared(values: dict[str, Any], name: str, **changes: Any) -> list[dict[str, Any]]:
    """Two runs: one that meets the bad steps, and one to which their rows are known as bad from the beginning."""
    met, spared = ({**values, "run_dir": f"{values['run_dir']}-{name}-{which}", **changes}
                   for which in ("met", "spared"))
    Path(spared["run_dir"]).mkdir()
    write_quarantine(Path(spared["run_dir"]), bad_rows(values))
    return [met, spared]


def saved_tensors(run_dir: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: master weights and both moments, and each group's count of updates."""
    saved = SavedState(Path(run_dir) / f"checkpoints/step_{step:08d}")
    counts = {f"updates/{name}": torch.tensor(n) for name, n in saved.updates.items()}
    return {**{key: saved.read(key) for key in saved.shapes}, **counts}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    assert {name.partition("/")[0] for name in a} == {"weight", "exp_avg", "exp_avg_sq", "updates"}
    differing = [name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())]
    assert not differing


def state(run_dir: str, step: int = STEPS) -> State:
    return read_checkpoint(Path(run_dir) / f"checkpoints/step_{step:08d}").state


def log_of(run_dir: str) -> list[dict[str, Any]]:
    wanted = ("step", "kind", "loss", "loss_by_corpus", "grad_norm", "param_norm", "pad_share", "lr", "rows")
    return [{k: r[k] for k in wanted if k in r} for r in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """All runs on one rank, by name, and what they printed."""
    root = tmp_path_factory.mktemp("runs")
    world = {**world, "run_dir": str(root / "run")}
    pairs = {"zero3": {}, "zero1": {"deepspeed": zero(root, 1)}, "zero2": {"deepspeed": zero(root, 2)},
             "bf16": {"model": {**world["model"], "dtype": "bfloat16", "attention": "sdpa"}}}
    named = {f"{name}-{which}": values for name, changes in pairs.items()
             for which, values in zip(("met", "spared"), poisoned_and_spared(world, name, **changes), strict=True)}
    strict = {**world, "run_dir": str(root / "strict"), "guard": {**world["guard"], "max_bad_steps": 2}}
    said = train(root, [*named.values(), strict, strict])
    resumed = {**world, "run_dir": str(root / "resumed")}
    shutil.copytree(named["zero3-met"]["run_dir"], resumed["run_dir"])
    for step in (8, 12):
        shutil.rmtree(Path(resumed["run_dir"]) / f"checkpoints/step_{step:08d}")
    branch = {**world, "run_dir": str(root / "branch"), "schedule": {
        "total": {"steps": 10}, "warmup": {"steps": 2},
        "anneal": {"length": {"steps": 2}, "shape": "sqrt", "final_lr_ratio": 0.1}},
        "parent": {"run_dir": named["zero3-met"]["run_dir"], "step": 8, "state_hash": read_checkpoint(
            Path(named["zero3-met"]["run_dir"]) / "checkpoints/step_00000008").state_hash}}
    said += train(root, [resumed, branch])
    return {**named, "strict": strict, "resumed": resumed, "branch": branch}, said


@pytest.mark.parametrize("name", ["zero3", "zero1", "zero2", "bf16"])
def test_a_run_that_meets_bad_steps_equals_one_that_never_saw_their_rows(
        runs: tuple[dict[str, Any], str], name: str) -> None:
    met, spared = runs[0][f"{name}-met"], runs[0][f"{name}-spared"]
    assert [(r["step"], r["rows"]) for r in read_metrics(met["run_dir"]) if r["kind"] == "bad_step"] \
        == [(n, rows_of_step(met, n)) for n in BAD_STEPS]
    assert state(met["run_dir"]).bad_steps == 3 and state(spared["run_dir"]).bad_steps == 0
    assert_bit_equal(saved_tensors(met["run_dir"]), saved_tensors(spared["run_dir"]))
    good = [r for r in log_of(met["run_dir"]) if r["step"] not in BAD_STEPS]
    assert good == log_of(spared["run_dir"]) and len(good) == STEPS - 3


def test_on_two_ranks_a_run_that_meets_bad_steps_equals_one_that_never_saw_their_rows(
        world: dict[str, Any], tmp_path: Path) -> None:
    met, spared = poisoned_and_spared({**world, "run_dir": str(tmp_path / "run")}, "two",
                                      batch={"global_batch_size": 4, "micro_batch_size": 1})
    said = train(tmp_path, [met, spared], ranks=2)
    assert state(met["run_dir"]).bad_steps == 3
    assert_bit_equal(saved_tensors(met["run_dir"]), saved_tensors(spared["run_dir"]))
    for step in (1, 3):  # only the rank that had the row saw which it was
        row = rows_of_step(met, step)["mixed"][0]
        assert said.count(f"step {step} was left out: loss nan; not finite in mixed row {row} (shard-") == 1


def test_a_row_in_quarantine_is_padding_when_it_is_met_again_and_the_mean_is_over_the_others(
        runs: tuple[dict[str, Any], str]) -> None:
    met = runs[0]["zero3-met"]
    rows = bad_rows(met)["mixed"]
    corpus_pad = {n: sum(r in rows for r in rows_of_step(met, n)["mixed"]) / 4 for n in range(7, 13)}
    assert max(corpus_pad.values()) < 1, "a step of the second epoch must keep some rows for this to prove anything"
    records = {r["step"]: r for r in read_metrics(met["run_dir"]) if r["kind"] == "train"}
    for n, share in corpus_pad.items():
        assert share <= records[n]["pad_share"] <= share + 0.1
        assert 4 < records[n]["loss"] < 6.5  # ln 258 = 5.55: a mean over too many or too few tokens would be off


def test_a_run_resumed_between_two_bad_steps_logs_and_saves_what_the_unbroken_one_did(
        runs: tuple[dict[str, Any], str]) -> None:
    met, resumed = runs[0]["zero3-met"], runs[0]["resumed"]
    assert log_of(resumed["run_dir"]) == log_of(met["run_dir"])
    assert_bit_equal(saved_tensors(resumed["run_dir"]), saved_tensors(met["run_dir"]))
    for field in ("bad_steps", "recent_norms", "quarantine"):
        assert getattr(state(resumed["run_dir"]), field) == getattr(state(met["run_dir"]), field)


def test_a_checkpoint_holds_the_quarantine_and_a_branch_goes_on_with_it(runs: tuple[dict[str, Any], str]) -> None:
    met, branch = runs[0]["zero3-met"], runs[0]["branch"]
    assert state(met["run_dir"], 4).quarantine == bad_rows(met, before=4)
    assert state(met["run_dir"], 8).quarantine == state(branch["run_dir"], 10).quarantine == bad_rows(met)
    assert read_metrics(branch["run_dir"])[0]["loss"] \
        == next(r["loss"] for r in read_metrics(met["run_dir"]) if r["step"] == 9)


def test_after_too_many_bad_steps_a_run_stops_and_the_same_command_goes_on_without_their_rows(
        runs: tuple[dict[str, Any], str]) -> None:
    strict, said = runs[0]["strict"], runs[1]
    stops = [line for line in said.splitlines() if "exit code 5" in line]
    assert len(stops) == 1  # the first of two starts
    for part in ("3 steps were left out, more than guard.max_bad_steps", "the last was step 5: gradient norm",
                 "checkpoints/step_00000004, without the 12 rows", "quarantine.json", "optimizer.peak_lr"):
        assert part in stops[0]
    assert read_quarantine(Path(strict["run_dir"])) == bad_rows(strict)
    assert_bit_equal(saved_tensors(strict["run_dir"]), saved_tensors(runs[0]["zero3-met"]["run_dir"]))


def test_the_bound_is_a_multiple_of_the_median_of_the_last_good_norms() -> None:
    guard = Guard(GuardConfig(window=3, norm_factor=2))
    for norm, bound in ((9.0, None), (1.0, None), (3.0, 6.0), (5.0, 6.0), (4.0, 8.0)):  # median of the last 3, times 2
        guard.note_good(norm)
        assert guard.bound == bound
    assert guard.judge(1.0, 8.0) is None
    assert "gradient norm 8.100" in str(guard.judge(1.0, 8.1))
    guard.note_bad({"b": [2], "a": [5, 1]})
    guard.note_bad({"a": [1, 3]})
    assert guard.bound == 8.0 and guard.bad_steps == 2 and guard.quarantine == {"a": [1, 3, 5], "b": [2]}
    again = Guard(GuardConfig(window=3, norm_factor=2), recent_norms=guard.recent_norms)
    assert again.bound == 8.0
    assert Guard(GuardConfig(window=1, norm_factor=None), recent_norms=[1.0]).judge(1.0, 1e9) is None


@pytest.mark.parametrize(("loss", "norm", "said"), [
    (float("nan"), 1.0, "loss nan"), (float("inf"), 1.0, "loss inf"), (float("nan"), float("nan"), "loss nan"),
    (2.0, float("inf"), "gradient norm inf"), (2.0, float("nan"), "gradient norm nan"), (2.0, 1.0, None),
    (2.0, None, None),
])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(
        loss: float, norm: float | None, said: str | None) -> None:
    reason = Guard(GuardConfig()).judge(loss, norm)
    assert reason is None if said is None else said in str(reason)


@pytest.mark.parametrize("text", ["[1]", '{"mixed": 3}', '{"mixed": [1.5]}', '{"mixed": [-1]}', "{"])
def test_a_quarantine_file_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "quarantine.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"quarantine\.json is not of the form"):
        read_quarantine(tmp_path)


def test_rows_left_out_keep_their_places_and_a_step_that_is_prepared_already_is_made_anew(
        world: dict[str, Any]) -> None:
    plan = build_plan(tiny.run_config(world), 1)
    options = {"global_batch_size": 4, "micro_batch_size": 4, "allow_unaudited": True}
    whole, other = (PackedDataset.open(plan.config.data.packed, **options) for _ in range(2))
    before, steps = list(whole.steps(0, 3)), other.steps(0, 3)
    next(steps)  # step 1 is being prepared by now
    left_out = whole.rows_by_corpus(1)["mixed"][:2]
    other.leave_out({"mixed": left_out, "no such corpus": [1]})
    after = next(steps)
    rows, full, masked = other.step_rows(1), before[1].batches[0], after.batches[0]
    assert (rows.row == whole.step_rows(1).row).all() and (rows.dealt == whole.step_rows(1).dealt).all()
    is_out = torch.tensor([int(rows.row[i]) in left_out for i in rows.dealt[0, :, 0]])
    assert is_out.sum() == 2 and torch.equal(full.cu_seqlens, masked.cu_seqlens)
    ids, labels = (masked.input_ids.view(4, -1), masked.labels)
    assert torch.equal(labels[~is_out], full.labels[~is_out]) and (labels[is_out] == -100).all()
    assert torch.equal(ids[~is_out], full.input_ids.view(4, -1)[~is_out])
    assert not torch.isin(ids[is_out], torch.tensor([NAN_TOKEN, SPIKE_TOKEN])).any()
    assert after.n_valid == masked.n_valid == int((labels != -100).sum()) < before[1].n_valid
    assert masked.n_valid_by_row.tolist() == (labels != -100).sum(1).tolist()
    assert after.n_pad - before[1].n_pad == sum(tiny.SEQ_LEN - n for n in _pads(full, is_out))
    assert after.cost == before[1].cost


def _pads(batch: Any, rows: torch.Tensor) -> list[int]:
    """Padding at the end of the given rows of a batch."""
    doc = batch.doc_ids[torch.searchsorted(batch.cu_seqlens, torch.arange(4 * tiny.SEQ_LEN), right=True) - 1]
    return [int(n) for n in (doc.view(4, -1) == -1).sum(1)[rows]]
