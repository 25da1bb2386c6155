"""The experiments: the order of their steps, what is not run again, their clocks, controls and tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cprec.errors import ConfigError, DataError
from cprec.eval.run import EvalOptions, evaluate
from cprec.eval.stats import Difference
from data_prep.config import PrepConfig
from experiments import compare, sources, text
from experiments.arms import Answers, Line
from experiments.claims import Deciding, Row, Table, deciding, tables
from experiments.compare import decided, outcomes
from experiments.forms import Source, World, load_form, load_world
from experiments.report import _about, _met, publish, wall_seconds, write_report
from experiments.steps import DONE, LOG, Step, StepError, in_order, is_done, run_steps, select, share_cores
from tests.eval.folders import Query, Shop, write_queries

REPO = Path(__file__).parents[2]
FORMS = ("cpu", "gpu", "tiny")
WORLDS = ("amazon", "journey")
CLOCK = (1_000_000_000_000, 1_000_864_000_000)


def line(form: str, world: str, work: Path) -> Line:
    made = Line(form, load_form(form), world, load_world(None, world), "data" if world == "amazon" else None, work)
    tables(made)
    return made


def says(word: str, book: Path) -> tuple[str, ...]:
    return ("python", "-c", f"open({str(book)!r}, 'a').write({word!r})")


def test_steps_run_after_what_they_need_and_are_not_run_again(tmp_path: Path) -> None:
    book = tmp_path / "book"
    steps = [Step("c/1", (says("c", book),), ("b", "a")), Step("b", (says("b", book),), ("a",)),
             Step("a", (says("a", book), says("A", book))), Step("d", (says("d", book),))]
    assert [s.name for s in in_order(steps)] == ["a", "b", "c/1", "d"]
    run_steps(steps, tmp_path / "work", jobs=1)
    assert book.read_text() == "aAbcd" and all(is_done(s, tmp_path / "work") for s in steps)
    run_steps(steps, tmp_path / "work", jobs=2)
    assert book.read_text() == "aAbcd"
    done = json.loads((tmp_path / "work/c/1" / DONE).read_text())
    assert done["commands"] == [list(says("c", book))] and done["seconds"] >= 0 and done["commit"]
    assert done["versions"]["torch"] and done["argv"] == sys.argv


def test_a_step_that_fails_is_named_with_its_words_and_the_next_run_goes_on_there(tmp_path: Path) -> None:
    book, switch = tmp_path / "book", tmp_path / "switch"
    fragile = f"import sys, pathlib; pathlib.Path({str(switch)!r}).exists() or sys.exit('no switch is there')"
    steps = [Step("a", (says("a", book),)), Step("b", (("python", "-c", fragile), says("b", book)), ("a",)),
             Step("c", (says("c", book),), ("b",))]
    with pytest.raises(StepError, match=r"(?s)b: exit code 1 of .*no switch is there.*goes on from here"):
        run_steps(steps, tmp_path / "work")
    assert book.read_text() == "a" and not (tmp_path / "work/b" / DONE).exists()
    switch.touch()
    run_steps(steps, tmp_path / "work")
    assert book.read_text() == "abc" and "no switch is there" in (tmp_path / "work/b" / LOG).read_text()


def test_a_step_that_fails_stops_only_those_that_need_it_and_all_failures_are_listed_last(tmp_path: Path) -> None:
    book, fails = tmp_path / "book", ("python", "-c", "import sys; sys.exit('broken')")
    steps = [Step("a", (fails,)), Step("b", (says("b", book),), ("a",)), Step("c", (says("c", book),)),
             Step("d", (fails,), ("c",)), Step("e", (says("e", book),), ("c",))]
    with pytest.raises(StepError, match=r"(?s)a: exit code 1.*d: exit code 1.*2 steps failed, 3 of 5 are left") as e:
        run_steps(steps, tmp_path / "work")
    assert book.read_text() == "ce" and e.value.exit_code == 1


def test_with_minutes_no_step_is_started_that_would_end_later(tmp_path: Path) -> None:
    book = tmp_path / "book"
    steps = [Step("a", (says("a", book),), seconds=50), Step("b", (says("b", book),), ("a",), seconds=70),
             Step("c", (says("c", book),), seconds=1)]
    assert [s.name for s in run_steps(steps, tmp_path / "work", minutes=1)] == ["b"] and book.read_text() == "ac"
    assert [s.name for s in run_steps(steps, tmp_path / "work", minutes=0)] == ["b"] and book.read_text() == "ac"
    assert run_steps(steps, tmp_path / "work", minutes=2) == [] and book.read_text() == "acb"


def test_what_nothing_needs_any_more_is_removed_when_a_step_is_done(tmp_path: Path) -> None:
    makes = f"import pathlib; [pathlib.Path({str(tmp_path)!r}, 'work/a', n).mkdir() for n in ('large', 'kept')]"
    run_steps([Step("a", (("python", "-c", makes),), scratch=("large",))], tmp_path / "work")
    assert (tmp_path / "work/a/kept").is_dir() and not (tmp_path / "work/a/large").exists()
    (tmp_path / "work/a/large").mkdir()  # as when cut off behind the marker
    run_steps([Step("a", (("python", "-c", makes),), scratch=("large",))], tmp_path / "work")
    assert not (tmp_path / "work/a/large").exists()


def test_a_folder_that_other_commands_made_is_refused(tmp_path: Path) -> None:
    step = Step("a", (says("a", tmp_path / "book"),))
    run_steps([step], tmp_path / "work")
    with pytest.raises(ConfigError, match="was made by other commands"):
        is_done(replace(step, commands=(says("b", tmp_path / "book"),)), tmp_path / "work")


def test_jobs_share_the_cores_and_a_need_that_is_no_step_is_refused() -> None:
    assert share_cores([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3]] and share_cores([7], 2) == [[7], [7]]
    with pytest.raises(ConfigError, match="a needs z"):
        in_order([Step("a", (), ("z",))])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_step_is_estimated_below_ten_minutes_and_every_arm_has_its_steps(form: str, world: str,
                                                                              tmp_path: Path) -> None:
    made = line(form, world, tmp_path)
    ordered = in_order(made.steps.values())
    place = {s.name: i for i, s in enumerate(ordered)}
    assert all(place[n] < place[s.name] for s in ordered for n in s.needs)
    assert max(s.seconds for s in ordered) < 540  # so that all fit where `--minutes 9` is given
    makes = {str(tmp_path / s.name) for s in ordered}
    answers = [a for t in tables(made) for r in t.rows for a in r.seeds]
    assert all(str(Path(f).parent) in makes for a in answers for f in (*a.folders, *filter(None, [a.losses])))
    labels = [(t, [r.label for r in t.rows]) for t in tables(made)]
    assert all(set(r.against) < set(names) and len(set(names)) == len(names) for t, names in labels for r in t.rows)
    assert {t.claim for t in tables(made)} == {1, 2, 3, 4, 5}
    compared = {(t.claim, t.key, frozenset((r.label, a))) for t in tables(made) for r in t.rows for a in r.against}
    asked = [(d.claim, d.table, frozenset((d.better, d.than))) for d in deciding(made)]
    assert set(asked) <= compared and len(set(asked)) == len(asked) and {d[0] for d in asked} == {1, 2, 3, 4}


def test_minutes_that_a_step_does_not_fit_into_are_refused_with_its_name(tmp_path: Path) -> None:
    asked = ["--form", "gpu", "--work", str(tmp_path), "--minutes", "6"]
    done = subprocess.run([sys.executable, str(REPO / "experiments/run.py"), *asked], capture_output=True, text=True)
    assert done.returncode == ConfigError.exit_code
    assert "--minutes 6: " in done.stderr and "would never start" in done.stderr and "train/" in done.stderr


def test_a_claim_alone_takes_its_own_steps_and_what_they_need(tmp_path: Path) -> None:
    made = line("gpu", "amazon", tmp_path)
    steps = select(list(made.steps.values()), [s.name for s in made.steps.values() if 2 in s.claims])
    names = {s.name for s in steps}
    assert {"sources", "prepare/main", "prepare/titles", "train/titles-2", "trunk/2", "branch/sqrt-34-2"} <= names
    assert not any(n.startswith(("tune/", "baseline/", "loss/")) for n in names) and "prepare/disjoint" not in names
    with pytest.raises(ConfigError, match="no step is called trunk/9; did you mean"):
        select(steps, ["trunk/9"])


def test_a_dry_run_prints_the_commands_that_a_user_would_type_and_writes_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "experiments/run.py", "--form", "tiny", "--work", str(work), "--dry-run", "--only",
               "claim5"]
    shown = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "python launch/prepare.py --config" in shown and '"replay/learned": 0.05' in shown
    assert "python launch/anneal.py --from" in shown and "launch/finetune.py" not in shown and not work.exists()


@pytest.mark.parametrize("world", WORLDS)
def test_the_sources_of_a_world_make_a_whole_preparation_config(world: str, tmp_path: Path) -> None:
    chosen, data = load_world(None, world), tmp_path / "data"
    people = [f"u{i:03d}" for i in range(200) for _ in range(10)]
    for source in {s.file for s in chosen.sources.values()}:
        for folder in ("interactions", "items"):
            (data / folder).mkdir(parents=True, exist_ok=True)
        events = {"user_id": people, "item_id": ["i"] * 2000, "timestamp": list(range(10**9, 10**9 + 2000))}
        items = {"item_id": ["i", "nobody's"], "title": ["A", "B"]}
        pq.write_table(pa.table(items), data / "items" / f"{source}.parquet")
        pq.write_table(pa.table(events), data / "interactions" / f"{source}.parquet")
    sources.write_sources(chosen, load_form("tiny"), str(data), tmp_path / "out")
    values = yaml.safe_load((tmp_path / "out/prepare.yaml").read_text())
    config = PrepConfig.model_validate({"out": "x", "tokenizer": {"train_vocab_size": 2048}, **values})
    assert config.pack.seq_len == 256 and len(config.domains.pretrain) == 7 and len(config.domains.unseen) >= 4
    if world == "amazon":
        few, more = (pq.read_table(d.path) for d in (config.datasets[0], config.datasets[-1]))
        assert 0 < len(few) < len(more) < 2000 and len(few) % 10 == 0  # whole users
        assert config.datasets[0].items and pq.read_table(config.datasets[0].items)["title"].to_pylist() == ["A"]
        assert set(few["user_id"].to_pylist()) < set(more["user_id"].to_pylist())


def test_a_data_folder_without_the_files_is_refused_with_the_way_out(tmp_path: Path) -> None:
    world = World(about="", sources={"a": Source(file="none")}, single="a", few=["a"],
                  prepare={"domains": {"pretrain": ["a"], "unseen": []}, "split": {"t_valid": 1, "t_test": 2}})
    with pytest.raises(DataError, match=r"none\.parquet cannot be read.*experiments/README"):
        sources.write_sources(world, load_form("tiny"), str(tmp_path), tmp_path / "out")
    with pytest.raises(ConfigError, match="needs --data"):
        sources.write_sources(world, load_form("tiny"), None, tmp_path / "out")


def test_other_years_are_brought_onto_the_clock_in_their_own_order() -> None:
    ms = np.array([50, 10, 20, 30, 30, 40, 60, 70, 80, 90, 100], dtype=np.int64) * 1_000_000
    moved = sources.onto_clock(ms, CLOCK)
    # sorted: 10 20 30 30 40 50 60 70 80 90 100; the 0.8 quantile is 80, the 0.9 quantile 90
    assert moved[8] == CLOCK[0] and moved[9] == CLOCK[1] and moved[10] == 2 * CLOCK[1] - CLOCK[0]
    assert (np.argsort(moved, kind="stable") == np.argsort(ms, kind="stable")).all() and moved[3] == moved[4]
    with pytest.raises(DataError, match="clock: order"):
        sources.onto_clock(np.full(10, 5, dtype=np.int64), CLOCK)


def test_where_only_order_is_known_each_users_last_two_events_are_held_out() -> None:
    users = np.array(["a", "b", "a", "a", "b", "c"])
    placed = sources.by_order(users, np.array([1, 1, 3, 2, 2, 9], dtype=np.int64), CLOCK)
    day = 86_400_000
    assert placed.tolist() == [CLOCK[0] - day, CLOCK[0], CLOCK[1], CLOCK[0], CLOCK[1], CLOCK[1]]


def test_controls_disturb_the_training_events_of_pre_training_domains_only(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    rows = [(f"u{u}", domain, f"i{k}", 10 * k + u) for domain in ("toys", "new") for u in range(3) for k in range(6)]
    for folder in ("interactions", "items"):
        (prepared / folder).mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(("user_id", "domain", "item_id", "ts_ms"), zip(*rows, strict=True), strict=True))),
                   prepared / "interactions/clean.parquet")
    (prepared / "split.json").write_text('{"t_valid": 40, "t_test": 50}')
    (prepared / "config.yaml").write_text(yaml.safe_dump({
        "domains": {"pretrain": ["toys"], "unseen": ["new"]},
        **{k: {} for k in ("clean", "sequences", "pack", "queries")}, "workers": 1}))
    found = {}
    for control in sources.CONTROLS:
        sources.write_control(prepared, control, tmp_path / control)
        written = pq.read_table(tmp_path / control / "interactions.parquet").to_pylist()
        found[control] = [tuple(r.values()) for r in written]
        learned = [r for r in rows if r[1] == "toys" and r[3] < 40]
        assert sorted(set(rows) - set(learned)) == sorted(r for r in found[control] if r in set(rows) - set(learned))
        assert sorted(r[2] for r in found[control]) == sorted(r[2] for r in rows)
        assert sorted(found[control]) != sorted(rows)
        values = yaml.safe_load((tmp_path / control / "prepare.yaml").read_text())
        assert values["split"] == {"t_valid": 40, "t_test": 50}
    who = [sorted((r[0], r[2]) for r in found[c]) for c in sources.CONTROLS]
    assert who[0] == sorted((r[0], r[2]) for r in rows) != who[1]  # shuffled: everybody keeps their items
    when = sorted((r[1], r[2], r[3]) for r in found["titles"])
    assert when == sorted((r[1], r[2], r[3]) for r in rows)  # titles: every item keeps its time


def test_text_is_of_packages_that_say_the_licence_and_a_part_of_it_is_held_out(tmp_path: Path) -> None:
    text.write_text(tmp_path, n_chars=60_000)
    parts = {p: pq.read_table(tmp_path / p / "text.parquet")["text"].to_pylist() for p in ("learned", "held_out")}
    taken = json.loads((tmp_path / "sources.json").read_text())
    assert sum(len(t) for t in parts["learned"]) == sum(t["chars"] for t in taken.values()) >= 60_000
    assert not set(parts["learned"]) & set(parts["held_out"]) and parts["held_out"]
    assert taken["scipy"]["licence"].startswith("BSD") and taken["scipy"]["version"] == distribution("scipy").version
    with pytest.raises(DataError, match="does not say that its licence is GPL"):
        text._licence(distribution("scipy"), "GPL")


def folders_of(tmp_path: Path) -> Answers:
    """Popularity's answers to two domains of two queries each, in a folder each."""
    people = [Query("a", [1, 2], 0), Query("b", [0], 3), Query("c", [0, 1, 2, 1, 2, 1], 5, is_cold=True)]
    shops = {"new": Shop(list("abcdef"), people[:2], kind="unseen", n_train=[10, 4, 3, 2, 1, 0]),
             "rare": Shop(list("abcdef"), people[1:], kind="unseen", n_train=[10, 4, 3, 2, 1, 0])}
    queries = write_queries(tmp_path / "queries", shops)
    for domain in shops:
        evaluate(EvalOptions(queries=str(queries), out=str(tmp_path / domain), baseline="popularity", domains=[domain]))
    return Answers((str(tmp_path / "new"), str(tmp_path / "rare")))


