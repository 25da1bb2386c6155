"""The whole preparation: what it leaves on disk, restarts, kills, worker counts, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops
import yaml

from cprec.errors import ConfigError, DataError
from cprec.format import ITEM_BITS, PackedCorpus, list_corpora, read_queries_manifest
from cprec.tokenizer import load_tokenizer
from data_prep.pipeline import Preparation, prepare
from data_prep.records import STAGES
from data_prep.templates import TEMPLATES

REPOSITORY = Path(__file__).resolve().parents[2]
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.fixture
def values(raw: Path, tmp_path: Path) -> dict[str, Any]:
    return shops.config_values(raw, tmp_path / "out")


def test_every_corpus_and_query_of_the_config_is_there_and_audited(prepared: Path) -> None:
    corpora = [*(f"specific/{d}" for d in ("books", "games", "toys")), "mixed",
               *(f"valid/{d}" for d in ("books", "games", "toys", "garden"))]
    assert list_corpora(prepared / "packed") == sorted(corpora)
    for name in corpora:
        manifest = PackedCorpus(prepared / "packed" / name).manifest
        assert manifest.audit is not None and manifest.audit.passed, name
        assert manifest.n_tokens + manifest.n_pad == manifest.n_rows * manifest.seq_len
    queries = read_queries_manifest(prepared / "queries")
    assert queries.domains == {"books": "pretrain", "games": "pretrain", "toys": "pretrain", "garden": "unseen"}


def test_every_event_is_kept_or_counted_as_dropped(prepared: Path) -> None:
    counts = json.loads((prepared / "report.json").read_text())
    clean, split = counts["clean"], counts["split"]
    dropped = sum(n for reason, n in clean.items() if reason.startswith("events dropped"))
    assert clean["events read"] == sum(60 * n for n in shops.SHOPS.values())
    assert clean["events kept"] == clean["events read"] - dropped
    assert clean["events kept"] == sum(split[f"events in {part}"] for part in ("train", "valid", "test"))
    for domain in ("books", "games", "toys"):
        in_histories = counts["sequences"][f"specific/{domain}: events in them"]
        assert counts["pack"][f"specific/{domain}: events in them"] == in_histories, domain


def test_nothing_held_out_is_in_any_training_row(prepared: Path) -> None:
    clock = json.loads((prepared / "split.json").read_text())
    for name in ("specific/books", "specific/games", "specific/toys", "mixed"):
        times = [t for ts in pq.read_table(prepared / "histories" / f"{name}.parquet")["ts"].to_pylist() for t in ts]
        assert max(times) < clock["t_valid"]
        assert PackedCorpus(prepared / "packed" / name).manifest.max_timestamp_ms == max(times)


def test_a_second_run_does_nothing_and_two_workers_and_threads_give_the_same_bytes(
        prepared: Path, raw: Path, tmp_path: Path) -> None:
    values = shops.config_values(raw, tmp_path / "out")
    prepare(shops.config(values | {"workers": 2, "engine": {"memory_limit": "500MB", "threads": 2}}))
    made = shops.bytes_below(tmp_path / "out")
    assert made == shops.bytes_below(prepared)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "packed").rglob("*")}
    prepare(shops.config(values))
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "packed").rglob("*")}


def run_until(line: str, config: Path) -> None:
    """Start launch/prepare.py and kill it (SIGKILL) as soon as it says `line`."""
    command = [sys.executable, str(REPOSITORY / "launch" / "prepare.py"), "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as run:
        assert run.stderr is not None
        seen = []
        for said in run.stderr:
            seen.append(said)
            if line in said:
                os.killpg(run.pid, signal.SIGKILL)
                return
        raise AssertionError(f"never said {line!r}:\n{''.join(seen)}")


def test_kills_at_three_stages_leave_the_same_bytes(prepared: Path, values: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    for line in ("stage split: done", "stage encode: done", "stage queries: done"):
        run_until(line, config)
    prepare(shops.config(values))
    assert shops.bytes_below(tmp_path / "out") == shops.bytes_below(prepared)


@pytest.fixture
def many_parts(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Values of a config, prepared in `tmp_path/out`, whose corpora have a part for every 16 histories."""
    for module in ("data_prep.engine", "data_prep.pack"):
        monkeypatch.setattr(f"{module}.ROW_GROUP_ROWS", 16)
    prepare(shops.config(values))
    return values


