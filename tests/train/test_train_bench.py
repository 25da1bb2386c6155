"""The benchmarks of training, run at a tiny size on the sides that are installed, and the GPU's parts on a CPU."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_world

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Asked, Record
from benchmarks.train import data, overhead, rivals, run
from benchmarks.train.evaluate import nats_per_token
from benchmarks.train.job import Answer, Job
from benchmarks.train.measure import Result, ranks_of, rate, versions
from benchmarks.train.measure import run as run_ranks
from benchmarks.train.overhead import summary
from benchmarks.train.worker import CONCAT, OURS, PADDED, SIDES, TRL
from cprec.format import PackedCorpus

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and 40 packed rows of 64 tokens in `rows/`."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    corpus = PackedCorpus(root / "packed/specific/toys")
    data.write_rows(root / "rows", [*corpus], like=corpus)
    (root / "base").symlink_to(root / "model")
    (root / "prepared").mkdir()
    (root / "prepared/packed").symlink_to(root / "packed")
    return root


@pytest.fixture(scope="module")
def gpu_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPU benchmark's models and rows at a tiny size."""
    work = tmp_path_factory.mktemp("gpu")
    gpu.make_world(gpu.options(["--tiny", "--steps", "2", "--models", "135m", "--work", str(work)]))
    return work


def _job(world: Path, side: str) -> Job:
    return Job(side=side, base=world / "base", rows=world / "rows", out=world / "runs" / side.replace(" ", "-"),
               steps=STEPS, rows_per_step=4, rows_per_forward=2, seed=1, peak_lr=1e-2, warmup_steps=1)


def test_documents_are_the_tokens_of_the_rows_without_padding(world: Path) -> None:
    rows = [*PackedCorpus(world / "rows/rows")]
    docs = data.documents(world / "rows")
    assert sum(map(len, docs)) == sum(64 - r.n_pad for r in rows) and len(docs) == sum(len(r.doc_ids) for r in rows)
    first = rows[0].input_ids[:rows[0].doc_lens[0]]
    assert docs[0] == first.tolist() and all(d[-1] == 1 for d in docs)  # each ends in its own end-of-text


@pytest.mark.parametrize("side", SIDES)
def test_two_ranks_of_every_side_count_their_useful_tokens_and_learn(world: Path, side: str) -> None:
    if reason := rivals.missing(side):
        pytest.skip(reason)
    options = run.Options(STEPS, 2, 1, data.Size(64), (side,), ("race",), world, None)
    [found] = run.race(options, world / "rows")["sides"]
    assert found["failed"] is None and found["rate"] > 0
    if side in (OURS, CONCAT):  # two rows a rank and step, all tokens of the latter are real
        assert 2 * 2 * STEPS * 59 <= found["useful_tokens"][0] <= 2 * 2 * STEPS * 64
    before = nats_per_token(world / "base", data.held_out(world, run.HELD_OUT_ROWS))
    assert found["losses"][0] < before - 0.1  # of weights that were trained


def test_overhead_is_measured_on_the_batches_of_the_run(world: Path) -> None:
    found = overhead.measure(ranks_of(_job(world, "overhead"), 1)[0], 1)
    assert min(found.torch_s, found.engine_s, found.loop_s) > 0 and 0 < found.outside_step_pct < 100


def test_a_side_that_fails_says_why(world: Path) -> None:
    with pytest.raises(RuntimeError, match="no side nobody"):
        run_ranks(ranks_of(_job(world, "nobody"), 1))


def test_held_out_loss_is_that_of_each_document_alone(world: Path) -> None:
    from transformers import AutoModelForCausalLM

    docs = data.documents(world / "rows")[:5]
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(input_ids=torch.tensor([d]), labels=torch.tensor([d])).loss) * (len(d) - 1) for d in docs]
    assert math.isclose(nats_per_token(world / "model", docs), sum(losses) / sum(len(d) - 1 for d in docs),
                        rel_tol=1e-4)


def test_the_rate_counts_useful_tokens_after_the_untimed_steps() -> None:
    ranks = [Answer(step_ends_s=[0, 10, 11, 12], useful=[9, 9, 30, 50], slots=[9, 9, 40, 60], peak_mb=1),
             Answer(step_ends_s=[0, 10, 11, 14], useful=[9, 9, 40, 40], slots=[9, 9, 40, 40], peak_mb=1)]
    assert rate(ranks) == 160 / 4  # the slower rank ends 4 s after its second step
    assert Result("x", [ranks]).padding == pytest.approx(1 - 196 / 216)


