"""Branches as plans: what a branch inherits, what it may change, what is refused. No rank is started."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from cprec import cli
from cprec.config import CheckpointConfig, Length
from cprec.errors import CheckpointError, ConfigError
from cprec.format import write_atomically
from cprec.tokenizer import load_tokenizer
from cprec.train import sweep
from cprec.train.branch import (
    Annealing,
    Rewarming,
    annealing_config,
    control_config,
    find_checkpoint,
    find_parent,
    is_pinned,
    restarting_config,
    rewarming_config,
)
from cprec.train.checkpoint import Checkpoint, State, checkpoint_name, read_run_config
from cprec.train.family import find_family
from cprec.train.plan import Plan, build_plan
from cprec.train.retention import lease, living_branches, prune
from cprec.train.run_folder import check_run_folder, claim_run_folder
from launch import anneal
from launch import sweep as launch_sweep

FOUR = Length(steps=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trunk data: mixed of 25 rows, specific/toys of 40; 8 rows a step, stable from step 2 on."""
    return {**tiny.write_world(tmp_path_factory.mktemp("world")), "validation": {"every": None}}


def plan_of(config: Any) -> Plan:
    return build_plan(tiny.run_config(config if isinstance(config, dict) else config.model_dump()), 1)


def save(plan: Plan, step: int) -> Checkpoint:
    """What a run leaves at `step`, but the weights."""
    claim_run_folder(Path(plan.config.run_dir), plan)
    return save_alone(plan, step)


def save_alone(plan: Plan, step: int) -> Checkpoint:
    """The same in a run folder that has been claimed."""
    state = State(
        step=step, tokens_seen=step * plan.tokens_per_step, rows_seen=step * 8, lr=plan.schedule.lr(step),
        phase=plan.schedule.phase(step), bad_steps=0, valid_loss=None, data_hashes={}, config_hash="",
        tokenizer_fingerprint=load_tokenizer(plan.config.model.path).fingerprint, world_size=1, zero_stage=3,
        parent=plan.config.parent, files={}).sealed()
    folder = Path(plan.config.run_dir) / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    write_atomically(folder / "state.json", state.model_dump_json())
    return Checkpoint(folder, state)


@pytest.fixture
def stable(world: dict[str, Any], tmp_path: Path) -> Checkpoint:
    """Step 6 of a trunk of 12."""
    return save(plan_of({**world, "run_dir": str(tmp_path / "base")}), 6)


def rows_read(plan: Plan, first: int, last: int) -> list[tuple[str, int, int]]:
    """Corpus, epoch and row of every row of the steps from `first` to before `last`."""
    at = plan.sampler.rows(first * 8, (last - first) * 8)
    return [(plan.sampler.names[c], int(e), int(r)) for c, e, r in zip(at.corpus, at.epoch, at.row, strict=True)]


def test_a_source_names_the_newest_stable_checkpoint_or_a_step(world: dict[str, Any], tmp_path: Path) -> None:
    values = {**world, "run_dir": str(tmp_path / "run"),
              "schedule": {**world["schedule"], "anneal": {"length": {"steps": 4}}}}
    plan = plan_of(values)
    for step in (1, 4, 6, 10):
        save(plan, step)
    run = str(tmp_path / "run")
    assert [find_parent(s).state.step for s in (run, f"{run}@latest-stable", f"{run}@4",
                                               f"{run}/checkpoints/step_00000004")] == [6, 6, 4, 4]
    assert find_checkpoint(run).state.step == find_parent(run, annealed=True).state.step == 10
    assert [is_pinned(s) for s in (run, f"{run}@latest-stable", f"{run}@4", f"{run}/checkpoints/step_00000004/")] == [
        False, False, True, True]
    (tmp_path / "a@1").symlink_to(tmp_path)  # an @ further up is part of a name
    assert [find_parent(f"{tmp_path}/a@1/run{at}").state.step for at in ("", "@4")] == [6, 4]
    for source, why in [("10", r"step 10 is in the anneal phase; an annealing branch starts from"),
                        ("1", r"step 1 is in the warmup phase"),
                        ("5", r"complete ones of .*: 1 \(warmup\), 4 \(stable"),
                        ("latest", "give a number, or latest-stable")]:
        with pytest.raises(CheckpointError, match=why):
            find_parent(f"{run}@{source}")
    with pytest.raises(CheckpointError, match=r"step 6 is in the stable phase; --rewarm starts from an annealed"):
        find_parent(f"{run}@6", annealed=True)