def test_a_table_joins_the_domains_of_several_folders_and_says_what_was_not_run(tmp_path: Path) -> None:
    split, nowhere = folders_of(tmp_path), Answers((str(tmp_path / "nowhere"),))
    table = Table("zero_shot", 1, "Title", ("new", "rare"), (
        Row("one", (split,), is_fixed=True), Row("same", (split, nowhere, nowhere, split), ("one", "gone"), tokens=7),
        Row("other", (split, nowhere), ("same",)), Row("none of those", (nowhere, split), ("other",)),
        Row("gone", (nowhere,))))
    asked = Deciding(1, "zero_shot", "one", "same")
    found, = outcomes([table], [asked])
    assert found.missing == ("same, 2 of 4 seeds", "other, 1 of 2 seeds", "none of those, 1 of 2 seeds", "gone")
    assert [(r.label, r.n_seeds) for r in found.results] == [
        ("one", 1), ("same", 2), ("other", 1), ("none of those", 1)]
    # popularity ranks a 1, b 3 in new, b 3, c 3 in rare: NDCG 1, 1/2 and 1/2, 1/2
    assert found.results[0].numbers["NDCG@10"].mean == pytest.approx((0.75 + 0.5) / 2)
    assert found.results[1].by_domain["new"] == pytest.approx({"NDCG@10": 0.75, "HR@10": 1})
    assert found.results[0].n_queries == 4 and "NLL" not in found.results[0].numbers
    assert [(g.metric, g.against, g.mean, g.p, g.n_seeds, g.verdict) for g in found.gaps] == [
        ("NDCG@10", "one", 0, 1, 2, "no difference shown"),  # the untrained one against both seeds
        ("HR@10", "one", 0, 1, 2, "no difference shown"),
        ("NDCG@10", "same", 0, 1, 1, "no difference shown"),  # the seed that both have; of others there is none
        ("HR@10", "same", 0, 1, 1, "no difference shown")]
    assert [g.p_holm == 1 for g in found.gaps] == [True, True, False, False]  # only of what decides
    turned = decided([found], asked)
    assert (turned["HR@10"].row, turned["HR@10"].against) == ("one", "same")
    write_report([found], line("tiny", "journey", tmp_path / "work"), tmp_path / "report")
    shown = (tmp_path / "report/report.md").read_text()
    assert "| same | 2 | 7 | 0.6250" in shown and "Not run: same, 2 of 4 seeds; other, 1 of 2 seeds" in shown
    assert "| one | 0.7500 / - / - | 0.5000 / - / - |" in shown and "explores" in shown
    result = json.loads((tmp_path / "report/zero_shot.json").read_text())["results"][0]
    assert result["numbers"]["HR@10"]["mean"] == 1 and (tmp_path / "report/zero_shot.png").is_file()


