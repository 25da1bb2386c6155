"""Which corpora a run reads: caps and their ways out, folders, added and removed corpora, what a step reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from cprec import dist
from cprec.config import Length
from cprec.data.corpora import find_corpora, of_kind, read_data_record, read_manifests
from cprec.data.dataset import PackedDataset, open_corpora
from cprec.errors import CheckpointError, ConfigError, DataError
from cprec.format import Manifest, read_manifest, write_atomically, write_manifest
from cprec.settings import dump_settings
from cprec.train.branch import Annealing, annealing_config
from cprec.train.checkpoint import Checkpoint, State, checkpoint_name
from cprec.train.loop import _check_one_view
from cprec.train.plan import Plan, build_plan
from cprec.train.run_folder import check_run_folder, claim_run_folder
from cprec.train.steps import open_run, show_step
from cprec.train.validate import _open_valid


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trunk data: mixed of 25 rows, specific/toys of 40; beside them a folder with specific/games of 12."""
    root = tmp_path_factory.mktemp("world")
    values = tiny.write_world(root)
    tiny.write_corpus(root / "more", "specific/games", model=root / "model", n_rows=12, seed=5)
    return {**values, "validation": {"every": None}}


def with_data(world: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {**world, "data": {**world["data"], **data}}


def plan_of(values: dict[str, Any]) -> Plan:
    return build_plan(tiny.run_config(values), 1)


def more(world: dict[str, Any]) -> str:
    return str(Path(world["data"]["packed"]).parent / "more")


def save(run_dir: Path, plan: Plan, step: int, *, world_size: int = 2) -> Checkpoint:
    """What a run leaves at `step`, but the weights."""
    claim_run_folder(run_dir, plan)
    batch = plan.config.batch.global_batch_size
    state = State(step=step, tokens_seen=step * plan.tokens_per_step, rows_seen=step * batch, lr=1e-2, phase="stable",
                  bad_steps=0, valid_loss=None, config_hash="", data_hashes={}, tokenizer_fingerprint="",
                  world_size=world_size, zero_stage=3, parent=None, files={}).sealed()
    folder = run_dir / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    write_atomically(folder / "state.json", state.model_dump_json())
    return Checkpoint(folder, state)


def branch_of(parent: Checkpoint, *, steps: int = 4, **wanted: Any) -> dict[str, Any]:
    mix, data = wanted.get("mix"), wanted.get("data", [])
    config = annealing_config(parent, Annealing(Length(steps=steps), f"{parent.run_dir}-b", mix=mix, packed=data))
    return config.model_dump()


def rows_read(plan: Plan, first: int, last: int) -> list[tuple[str, int, int]]:
    """Corpus, epoch and row of every row of the steps from `first` to before `last`."""
    batch = plan.config.batch.global_batch_size
    at = plan.sampler.rows(first * batch, (last - first) * batch)
    return [(plan.sampler.names[c], int(e), int(r)) for c, e, r in zip(at.corpus, at.epoch, at.row, strict=True)]


def test_a_plan_says_in_which_step_a_corpus_runs_dry_and_what_to_do(world: dict[str, Any]) -> None:
    # 12 steps of 8 rows, a third of them mixed: 32 rows of 25; the 26th, beyond one epoch, is row 75 or so, in step 10
    with pytest.raises(ConfigError, match=r"mixed runs dry in step 10 of 12: 25 rows \(1 epochs\).*wants 32; lower its "
                                          r"weight, shorten the run, raise its max_epochs, or set data.when_dry=redis"):
        plan_of(with_data(world, max_epochs={"mixed": 1}))
    assert plan_of(with_data(world, max_epochs={"mixed": 1.28})).sampler.drawn(96).tolist() == [32, 64]


def test_a_weight_that_cannot_be_held_is_told_with_what_it_comes_to(world: dict[str, Any]) -> None:
    # toys wants 1e-9 of the rows; one of 16,384 is the least there is, in the middle of the period: none of 96 rows
    (said,) = plan_of(with_data(world, mix={"stable": {"mixed": 1, "specific/toys": 1e-9}})).warnings()
    assert said.startswith("specific/toys has 1e-09 of the weights of data.mix.stable, but gets 1 of every 16,384 rows")
    assert "6.1e-05, and 0.00 epochs of its 40 rows by the run's end; limit it with data.max_epochs" in said
    plan = plan_of(with_data(world, mix={"stable": {"mixed": 1}, "warmup": {"mixed": 1, "specific/toys": 1e-9}}))
    assert "data.mix.warmup" in plan.text() and len(plan.warnings()) == 1
    assert plan_of(world).warnings() == []


def test_a_branch_is_warned_of_the_mixture_that_it_reads_itself(world: dict[str, Any], tmp_path: Path) -> None:
    rare = {"mixed": 1, "specific/toys": 1e-9}
    parent = save(tmp_path / "run", plan_of(with_data(world, mix={"stable": rare})), 8)
    assert len(plan_of(branch_of(parent)).warnings()) == 1
    assert plan_of(branch_of(parent, mix={"mixed": 1, "specific/toys": 1})).warnings() == []


def test_redistributing_reads_the_cap_and_not_a_row_more_and_the_plan_tells(world: dict[str, Any]) -> None:
    plan = plan_of(with_data(world, max_epochs={"mixed": 1}, when_dry="redistribute"))
    free = plan_of(world)
    assert plan.sampler.drawn(96).tolist() == [25, 71]
    assert rows_read(plan, 0, 9) == rows_read(free, 0, 9)  # up to the row at which it is exhausted nothing changes
    assert "mixed reaches its max_epochs in step 10" in plan.text()
    longer = {**with_data(world, max_epochs={"mixed": 1}, when_dry="redistribute"),
              "schedule": {"total": {"steps": 40}, "warmup": {"steps": 2}}}
    assert rows_read(plan_of(longer), 0, 12) == rows_read(plan, 0, 12)


def test_a_run_in_which_every_corpus_runs_dry_is_refused_with_the_step(world: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"in step 9 of 12 every corpus with a weight has run dry"):
        plan_of(with_data(world, max_epochs={"*": 1}, when_dry="redistribute"))  # 65 rows are 8 steps and one row


@pytest.mark.parametrize("wrong", [{"mixed": 0}, {"mixed": -1}, {"mixed": float("inf")}])
def test_impossible_epochs_are_refused(world: dict[str, Any], wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data.max_epochs.mixed="):
        plan_of(with_data(world, max_epochs=wrong))


@pytest.mark.parametrize("packed", [[], 5, [3]])
def test_what_names_no_folder_is_refused_in_one_sentence(world: dict[str, Any], packed: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.packed=.*give a folder of packed corpora, or a list of them") as e:
        plan_of(with_data(world, packed=packed))
    assert "problems" not in str(e.value)


def test_several_folders_serve_one_run_in_any_order(world: dict[str, Any]) -> None:
    one, two = ([world["data"]["packed"], more(world)], [more(world), world["data"]["packed"]])
    plans = [plan_of(with_data(world, packed=packed)) for packed in (one, two)]
    assert plans[0].sampler == plans[1].sampler
    assert plans[0].sampler.names == ("mixed", "specific/games", "specific/toys")
    assert plans[0].data == plans[1].data and plans[0].places["specific/games"] == f"{more(world)}/specific/games"
    games = f"{more(world)}/specific/games"
    assert find_corpora(games) == {"specific/games": games}


def test_a_corpus_name_in_two_folders_is_an_error_that_names_both(world: dict[str, Any], tmp_path: Path) -> None:
    other = shutil.copytree(Path(world["data"]["packed"]) / "mixed", tmp_path / "again/mixed").parent
    with pytest.raises(DataError, match=rf"corpus mixed is in {world['data']['packed']}/mixed and in {other}/mixed"):
        plan_of(with_data(world, packed=[world["data"]["packed"], str(other)]))


def remade(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a corpus whose manifest says something else."""
    shutil.copytree(folder, to)
    manifest = read_manifest(to)
    write_manifest(to, Manifest.model_validate({**manifest.model_dump(), **changes}))
    return to.parents[1]


def test_two_splits_are_mixed_only_knowingly_and_two_row_lengths_never(
        world: dict[str, Any], tmp_path: Path) -> None:
    games = Path(more(world), "specific/games")
    split = str(remade(games, tmp_path / "a/specific/games", split_hash="1"))
    with pytest.raises(DataError, match=r"mixed and specific/games differ in split_hash .*allow_unaudited=true know"):
        plan_of(with_data(world, packed=[world["data"]["packed"], split]))
    plan_of(with_data(world, packed=[world["data"]["packed"], split], allow_unaudited=True))
    short = str(remade(games, tmp_path / "b/specific/games", seq_len=32))
    with pytest.raises(DataError, match=r"differ in seq_len \(64 and 32\)"):
        plan_of(with_data(world, packed=[world["data"]["packed"], short], allow_unaudited=True))


def test_a_branch_may_add_a_corpus_and_reads_on_where_its_trunk_stood(world: dict[str, Any], tmp_path: Path) -> None:
    trunk = plan_of(world)
    parent = save(tmp_path / "run", trunk, 8)
    values = branch_of(parent, data=[more(world)], mix={"specific/games": 1, "mixed": 1}, steps=5)
    branch = plan_of(values)
    check_run_folder(tmp_path / "run-b", branch)
    assert branch.sampler.names == ("mixed", "specific/games", "specific/toys")
    assert rows_read(branch, 0, 8) == rows_read(trunk, 0, 8)
    read = rows_read(branch, 0, 13)
    assert len(set(read)) == len(read)  # nothing twice within an epoch, trunk and branch together
    assert {name for name, _, _ in read[64:]} == {"mixed", "specific/games"}
    claim_run_folder(tmp_path / "run-b", branch)
    again = plan_of(branch.config.model_dump())
    assert again.sampler == branch.sampler and again.config == branch.config


def test_a_branch_without_a_mixture_of_its_own_reads_the_trunks_next_rows(
        world: dict[str, Any], tmp_path: Path) -> None:
    trunk = plan_of(world)
    branch = plan_of(branch_of(save(tmp_path / "run", trunk, 8)))
    assert rows_read(branch, 8, 12) == rows_read(trunk, 8, 12)


def test_added_data_without_a_weight_and_a_weight_without_data_are_told(world: dict[str, Any], tmp_path: Path) -> None:
    parent = save(tmp_path / "run", plan_of(world), 8)
    with pytest.raises(ConfigError, match=r"--packed .*more: no --mix gives one of its corpora a weight.*games"):
        branch_of(parent, data=[more(world)])
    with pytest.raises(ConfigError, match=r"--mix specific/games: the run has no such corpus"):
        branch_of(parent, mix={"specific/games": 1})


def test_a_corpus_of_the_trunk_may_be_gone_if_the_branch_does_not_read_it(
        world: dict[str, Any], tmp_path: Path) -> None:
    packed = Path(shutil.copytree(world["data"]["packed"], tmp_path / "packed"))
    trunk = plan_of(with_data(world, packed=str(packed)))
    parent = save(tmp_path / "run", trunk, 8)
    shutil.rmtree(packed / "specific/toys")
    branch = plan_of(branch_of(parent, mix={"mixed": 1}))
    check_run_folder(tmp_path / "run-b", branch)
    assert rows_read(branch, 0, 8) == rows_read(trunk, 0, 8)  # its rows are still counted
    assert branch.data.corpora == trunk.data.corpora and "only the trunk read it" in branch.text()
    with pytest.raises(DataError, match=r"specific/toys, which .*run was trained on, is in no folder of data.packed="):
        plan_of(branch_of(parent))
    reader = PackedDataset(open_corpora(branch.sampler, branch.places, None, branch.train), branch.sampler,
                           global_batch_size=8, micro_batch_size=2)
    assert [len(b.corpus) for b in reader.step(8).batches] == [2, 2, 2, 2]
    with pytest.raises(DataError, match=r"rows of corpus specific/toys are to be read, and no folder"):
        reader.step(0)


def test_a_run_itself_neither_adds_nor_loses_a_corpus_and_a_branch_does_not_swap_one(
        world: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    parent = save(run, plan_of(world), 8)
    grown = plan_of(with_data(world, packed=[world["data"]["packed"], more(world)],
                              mix={"stable": {"mixed": 1, "specific/toys": 2}}))
    with pytest.raises(ConfigError, match=r"data.mix.stable.specific/games: None in .*, 0.0 now"):
        check_run_folder(run, grown)
    packed = Path(shutil.copytree(world["data"]["packed"], tmp_path / "packed"))
    shutil.rmtree(packed / "mixed")
    shrunk = plan_of(with_data(world, packed=str(packed), mix={"stable": {"specific/toys": 1}}))
    for plan, other in ((grown, "specific/games"), (shrunk, "mixed")):  # also where its config was edited to agree
        shutil.copytree(run, tmp_path / other)
        write_atomically(tmp_path / other / "config.yaml", dump_settings(plan.config))
        with pytest.raises(DataError, match=rf"^{other} below data.packed=.* are not what .* was trained on; give"):
            check_run_folder(tmp_path / other, plan)
    tiny.write_corpus(packed, "mixed", model=Path(world["model"]["path"]), n_rows=25, seed=99)
    values = branch_of(parent)
    values["data"]["packed"] = str(packed)
    with pytest.raises(DataError, match=r"mixed below data.packed=.* are not what .*run was trained on"):
        check_run_folder(tmp_path / "run-b", plan_of(values))


def test_a_cap_may_be_changed_while_no_row_that_was_read_would_be_another(
        world: dict[str, Any], tmp_path: Path) -> None:
    capped = with_data(world, max_epochs={"mixed": 1.5})
    save(tmp_path / "run", plan_of(capped), 8)
    check_run_folder(tmp_path / "run", plan_of(with_data(world, max_epochs={"mixed": 1}, when_dry="redistribute")))
    early = with_data(world, max_epochs={"mixed": 0.5}, when_dry="redistribute")
    with pytest.raises(ConfigError, match=r"give other rows for steps 1 to 8 than those that .*run has read"):
        check_run_folder(tmp_path / "run", plan_of(early))


def test_caps_count_what_the_trunk_has_read(world: dict[str, Any], tmp_path: Path) -> None:
    parent = save(tmp_path / "run", plan_of(with_data(world, max_epochs={"mixed": 2})), 8)  # 21 or 22 of 50 rows
    assert plan_of(branch_of(parent, mix={"mixed": 1}, steps=3)).sampler.drawn(88)[0] in (45, 46)
    with pytest.raises(ConfigError, match="mixed runs dry in step 12 of 13"):
        plan_of(branch_of(parent, mix={"mixed": 1}, steps=5))


def test_a_record_of_another_version_is_told_apart_from_none(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run that has begun"):
        read_data_record(tmp_path)
    (tmp_path / "data.json").write_text('{"corpora": {}}')
    with pytest.raises(CheckpointError, match="not a record of a run's data that this version"):
        read_data_record(tmp_path)


def test_a_step_is_shown_with_its_rows_documents_and_domains(world: dict[str, Any], tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    shutil.copytree(world["data"]["packed"], prepared / "packed")
    plan = plan_of(with_data(world, packed=str(prepared / "packed")))
    save(tmp_path / "run", plan, 8)
    lines = list(show_step(open_run(tmp_path / "run", step=9), 9))
    assert lines[0] == ("step 9: 8 rows (positions 64 to 71), 2 micro-steps, assuming world size 2 and micro batch 2; "
                        "if the run had others then, they dealt the same rows otherwise")
    assert sum(line.startswith("micro-step") for line in lines) == 4
    shown = sorted(tuple(line.split()[:3]) for line in lines if line.startswith("  ") and line[2] != " ")
    assert shown == sorted((name, "row", str(row)) for name, _, row in rows_read(plan, 8, 9))
    assert any("domain toys" in line for line in lines) and any("domains unknown" in line for line in lines)
    assert any(line.startswith("domains of the documents of mixed are not told: no histories/mixed") for line in lines)
    assert lines[-1].startswith(f"a row as text: python launch/peek.py {prepared}/packed/")
    (prepared / "histories").mkdir()
    known = [["toys"] if i % 2 else ["games", "toys"] for i in range(1000)]
    pq.write_table(pa.table({"history_id": range(1000), "domains": known}), prepared / "histories/mixed.parquet",
                   row_group_size=7)
    dataset = open_run(tmp_path / "run", step=9, world_size=4)
    per_rank = [[line for line in show_step(dataset, 9, rank=r) if line.startswith("    history")] for r in range(4)]
    every = [line for line in show_step(dataset, 9) if line.startswith("    history")]
    assert sorted(line for lines in per_rank for line in lines) == sorted(every)
    assert any("history of domains games, toys" in line for line in every)
    assert not any("unknown" in line for line in every)


def test_a_step_of_a_run_that_has_not_begun_can_be_shown(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_settings(tiny.run_config(world)))
    assert "4 micro-steps, assuming world size 1 and" in next(show_step(open_run(tmp_path, step=1), 1))


def test_a_step_is_dealt_as_for_the_ranks_of_the_first_checkpoint_after_it(
        world: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(world)
    for step, world_size in ((4, 1), (8, 4), (10, 2)):
        save(tmp_path, plan, step, world_size=world_size)
    asked = {step: open_run(tmp_path, step=step).world_size for step in (1, 4, 5, 8, 9, 10, 11)}
    assert asked == {1: 1, 4: 1, 5: 4, 8: 4, 9: 2, 10: 2, 11: 2}  # step 11 is yet to be read
    assert open_run(tmp_path, step=5, world_size=1).world_size == 1


@pytest.mark.parametrize(("asked", "said"), [
    ({"step": 13}, r"--step 13: .* has steps 1 to 12"), ({"step": 0}, r"--step 0: "),
    ({"step": 1, "world_size": 3}, r"--world-size\): batch.global_batch_size=8 rows does not divide"),
    ({"step": 1, "world_size": 0}, "--world-size 0: give at least one rank"),
])
def test_a_step_or_a_world_size_that_the_run_cannot_have_is_refused(
        world: dict[str, Any], tmp_path: Path, asked: dict[str, int], said: str) -> None:
    (tmp_path / "config.yaml").write_text(dump_settings(tiny.run_config(world)))
    with pytest.raises(ConfigError, match=said):
        open_run(tmp_path, **asked)


def test_a_rank_that_is_not_there_and_a_folder_that_is_no_run_are_refused(
        world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        open_run(tmp_path, step=1)
    (tmp_path / "config.yaml").write_text(dump_settings(tiny.run_config(world)))
    with pytest.raises(ConfigError, match="--rank 1: there are ranks 0 to 0"):
        next(show_step(open_run(tmp_path, step=1), 1, rank=1))


# What the ranks of a run see, and what is read of it once


@pytest.mark.parametrize("altered", ["mixed", "valid/toys"])
def test_ranks_that_found_other_data_stop_and_tell_each_other_little(
        world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, altered: str) -> None:
    values = {**world, "validation": {"every": 6, "rows_per_corpus": 4}}
    packed = Path(shutil.copytree(world["data"]["packed"], tmp_path / "packed"))
    copy = plan_of({**values, "data": {**world["data"], "packed": str(packed)}})
    shutil.rmtree(packed / altered)
    tiny.write_corpus(packed, altered, model=Path(world["model"]["path"]), n_rows=25, seed=99,
                      kind="valid" if altered.startswith("valid") else "train")
    other = plan_of({**values, "data": {**world["data"], "packed": str(packed)}})
    told: list[str] = []

    def told_by_both(texts: list[str]) -> list[str]:
        told.extend(texts)
        return told

    monkeypatch.setattr(dist, "gather_texts", told_by_both)
    for same in (plan_of(values), copy):
        _check_one_view(same)
    with pytest.raises(DataError, match=r"data.packed=.*/packed: rank 2 found other data there than rank 0"):
        _check_one_view(other)
    assert [len(text) for text in told] == [32, 32, 32]  # a hash, not a list of shards


def test_one_reading_of_the_manifests_serves_both_kinds(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("cprec.data.remote.read_manifest", lambda place: (read.append(place), read_manifest(place))[1])
    manifests = read_manifests(find_corpora(world["data"]["packed"]), None)
    assert list(of_kind(manifests, "train", "p")) == ["mixed", "specific/toys"]
    assert list(of_kind(manifests, "valid", "p")) == ["valid/games", "valid/toys"]
    assert len(read) == 4


def test_a_run_opens_each_validation_corpus_once_and_another_run_anew(world: dict[str, Any]) -> None:
    values = {**world, "validation": {"every": 6, "rows_per_corpus": 4}}
    first, second = plan_of(values), plan_of(values)
    corpus = _open_valid(first, "valid/toys", first.valid["valid/toys"])
    assert _open_valid(first, "valid/toys", first.valid["valid/toys"]) is corpus and len(corpus) == 5
    assert _open_valid(second, "valid/toys", second.valid["valid/toys"]) is not corpus