def test_one_two_and_four_workers_pack_the_same_bytes(many_parts: dict[str, Any], tmp_path: Path) -> None:
    made = shops.bytes_below(tmp_path / "out")
    assert sum(name.startswith("packed/mixed/parts/") for name in made) >= 3
    for workers in (2, 4):
        out = tmp_path / f"with_{workers}"
        prepare(shops.config(many_parts | {"out": str(out), "workers": workers}))
        assert shops.bytes_below(out) == made


def test_a_restart_packs_unfinished_parts_only_and_gives_the_same_bytes(
        many_parts: dict[str, Any], tmp_path: Path) -> None:
    made = shops.bytes_below(tmp_path / "out")
    mixed = tmp_path / "out" / "packed" / "mixed"
    # as after a kill in part 1, with a shard of part 2 lost and the manifest not yet written
    for lost in (tmp_path / "out" / "stages" / "pack.json", mixed / "manifest.json", mixed / "parts" / "00001.json",
                 mixed / "shard-00002-000.arrow"):
        lost.unlink()
    cut = mixed / "shard-00001-000.arrow"
    cut.write_bytes(cut.read_bytes()[:1000])
    times = {p: p.stat().st_mtime_ns for p in mixed.glob("shard-*")}
    prepare(shops.config(many_parts))
    assert shops.bytes_below(tmp_path / "out") == made
    again = {p.name[:len("shard-00000")] for p in times if p.stat().st_mtime_ns != times[p]}
    assert again == {"shard-00001", "shard-00002"}


def test_shards_of_another_plan_are_not_kept(copy_of_prepared: Path, raw: Path, prepared: Path) -> None:
    out = copy_of_prepared
    (out / "stages" / "pack.json").unlink()
    (out / "packed" / "mixed" / "manifest.json").unlink()
    (out / "packed" / "mixed" / "plan.json").write_text('{"plan": "other"}')
    shard = out / "packed" / "mixed" / "shard-00000-000.arrow"
    shard.write_bytes(shard.read_bytes().replace(b"\x05\x00", b"\x06\x00"))
    (out / "packed" / "mixed" / "shard-00000-099.arrow").write_text("of the other plan")
    prepare(shops.config(shops.config_values(raw, out)))
    assert shops.bytes_below(out) == shops.bytes_below(prepared)


@pytest.mark.parametrize("mode", ["concat", "one_per_row"])
def test_other_ways_to_pack_lose_no_token_and_pass_the_audit(
        values: dict[str, Any], tmp_path: Path, prepared: Path, mode: str) -> None:
    values["pack"]["mode"] = mode
    prepare(shops.config(values))
    made = PackedCorpus(tmp_path / "out" / "packed" / "mixed").manifest
    best = PackedCorpus(prepared / "packed" / "mixed").manifest
    assert (made.n_tokens, made.n_documents) == (best.n_tokens, best.n_documents)
    if mode == "concat":
        assert made.n_pad < made.seq_len and made.n_rows <= best.n_rows
    else:
        assert made.n_rows == made.n_documents


