"""Controls: what they change and what they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cprec.errors import ConfigError, DataError
from cprec.eval.baselines import fit_baseline, rank_by_baseline
from cprec.eval.comparison import make_report
from cprec.eval.controls import CONTROLS, no_history, shuffled_history, shuffled_target
from cprec.eval.queries import DomainQueries, load_queries
from cprec.eval.report import to_markdown
from cprec.eval.run import EvalOptions, evaluate
from tests.eval.folders import Query, Shop, write_queries
from tests.eval.prepared_shop import write_chain


@pytest.fixture()
def queries(tmp_path: Path) -> DomainQueries:
    people = [Query(f"u{i}", [i, (i + 1) % 6], (i + 2) % 6, is_cold=i % 2 == 0) for i in range(6)]
    return load_queries(write_queries(tmp_path / "q", {"food": Shop(list("abcdef"), people)}), "food")


def test_a_shuffled_target_is_a_candidate_and_never_the_own_one(queries: DomainQueries) -> None:
    shuffled = shuffled_target(queries)
    for i in range(len(queries)):
        assert shuffled.targets[i] != queries.targets[i]
        assert shuffled.targets[i] not in queries.seen[i]
        assert queries.candidates(i)[shuffled.targets[i]]
    # cold is what the item is: in these queries item t is cold where (t - 2) is even
    assert shuffled.is_cold.tolist() == [(t - 2) % 2 == 0 for t in shuffled.targets]


def test_a_shuffled_history_is_anothers_and_the_candidates_stay(queries: DomainQueries) -> None:
    shuffled = shuffled_history(queries)
    before, after = ([q.histories[i].tolist() for i in range(6)] for q in (queries, shuffled))
    assert sorted(before) == sorted(after) and all(a != b for a, b in zip(before, after, strict=True))
    for i in range(6):
        np.testing.assert_array_equal(shuffled.candidates(i), queries.candidates(i))


def test_no_history_shows_nothing(queries: DomainQueries) -> None:
    empty = no_history(queries)
    assert [len(empty.histories[i]) for i in range(6)] == [0] * 6
    np.testing.assert_array_equal(empty.targets, queries.targets)


def test_controls_are_the_same_every_time(queries: DomainQueries) -> None:
    for control in CONTROLS.values():
        a, b = control(queries), control(queries)
        assert a.targets.tolist() == b.targets.tolist() and a.histories.values.tolist() == b.histories.values.tolist()


def test_what_cannot_be_shuffled_is_refused(queries: DomainQueries) -> None:
    one = replace(queries.head(1), histories=queries.histories)
    with pytest.raises(DataError, match="one query"):
        shuffled_history(one)
    with pytest.raises(DataError, match="no other query's target"):
        shuffled_target(one)


def test_a_model_that_reads_the_history_falls_under_every_control(tmp_path: Path) -> None:
    folder = write_chain(tmp_path, n_items=40, n_users=120)
    frozen = load_queries(folder, "food")
    score = fit_baseline("markov", folder, frozen).score
    first, target, history = (np.mean([rank_by_baseline(score, q, i).rank == 1 for i in range(len(q))])
                              for q in (frozen, shuffled_target(frozen), shuffled_history(frozen)))
    assert first > 0.9 and target < 0.7 and history < 0.7


def test_a_control_a_tuned_baseline_a_protocol_and_a_filter_work_together(tmp_path: Path) -> None:
    folder = write_chain(tmp_path)
    asked = EvalOptions(queries=str(folder), out=str(tmp_path / "a"), baseline="markov", protocol="uniform-3",
                        seen="include", control="shuffled-history", limit=40)
    same = [asked, replace(asked, out=str(tmp_path / "b"), baseline="popularity")]
    assert [evaluate(o).inputs.seen for o in same] == ["include"] * 2
    a, b = (Path(o.out) for o in same)
    assert json.loads((a / "food.tuning.json").read_text())[0]["settings"] in ({"gap": 1}, {"gap": 5})
    drawn = [pq.read_table(out / "negatives/food.parquet") for out in (a, b)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 40
    assert pq.read_table(a / "food.parquet")["n_candidates"].to_pylist() == [4] * 40
    report = make_report({"markov": a, "popularity": b}, reference="popularity")
    assert (report.protocol, report.seen, report.rows[0].n_queries) == ("uniform-3", "include", 40)
    assert "Protocol uniform-3, ties count half" in to_markdown(report)
    real = replace(asked, out=str(tmp_path / "real"), control=None)
    evaluate(real)
    with pytest.raises(DataError, match="control is shuffled-history and None"):
        make_report({"markov": [a, real.out]})  # no two seeds
    full = replace(real, out=str(tmp_path / "full"), protocol="full")
    evaluate(full)
    with pytest.raises(DataError, match="protocol is uniform-3 and full"):
        make_report({"few": real.out, "all": full.out})


def test_the_evaluation_of_a_control_is_marked_and_kept_apart(tmp_path: Path) -> None:
    folder = write_chain(tmp_path)
    real = EvalOptions(queries=str(folder), out=str(tmp_path / "real"), baseline="markov")
    evaluate(real)
    control = replace(real, out=str(tmp_path / "control"), control="shuffled-history")
    assert evaluate(control).inputs.control == "shuffled-history"
    with pytest.raises(DataError, match="control: shuffled-history / None"):
        evaluate(replace(control, control=None))
    with pytest.raises(ConfigError, match="did you mean 'no-history'"):
        evaluate(replace(control, control="no_history"))
    report = make_report({"real": real.out, "control": control.out}, reference="real")
    assert [e.control for e in report.models] == [None, "shuffled-history"]
    assert "CONTROL shuffled-history" in report.models[1].line
    assert report.differences[0].mean < 0
