"""Per-user results in the libraries that people read tables with; the tasks for lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cprec.eval.run import EvalOptions, evaluate
from tests.eval.folders import Query, Shop, write_queries

REPOSITORY = Path(__file__).parents[2]
Rows = list[tuple[str, float, list[int]]]


def by_pandas(path: Path) -> Rows:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed (extra baselines)")
    table = pandas.read_parquet(path)
    return [(r.user_id, r.rank, list(r.top10)) for r in table.itertuples()]


def by_polars(path: Path) -> Rows:
    polars = pytest.importorskip("polars", reason="polars is not installed (extra dev)")
    return list(polars.read_parquet(path).select("user_id", "rank", "top10").iter_rows())


def by_duckdb(path: Path) -> Rows:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    return list(duckdb.sql(f"select user_id, rank, top10 from '{path}'").fetchall())


@pytest.mark.parametrize("read", [by_pandas, by_polars, by_duckdb])
def test_per_user_results_are_read_by(read: Callable[[Path], Rows], tmp_path: Path) -> None:
    shop = Shop(["Milk", "Bread", "Jam", "Tea"], [Query("ann", [0], 2), Query("bob", [1], 0)], n_train=[9, 7, 5, 1])
    queries = write_queries(tmp_path / "queries", {"food": shop})
    evaluate(EvalOptions(queries=str(queries), out=str(tmp_path / "eval"), baseline="popularity", top_k=2))
    # by counts Milk, Bread, Jam, Tea, less what was had: ann is offered Bread, Jam, Tea; bob Milk, Jam, Tea
    assert sorted(read(tmp_path / "eval/food.parquet")) == [("ann", 2.0, [1, 2]), ("bob", 1.0, [0, 2])]


def test_lm_evaluation_harness_knows_the_group_of_general_tasks_and_each_of_its_tasks() -> None:
    folder = REPOSITORY / "launch/lm_eval"
    group = yaml.safe_load((folder / "general_ability.yaml").read_text(encoding="utf-8"))
    assert group["group"] == "general_ability" and len(set(group["task"])) == 5
    assert [m["metric"] for m in group["aggregate_metric_list"]] == ["acc"]
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed (pip install lm_eval)")
    known = tasks.TaskManager(include_path=str(folder))
    assert known.match_tasks(["general_ability"]) == ["general_ability"]
    assert {*group["task"]} <= {*known.all_tasks}