def test_overhead_compares_steps_of_the_same_batches() -> None:
    found = summary(loop=[[1.1, 2.2], [3.3, 1.0]], engine=[[1.0, 2.0], [3.0, 1.0]], torch=[[0.5, 1.0], [2.0, 0.5]],
                    inside=[[1.0, 2.1], [3.2, 0.9]])
    assert found.loop_over_engine_pct == pytest.approx(10)  # ratios 1.1, 1.1, 1.1, 1.0
    assert found.engine_over_torch_pct == pytest.approx(100)  # 2, 2, 1.5, 2
    assert found.loop_s == pytest.approx(1.65)


def _found() -> dict[str, Any]:
    def side(name: str, value: float) -> dict[str, Any]:
        return {"side": name, "failed": None, "rate": value, "rates": [value], "padding": 0.1, "losses": [3.0],
                "useful_tokens": [1000], "peak_mb": 900.0}

    return {"minutes": 1.0, "machine": run.machine() | {"versions": versions()}, "data": {
                "seq_len": 64, "vocabulary": 258, "hidden_size": 32, "n_layers": 2, "n_heads": 4,
                "rows_per_forward": 1, "steps": 4, "repeats": 1, "mean_doc_tokens": 17.0, "held_out_rows": 1},
            "race": {"sides": [side(OURS, 300.0), side(PADDED, 200.0), side(CONCAT, 150.0),
                               {"side": TRL, "failed": "not installed"}]},
            "overhead": {"loop_s": 1.0, "engine_s": 0.98, "torch_s": 0.9, "loop_over_engine_pct": 2.04,
                         "engine_over_torch_pct": 8.9, "outside_step_pct": 0.3},
            "scaling": {"rates": {"one": [100.0], "apart": [180.0], "two": [150.0]}},
            "attention": {"isolated_attention_vs_dense_mask": {"1024": 9.5},
                          "milliseconds": {"1024": {"one by one": 2.0, "dense mask": 19.0}}},
            "loss": {"failed": "no memory"}}


def test_the_last_line_has_every_promised_number_and_the_page_its_tables() -> None:
    line = json.loads(json.dumps(run.headline(_found())))
    assert (line["vs_trainer_padded"], line["vs_trainer_concat"], line["vs_trl_packed"]) == (1.5, 2.0, None)
    assert line["loop_overhead_pct"] == 2.04 and line["isolated_attention_vs_dense_mask"] == {"1024": 9.5}
    assert line["loss_peak_memory_vs_full_logits"] is None
    assert line["two_ranks_vs_one"] == 1.5 and line["two_runs_vs_one"] == 1.8
    assert {"cpu", "cores", "versions", "commit"} <= {*line}
    page = run.filled(f"# Page\n{run.MARKS[0]}\nNot measured\n{run.MARKS[1]}\nend\n", _found())
    assert "| trainer padded | 200 | 200 to 200 | 1.50 x |" in page and "trl packed | FAILED" in page
    assert "| 1,024 | 2.0 | 19.0 | 9.5 x |" in page
    assert "loss: FAILED: no memory" in page and "Not measured" not in page and page.endswith("end\n")
    assert run.filled(page, _found()) == page


def test_the_command_lines_name_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for module, wrong, said in ((run, ["--only", "rase"], "choose from race"), (run, ["--steps", "3"], "at least 4"),
                                (gpu, ["--parts", "bar"], "choose from ceiling"),
                                (gpu, ["--models", "7b"], "choose from 1p5b, 135m")):
        with pytest.raises(SystemExit):
            module.options(wrong)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("part", ["ceiling", "loss_parity", "bare", "memory"])
def test_every_part_of_the_gpu_benchmark_runs_tiny(gpu_world: Path, part: str) -> None:
    rows = "short" if part == "loss_parity" else "full"
    asked = Asked(part, str(gpu_world), tiny=True, rows=rows, backend="doc_sdpa", steps=2)
    records = [*gpu_parts.run(asked)]
    assert records and all(r.failed is None and r.part in ("parity", part) for r in records)
    assert all(math.isfinite(v) for r in records for v in r.values.values() if isinstance(v, float))
    if part == "memory":
        assert records[0].values["loss"] == pytest.approx(records[1].values["loss"], rel=1e-5)


@pytest.mark.parametrize("backend", gpu_parts.backends())
def test_backends_of_this_machine_hold_against_float64(gpu_world: Path, backend: str) -> None:
    records = [*gpu_parts.run(Asked("parity", str(gpu_world), tiny=True, backend=backend))]
    assert [r.failed for r in records] == [None, None]


