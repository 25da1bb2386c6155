"""Whole evaluations of small saved models: results, resuming, several processes, refusals, reports."""

from __future__ import annotations

import json
import shutil
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
from cprec.eval.report import to_markdown, to_text, write_report
from cprec.eval.run import EvalOptions, evaluate, expectation, refuse_full
from cprec.format import MANIFEST
from cprec.template import Template
from cprec.tokenizer import load_tokenizer
from data_prep.templates import TEMPLATES
from tests.eval.folders import TEMPLATE, TOKENIZER_VOCAB, Query, Shop, write_queries, write_tokenizer
from tests.eval.models import plain_scores, random_model
from tests.eval.scripts import run_script

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
    (Path(options.out) / "parts" / "food.00000.parquet").unlink()
    assert evaluate(options) == first
    assert not (Path(options.out) / "parts" / "food.00000.parquet").exists()


def test_a_killed_evaluation_redoes_only_what_is_missing(options: EvalOptions) -> None:
    evaluate(options)
    out = Path(options.out)
    before = {p.name: pq.read_table(p) for p in out.glob("*.parquet")}
    stamp = (out / "parts" / "toys.00000.parquet").stat().st_mtime_ns
    for name in (MANIFEST, "parts/food.00000.parquet", "toys.parquet"):
        (out / name).unlink()
    (out / "parts" / "food.00000.parquet.partial").write_bytes(b"half a file")
    evaluate(options)
    assert (out / "parts" / "toys.00000.parquet").stat().st_mtime_ns == stamp
    assert {p.name: pq.read_table(p) for p in out.glob("*.parquet")} == before


