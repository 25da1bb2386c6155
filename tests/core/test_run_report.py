"""A run's page: what it tells of a real run that was stopped, left steps out and has a branch; in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import dump, look_at

from cprec.config import Length
from cprec.errors import CheckpointError, ConfigError, DivergedError
from cprec.eval.run import EvalOptions, evaluate
from cprec.format import write_atomically
from cprec.plots import Curve, Steps, draw_svg
from cprec.report import markup
from cprec.report.charts import thin
from cprec.report.live import PageServer, page_of
from cprec.report.page import run_page
from cprec.tokenizer import load_tokenizer
from cprec.train.branch import Annealing, annealing_config, find_parent
from cprec.train.checkpoint import Checkpoint, State, checkpoint_name
from cprec.train.metrics import BadStepRecord, Memory, MetricsLog, PartTimes, TrainRecord, ValidationRecord
from cprec.train.plan import Plan, build_plan
from cprec.train.retention import lease
from cprec.train.run_folder import claim_run_folder
from cprec.train.starts import STARTS, Start, read_starts, recorded_start
from tests.eval.folders import Query, Shop, write_queries

LONG = "a_shop_with_a_name_that_is_longer_than_a_telephone_is_wide_and_has_<tags>&amp;"


PARTS = PartTimes(data=0.5, forward=2.0, backward=5.0, optimizer=2.0, other=0.5)
ROWS = {"specific/toys": [3, 4], "mixed": [1]}


def save(plan: Plan, step: int, valid_loss: float) -> Checkpoint:
    """What a run leaves at `step`, but the weights."""
    state = State(
        step=step, tokens_seen=step * plan.tokens_per_step, rows_seen=step * 8, lr=plan.schedule.lr(step),
        phase=plan.schedule.phase(step), bad_steps=1, valid_loss=valid_loss, data_hashes={}, config_hash="",
        tokenizer_fingerprint=load_tokenizer(plan.config.model.path).fingerprint, world_size=4, zero_stage=3,
        parent=plan.config.parent, files={}).sealed()
    folder = Path(plan.config.run_dir) / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    write_atomically(folder / "state.json", state.model_dump_json())
    return Checkpoint(folder, state)


def train_record(plan: Plan, step: int) -> TrainRecord:
    """Five seconds of backward in ten a step; the loss falls by a tenth a step."""
    loss = 7.0 - step / 10
    return TrainRecord(
        step=step, n_steps=1, phase=plan.schedule.phase(step - 1), lr=plan.schedule.lr(step - 1), loss=loss,
        loss_by_corpus={"mixed": loss + 0.2, "specific/toys": loss - 0.1}, grad_norm=1.0 + step,
        grad_norm_max=2.0 + step, param_norm=9.0, tokens_seen=step * plan.tokens_per_step, tokens_per_s=51_200.0,
        tokens_per_s_per_device=12_800.0, mfu=0.4, pad_share=0.01, step_s=10.0, time_s=PARTS, save_stall_s=0.25,
        memory=Memory(40.0, 60.0, 8.0), eta_s=3600.0, bad_steps=1)


def write_log(plan: Plan, steps: range) -> None:
    """The records of the steps, a validation after every second; step 5 is left out."""
    log = MetricsLog(Path(plan.config.run_dir), plan.config, resume_step=10**9, active=True)
    for step in steps:
        if step == 5:
            log.write(BadStepRecord(step, "loss nan", None, None, ROWS))
            continue
        log.write(train_record(plan, step))
        if step % 2 == 0:
            losses = {name: 6.0 - step / 10 + i for i, name in enumerate(plan.valid)}
            log.write(ValidationRecord(step, sum(losses.values()) / len(losses), losses))
    log.close()


def plan_of(values: dict[str, Any]) -> Plan:
    plan = build_plan(tiny.run_config(values), 1)
    claim_run_folder(Path(plan.config.run_dir), plan)
    return plan


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left by `run`, killed at step 4, told to stop at 6, then complete at 12, with one step left out; and by
    `branch`, of its step 6, ranked. Ten validation corpora."""
    root = tmp_path_factory.mktemp("report")
    values = tiny.write_world(root)
    for i in range(8):
        tiny.write_corpus(root / "packed", f"valid/{LONG if i == 0 else f'shop{i}'}", model=root / "model", n_rows=2,
                          seed=10 + i, kind="valid")
    trunk = plan_of(values)
    (root / "run" / STARTS).write_text(
        '{"step": 0, "time_s": 86400.0, "world_size": 4, "host": "node1", "launcher": "srun"}\n'
        '{"step": 4, "time_s": 90000.0, "world_size": 4, "host": "node1", "launcher": "srun"}\n'
        '{"how": "stopped", "end_step": 6, "end_time_s": 93723.0}\n'
        '{"step": 6, "time_s": 99999.0, "world_size": 8, "host": "node2", "launcher": "srun"}\n'
        '{"how": "complete", "end_step": 12, "end_time_s": 100000.0}\n')
    write_log(trunk, range(1, 13))
    save(trunk, 6, 5.5)
    save(trunk, 12, 5.25)
    branch = plan_of(annealing_config(find_parent(f"{root / 'run'}@6"), Annealing(
        run_dir=str(root / "branch"), length=Length(steps=4), mix={"mixed": 1.0})).model_dump())
    assert branch.config.parent is not None
    lease(root / "run", branch.config.parent.step, run_dir=root / "branch")
    write_log(branch, range(7, 11))
    queries = write_queries(root / "queries", {"toys": Shop(["robot", "ball", "kite", "drum"], [
        Query(f"u{i}", [i % 4, (i + 1) % 4], (i + 2) % 4) for i in range(8)])})
    evaluate(EvalOptions(queries=str(queries), out=str(root / "branch/eval"), baseline="popularity"))
    return root


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    return run_page(runs / "branch")