def test_a_wrong_backend_fails_the_parity_check(gpu_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_parts._attend

    def one_document(backend: str, qkv: tuple[torch.Tensor, ...], lens: list[int], grad: torch.Tensor) -> Any:
        return right(backend, qkv, [sum(lens)], grad)  # what a kernel does that overlooks the borders

    monkeypatch.setattr(gpu_parts, "_attend", one_document)
    mixed, one = gpu_parts.run(Asked("parity", str(gpu_world), tiny=True, backend="sdpa"))
    assert mixed.failed is not None and one.failed is None


@pytest.mark.parametrize("part", ["ours", "trainer"])
def test_our_run_and_the_trainer_are_measured_in_processes_of_their_own(gpu_world: Path, part: str) -> None:
    [record] = gpu.measured(Asked(part, str(gpu_world), tiny=True, rows="short", steps=2))
    assert record.failed is None and float(record.values["useful_tokens_per_s"] or 0) > 0
    assert record.backend in ("doc_sdpa", "sdpa")
    if part == "ours":  # ended before it saved
        assert not [*gpu_world.rglob("state.json")]


def test_the_plan_measures_right_before_fast_and_slow_backends_only_when_named(tmp_path: Path) -> None:
    def planned(*argv: str) -> list[tuple[str, str, str]]:
        return [(a.part, a.model, a.backend) for a in gpu.plan(gpu.options(["--work", str(tmp_path), *argv]))]

    everything = planned()
    first_timed = next(i for i, (part, _, _) in enumerate(everything) if part in ("bare", "ours", "trainer"))
    assert {part for part, _, _ in everything[:first_timed]} == {"ceiling", "parity", "loss_parity", "memory"}
    named = planned("--backends", "sdpa", "--parts", "bare,ours", "--models", "135m")
    assert named == [("bare", "135m", "sdpa"), ("ours", "135m", "sdpa")] * 2  # short and full-length documents
    assert planned("--parts", "trainer", "--models", "1p5b") == [("trainer", "1p5b", "auto")] * 2


def test_a_measurement_that_fails_is_a_record_and_the_headline_names_it(tmp_path: Path) -> None:
    [record] = gpu.measured(Asked("bare", str(tmp_path / "nothing"), tiny=True, backend="sdpa"))
    assert record.failed is not None and "ended with" in record.failed
    assert gpu.headline([record])["failed"] == ["bare      135m  full  sdpa"]


def test_the_gpu_headline_takes_the_lowest_ratio_per_backend() -> None:
    def speed(part: str, model: str, rows: str, backend: str, tokens: float) -> Record:
        return Record(part, model, rows, backend, {"useful_tokens_per_s": tokens, "mfu": 0.5, "tflops": 400.0})

    records = [speed("bare", "1p5b", "full", "varlen", 100.0), speed("ours", "1p5b", "full", "varlen", 95.0),
               speed("bare", "1p5b", "short", "varlen", 120.0), speed("ours", "1p5b", "short", "varlen", 108.0),
               speed("trainer", "1p5b", "short", "sdpa", 60.0), speed("trainer", "1p5b", "full", "sdpa", 80.0),
               Record("ceiling", values={"what": "square", "tflops": 800.0}),
               Record("parity", backend="varlen", failed="error beyond the limit")]
    line = gpu.headline(records)
    assert line["mfu_1p5b"] == {"varlen": 0.5} and line["of_bare_step"] == {"varlen": 0.9}
    assert line["vs_trainer"] == {"varlen": 1.8} and line["vs_trainer_full"] == {"varlen": 1.188}
    assert line["of_ceiling_1p5b"] == {"varlen": 0.5} and line["parity_holds"] == {"varlen": False}


def test_generated_rows_are_full_and_their_documents_short(gpu_world: Path) -> None:
    short, full = (PackedCorpus(gpu_world / f"135m-{kind}/rows") for kind in ("short", "full"))
    assert all(int(row.doc_lens.sum()) == 256 for row in short) and all(len(row.doc_lens) == 1 for row in full)
    lens = np.concatenate([row.doc_lens for row in short])
    assert lens.min() >= 8 and 60 < lens.mean() < 150 and int(max(r.input_ids.max() for r in short)) < 512


def test_ranks_get_a_core_each_where_there_are_enough(world: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    ranks = ranks_of(_job(world, OURS), len(cores))
    assert [r.cores for r in ranks] == [[c] for c in cores] and [r.rank for r in ranks] == [*range(len(cores))]
    assert all(r.cores == [] for r in ranks_of(_job(world, OURS), len(cores) + 1))