def test_plain_text_is_packed_whole_beside_the_histories(
        values: dict[str, Any], tmp_path: Path, tiny_tokenizer: str) -> None:
    texts = ["A first text.\nIn two lines.", "", "word " * 400, "</s> is text"]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    replay = [{"name": "notes", "path": str(tmp_path / "notes.jsonl"), "text": "body"}]
    prepare(shops.config(values | {"replay": replay, "tokenizer": {"path": tiny_tokenizer}}))
    corpus = PackedCorpus(tmp_path / "out" / "packed" / "replay" / "notes")
    tokenizer = load_tokenizer(tiny_tokenizer)
    packed: dict[int, list[int]] = {}  # by text; its pieces in order
    for row in corpus:
        ends = np.cumsum(row.real_doc_lens)
        for doc_id, end, n in zip(row.doc_ids.tolist(), ends, row.real_doc_lens, strict=True):
            packed[doc_id] = row.input_ids[end - n:end].tolist()
    ids = [[i for d in sorted(packed) if d >> ITEM_BITS == text for i in packed[d]] for text in range(3)]
    assert ids == [[*tokenizer.encode_start(t.strip()), tokenizer.eos_id] for t in texts if t]
    manifest = corpus.manifest
    assert manifest.kind == "train" and manifest.template is None and len(packed) > 3
    assert manifest.audit is not None and manifest.audit.passed
    counts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert counts["ingest"]["replay notes: documents dropped: empty"] == 1
    said = {what for what in counts["pack"] if what.startswith("replay/notes: ")}
    assert said == {f"replay/notes: {what}" for what in ("pieces of text", "rows", "tokens", "padding")}
    assert counts["pack"]["replay/notes: pieces of text"] == len(packed)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_goes_through_the_line_and_passes_the_audit(
        values: dict[str, Any], tmp_path: Path, tiny_tokenizer: str, template: str) -> None:
    prepare(shops.config(values | {"template": template, "tokenizer": {"path": tiny_tokenizer}}))
    corpus = PackedCorpus(tmp_path / "out" / "packed" / "mixed")
    assert corpus.manifest.audit is not None and corpus.manifest.audit.passed
    assert corpus.manifest.has_loss_mask is (template == "supervised")
    if corpus.manifest.has_loss_mask:
        row = corpus[0]
        assert row.loss_mask is not None
        n = int(row.doc_lens[0])
        assert row.loss_mask[n - 1] and not row.loss_mask[0]  # the end is predicted, the lead-in is not


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install mpich, or install Open MPI")
def test_three_mpi_ranks_pack_the_same_bytes_as_one_process(
        prepared: Path, values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'cprec[mpi]'")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    prepare_py = str(REPOSITORY / "launch" / "prepare.py")
    command = [str(MPIRUN), "-n", "3", sys.executable, prepare_py, "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMPI_ALLOW_RUN_AS_ROOT": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "rank 0 of 3 leads, 2 ranks work" in ran.stderr
    assert shops.bytes_below(tmp_path / "out") == shops.bytes_below(prepared)


def test_data_that_a_killed_run_packed_again_is_audited_by_the_next_one(
        copy_of_prepared: Path, raw: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = shops.config_values(raw, copy_of_prepared)
    (copy_of_prepared / "packed" / "mixed" / "shard-00000-000.arrow").unlink()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline.audit", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(shops.config(values))
    assert PackedCorpus(copy_of_prepared / "packed" / "mixed").manifest.audit is None
    prepare(shops.config(values))
    assert shops.bytes_below(copy_of_prepared) == shops.bytes_below(prepared)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_lost_and_an_altered_shard_are_mended_by_what_their_message_says(
        copy_of_prepared: Path, raw: Path, prepared: Path, caplog: pytest.LogCaptureFixture, is_lost: bool) -> None:
    values = shops.config_values(raw, copy_of_prepared)
    shard = copy_of_prepared / "packed" / "mixed" / "shard-00000-000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    if is_lost:
        shard.unlink()
    with pytest.raises(DataError, match=r"mixed/shard-00000-000.arrow .*run launch/prepare.py again, which makes"):
        PackedCorpus(copy_of_prepared / "packed" / "mixed").verify()
    shard.unlink(missing_ok=True)  # "delete it", says the message of the altered one
    prepare(shops.config(values))
    assert shops.bytes_below(copy_of_prepared) == shops.bytes_below(prepared)
    assert "stage pack: packed/mixed/shard-00000-000.arrow is missing or of another size, made anew" in caplog.messages


def test_a_history_that_names_an_item_beyond_the_catalogue_is_told_with_its_file(
        copy_of_prepared: Path, raw: Path, prepared: Path) -> None:
    values = shops.config_values(raw, copy_of_prepared)
    histories = copy_of_prepared / "histories" / "mixed.parquet"
    for odd in (-1, 10**6):
        table = pq.read_table(prepared / "histories" / "mixed.parquet")
        items = table["items"].to_pylist()
        items[3][1] = odd
        field = table.schema.get_field_index("items")
        pq.write_table(table.set_column(field, "items", pa.array(items, pa.list_(pa.int32()))), histories)
        shutil.rmtree(copy_of_prepared / "packed" / "mixed")
        stamp = copy_of_prepared / "stages" / "sequences.json"
        said = json.loads(stamp.read_text())
        said["outputs"]["histories/mixed.parquet"] = histories.stat().st_size  # the size alone would give it away
        stamp.write_text(json.dumps(said))
        with pytest.raises(DataError, match=f"histories/mixed.parquet names item {odd}, the catalogue has items 0 to"):
            prepare(shops.config(values))
    histories.unlink()
    prepare(shops.config(values))
    assert shops.bytes_below(copy_of_prepared) == shops.bytes_below(prepared)


def test_a_manifest_of_another_plan_does_not_outlive_its_shards(
        copy_of_prepared: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy_of_prepared / "stages" / "pack.json").unlink()
    values = shops.config_values(raw, copy_of_prepared)
    values["pack"]["seq_len"] = 512

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.pack.pack_part", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(shops.config(values))
    assert list_corpora(copy_of_prepared / "packed") == []


def test_a_folder_prepared_otherwise_is_refused_and_left_alone(copy_of_prepared: Path, raw: Path) -> None:
    before = shops.bytes_below(copy_of_prepared)
    values = shops.config_values(raw, copy_of_prepared) | {"seed": 18}
    with pytest.raises(ConfigError, match=r"was prepared otherwise(.|\n)*stage clean: seed: 17 there, 18 now"):
        prepare(shops.config(values))
    assert shops.bytes_below(copy_of_prepared) == before


def test_the_way_out_of_a_folder_prepared_otherwise_removes_just_what_depends_on_the_changes(
        copy_of_prepared: Path, raw: Path, tmp_path: Path) -> None:
    values = shops.config_values(raw, copy_of_prepared)
    values["domains"] = {"pretrain": ["books", "toys"], "unseen": ["garden"]}  # games is learned from no more
    values["queries"]["max_per_domain"] = 10
    with pytest.raises(ConfigError) as e:
        prepare(shops.config(values))
    said = str(e.value)
    assert "stage clean: domains.pretrain: ['books', 'games', 'toys'] there, ['books', 'toys'] now" in said
    assert "stage queries: queries.max_per_domain: 20 there, 10 now" in said
    assert "have stages clean, split, sequences, vocabulary, encode, pack, queries, audit made anew" in said
    assert "(kept: ingest)" in said
    command = said.splitlines()[-1].strip()
    assert command.startswith("rm -r ")
    ingested = (copy_of_prepared / "interactions" / "ingested.parquet").stat().st_mtime_ns
    subprocess.run(command, shell=True, check=True)
    prepare(shops.config(values))
    assert (copy_of_prepared / "interactions" / "ingested.parquet").stat().st_mtime_ns == ingested
    prepare(shops.config(values | {"out": str(tmp_path / "fresh")}))
    assert shops.bytes_below(copy_of_prepared) == shops.bytes_below(tmp_path / "fresh")


def test_a_change_of_packing_alone_names_packing_and_the_audit(copy_of_prepared: Path, raw: Path) -> None:
    values = shops.config_values(raw, copy_of_prepared)
    values["pack"]["seq_len"] = 512
    with pytest.raises(ConfigError, match=r"stage pack: pack.seq_len: 256 there, 512 now\n.*have stages pack, audit m"):
        prepare(shops.config(values))


def test_a_rerun_of_what_is_finished_says_a_line_per_stage_and_writes_nothing(
        copy_of_prepared: Path, raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = shops.config_values(raw, copy_of_prepared) | {"workers": 2}
    (copy_of_prepared / "config.yaml").write_text("as it was")
    with caplog.at_level("INFO"):
        prepare(shops.config(values))
    assert (copy_of_prepared / "config.yaml").read_text() == "as it was"
    said = [r.getMessage() for r in caplog.records]
    assert said[:len(STAGES)] == [f"stage {name}: finished earlier, kept" for name in STAGES]


def test_a_stage_says_one_line_of_what_it_counted(
        values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        prepare(shops.config(values))
    said = [r.getMessage() for r in caplog.records]
    assert [s.partition(":")[0] for s in said if s.startswith("stage ")] == [f"stage {name}" for name in STAGES]
    assert any(re.fullmatch(r"stage clean: done in [0-9.]+ s, [0-9,]+ events kept, [0-9,]+ items kept", s)
               for s in said)
    assert len(said) < 30


def test_a_changed_source_is_noticed(raw: Path, copy_of_prepared: Path, tmp_path: Path) -> None:
    table = pq.read_table(raw / "toys.parquet")
    moved = tmp_path / "toys.parquet"
    pq.write_table(table.slice(1), moved)
    values = shops.config_values(raw, copy_of_prepared)
    values["datasets"][2]["path"] = str(moved)
    with pytest.raises(ConfigError, match=r"was prepared otherwise(.|\n)*stage ingest: .*toys.parquet"):
        prepare(shops.config(values))


def test_a_folder_of_something_else_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and is no prepared folder"):
        prepare(shops.config(values))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_refused_folder_keeps_its_own_folder_named_spill(values: dict[str, Any], tmp_path: Path) -> None:
    for name in ("spill", ".spill"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "thesis.txt").write_text("mine")
    before = shops.bytes_below(tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty and is no prepared folder"):
        prepare(shops.config(values))
    assert shops.bytes_below(tmp_path / "out") == before and len(before) == 2


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_spill_folder_is_removed_only_where_the_preparation_chose_it(
        values: dict[str, Any], tmp_path: Path, elsewhere: bool) -> None:
    values["engine"]["spill"] = str(tmp_path / "elsewhere") if elsewhere else None
    preparation = Preparation(shops.config(values))
    for folder in (".spill", "spill"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    assert preparation.engine is preparation.engine
    preparation.close()
    assert (tmp_path / "out" / "spill").is_dir()
    assert (tmp_path / "out" / ".spill").is_dir() is elsewhere


def test_missing_files_of_two_datasets_are_one_error_and_nothing_is_written(
        values: dict[str, Any], tmp_path: Path) -> None:
    values["datasets"][0]["path"] = "nowhere.parquet"
    values["datasets"][1]["items"] = "neither.parquet"
    with pytest.raises(DataError, match=r"2 problems(.|\n)*nowhere.parquet(.|\n)*neither.parquet"):
        prepare(shops.config(values))
    assert not (tmp_path / "out").exists()


def test_an_unknown_domain_is_named_with_the_nearest_known_one_and_can_be_mended(
        values: dict[str, Any], tmp_path: Path) -> None:
    wrong = values | {"domains": {"pretrain": ["books", "gmes", "toys"], "unseen": ["garden"]}}
    with pytest.raises(DataError, match="domain 'gmes': no dataset has events of it; did you mean 'games'"):
        prepare(shops.config(wrong))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_domain_without_training_history_is_an_error_that_names_it(values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"domain 'books' has no training history of 400 or more items"):
        prepare(shops.config(values | {"sequences": {"min_items": 400, "max_items": 900}}))


def test_three_mistakes_in_a_config_are_reported_at_once(values: dict[str, Any]) -> None:
    values["tokenizer"] = {}
    values["pack"]["seq_length"] = 5
    values["datasets"][1]["parser"] = "tabulr"
    with pytest.raises(ConfigError) as e:
        shops.config(values)
    for part in ("3 problems", "exactly one of path", "did you mean 'seq_len'", "did you mean 'tabular'"):
        assert part in str(e.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"domains": {"pretrain": ["books"], "unseen": ["books"]}}, "books named more than once"),
    ({"regime": "disjoint", "domains": {"pretrain": ["books"]}}, "domains.unseen is empty"),
    ({"split": {"t_valid": 5}}, "give both"),
    ({"split": {"quantiles": [0.9, 0.8]}}, "must rise strictly"),
    ({"sequences": {"min_items": 5, "max_items": 8}}, "use at least 9"),
    ({"template": "cprek"}, "did you mean 'cprec'"),
    ({"queries": {"min_history": 60}}, "above queries.max_history=50"),
])
def test_a_config_that_cannot_work_is_refused(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shops.config(values | change)


def test_stages_of_the_report_are_those_of_the_design(prepared: Path) -> None:
    assert tuple(json.loads((prepared / "report.json").read_text())) == STAGES
    assert "| clean | events kept |" in (prepared / "report.md").read_text()


def test_the_script_prints_an_error_without_a_traceback(values: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values | {"regime": "none"}))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run([sys.executable, str(REPOSITORY / "launch" / "prepare.py"), "--config", str(config)],
                         capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == ConfigError.exit_code
    assert "ConfigError: " in ran.stderr and "regime='none'" in ran.stderr and "Traceback" not in ran.stderr