def test_holm_adjusts_over_the_deciding_comparisons_alone_and_a_turned_one_has_the_claims_sign(tmp_path: Path) -> None:
    split = folders_of(tmp_path)
    half = Answers((split.folders[0],))
    rows = (Row("one", (half,)), Row("a", (half,), ("one",)), Row("b", (half,), ("one", "a")))
    asked = [Deciding(1, "t", "one", "a"), Deciding(1, "t", "b", "one")]
    found, = outcomes([Table("t", 1, "T", ("new",), rows)], asked)
    gap = replace(found.gaps[0], mean=0.25, low=0.125, high=1.0, p=0.01, p_holm=0.02, n_seeds=2)
    assert (gap.verdict, gap.turned().verdict) == ("better", "worse")
    assert (gap.turned().low, gap.turned().high) == (-1.0, -0.125) and replace(gap, metric="NLL").verdict == "worse"
    assert replace(gap, low=-0.125).verdict == "no difference shown"
    assert replace(gap, n_seeds=1).verdict == "of one seed"
    assert [(g.row, g.against, g.p_holm == g.p_holm) for g in found.gaps if g.metric == "HR@10"] == [
        ("a", "one", True), ("b", "one", True), ("b", "a", False)]


def test_holm_counts_comparisons_that_are_planned_and_not_run_yet(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = folders_of(tmp_path)
    table = Table("t", 1, "T", ("new",), (Row("one", (split,)), Row("a", (split,), ("one",))))
    monkeypatch.setattr(compare, "paired_differences", lambda a, b: [Difference(1.0, 0.5, 1.5, 0.02)] * 2)
    asked = [Deciding(1, "t", "a", "one"), Deciding(1, "away", "x", "y"), Deciding(1, "away", "x", "baseline: z")]
    found, = outcomes([table], asked)
    assert [g.p_holm for g in found.gaps] == pytest.approx([0.06, 0.06])


def pages(repo: Path, *keys: str) -> dict[str, str]:
    marks = "".join(f"about {k}\n<!-- experiments:{k}:begin -->\nold\n<!-- experiments:{k}:end -->\n" for k in keys)
    texts = {"docs/experiments.md": f"# Head\n{marks}tail\n", "README.md": f"# Read\n{marks}foot\n"}
    for name, text_ in texts.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text_)
    return texts