def test_starts_say_from_where_to_where_a_run_went_and_how_it_ended(tmp_path: Path) -> None:
    done = [0]
    for last, how in ((5, "stopped"), (9, "DivergedError"), (9, "complete")):
        with suppress(DivergedError), recorded_start(tmp_path, step=lambda: done[0], last_step=9):
            done[0] = last
            if how == "DivergedError":
                raise DivergedError("too many bad steps")
    starts = read_starts(tmp_path)
    assert [(s.step, s.end_step, s.how) for s in starts] == [
        (0, 5, "stopped"), (5, 9, "DivergedError"), (9, 9, "complete")]
    assert all(s.world_size == 1 and s.time_s <= (s.end_time_s or 0) for s in starts)


def test_who_is_killed_leaves_a_start_without_an_end_and_a_cut_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text(
        '{"step": 0, "time_s": 1.0, "world_size": 2, "host": "a", "launcher": "srun"}\n{"ste\n'
        '{"step": 4, "time_s": 2.0, "world_size": 2, "host": "a", "launcher": "srun"}\n'
        '{"how": "DivergedError", "end_step": 6, "end_time_s": 3.0}\n')
    start = Start(0, 1.0, 2, "a", "srun")
    assert read_starts(tmp_path) == [start, replace(start, step=4, time_s=2.0, how="DivergedError", end_step=6,
                                                    end_time_s=3.0)]


def test_the_page_tells_of_lineage_data_bad_steps_starts_checkpoints_and_ranking(runs: Path, page: str) -> None:
    trunk = texts_of(run_page(runs / "run"))
    for row in (
            "Complete at step 12", "12 of 12", "6,144", "5.8000", "40.0%",  # 12 steps of 8 rows of 64; 7 - 12/10
            "loss nan", "2 of specific/toys, 1 of mixed",
            "1970-01-02 00:00 0 - - 4 ranks node1 srun killed or hung",
            "1970-01-02 01:00 4 6 1:02:03 4 ranks node1 srun told to stop, saved",
            "1970-01-02 03:46 6 12 0:00:01 8 ranks node2 srun complete",
            "backward 0:00:55 50.0%",  # 11 records of 5 s in 10
            "6 stable 3,072 5.5000 0.000 4 x ZeRO-3 parent of", "12 stable 6,144 5.2500 0.000 4 x ZeRO-3 last",
            "specific/toys", "share from step 0", "No run has a finished evaluation"):
        assert row in trunk, row
    branch = texts_of(page)
    for row in ("└─ branch", f"Branch of {runs / 'run'} at step 6", "schedule.total.steps 12 10", "popularity",
                "NDCG@10", "mixed", "share from step 6", "100.00%", "None since the fork, 1 before it."):
        assert row in branch, row
    assert "&lt;tags&gt;&amp;amp;" in page and "<tags>" not in page, "names are text"


