"""Whole evaluations of small saved models: results, resuming, several processes, refusals, reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cprec.errors import ConfigError, DataError
from cprec.eval.comparison import make_report
from cprec.eval.metrics import METRICS
from cprec.eval.queries import load_queries
from cprec.eval.report import to_text, write_report
from cprec.eval.run import EvalOptions, evaluate
from cprec.format import MANIFEST
from cprec.template import Template
from cprec.tokenizer import load_tokenizer
from data_prep.templates import TEMPLATES
from tests.eval.folders import TEMPLATE, TOKENIZER_VOCAB, Query, Shop, write_queries, write_tokenizer
from tests.eval.models import plain_scores, random_model

REPOSITORY = Path(__file__).parents[2]
TITLES = ["Milk", "Bread", "Oat milk", "Bread roll", "Jam", "Milk", "Tea", "Teapot", "Salt", "Oats", "Oat bar", "Rye"]
FOOD = Shop(TITLES, [
    Query("u0", [0, 1, 2], 4), Query("u1", [6], 7), Query("u2", [3, 8, 9], 5, is_cold=True), Query("u3", [10, 11], 0),
    Query("u4", [4, 2], 11, query_ts=300),
], n_train=[9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 0], first_ts=[0] * 10 + [400, 0])
TOYS = Shop([f"Toy {i}" for i in range(14)], [Query("u0", [1, 2], 3), Query("u9", [5], 13)], kind="unseen",
            n_train=list(range(14)))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model("qwen2", vocab_size=TOKENIZER_VOCAB, dtype=torch.float32, spread=0.15).save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return write_queries(tmp_path / "queries", {"food": FOOD, "toys": TOYS})


@pytest.fixture
def options(tmp_path: Path, queries: Path, model_folder: Path) -> EvalOptions:
    return EvalOptions(queries=str(queries), out=str(tmp_path / "eval"), model=str(model_folder), dtype="float64")


@pytest.mark.parametrize("template", [TEMPLATE, *TEMPLATES.values()], ids=lambda t: t.name)
def test_results_are_those_of_scoring_every_line_by_a_plain_forward(
        options: EvalOptions, tmp_path: Path, template: Template) -> None:
    queries = write_queries(tmp_path / "of_template", {"food": FOOD, "toys": TOYS}, template=template)
    manifest = evaluate(replace(options, queries=str(queries)))
    results = pq.read_table(Path(options.out) / "food.parquet").to_pylist()
    plain = random_model("qwen2", vocab_size=TOKENIZER_VOCAB, dtype=torch.float32, spread=0.15, attention="sdpa")
    plain.double()
    tokenizer, q = load_tokenizer(str(options.model)), load_queries(queries, "food")
    lines = [template.line({"title": t, "domain": "food"}) for t in TITLES]
    for i, query in enumerate(FOOD.queries):
        prompt = tokenizer.encode([template.lead_in + "".join(lines[h] for h in query.history)
                                   + (template.before_target or "")])[0]
        scores = np.array(plain_scores(plain, prompt, tokenizer.encode(lines)))  # of bytes: the same ids everywhere
        allowed = q.candidates(i)
        others = np.delete(np.arange(12), query.target)
        others = others[allowed[others]]
        better = (scores[others] > scores[query.target] + 1e-9).sum()
        equal = (abs(scores[others] - scores[query.target]) <= 1e-9).sum()
        found = results[i]
        assert (found["user_id"], found["rank"]) == (query.user_id, 1 + better + equal / 2)
        assert found["n_candidates"] == allowed.sum()
        assert found["nll"] == pytest.approx(-scores[query.target], abs=1e-9)
        assert set(found["top10"]).isdisjoint(query.history)
        assert found["certified"]
    # the two items called Milk: u2 is asked for one while the other is a candidate too; u4 asks before item 10 exists
    assert results[2]["rank"] % 1 == 0.5
    assert 10 not in results[4]["top10"]
    assert [r["is_cold"] for r in results] == [False, False, True, False, False]
    food = manifest.domains["food"]
    assert (food.n_queries, food.n_certified, food.n_items, food.n_histories_cut) == (5, 5, 12, 0)
    assert manifest.domains["toys"].kind == "unseen"


def test_a_finished_evaluation_is_only_read(options: EvalOptions) -> None:
    first = evaluate(options)
    (Path(options.out) / "parts" / "food.0of1.parquet").unlink()
    assert evaluate(options) == first
    assert not (Path(options.out) / "parts" / "food.0of1.parquet").exists()


def test_a_killed_evaluation_redoes_only_what_is_missing(options: EvalOptions) -> None:
    evaluate(options)
    out = Path(options.out)
    before = {p.name: pq.read_table(p) for p in out.glob("*.parquet")}
    stamp = (out / "parts" / "toys.0of1.parquet").stat().st_mtime_ns
    for name in (MANIFEST, "parts/food.0of1.parquet", "toys.parquet"):
        (out / name).unlink()
    (out / "parts" / "food.0of1.parquet.partial").write_bytes(b"half a file")
    evaluate(options)
    assert (out / "parts" / "toys.0of1.parquet").stat().st_mtime_ns == stamp
    assert {p.name: pq.read_table(p) for p in out.glob("*.parquet")} == before


@pytest.mark.parametrize(("change", "named"), [
    ({"limit": 1}, "limit: None / 1"),
    ({"dtype": "float32"}, "dtype: float64 / float32"),
    ({"domains": ["toys"]}, r"domains: \['food', 'toys'\] / \['toys'\]"),
    ({"model": None, "baseline": "popularity"}, "not of baseline:popularity"),
])
def test_a_folder_with_another_evaluation_is_refused_naming_both(
        options: EvalOptions, change: dict[str, object], named: str) -> None:
    evaluate(options)
    with pytest.raises(DataError, match=named):
        evaluate(replace(options, **change))  # type: ignore[arg-type]


def test_other_weights_in_the_same_place_are_another_model(options: EvalOptions, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    shutil.copytree(str(options.model), moved)
    evaluate(replace(options, model=str(moved)))
    random_model("qwen2", vocab_size=TOKENIZER_VOCAB, dtype=torch.float32, seed=1).save_pretrained(moved)
    with pytest.raises(DataError, match="model_hash"):
        evaluate(replace(options, model=str(moved)))


def test_an_altered_query_file_is_refused_before_anything_is_written(options: EvalOptions, queries: Path) -> None:
    path = queries / "toys.items.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"toys\.items\.parquet is missing or altered"):
        evaluate(options)
    assert not Path(options.out).exists()


def test_all_wrong_options_are_named_at_once(options: EvalOptions) -> None:
    wrong = replace(options, baseline="popularty", dtype="float8", limit=0, domains=["fod"])
    with pytest.raises(ConfigError) as e:
        evaluate(wrong)
    for named in ("give exactly one", "'popularity'", "dtype='float8'", "limit=0", "'fod'"):
        assert named in str(e.value)


def test_a_model_folder_without_weights_is_refused(options: EvalOptions, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        evaluate(replace(options, model=str(tmp_path / "empty")))


def test_histories_that_the_context_does_not_hold_are_counted(options: EvalOptions, tmp_path: Path) -> None:
    short = tmp_path / "short"
    # "Bread roll\n" is 11 bytes: 24 - 11 leaves 13 for "Chosen:\n" (8) and one short line
    random_model(vocab_size=TOKENIZER_VOCAB, dtype=torch.float32, max_position_embeddings=24).save_pretrained(short)
    write_tokenizer(short)
    manifest = evaluate(replace(options, model=str(short), domains=["food"]))
    dropped = pq.read_table(Path(options.out) / "food.parquet")["n_dropped"].to_pylist()
    # kept: nothing of "Oat milk" / Tea / Oats / Rye / nothing of "Oat milk"
    assert dropped == [3, 0, 2, 1, 2]
    assert manifest.domains["food"].n_histories_cut == 4


def test_popularity_answers_in_the_same_schema_without_a_likelihood(options: EvalOptions) -> None:
    evaluate(replace(options, model=None, baseline="popularity"))
    table = pq.read_table(Path(options.out) / "food.parquet")
    # u0 had 0 1 2; of 3..11 with 6 5 4 3 2 1 1 1 0 events, item 4 is second. u3: item 0 is first of all.
    # u4 at 300: item 11 with no event is behind 0 1 3 5 6 7 8 9
    assert [table["rank"][i].as_py() for i in (0, 3, 4)] == [2, 1, 9]
    assert table["nll"].null_count == 5
    assert table["top10"][0].as_py() == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def run_script(*arguments: str, n_processes: int | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable] if n_processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    return subprocess.run([*start, str(REPOSITORY / "launch" / "rank.py"), *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, timeout=300)


def test_two_processes_give_what_one_gives(options: EvalOptions, tmp_path: Path) -> None:
    evaluate(options)
    done = run_script("--model", str(options.model), "--queries", options.queries, "--out", str(tmp_path / "two"),
                      "--dtype", "float64", n_processes=2)
    assert done.returncode == 0, done.stderr
    for domain in ("food", "toys"):
        one, two = (pq.read_table(Path(out) / f"{domain}.parquet") for out in (options.out, tmp_path / "two"))
        np.testing.assert_allclose(one["nll"].to_numpy(), two["nll"].to_numpy(), rtol=0, atol=1e-9)
        assert one.drop_columns("nll") == two.drop_columns("nll")
    assert sorted(p.name for p in (tmp_path / "two" / "parts").iterdir()) == [
        f"{d}.{r}of2.parquet" for d in ("food", "toys") for r in (0, 1)]
    assert done.stdout.count("HR@10: mean") == 1
    assert (tmp_path / "two" / "report.md").is_file()


def test_an_error_of_the_user_is_one_message_and_its_exit_code(queries: Path, tmp_path: Path) -> None:
    done = run_script("--baseline", "popular", "--queries", str(queries), "--out", str(tmp_path / "x"))
    assert (done.returncode, done.stdout) == (ConfigError.exit_code, "")
    assert done.stderr == "\nConfigError: ranking: baseline='popular' is none; did you mean 'popularity'?\n"


def test_the_report_holds_means_macro_averages_chance_and_paired_differences(
        options: EvalOptions, queries: Path, tmp_path: Path) -> None:
    games = replace(TOYS, queries=TOYS.queries[:1])
    two = write_queries(tmp_path / "two", {"food": FOOD, "toys": TOYS, "games": games})
    model = replace(options, queries=str(two))
    baseline = replace(model, model=None, baseline="popularity", out=str(tmp_path / "popularity"))
    for each in (model, baseline):
        evaluate(each)
    report = make_report({"ours": model.out, "popularity": baseline.out}, reference="popularity")
    assert [r.name for r in report.rows] == ["food", "toys", "games", "unseen domains (macro)"]
    cells = {(c.row, c.model, c.metric): c for c in report.cells}
    # toys: u0 had 1 2 and wants 3: behind 4..13, rank 11; u9 wants 13, the most popular: rank 1
    assert cells["toys", "popularity", "HR@10"].mean == 0.5
    assert cells["toys", "popularity", "MRR"].mean == pytest.approx((1 / 11 + 1) / 2)
    assert cells["unseen domains (macro)", "popularity", "HR@10"].mean == 0.25
    assert ("toys", "popularity", "NLL") not in cells
    assert {c.metric for c in report.cells if c.model == "ours"} == set(METRICS)
    # toys: 12 and 13 candidates
    assert report.rows[1].chance_hr10 == pytest.approx((10 / 12 + 10 / 13) / 2)
    own = cells["food", "ours", "NDCG@10"].mean - cells["food", "popularity", "NDCG@10"].mean
    assert report.differences[0].mean == pytest.approx(own)
    write_report(report, tmp_path / "report")
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(m["name"], m["n_queries"], m["n_certified"]) for m in values["models"]] == [
        ("ours", 8, 8), ("popularity", 8, 8)]
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| unseen domains (macro) | 3 | 28 |" in markdown
    for text in (markdown, to_text(report)):
        assert "items seen before are no candidates" in text


def test_evaluations_of_different_queries_are_not_put_in_one_table(options: EvalOptions, tmp_path: Path) -> None:
    popularity = replace(options, model=None, baseline="popularity")
    limited = replace(popularity, out=str(tmp_path / "limited"), limit=1)
    for each in (popularity, limited):
        evaluate(each)
    with pytest.raises(DataError, match="answered different queries: limit is None and 1"):
        make_report({"a": popularity.out, "b": limited.out})
    with pytest.raises(DataError, match="holds no finished evaluation"):
        make_report({"a": tmp_path})