def test_newer_checkpoints_that_are_broken_or_half_written_are_named_when_the_newest_is_asked_for(
        world: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, run = plan_of({**world, "run_dir": str(tmp_path / "run")}), tmp_path / "run"
    four, six, eight, ten = (save(plan, step).folder for step in (4, 6, 8, 10))
    (four / "state.json").write_text("{")  # older than the newest sound one: of no interest
    (eight / "state.json").write_text((eight / "state.json").read_text().replace('"lr":0.01', '"lr":0.02'))
    (ten / "state.json").unlink()
    for at in ("", "@latest-stable"):
        caplog.clear()
        assert find_checkpoint(f"{run}{at}").folder == six
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(said) == 2 and all(line.startswith(f"PASSED OVER for {six}: ") for line in said)
        assert "step_00000008/state.json was altered" in said[0]
        assert "step_00000010 is no complete checkpoint: it has no state.json" in said[1]
    caplog.clear()
    assert find_checkpoint(f"{run}@6").folder == six and not caplog.records
    with pytest.raises(CheckpointError, match=r"step_00000008/state.json was altered"):
        find_checkpoint(f"{run}@8")
    with pytest.raises(CheckpointError, match=r"step_00000010 is no complete checkpoint"):
        find_checkpoint(f"{run}@10")
    shutil.rmtree(six)
    with pytest.raises(CheckpointError, match=r"(?s): none.*step_00000004.*step_00000008.*step_00000010"):
        find_checkpoint(str(run))


def test_a_parent_that_is_half_pruned_says_to_start_its_run_once(
        world: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, run = plan_of({**world, "run_dir": str(tmp_path / "run")}), tmp_path / "run"
    six, eight = (save(plan, step).folder for step in (6, 8))
    (eight / "state.json").rename(eight / "state.json.pruned")
    why = rf"step_00000008 is no complete checkpoint: it is being pruned now, or was .*start {run} once"
    for source in (f"{run}@8", str(eight)):
        with pytest.raises(CheckpointError, match=why):
            find_checkpoint(source)
    assert find_checkpoint(str(run)).folder == six and re.search(why, caplog.text)
    assert "interrupted save" not in caplog.text


def test_a_parent_whose_tokenizer_has_changed_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    model = Path(shutil.copytree(world["model"]["path"], tmp_path / "model"))
    save(plan_of({**world, "run_dir": str(tmp_path / "run"), "model": {"path": str(model)}}), 6)
    find_parent(str(tmp_path / "run"))
    spec = json.loads((model / "tokenizer.json").read_text())
    spec["model"]["vocab"]["<one-more>"] = 258
    (model / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=r"the tokenizer of model.path=.* has changed since step 6 was saved"):
        find_parent(str(tmp_path / "run"))


def test_a_last_rate_by_itself_is_where_the_annealing_ends(stable: Checkpoint) -> None:
    plan = plan_of(annealing_config(stable, Annealing(FOUR, shape="linear", final_lr=2e-3)))
    assert plan.schedule.lr(6) == stable.state.lr == 1e-2
    assert plan.schedule.lr(10) == pytest.approx(2e-3, rel=1e-12)
    with pytest.raises(ConfigError, match=r"--final-lr 0.02: an annealing goes down from 0.01"):
        annealing_config(stable, Annealing(FOUR, final_lr=2e-2))


@pytest.mark.parametrize(("mix", "why"), [
    ({"mixd": 1.0}, r"--mix mixd: the run has no such corpus; did you mean 'mixed'"),
    ({"mixed": -1.0}, r"--mix mixed=-1: a weight is a number from 0 up"),
    ({"mixed": float("nan")}, "--mix mixed=nan: a weight is a number"),
    ({"mixed": 0.0}, "all weights are zero"),
])
def test_an_impossible_mixture_is_refused(stable: Checkpoint, mix: dict[str, float], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        annealing_config(stable, Annealing(FOUR, mix=mix))


def test_weights_of_the_command_line_are_split_at_commas_or_given_apart() -> None:
    assert cli.weights(["mixed=1,specific/*=2"]) == cli.weights(["mixed=1", "specific/*=2"]) == {
        "mixed": 1.0, "specific/*": 2.0}
    assert cli.weights([]) is None
    for wrong in ("mixed", "mixed=x", "=2", "mixed=1,"):
        with pytest.raises(ConfigError, match="not of the form CORPUS=WEIGHT"):
            cli.weights([wrong])


def test_a_branch_has_values_of_its_own_only_where_they_do_not_change_what_is_trained(stable: Checkpoint) -> None:
    config = annealing_config(stable, Annealing(FOUR, overrides=[
        "checkpoint.every=2", "data.max_epochs={mixed: 2}", "data.when_dry=redistribute", "validation.every=3"]))
    assert (config.checkpoint.every, config.data.max_epochs, config.validation.every) == (2, {"mixed": 2.0}, 3)
    check_run_folder(Path(config.run_dir), plan_of(config))
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*optimizer.eps: a branch has this from its trunk.*run_dir"):
        annealing_config(stable, Annealing(FOUR, overrides=["optimizer.eps=1", "run_dir=elsewhere"]))
    with pytest.raises(ConfigError, match=r"checkpoint.evry: unknown key; did you mean 'every'"):
        annealing_config(stable, Annealing(FOUR, overrides=["checkpoint.evry=2"]))


def test_a_control_is_the_same_annealing_on_the_trunks_mixture(stable: Checkpoint) -> None:
    branch = annealing_config(stable, Annealing(FOUR, mix={"mixed": 1.0}, final_lr=1e-3))
    control = control_config(branch)
    assert control.run_dir == f"{branch.run_dir}-control"
    assert (control.schedule, control.parent, control.optimizer) == (branch.schedule, branch.parent, branch.optimizer)
    plans = plan_of(branch), plan_of(control)
    assert {name for name, _, _ in rows_read(plans[0], 6, 10)} == {"mixed"}
    assert rows_read(plans[1], 6, 10) == rows_read(plan_of(read_run_config(stable.run_dir)), 6, 10)
    with pytest.raises(ConfigError, match="would be its own control"):
        control_config(control)


def test_a_branch_with_a_seed_reads_what_the_trunk_has_left_in_another_order(stable: Checkpoint) -> None:
    trunk = plan_of(read_run_config(stable.run_dir))
    plain, one, two = (plan_of(annealing_config(stable, Annealing(Length(steps=6), seed=k))) for k in (None, 1, 2))
    for seeded in (one, two):
        assert rows_read(seeded, 0, 6) == rows_read(trunk, 0, 6)
        assert rows_read(seeded, 6, 12) != rows_read(plain, 6, 12)
        read = rows_read(seeded, 0, 12)
        assert len(set(read)) == len(read) and {e for _, e, _ in read} == {0, 1}  # an epoch ends; none has a row twice
        check_run_folder(Path(seeded.config.run_dir), seeded)
    assert rows_read(one, 6, 12) != rows_read(two, 6, 12)
    toys = [sorted(r for name, e, r in rows_read(p, 0, 24) if (name, e) == ("specific/toys", 0)) for p in (one, plain)]
    assert toys[0] == toys[1] == list(range(40))  # over the whole epoch each row once
    again = plan_of(one.config)
    assert again.config == one.config and again.sampler == one.sampler


def test_a_branch_that_has_begun_keeps_its_fork_unless_another_step_is_named(
        world: dict[str, Any], stable: Checkpoint) -> None:
    begun = plan_of(annealing_config(stable, Annealing(FOUR)))
    save(begun, 8)
    newer = save(plan_of(read_run_config(stable.run_dir)), 10)
    assert annealing_config(newer, Annealing(FOUR)) == begun.config
    other = plan_of(annealing_config(newer, Annealing(FOUR, pinned=True)))
    with pytest.raises(ConfigError, match=r"belongs to another run(?s:.)*parent.step: 6 in .*10 now"):
        check_run_folder(Path(begun.config.run_dir), other)


def test_a_branch_that_has_a_checkpoint_goes_on_when_its_parent_has_moved(
        world: dict[str, Any], stable: Checkpoint, tmp_path: Path) -> None:
    run = str(tmp_path / "branch")
    begun = plan_of(annealing_config(stable, Annealing(FOUR, run_dir=run)))
    claim_run_folder(Path(run), begun)
    moved = stable.run_dir.rename(tmp_path / "archive")
    with pytest.raises(CheckpointError, match=r"base/data.json cannot be read"):  # it needs its parent still
        check_run_folder(Path(run), plan_of(begun.config))
    save_alone(begun, 8)
    check_run_folder(Path(run), plan_of(begun.config))
    newer = save(plan_of({**world, "run_dir": str(moved)}), 10)
    for parent, pinned in ((find_parent(f"{moved}@6"), True), (newer, False)):  # the same command, the new place
        again = plan_of(annealing_config(parent, Annealing(FOUR, run_dir=run, pinned=pinned)))
        check_run_folder(Path(run), again)
        assert again.config.parent is not None and again.config.parent.run_dir == str(moved)
        assert (again.config.parent.step, again.sampler) == (6, begun.sampler)
    other = {**begun.config.model_dump(), "parent": {"run_dir": str(moved), "step": 6, "state_hash": "other"}}
    with pytest.raises(ConfigError, match=r"parent.state_hash: "):
        check_run_folder(Path(run), plan_of(other))


def test_a_way_back_and_a_branch_of_it_read_on_where_the_weights_stand(stable: Checkpoint) -> None:
    branch = plan_of(annealing_config(stable, Annealing(FOUR, shape="linear", final_lr_ratio=0.0, mix={"mixed": 1.0})))
    annealed = save(branch, 9)
    back = plan_of(rewarming_config(annealed, Rewarming(Length(steps=11), rewarm_steps=4)))
    check_run_folder(Path(back.config.run_dir), back)
    assert (back.first_step, back.schedule.total_steps) == (9, 20)
    assert rows_read(back, 0, 9) == rows_read(branch, 0, 9)
    assert {name for name, _, _ in rows_read(back, 9, 20)} == {"mixed", "specific/toys"}
    assert len(set(rows_read(back, 0, 11))) == 88
    at_9 = annealed.state.lr
    assert at_9 == pytest.approx(0.25e-2)
    climb = [at_9 + (1e-2 - at_9) * k / 4 for k in (1, 2, 3, 4)]
    assert [back.schedule.lr(n) for n in range(9, 14)] == pytest.approx([*climb, 1e-2])
    assert [back.schedule.phase(n) for n in (8, 9, 12, 13)] == ["anneal", "rewarm", "rewarm", "stable"]
    second = plan_of(annealing_config(save(back, 15), Annealing(FOUR, seed=3)))
    check_run_folder(Path(second.config.run_dir), second)
    assert rows_read(second, 0, 15) == rows_read(back, 0, 15)
    assert [second.schedule.lr(n) for n in range(16)] == [back.schedule.lr(n) for n in range(16)]
    assert second.config.schedule.returns == back.config.schedule.returns
    zero = plan_of(rewarming_config(annealed, Rewarming(FOUR, rewarm_steps=2, from_zero=True)))
    assert [zero.schedule.lr(n) for n in (9, 10, 11)] == pytest.approx([5e-3, 1e-2, 1e-2])


def test_an_export_begins_a_new_trunk_with_a_warm_up_and_rows_in_another_order(
        stable: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(read_run_config(stable.run_dir).model.path, tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"its run's config is not at hand .*model.path="):
        restarting_config(folder, Rewarming(FOUR, rewarm_steps=2))
    (folder / "cprec_export.json").write_text(json.dumps({"run": str(stable.run_dir), "step": 6, "state_hash": "x"}))
    new = plan_of(restarting_config(folder, Rewarming(FOUR, rewarm_steps=2)))
    assert (new.config.model.path, new.config.parent, new.first_step) == (str(folder), None, 0)
    assert [new.schedule.lr(n) for n in range(4)] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert new.config.data.seed == 1 and restarting_config(folder, Rewarming(FOUR, seed=7)).data.seed == 7


@pytest.mark.parametrize("annealed", [False, True])
def test_an_average_is_told_apart_from_a_run_with_what_to_do_instead(tmp_path: Path, annealed: bool) -> None:
    (tmp_path / "cprec_average.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"average of models.*launch/pretrain.py.*model.path={tmp_path}"):
        find_parent(str(tmp_path), annealed=annealed)


def test_a_branch_that_stands_elsewhere_is_found_by_its_lease(
        stable: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("away")
    for where in (away / "branch", away / "deeper/sweep/sqrt-4"):
        plan = plan_of(annealing_config(stable, Annealing(FOUR, run_dir=str(where))))
        claim_run_folder(where, plan)
    assert [m.folder for m in find_family([stable.run_dir])] == [stable.run_dir]
    lease(stable.run_dir, 6, run_dir=away / "branch")
    lease(stable.run_dir, 6, run_dir=away / "deeper/sweep", is_of_sweep=True)
    assert [m.folder for m in find_family([stable.run_dir])] == [
        stable.run_dir, away / "branch", away / "deeper/sweep/sqrt-4"]


@pytest.mark.parametrize(("schedule", "phases"), [
    ({"kind": "cosine", "final_lr_ratio": 0.0}, ["warmup", "decay", "decay"]),
    ({"kind": "linear"}, ["warmup", "decay", "decay"]),
    ({"kind": "constant"}, ["warmup", "stable", "stable"]),
    ({"kind": "wsd-s", "cycles": 2, "anneal": {"length": {"share": 0.5}}}, ["warmup", "anneal", "anneal"]),
])
def test_rivals_of_the_schedule_are_configs_that_resolve_to_themselves(
        world: dict[str, Any], schedule: dict[str, Any], phases: list[str]) -> None:
    plan = plan_of({**world, "schedule": {**world["schedule"], **schedule}})
    assert [plan.schedule.phase(n) for n in (0, 3, 11)] == phases
    again = plan_of(plan.config)
    assert (again.config, again.sampler) == (plan.config, plan.sampler)
    assert rows_read(plan, 0, 12) == rows_read(plan_of(world), 0, 12)  # an honest comparison: the same rows


def test_cycles_read_the_annealing_mixture_in_each_annealing(world: dict[str, Any], tmp_path: Path) -> None:
    values = {**world, "run_dir": str(tmp_path / "cycles"), "schedule": {
        "kind": "wsd-s", "cycles": 2, "total": {"steps": 12}, "warmup": {"steps": 1},
        "anneal": {"length": {"steps": 2}}}}
    values["data"] = {**world["data"], "mix": {"stable": {"specific/toys": 1}, "anneal": {"mixed": 1}}}
    plan = plan_of(values)
    read = [{name for name, _, _ in rows_read(plan, n, n + 1)} for n in range(12)]
    assert [n for n in range(12) if read[n] == {"mixed"}] == [4, 5, 10, 11]
    branch = plan_of(annealing_config(save(plan, 8), Annealing(FOUR, mix={"specific/toys": 1})))
    check_run_folder(Path(branch.config.run_dir), branch)  # knows of the cycle behind it
    assert rows_read(branch, 0, 8) == rows_read(plan, 0, 8)
    assert [branch.schedule.lr(n) for n in range(9)] == [plan.schedule.lr(n) for n in range(9)]


@pytest.mark.parametrize(("schedule", "why"), [
    ({"kind": "cosine", "anneal": {"length": {"steps": 2}}}, r"anneal means nothing under kind='cosine'"),
    ({"kind": "constant", "final_lr_ratio": 0.1}, r"final_lr_ratio means nothing under kind='constant'"),
    ({"kind": "wsd-s"}, r"needs both cycles, their number, and anneal"),
    ({"kind": "cosin"}, r"schedule.kind='cosin'"),
    ({"kind": "cosine", "final_lr_ratio": 2}, r"final_lr_ratio=2.0 must lie between 0 and 1"),
    ({"kind": "cosine", "warmup": {"steps": 12}}, r"leaves nothing of schedule.total \(12 steps\)"),
    ({"kind": "wsd-s", "cycles": 6, "anneal": {"length": {"steps": 1}}, "warmup": {"steps": 2}},
     r"schedule.cycles=6 .* are 2 steps each, too few for schedule.warmup \(2 steps\)"),
])
def test_a_schedule_that_cannot_be_is_told(world: dict[str, Any], schedule: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan_of({**world, "schedule": {**world["schedule"], **schedule}})


def test_a_mixture_that_no_phase_would_read_is_told(world: dict[str, Any]) -> None:
    data = {**world["data"], "mix": {"stable": {"mixed": 1}, "anneal": {"mixed": 1}}}
    with pytest.raises(ConfigError, match=r"data.mix.anneal is never read under kind='cosine'"):
        plan_of({**world, "data": data, "schedule": {**world["schedule"], "kind": "cosine"}})


def test_only_a_run_that_stays_at_its_stable_rate_may_grow(world: dict[str, Any], tmp_path: Path) -> None:
    for kind, grows in (("wsa", True), ("constant", True), ("cosine", False)):
        values = {**world, "run_dir": str(tmp_path / kind), "schedule": {**world["schedule"], "kind": kind}}
        save(plan_of(values), 4)
        longer = plan_of({**values, "schedule": {**values["schedule"], "total": {"steps": 20}}})
        if grows:
            check_run_folder(tmp_path / kind, longer)
            continue
        with pytest.raises(ConfigError, match=r"schedule.total.steps: 12 in"):
            check_run_folder(tmp_path / kind, longer)


def test_a_sweep_is_every_point_of_its_grid_and_checked_before_anything_starts(
        stable: Checkpoint, tmp_path: Path) -> None:
    grid = sweep.Grid([FOUR, Length(share=0.5)], ("sqrt", "linear"), (sweep.TRUNK, "specific/*=2,mixed=1"), (None, 3))
    jobs = sweep.plan_sweep(stable, grid, tmp_path / "out")
    assert len(jobs) == len({j.run_dir for j in jobs}) == 16
    assert [(j.name, j.last_step) for j in jobs[:4]] == [
        ("sqrt-4", 10), ("sqrt-4-seed3", 10), ("sqrt-4-specific-all-2-mixed-1", 10),
        ("sqrt-4-specific-all-2-mixed-1-seed3", 10)]
    assert jobs[4].name == "sqrt-3" and jobs[4].last_step == 9  # half of 6 steps
    assert sweep.command_of(jobs[3], "deepspeed --num_gpus 8", Path("launch/anneal.py")) == (
        f"deepspeed --num_gpus 8 launch/anneal.py --from {stable.folder} --steps 4 --shape sqrt --final-lr-ratio 0.1 "
        f"--run-dir {tmp_path}/out/sqrt-4-specific-all-2-mixed-1-seed3 --mix 'specific/*=2,mixed=1' --seed 3")
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*mean 'linear'.*no such corpus; did you mean 'mixed'"):
        sweep.plan_sweep(stable, sweep.Grid([FOUR], ("liner", "sqrt"), (sweep.TRUNK, "mixd=1")), tmp_path)
    with pytest.raises(ConfigError, match="sqrt-4 would be made twice"):
        sweep.plan_sweep(stable, sweep.Grid([FOUR, FOUR]), tmp_path)


def test_a_trunk_that_trains_on_keeps_the_parent_of_a_sweep_that_waits(stable: Checkpoint, tmp_path: Path) -> None:
    out, keep_one = tmp_path / "out", CheckpointConfig(keep_last=1)
    sweep.keep_parent(stable, out)
    trunk = plan_of(read_run_config(stable.run_dir))
    newer = save(trunk, 8)
    sweep.keep_parent(newer, out)  # another parent of the same sweep does not let go of the first
    save(trunk, 10)
    assert prune(stable.run_dir, keep_one) == []
    assert living_branches(stable.run_dir) == {6: [str(out)], 8: [str(out)]}
    out.rmdir()
    assert prune(stable.run_dir, keep_one) == [stable.folder.name, newer.folder.name]
    with pytest.raises(CheckpointError, match=r"step_00000006 is no complete checkpoint"):
        sweep.keep_parent(stable, out)


def test_the_commands_of_an_array_in_the_queue_stay_when_the_grid_grows(stable: Checkpoint, tmp_path: Path) -> None:
    def written(*shapes: str) -> Path:
        jobs = sweep.plan_sweep(stable, sweep.Grid([FOUR], shapes), tmp_path / "out")
        return Path(sweep.write_commands(jobs, "ranks", Path("launch/anneal.py"), tmp_path / "out")[-1])

    one, two = written("sqrt"), written("linear", "sqrt")
    assert one != two and one == written("sqrt")
    assert [len(path.read_text().splitlines()) for path in (one, two)] == [1, 2] and "--shape sqrt" in one.read_text()


def test_a_seed_of_a_sweep_is_a_whole_number(stable: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--from", str(stable.run_dir), "--steps", "4", "--seed", "1,1.5"])
    with pytest.raises(ConfigError, match=r"--seed 1,1.5: give whole numbers"):
        launch_sweep.main()


@pytest.mark.parametrize(("launcher", "states"), [
    ("false", ["failed", "failed"]), ("true", ["failed", "failed"]), ("bash -c 'exit 75'", ["stopped", "to do"]),
])
def test_a_job_that_fails_is_named_and_the_others_go_on_but_not_when_asked_to_stop(
        stable: Checkpoint, tmp_path: Path, launcher: str, states: list[str]) -> None:
    """A job is finished by its checkpoint, not by an exit code of 0."""
    jobs = sweep.plan_sweep(stable, sweep.Grid([FOUR], ("sqrt", "linear")), tmp_path / "out")
    outcomes = list(sweep.run_sweep(jobs, launcher, Path("anneal.py")))
    assert [o.state for o in outcomes] == states
    table = sweep.summary(outcomes)
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        [j.name, s.split()[0]] for j, s in zip(jobs, states, strict=True)]
    assert states[0] != "failed" or str(tmp_path / "out/linear-4.log") in table


def test_a_launcher_that_is_not_there_is_told(stable: Checkpoint, tmp_path: Path) -> None:
    jobs = sweep.plan_sweep(stable, sweep.Grid([FOUR]), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--launcher 'deepsped' cannot be started: No such file"):
        list(sweep.run_sweep(jobs, "deepsped", Path("anneal.py")))


def test_an_option_that_a_script_does_not_have_is_answered_with_its_neighbour(
        capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.Parser()
    parser.add_argument("--final-lr")
    parser.add_argument("--shape")
    assert parser.parse_args(["--final-lr=1"]).final_lr == "1"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--finl-lr", "1"])
    assert "there is no option --finl-lr: did you mean '--final-lr'" in capsys.readouterr().err


def test_options_that_mean_nothing_together_are_told(stable: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ["anneal.py", "--from", str(stable.run_dir), "--steps", "2"]
    for options, why in ((["--rewarm", "1", "--mix", "mixed=1"], "--mix: these are of an annealing"),
                         (["--rewarm", "-1"], "--rewarm -1: give the number of steps"),
                         (["--from-zero"], "--from-zero says where --rewarm begins")):
        monkeypatch.setattr(sys, "argv", [*source, *options])
        with pytest.raises(ConfigError, match=why):
            anneal.main()


def test_a_sweep_takes_no_other_annealing_of_the_same_name_for_its_own(stable: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(plan_of(annealing_config(stable, Annealing(FOUR, run_dir=str(out / "sqrt-4")))), 10)
    assert [j.is_finished for j in sweep.plan_sweep(stable, sweep.Grid([FOUR]), out)] == [True]
    newer = save(plan_of(read_run_config(stable.run_dir)), 8)
    for parent, ratio in ((newer, 0.1), (stable, 0.2)):
        with pytest.raises(ConfigError, match=r"sqrt-4 holds another annealing \(of .*base at step 6, sqrt over 4"):
            sweep.plan_sweep(parent, sweep.Grid([FOUR], final_lr_ratio=ratio), out)