def everything(repo: Path) -> dict[str, bytes]:
    return {str(p.relative_to(repo)): p.read_bytes() for p in sorted(repo.rglob("*")) if p.is_file()}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = tmp_path / "work/report"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("Numbers.\n\n![shots](zero_shot.png)\n")
    (folder / "summary.md").write_text("| a |\n")
    (folder / "zero_shot.png").write_bytes(b"png")
    return folder


def test_publishing_fills_both_pages_between_the_marks_and_leaves_another_worlds_part(report: Path,
                                                                                    tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    pages(repo, "cpu-amazon", "cpu-journey")
    other = repo / "experiments/results/cpu-journey/report.md"
    other.parent.mkdir(parents=True)
    other.write_text("theirs")
    stale = repo / "experiments/results/cpu-amazon/stale.json"
    stale.parent.mkdir()
    stale.touch()
    publish(report, "cpu-amazon", repo)
    docs, readme = ((repo / name).read_text() for name in ("docs/experiments.md", "README.md"))
    begin, end = "<!-- experiments:cpu-amazon:begin -->\n", "<!-- experiments:cpu-amazon:end -->\n"
    theirs = "about cpu-journey\n<!-- experiments:cpu-journey:begin -->\nold\n<!-- experiments:cpu-journey:end -->\n"
    picture = "![shots](../experiments/results/cpu-amazon/zero_shot.png)"
    assert docs == f"# Head\nabout cpu-amazon\n{begin}Numbers.\n\n{picture}\n{end}{theirs}tail\n"
    assert readme.startswith(f"# Read\nabout cpu-amazon\n{begin}| a |\n") and readme.endswith(f"{end}{theirs}foot\n")
    for page in ("docs/experiments.md", "README.md"):
        links = re.findall(r"\]\(([^)]+)\)", (repo / page).read_text())
        assert links and all((repo / page).parent.joinpath(name).is_file() for name in links)
    assert other.read_text() == "theirs" and not stale.exists()
    before = everything(repo)
    publish(report, "cpu-amazon", repo)
    assert everything(repo) == before


@pytest.mark.parametrize("page", ["docs/experiments.md", "README.md"])
def test_publishing_changes_nothing_where_a_page_lacks_the_marks(page: str, report: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    texts = pages(repo, "cpu-amazon")
    (repo / page).write_text(texts[page].replace("<!-- experiments:cpu-amazon:end -->", ""))
    (repo / "experiments/results/cpu-amazon").mkdir(parents=True)
    (repo / "experiments/results/cpu-amazon/about.json").write_text("{}")
    before = everything(repo)
    with pytest.raises(DataError, match="lacks the marks"):
        publish(report, "cpu-amazon", repo)
    assert everything(repo) == before


def test_the_pages_have_marks_for_every_published_report_and_its_pictures_are_there() -> None:
    for page in ("docs/experiments.md", "README.md"):
        text_ = (REPO / page).read_text()
        marks = set(re.findall(r"<!-- experiments:([\w-]+):begin -->", text_))
        assert {p.name for p in (REPO / "experiments/results").iterdir()} <= marks
        pictures = re.findall(r"\]\(([^)]*experiments/results/[^)]+)\)", text_)
        assert pictures and all((REPO / page).parent.joinpath(p).exists() for p in pictures)


def test_wall_time_counts_steps_that_ran_side_by_side_once_and_no_pause() -> None:
    def ended(at: str, seconds: float) -> dict[str, object]:
        return {"finished": f"2026-01-01T00:{at}Z", "seconds": seconds}

    # 0:00-1:00 and 0:30-2:00 overlap, 0:40-0:50 within; 10:00-10:30 after a pause
    steps = [ended("10:30", 30), ended("02:00", 90), ended("01:00", 60), ended("00:50", 10)]
    assert wall_seconds(steps) == 150


def test_a_report_says_what_ran_how_long_and_how_many_of_those_asked_about_were_learned_from(tmp_path: Path) -> None:
    made = line("tiny", "journey", tmp_path / "work")
    prepared = Path(made.prepared())
    shop = Shop(list("abcdef"), [Query("a", [1, 2], 0), Query("b", [0], 3)], kind="unseen", n_train=[6, 5, 4, 3, 2, 1])
    write_queries(prepared / "queries", dict.fromkeys(made.world.unseen, shop))
    (prepared / "interactions").mkdir()
    pq.write_table(pa.table({"user_id": ["b", "b", "z"]}), prepared / "interactions/train.parquet")
    for name, seconds, argv in (("text", 30, ["/home/me/experiments/run.py", "--form", "tiny"]),
                                ("base", 60, ["/home/me/experiments/run.py", "--data=/home/me/data", "--work", "w"])):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / DONE).write_text(json.dumps({
            "commands": [], "seconds": seconds, "commit": name, "device": "a machine", "argv": argv,
            "versions": {"torch": "2.9" if name == "text" else "2.10"}, "finished": "2026-01-01T00:10:00Z"}))
    about = _about(made)
    assert about.queried == dict.fromkeys(made.world.unseen, (1, 2)) and about.key == "tiny-journey"
    assert about.form == made.form.model_dump() and about.world["few"] == made.world.few
    assert (about.seconds, about.step_minutes, about.wall_minutes) == ({"text": 30, "base": 60}, 1.5, 1.0)
    assert about.argv == ["run.py --data=FOLDER --work FOLDER", "run.py --form tiny"]
    assert about.versions == {"torch": ["2.10", "2.9"]}
    assert "The users of 4 of the 8 queries have events" in _met(about) and "(nutrition 1 of 2, " in _met(about)
    for done in (tmp_path / "work").glob(f"*/{DONE}"):  # as steps left them before they noted these
        noted = json.loads(done.read_text())
        done.write_text(json.dumps({k: v for k, v in noted.items() if k not in ("argv", "versions")}))
    assert (_about(made).argv, _about(made).versions) == ([], {})