def texts_of(page: str) -> str:
    """What stands on a page, tags gone and blanks as one."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_a_run_that_has_not_logged_and_one_that_was_killed_have_a_page(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "run", tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run" / STARTS).write_text(json.dumps(
        {"step": 0, "time_s": 1.0, "world_size": 1, "host": "a", "launcher": "srun"}) + "\n")
    page = run_page(tmp_path / "run")
    assert "Killed or hung, at step 0 of 12" in page and "Nothing is logged yet." in page
    assert "None is complete yet." in page
    with pytest.raises(CheckpointError, match="no run folder"):
        run_page(tmp_path)


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_whole_legible_and_alone(page: str, tmp_path: Path, width: int, is_dark: bool) -> None:
    seen = look_at(page, tmp_path, width=width, is_dark=is_dark)
    assert seen.width == width and seen.texts > 200 and seen.charts >= 6
    assert not seen.scrolls and not seen.wide
    assert not seen.overlapping and not seen.clipped
    assert not seen.pale and seen.smallest >= 9
    assert not seen.outside
    assert seen.background < 0.05 if is_dark else seen.background > 0.9


def test_the_browser_finds_what_is_wrong_with_a_page(tmp_path: Path) -> None:
    body = ['<div style="width: 2000px">wide</div>', '<p style="color: #eee">pale</p>', '<img src="far.png">',
            '<p style="margin-bottom: -1.5em">over</p><p>under</p>', '<p style="font-size: 5px">small</p>',
            '<svg viewBox="0 0 10 10" width="10"><text x="9">sticks out</text></svg>']
    seen = look_at(markup.page("bad", body), tmp_path, width=390, is_dark=False)
    assert seen.scrolls and seen.wide and seen.pale == ["pale"] and seen.outside == ["far.png"]
    assert seen.overlapping == ["over / under"] and seen.smallest < 9 and seen.clipped == ["sticks out"]


@pytest.fixture
def server(runs: Path) -> Iterator[PageServer]:
    with PageServer(page_of(runs / "run", refresh_s=1), port=0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def ask(server: PageServer, path: str = "") -> str:
    with urllib.request.urlopen(server.url + path) as answer:
        return str(answer.read().decode())


def test_the_page_is_given_to_nobody_who_calls_this_machine_by_another_name(server: PageServer) -> None:
    asked = urllib.request.Request(server.url, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked)


def test_the_served_page_is_made_anew_when_the_run_has_gone_on_and_only_then(runs: Path, server: PageServer) -> None:
    first = ask(server)
    assert first == ask(server) and "follows the run" in first
    path = runs / "run/starts.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 12, "time_s": 5.0, "world_size": 3, "host": "b", "launcher": "srun"}\n')
    os.utime(path, ns=(1, 1))
    try:
        assert "3 ranks" in ask(server) and "3 ranks" not in first
    finally:
        path.write_text(before)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, "config.yaml")
    with pytest.raises(ConfigError, match="give another"):
        PageServer(lambda: "", port=server.server_address[1])


def test_an_open_page_follows_the_run_and_keeps_what_was_unfolded(tmp_path: Path) -> None:
    n = 0

    def make() -> str:
        nonlocal n
        n += 1
        unfold = "<script>document.querySelector('details').open = true</script>" if n == 1 else ""
        return markup.page("t", [markup.folded("more", f"<b>answer {n}</b>"), unfold], refresh_s=0.2)

    with PageServer(make, port=0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        dom = dump(serving.url, tmp_path, budget_ms=3000)
        serving.shutdown()
    assert n > 1 and "answer 1<" not in dom and "<details open" in dom


def test_a_long_curve_is_thinned_to_means_or_the_largest() -> None:
    points = [(i, float(i % 2)) for i in range(2000)]
    means, n = thin(points)
    assert n == 4 and len(means) == 500 and means[0] == (3, 0.5)
    assert thin(points, max)[0][-1] == (1999, 1.0)
    assert thin([]) == ([], 0) and thin([(1, 2.0)]) == ([(1, 2.0)], 1)


def test_a_chart_is_the_same_every_time_and_leaves_its_colors_to_the_page() -> None:
    curves = [Curve([(i, 1.0 / (i + 1)) for i in range(20)], color) for color in (0, 9)]
    svg = draw_svg(curves, Steps([(0, 5)], [3], [7]), is_log=True)
    assert svg == draw_svg(curves, Steps([(0, 5)], [3], [7]), is_log=True)
    assert svg.startswith('<svg viewBox="0 0 300 190"') and "#00000" not in svg and "font-family" not in svg
    for color in ("currentColor", "var(--grid)", "var(--shade)", "var(--bad)", "var(--curve-0)", "var(--curve-1)"):
        assert color in svg
