"""The benchmark of the reader, run at a tiny size on the sides that are installed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.reader import balance, corpora, ours, pages, run
from benchmarks.reader.job import Answer
from benchmarks.reader.measure import Case, Limits, Result, Setup, expected_checksum, jobs, race, same_rows
from benchmarks.reader.records import checksum, finish, generated, mapped, records_of, stacked
from benchmarks.reader.rivals import COLLATE, COPY, LIBRARIES, LITDATA, MEGATRON, MEMMAP, OURS, SIDES, installed
from cprec.data.collate import collate
from cprec.format import PackedCorpus, PackedRows

LIMITS = Limits(micro_batch_size=4, global_batch_size=16, seconds=0.05, most_rows=64, repeats=1, seed=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    """160 rows of 256 tokens."""
    made = corpora.build(tmp_path_factory.mktemp("corpus"), 160, seq_len=256, seed=1, packed=None)
    for side in (MEMMAP, *LIBRARIES):
        if installed(side):
            corpora.add(made, side)
    return made


def test_a_record_finishes_to_the_batch_that_its_row_collates_to(corpus: corpora.Corpus) -> None:
    rows = [*PackedCorpus(corpus.folder / OURS / ours.CORPUS)]
    assert any(row.n_pad for row in rows) and any(not row.n_pad for row in rows)
    batch = collate(rows, [0] * len(rows))
    made = finish(mapped(corpus.folder, corpus.shape), corpus.shape.seq_len)
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        one, other = getattr(made, name), getattr(batch, name)
        assert one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all()), name
    assert made.max_seqlen == batch.max_seqlen


def test_a_record_is_ids_padding_and_lengths() -> None:
    rows = PackedRows(np.array([[5, 6, 7, 8], [9, 3, 4, 0]], np.uint16), np.array([1, 3, 3, 1], np.int32),
                      np.array([2, 2]), np.array([0, 1, 2]), np.array([2, 1]), np.array([0, 1], np.int32))
    assert records_of(rows, 8).tolist() == [[5, 6, 7, 8, 0, 1, 3, 0], [9, 3, 4, 0, 1, 3, 1, 0]]


def test_generated_rows_are_full_of_documents_and_the_same_again() -> None:
    one, again = (next(generated(500, 2048, seed=3)) for _ in range(2))
    assert np.array_equal(one.input_ids, again.input_ids) and np.array_equal(one.doc_lens, again.doc_lens)
    assert one.n_lens.sum() == len(one.doc_lens) and one.doc_lens.sum() == 500 * 2048 and one.doc_lens.min() > 0
    assert one.n_docs.sum() == len(one.doc_ids) and (one.n_pad < 8).all()
    assert 100 < one.doc_lens.mean() < 200


def test_the_checksum_knows_rows_but_not_their_order(corpus: corpora.Corpus) -> None:
    whole, seq_len = mapped(corpus.folder, corpus.shape), corpus.shape.seq_len
    shuffled = whole[np.random.default_rng(0).permutation(160)]
    parts = [checksum(finish(shuffled[i:i + 32], seq_len), seq_len) for i in range(0, 160, 32)]
    assert (sum(n for n, _ in parts), sum(s for _, s in parts) % 2**64) == expected_checksum(corpus)
    twice = np.array(whole)
    twice[1] = twice[0]
    assert checksum(finish(twice, seq_len), seq_len) != expected_checksum(corpus)


@pytest.mark.parametrize("side", [OURS, MEMMAP])
def test_two_ranks_read_every_row_once_and_a_resumed_one_what_is_left(corpus: corpora.Corpus, side: str) -> None:
    seq_len = corpus.shape.seq_len
    ranks = [checksum(batch, seq_len) for job in jobs(corpus, Setup(side), Case("", 2), LIMITS)
             for batch in SIDES[side].batches(job)]
    assert (sum(n for n, _ in ranks), sum(s for _, s in ranks) % 2**64) == expected_checksum(corpus)
    [resumed] = jobs(corpus, Setup(side), Case("", resume=True), LIMITS)
    assert resumed.first_row == 144 and sum(len(b.labels) for b in SIDES[side].batches(resumed)) == 16


@pytest.mark.parametrize("side", LIBRARIES)
def test_every_library_reads_every_row_once(corpus: corpora.Corpus, side: str) -> None:
    if not installed(side):
        pytest.skip(f"{side} is not installed: make bench-reader installs it")
    [checks] = same_rows(corpus, [Setup(side)], LIMITS).values()
    assert checks == {"1 rank": True, "2 ranks": True, "resumed": True}


def test_a_side_that_fails_says_why_and_the_others_go_on(corpus: corpora.Corpus) -> None:
    results = race({"c": corpus}, [Setup(COLLATE), Setup("nobody")], Case("c"), LIMITS)
    assert results[0].failed is None and results[0].rows_per_s > 0 and results[0].mb("anon_mb") > 10
    assert results[1].failed is not None and "nobody" in results[1].failed


def test_pages_are_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    pages.warm(pages.files_below(tmp_path))
    assert pages.cached_share(pages.files_below(tmp_path)) == 1.0
    pages.drop(pages.files_below(tmp_path))  # whether the system listens is for the tables to say
    assert 0.0 <= pages.cached_share(pages.files_below(tmp_path)) <= 1.0


def test_the_spread_is_the_slowest_rank_over_the_mean() -> None:
    work = np.array([[1.0, 3.0], [2.0, 2.0]])  # means 2 and 2, slowest 3 and 2
    assert balance.slowest(work) == 5 / 4 and balance.worst(work) == 3 / 2
    one = balance.Model(layers=1, hidden=4, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
    assert one.flops_per_token == 6 * (2 * 16 + 2 * 4 * 2 + 3 * 4 * 8 + 4 * 10)
    assert one.flops_per_pair == 24  # half of: 2 products, 2 FLOPs, 3 passes, 4 wide
    flops = balance.rank_flops([np.array([[[2, 3], [1, 0]]])], seq_len=5, model=one)
    assert flops.tolist() == [[10 * one.flops_per_token + 5 * 24, 10 * one.flops_per_token + 1 * 24]]


def test_dealing_keeps_the_rows_of_a_step_and_evens_the_ranks(corpus: corpora.Corpus) -> None:
    dealt = ours.Dealt(corpus.folder / OURS, [ours.CORPUS], seed=1, world_size=4, grad_accum_steps=4,
                       micro_batch_size=2)
    before, after = dealt.drawn(0), dealt.dealt(0)
    assert before.shape == after.shape == (4, 4, 2)
    assert sorted(before.reshape(-1)) == sorted(after.reshape(-1))
    assert balance.slowest(after.sum(axis=2)) < balance.slowest(before.sum(axis=2))


def test_real_rows_come_again_until_there_are_enough(corpus: corpora.Corpus, tmp_path: Path) -> None:
    again = corpora.build(tmp_path / "again", 320, seq_len=0, seed=1, packed=corpus.folder / OURS)
    whole, twice = mapped(corpus.folder, corpus.shape), mapped(again.folder, again.shape)
    assert np.array_equal(twice, np.concatenate([whole, whole]))
    one = stacked([*PackedCorpus(corpus.folder / OURS / ours.CORPUS)])
    assert one.doc_lens.sum() == 160 * 256


def test_the_last_line_has_every_promised_number_and_the_page_its_tables() -> None:
    found = {"minutes": 1.0, "machine": run.machine(), "spread": [asdict(
        balance.Spread(8, accum, micro, 2, before, after, 1.5, 1.1, 1.4, 1.2)) for accum, micro, before, after in (
            (4, 1, 1.3, 1.01), (1, 8, 1.2, 1.02), (1, 1, 1.4, 1.35))],
        "same_rows": {OURS: {"1 rank": True}},
        "data": {"rows": "generated", "seq_len": 256, "micro_batch_size": 4, "repeats": 1, "corpora": "two"},
        "cases": [_case(run.MAIN, {OURS: 600, LITDATA: 200, MEGATRON: 100, COPY: 1200}),
                  _case(run.TWO, {OURS: 800, LITDATA: 100, MEGATRON: 400}),
                  _case(Case(run.LARGE, resume=True), {OURS: 600})]}
    line = json.loads(json.dumps(run.headline(found)))
    assert line["rows_per_s_vs_fastest_library"] == 2.0 and line["fastest_library"] == MEGATRON  # 3 with one process
    assert line["vs_memcpy"] == 0.5 and line["vs_memcpy_from_memory"] is None
    assert line["first_batch_ms"] == {"small": None, "large": 40.0} == line["resume_ms"]
    assert line["rss_mb"]["large"] == {"anon": 30.0, "file": 20.0}
    assert line["flops_spread_before"] == 1.3 and line["flops_spread_after"] == 1.02 and line["same_rows"] is True
    assert {"cpu", "versions", "commit"} <= {*line}
    page = run.filled(f"# Page\n{run.MARKS[0]}\nNot measured\n{run.MARKS[1]}\nend\n", found)
    assert f"| {LITDATA} | 200 | 0.1 | 3.00 x | 40.0 |" in page
    shared, single = page.split("one row per rank and step, nothing to deal, not in the headline")
    assert "| 1.3000 | 1.0100 |" in shared and "The worst of these, as drawn 1.3000 and as dealt 1.0200" in shared
    assert "| 1.4000 | 1.3500 |" in single and "| 1.0200 |" not in single
    assert "Not measured" not in page and page.endswith("end\n")
    assert run.filled(page, found) == page


def _case(case: Case, rows_per_s: dict[str, int]) -> dict[str, Any]:
    answers = {side: Answer(imports_s=1, first_batch_s=0.04, rows=n, seconds=case.processes, anon_mb=30, file_mb=20,
                            anon_before_mb=10) for side, n in rows_per_s.items()}
    return {"case": case.label, "seq_len": 256, "skipped": {}, "setups": [
        run._values(Result(Setup(side), case, [[a] * case.processes], [1.0])) for side, a in answers.items()]}


def test_the_command_line_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in ((["--only", "rat"], "choose from check, rate"), (["--rows", "100,6400"], "100: not a multiple"),
                        (["--global-batch-size", "8"], "two ranks need a multiple of 16")):
        with pytest.raises(SystemExit):
            run.options(wrong)
        assert said in capsys.readouterr().err