@pytest.mark.parametrize(("change", "named"), [
    ({"limit": 1}, "limit: None / 1"),
    ({"dtype": "float32"}, "dtype: float64 / float32"),
    ({"domains": ["toys"]}, r"domains: \['food', 'toys'\] / \['toys'\]"),
    ({"model": None, "dtype": "float32", "baseline": "popularity"}, "not of baseline:popularity"),
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
    evaluate(replace(options, model=None, dtype="float32", baseline="popularity"))
    table = pq.read_table(Path(options.out) / "food.parquet")
    # u0 had 0 1 2; of 3..11 with 6 5 4 3 2 1 1 1 0 events, item 4 is second. u3: item 0 is first of all.
    # u4 at 300: item 11 with no event is behind 0 1 3 5 6 7 8 9
    assert [table["rank"][i].as_py() for i in (0, 3, 4)] == [2, 1, 9]
    assert table["nll"].null_count == 5
    assert table["top10"][0].as_py() == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_two_processes_give_what_one_gives(options: EvalOptions, tmp_path: Path) -> None:
    evaluate(options)
    done = run_script("rank.py", "--model", str(options.model), "--queries", options.queries, "--dtype", "float64",
                      "--out", str(tmp_path / "two"), n_processes=2)
    assert done.returncode == 0, done.stderr
    for domain in ("food", "toys"):
        one, two = (pq.read_table(Path(out) / f"{domain}.parquet") for out in (options.out, tmp_path / "two"))
        np.testing.assert_allclose(one["nll"].to_numpy(), two["nll"].to_numpy(), rtol=0, atol=1e-9)
        assert one.drop_columns("nll") == two.drop_columns("nll")
    assert sorted(p.name for p in (tmp_path / "two" / "parts").iterdir()) == [
        "food.00000.parquet", "toys.00000.parquet"]
    assert done.stdout.count("HR@10: mean") == 1
    assert (tmp_path / "two" / "report.md").is_file()


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_missing_parts_are_shared_out_anew_among_any_number_of_processes(tmp_path: Path, first: int, then: int) -> None:
    asked = [Query(f"u{i:02d}", [i % 12], (i + 5) % 12) for i in range(70)]
    queries = write_queries(tmp_path / "queries", {"food": replace(FOOD, queries=asked), "toys": TOYS})
    out, given = tmp_path / "eval", ("--baseline", "popularity", "--queries", str(queries), "--out")
    evaluate(EvalOptions(queries=str(queries), out=str(tmp_path / "whole"), baseline="popularity"))
    done = run_script("rank.py", *given, str(out), n_processes=first)
    assert done.returncode == 0, done.stderr
    kept = (out / "parts" / "food.00001.parquet").stat().st_mtime_ns
    # of six parts 0 2 4 are missing, which always were one process's
    for name in (MANIFEST, "parts/food.00000.parquet", "parts/food.00002.parquet", "parts/food.00004.parquet"):
        (out / name).unlink()
    done = run_script("rank.py", *given, str(out), n_processes=then)
    assert done.returncode == 0, done.stderr
    share = {1: 3, 2: 2}[then]
    assert f"3 of 6 parts of 16 queries are missing; process 0 ranks {share} of them" in done.stderr
    assert (out / "parts" / "food.00001.parquet").stat().st_mtime_ns == kept
    for domain in ("food", "toys"):
        assert pq.read_table(out / f"{domain}.parquet") == pq.read_table(tmp_path / "whole" / f"{domain}.parquet")


def test_an_error_of_the_user_is_one_message_and_its_exit_code(queries: Path, tmp_path: Path) -> None:
    done = run_script("rank.py", "--baseline", "popular", "--queries", str(queries), "--out", str(tmp_path / "x"))
    assert (done.returncode, done.stdout) == (ConfigError.exit_code, "")
    assert done.stderr == "\nConfigError: ranking: baseline='popular' is none; did you mean 'popularity'?\n"


def test_the_report_holds_means_macro_averages_chance_and_paired_differences(
        options: EvalOptions, queries: Path, tmp_path: Path) -> None:
    games = replace(TOYS, queries=TOYS.queries[:1])
    two = write_queries(tmp_path / "two", {"food": FOOD, "toys": TOYS, "games": games})
    model = replace(options, queries=str(two))
    baseline = replace(model, model=None, dtype="float32", baseline="popularity", out=str(tmp_path / "popularity"))
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
    popularity = replace(options, model=None, dtype="float32", baseline="popularity")
    limited = replace(popularity, out=str(tmp_path / "limited"), limit=1)
    for each in (popularity, limited):
        evaluate(each)
    with pytest.raises(DataError, match="not answer the same queries in the same way: limit is None and 1"):
        make_report({"a": popularity.out, "b": limited.out})
    with pytest.raises(DataError, match="holds no finished evaluation"):
        make_report({"a": tmp_path})


@pytest.mark.parametrize("protocol", ["uniform-3", "popularity-3"])
def test_sampled_candidates_are_ranked_as_in_the_full_catalogue_and_kept(
        options: EvalOptions, tmp_path: Path, protocol: str) -> None:
    evaluate(options)
    sampled = replace(options, protocol=protocol, out=str(tmp_path / "sampled"), top_k=14)
    whole = replace(options, top_k=14, out=str(tmp_path / "whole"))
    for each in (sampled, whole):
        evaluate(each)
    for domain in ("food", "toys"):
        drawn, few, all_ = (pq.read_table(Path(out) / f"{domain}.parquet").to_pylist()
                            for out in (Path(sampled.out) / "negatives", sampled.out, whole.out))
        for own, here, there in zip(drawn, few, all_, strict=True):
            among = {own["target"], *own["negatives"]}
            assert here["n_candidates"] == len(among) == 4
            assert here["nll"] == pytest.approx(there["nll"], abs=1e-9)
            assert set(here["top10"]) == among
            assert np.diff([dict(zip(there["top10"], there["top_scores"], strict=True))[i] for i in here["top10"]]
                           ).max() <= 1e-9


def test_what_the_full_ranks_make_one_expect_is_printed_beside(options: EvalOptions, tmp_path: Path) -> None:
    evaluate(options)
    done = run_script("rank.py", "--model", str(options.model), "--queries", options.queries, "--dtype", "float64",
                      "--out", str(tmp_path / "few"), "--protocol", "uniform-20", "--full", options.out)
    assert done.returncode == 0, done.stderr
    ranks = pq.read_table(Path(options.out) / "toys.parquet")["rank"].to_numpy()
    # 20 negatives are all that there are, so nothing is left to chance
    assert f"toys: HR@1 {(ranks <= 1).mean():.4f} ({(ranks <= 1).mean():.4f})" in done.stdout
    with pytest.raises(DataError, match="cannot be compared"):
        expectation(options.out, options.out)
    with pytest.raises(ConfigError, match="protocol=beam-3 has no expectation"):
        refuse_full(replace(options, protocol="beam-3"), options.out)
    with pytest.raises(DataError, match="holds no full ranking but uniform-20"):
        refuse_full(replace(options, protocol="uniform-3"), str(tmp_path / "few"))


@pytest.mark.parametrize(("full", "asked", "named"), [
    ({}, {"dtype": "float32"}, "dtype: float64 / float32"),
    ({}, {"limit": 1}, "limit: None / 1"),
    ({"rank_up_to": 3}, {"rank_up_to": 3}, "ranks only up to rank_up_to=3"),
    ({}, {"model": None, "dtype": "float32", "baseline": "popularity"}, "model_hash: .* / baseline:popularity"),
])
def test_an_expectation_that_is_another_ones_is_refused_before_anything_is_ranked(
        options: EvalOptions, full: dict[str, object], asked: dict[str, object], named: str, tmp_path: Path) -> None:
    evaluate(replace(options, domains=["toys"], **full))  # type: ignore[arg-type]
    few = replace(options, domains=["toys"], protocol="uniform-3", out=str(tmp_path / "few"), **asked)  # type: ignore
    with pytest.raises(DataError, match=f"cannot be compared: .*{named}"):
        refuse_full(few, options.out)
    if not full:
        refuse_full(replace(few, **{name: getattr(options, name) for name in asked}), options.out)
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(("rank_up_to", "settled"), [(10, {"HR@1", "HR@10", "NDCG@10", "MRR"}), (3, {"HR@1", "MRR"})])
def test_a_report_shows_of_ranks_that_were_not_told_apart_what_is_known(
        options: EvalOptions, tmp_path: Path, rank_up_to: int, settled: set[str]) -> None:
    stopped = replace(options, rank_up_to=rank_up_to, domains=["toys"], out=str(tmp_path / "stopped"))
    exact = replace(options, domains=["toys"])
    for each in (exact, stopped):
        evaluate(each)
    ranks = [pq.read_table(Path(o.out) / "toys.parquet")["rank"].to_numpy() for o in (exact, stopped)]
    assert np.isinf(ranks[1]).any() and not np.isinf(ranks[0]).any()
    report = make_report({"exact": exact.out, "stopped": stopped.out}, reference="exact")
    mean = {(c.model, c.metric): c.mean for c in report.cells if c.row == "toys"}
    of_ranks = {"HR@1", "HR@10", "HR@50", "NDCG@10", "MRR", "AUC"}
    assert {m for name, m in mean if name == "stopped" and m in of_ranks} == settled
    for metric in settled - {"MRR"}:
        assert mean["stopped", metric] == mean["exact", metric]
    assert mean["stopped", "MRR"] == pytest.approx((1 / ranks[1]).mean()) and np.isfinite(mean["stopped", "MRR"])
    assert f"ranks beyond {rank_up_to} not told apart (0 in MRR; no AUC" in report.models[1].line
    alone = make_report({"stopped": stopped.out})
    write_report(alone, tmp_path / "report")
    assert (tmp_path / "report/metrics.png").is_file() == ("HR@10" in settled)
    assert ("metrics.png" in (tmp_path / "report/report.md").read_text()) == ("HR@10" in settled)


def test_a_shorter_list_than_ten_has_no_popularity_or_coverage_of_ten(options: EvalOptions, tmp_path: Path) -> None:
    for top_k, shown in ((3, False), (14, True)):
        out = str(tmp_path / str(top_k))
        evaluate(replace(options, domains=["food"], top_k=top_k, out=out))
        report = make_report({"x": out})
        assert ("ARP@10" in {c.metric for c in report.cells}, len(report.coverage) == 1) == (shown, shown)
        to_markdown(report)
    # at most ten of the fourteen that were asked for
    ten = make_report({"x": out}).coverage[0].share
    lists = [row[:10] for row in pq.read_table(Path(out) / "food.parquet")["top10"].to_pylist()]
    assert ten == len({item for row in lists for item in row}) / 12


def test_a_report_names_scoring_filter_and_a_split_that_leaks(options: EvalOptions, queries: Path,
                                                              tmp_path: Path) -> None:
    manifest = json.loads((queries / MANIFEST).read_text())
    (queries / MANIFEST).write_text(json.dumps({**manifest, "target": "leave_one_out"}))
    found = replace(options, scoring="mean-1", items="warm", domains=["food"])
    evaluate(found)
    report = make_report({"x": found.out})
    assert "every user's last event, which LEAKS" in to_text(report)
    assert "only items of the training window are candidates" in to_text(report)
    assert "scores mean-1" in report.models[0].line and " tokens and " in report.models[0].line


@pytest.mark.parametrize("scoring", ["mean-1", "pmi-0.5"])
def test_another_scoring_changes_the_order_and_not_the_likelihood(options: EvalOptions, tmp_path: Path,
                                                                  scoring: str) -> None:
    other = replace(options, scoring=scoring, out=str(tmp_path / "other"))
    evaluate(options)
    assert all(d.n_certified == d.n_queries for d in evaluate(other).domains.values())
    a, b = (pq.read_table(Path(o.out) / "food.parquet") for o in (options, other))
    np.testing.assert_allclose(a["nll"].to_numpy(), b["nll"].to_numpy(), atol=1e-9)
    assert a["score"].to_pylist() == [-x for x in a["nll"].to_pylist()] != b["score"].to_pylist()


def test_a_beam_as_wide_as_the_trie_ranks_what_it_lists_exactly(options: EvalOptions, tmp_path: Path) -> None:
    evaluate(options)
    evaluate(replace(options, protocol="beam-500", out=str(tmp_path / "beam")))
    exact, beam = (pq.read_table(Path(out) / "food.parquet") for out in (options.out, tmp_path / "beam"))
    assert beam["top10"] == exact["top10"]
    assert beam["nll"].null_count == len(beam) and not any(beam["certified"].to_pylist())


def test_filters_change_candidates_and_drop_targets_that_they_take_away(options: EvalOptions, tmp_path: Path) -> None:
    popularity = replace(options, model=None, dtype="float32", baseline="popularity", domains=["food"])
    evaluate(replace(popularity, seen="include", out=str(tmp_path / "include")))
    assert pq.read_table(tmp_path / "include" / "food.parquet")["n_candidates"].to_pylist() == [12, 12, 12, 12, 11]
    shop = replace(FOOD, first_ts=[0] * 9 + [600, 0, 600], queries=[*FOOD.queries[:4], Query("u5", [1], 9)])
    cold = write_queries(tmp_path / "cold", {"food": shop})
    evaluate(replace(popularity, queries=str(cold), items="warm", out=str(tmp_path / "warm")))
    warm = pq.read_table(tmp_path / "warm" / "food.parquet")
    # items 9 and 11 come after the training window; u5 wants 9; of the 10 others u0 had three, u1 one, u2 two, u3 one
    assert list(zip(warm["user_id"].to_pylist(), warm["n_candidates"].to_pylist(), strict=True)) == [
        ("u0", 7), ("u1", 9), ("u2", 8), ("u3", 9)]
    for name in ("include", "warm"):  # a report reads the same queries again
        assert make_report({name: tmp_path / name}).rows[0].n_queries == {"include": 5, "warm": 4}[name]


def test_a_model_that_scales_its_logits_is_refused(options: EvalOptions, tmp_path: Path) -> None:
    scaled = tmp_path / "scaled"
    shutil.copytree(str(options.model), scaled)
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps({**config, "logit_scale": 0.5}))
    with pytest.raises(ConfigError, match=r"its logit_scale=0\.5: it scales its logits"):
        evaluate(replace(options, model=str(scaled)))


@pytest.mark.parametrize(("change", "named"), [
    ({"protocol": "beem-3"}, "protocol='beem-3' is none"), ({"scoring": "mean"}, "scoring='mean' is none"),
    ({"model": None, "dtype": "float32", "baseline": "popularity", "protocol": "beam-5"}, "a baseline has no text"),
    ({"protocol": "beam-5", "scoring": "pmi-1"}, "only the exact search of a model"),
    ({"rank_up_to": 0}, "rank_up_to=0"),
    ({"rank_up_to": 5, "protocol": "beam-5"}, "of a model can stop early"),
    ({"model": None, "dtype": "float32", "baseline": "popularity", "rank_up_to": 5}, "of a model can stop early"),
    ({"model": None, "baseline": "popularity"}, "dtype=float64: a baseline has none"),
    ({"seed": 1}, r"seed=1: only of a baseline that is trained \(sasrec, bert4rec\)"),
    ({"scoring": "pmi-1", "control": "no-history"}, "no-history shows nothing else"),
])
def test_protocols_that_cannot_be_are_refused(options: EvalOptions, change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        evaluate(replace(options, **change))  # type: ignore[arg-type]
