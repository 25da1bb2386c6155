"""Comparisons of evaluations: slices, seeds, several tests, and what people read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.errors import ConfigError, CPRecError, DataError
from cprec.eval.comparison import make_report
from cprec.eval.metrics import METRICS, TABLE_METRICS
from cprec.eval.report import to_html, to_markdown, to_text, write_report
from cprec.eval.run import EvalOptions, evaluate
from cprec.eval.stats import detectable_difference, holm
from tests.eval.folders import Query, Shop, write_queries
from tests.eval.scripts import run_script

# events: item 0 has half of all, so it alone is the head; item 5 is new since the training window
N_TRAIN = [10, 4, 3, 2, 1, 0]
PEOPLE = [
    Query("a", [1, 2], 0),  # popularity: rank 1
    Query("b", [0], 3),  # candidates 1 2 3 4 5: rank 3
    Query("c", [0, 1, 2, 1, 2, 1], 5, is_cold=True),  # candidates 3 4 5: rank 3
]


@pytest.fixture()
def options(tmp_path: Path) -> EvalOptions:
    shops = {"food": Shop(list("abcdef"), PEOPLE, n_train=N_TRAIN),
             "new": Shop(list("abcdef"), PEOPLE[:2], kind="unseen", n_train=N_TRAIN),
             "rare": Shop(list("abcdef"), PEOPLE[1:], kind="unseen", n_train=N_TRAIN)}
    folder = write_queries(tmp_path / "queries", shops)
    found = EvalOptions(queries=str(folder), out=str(tmp_path / "popularity"), baseline="popularity")
    evaluate(found)
    return found


def test_slices_hold_their_queries_only(options: EvalOptions) -> None:
    report = make_report({"popularity": options.out})
    mrr = {c.row: c.mean for c in report.cells if c.metric == "MRR"}
    assert mrr["food"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert mrr["food: head target"] == 1 and mrr["food: tail target"] == pytest.approx(1 / 3)
    assert mrr["food: cold target"] == pytest.approx(1 / 3) and mrr["food: warm target"] == pytest.approx(2 / 3)
    assert mrr["food: history of 6 to 20"] == pytest.approx(1 / 3)
    # unseen: new has 1 and 1/3, rare 1/3 and 1/3; only new has a head target
    assert mrr["unseen domains (macro)"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    head = next(s for s in report.slices if s.name == "unseen domains (macro): head target")
    assert (head.domains, head.n_queries, head.n_users, head.n_items) == (["new"], 1, 1, 6)
    assert not any("repeated" in s.name or "more than 20" in s.name for s in report.slices)  # nobody is in those


def test_every_number_has_its_users_catalogue_and_what_they_can_show(options: EvalOptions) -> None:
    report = make_report({"popularity": options.out})
    unseen = next(r for r in report.rows if r.name == "unseen domains (macro)")
    assert (unseen.n_queries, unseen.n_users, unseen.n_items) == (4, 3, 12)
    assert unseen.detectable_hr10 == detectable_difference(3)
    assert {c.row: c.share for c in report.coverage}["food"] == 1.0  # ten best of five or six are all of them
    arp = next(c.mean for c in report.cells if (c.row, c.metric) == ("food", "ARP@10"))
    # candidates of a: 0 3 4 5; of b: 1 to 5; of c: 3 4 5
    assert arp == pytest.approx((13 / 4 + 10 / 5 + 3 / 3) / 3)


def seeds_of(options: EvalOptions, tmp_path: Path, n: int) -> list[str]:
    """The evaluation, and copies of it that say that other weights gave the same."""
    folders = [options.out]
    for i in range(1, n):
        folders.append(str(shutil.copytree(options.out, tmp_path / f"seed {i}", dirs_exist_ok=True)))
        manifest = json.loads((tmp_path / f"seed {i}/manifest.json").read_text())
        manifest["inputs"]["model_hash"] = f"{i}"
        (tmp_path / f"seed {i}/manifest.json").write_text(json.dumps(manifest))
    return folders


def test_seeds_are_averaged_and_their_spread_is_said(options: EvalOptions, tmp_path: Path) -> None:
    one, three = make_report({"popularity": options.out}), seeds_of(options, tmp_path, 3)
    same = make_report({"popularity": three})
    assert [c.mean for c in same.cells] == pytest.approx([c.mean for c in one.cells])
    assert {c.seed_sd for c in one.cells} == {None} and {c.seed_sd for c in same.cells} == {0.0}
    assert same.models[0].n_seeds == 3 and "3 seeds" in same.models[0].line and "(sd 0.0000)" in to_text(same)
    held = make_report({"a": three, "b": options.out}, reference="b")
    assert {(d.mean, d.p, d.p_mcnemar) for d in held.differences} == {(0, 1, None)}
    with pytest.raises(DataError, match=r"2 seeds .* cannot be held against 3"):
        make_report({"a": three, "b": three[:2]})


def test_one_model_on_one_set_of_queries_is_not_several_seeds(options: EvalOptions, tmp_path: Path) -> None:
    copied = str(shutil.copytree(options.out, tmp_path / "copied"))
    for other in (options.out, options.out + "/", copied):
        with pytest.raises(DataError, match=r"a: .*popularity and .* are one model on one set of queries"):
            make_report({"a": [options.out, other]})


def test_differences_are_adjusted_within_their_family_and_the_primary_one_is_named(options: EvalOptions,
                                                                                    tmp_path: Path) -> None:
    other = replace(options, out=str(tmp_path / "control"), control="no-history")
    evaluate(other)
    report = make_report({"popularity": options.out, "control": other.out}, reference="popularity")
    primary = [d for d in report.differences if d.is_primary]
    assert [(d.row, d.metric) for d in primary] == [("unseen domains (macro)", "NDCG@10")]
    rest = [d for d in report.differences if not d.is_primary]
    assert [d.p_holm for d in rest] == holm([d.p for d in rest]) and primary[0].p_holm == primary[0].p
    assert {d.metric for d in rest} == {"NDCG@10", "HR@10"}  # popularity gives no likelihood
    by_row = {d.row: d.p_mcnemar for d in rest if d.metric == "HR@10"}
    assert by_row["food"] == 1 and by_row["unseen domains (macro)"] is None  # b answers in both


def test_the_page_holds_its_pictures_and_all_tables(options: EvalOptions, tmp_path: Path) -> None:
    report = make_report({"a": options.out, "b": options.out}, reference="a")
    write_report(report, tmp_path / "report")
    names = {p.name for p in (tmp_path / "report").iterdir()}
    assert names == {"report.md", "report.json", "report.html", "metrics.png", "differences.png"}
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "src=\"metrics.png\"" not in page
    n_tables = len(TABLE_METRICS) + 3  # other measures, slices, differences
    assert page.count("<table>") == n_tables
    assert page == to_html(to_markdown(report), sorted((tmp_path / "report").glob("*.png")))
    values = json.loads((tmp_path / "report/report.json").read_text())
    shown = {c["metric"] for c in values["cells"]}
    assert shown == set(METRICS) - {"NLL", "bits/byte"}
    markdown = to_markdown(report)
    assert "| food | 3 | 6 | 3 |" in markdown and "Detectable difference in HR@10" in markdown
    assert "users may occur in the training window" in markdown and "(split ssssssss)" in markdown


def test_an_evaluation_whose_queries_changed_is_refused(options: EvalOptions) -> None:
    manifest = Path(options.queries) / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(DataError, match="are others now"):
        make_report({"popularity": options.out})
    manifest.unlink()
    with pytest.raises(DataError, match="are not there"):
        make_report({"popularity": options.out})


def test_a_target_that_a_list_lacks_is_a_miss_and_leaves_no_auc(options: EvalOptions) -> None:
    path = Path(options.out) / "food.parquet"
    table = pq.read_table(path)
    for name, values in (("rank", [np.inf, *table["rank"].to_pylist()[1:]]), ("valid_share", [0.5, 1.0, 0.0])):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.float64()))
    pq.write_table(table, path)
    report = make_report({"x": options.out})
    cells = {(c.row, c.metric): c.mean for c in report.cells}
    # popularity ranked a first; b and c came third
    assert cells["food", "HR@10"] == pytest.approx(2 / 3) and cells["food", "MRR"] == pytest.approx(2 / 3 / 3)
    assert cells["food", "valid"] == 0.5
    assert ("food", "AUC") not in cells and ("new", "AUC") in cells
    assert "none where ranks are infinite" in to_markdown(report)


def test_the_script_says_what_users_could_show_before_anything_is_run() -> None:
    done = run_script("leaderboard.py", "--users", "5000")
    assert done.returncode == 0 and f"{detectable_difference(5000):.4f}" in done.stdout, done.stderr


def test_the_script_takes_folders_of_one_name_as_its_seeds(options: EvalOptions, tmp_path: Path) -> None:
    three = ",".join(seeds_of(options, tmp_path, 3))
    done = run_script("leaderboard.py", f"ours={three}", f"theirs={options.out}", "--reference", "theirs", "--out",
                      str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert "ours: baseline:popularity, 3 seeds" in done.stdout and "theirs: baseline:popularity, 1 seed" in done.stdout
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [(m["name"], m["n_seeds"]) for m in report["models"]] == [("ours", 3), ("theirs", 1)]
    assert "not adjusted" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(("given", "code", "said"), [
    ([], ConfigError, "give evaluations as NAME=FOLDER"),
    (["a=x"], ConfigError, "a folder for the report as --out"),
    (["a", "--out", "o"], ConfigError, "a: not of the form NAME=FOLDER[,FOLDER...]"),
    (["a=x", "a=y", "--out", "o"], ConfigError, "a=y: not of the form NAME=FOLDER[,FOLDER...] with a name of its own"),
    (["a=nowhere", "--out", "o"], DataError, "nowhere holds no finished evaluation"),
    (["a=EVAL,EVAL", "--out", "o"], DataError, "not two seeds; give each of them once"),
    (["a=EVAL", "--reference", "b", "--out", "o"], DataError, "reference 'b' is none of the models"),
])
def test_an_error_of_the_script_is_one_message_and_its_exit_code(
        options: EvalOptions, given: list[str], code: type[CPRecError], said: str, tmp_path: Path) -> None:
    done = run_script("leaderboard.py", *(g.replace("EVAL", options.out) for g in given), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code.exit_code, "")
    assert said in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "o").exists()
