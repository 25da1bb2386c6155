"""What others open: the splits as RecBole's files, the dataset card, and shards through `datasets`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops
import yaml

from cprec.errors import DataError
from cprec.format import PackedCorpus, list_corpora
from data_prep.engine import write_parquet
from data_prep.engines.duckdb import DuckDBEngine
from data_prep.pipeline import Preparation, export_recbole, prepare
from data_prep.records import CLEAN_INTERACTIONS, Corpora, Layout, Split
from data_prep.to_recbole import write_recbole


@pytest.fixture(scope="module")
def exported(prepared: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the prepared shops with their RecBole files."""
    out = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("exported") / "out"))
    assert export_recbole(shops.config(shops.config_values(raw, out))) == out / "recbole"
    return out


def triples(table: pa.Table) -> list[tuple[str, str, int]]:
    return sorted(zip(*(table[c].to_pylist() for c in ("user_id", "item_id", "ts_ms")), strict=True))


def read_back(exported: Path, domain: str, part: str, tmp_path: Path) -> dict[str, pa.Table]:
    """A domain's part and its items, as our own RecBole parser takes them in."""
    folder = exported / "recbole" / domain
    out = tmp_path / f"{domain}-{part}"
    values: dict[str, Any] = {
        "out": str(out), "workers": 1, "engine": {"memory_limit": "500MB", "threads": 1}, "datasets": [{
            "parser": "recbole", "domain": domain, "path": str(folder / f"{domain}.{part}.inter"),
            "items": str(folder / f"{domain}.item"), "columns": {"timestamp_unit": "ms"}}],
        "domains": {"pretrain": [domain]}, "tokenizer": {"train_vocab_size": 512}}
    out.mkdir()
    preparation = Preparation(shops.config(values))
    try:
        next(s for s in preparation.stages() if s.name == "ingest").run()
    finally:
        preparation.close()
    return {"events": pq.read_table(preparation.layout.raw_interactions),
            "items": pq.read_table(preparation.layout.raw_items)}


@pytest.mark.parametrize("domain", ["toys", "garden"])
def test_recbole_files_are_the_splits_event_by_event_when_our_parser_reads_them_back(
        exported: Path, domain: str, tmp_path: Path) -> None:
    clock = Split.model_validate_json((exported / "split.json").read_text())
    clean = pq.read_table(exported / "interactions/clean.parquet", filters=[("domain", "=", domain)])
    times = clean["ts_ms"].to_numpy()
    masks = {"train": times < clock.t_valid, "valid": (times >= clock.t_valid) & (times < clock.t_test),
             "test": times >= clock.t_test}
    for part, mask in masks.items():
        found = read_back(exported, domain, part, tmp_path)
        assert mask.any() and triples(found["events"]) == triples(clean.filter(pa.array(mask)))
    catalogue = pq.read_table(exported / "catalogue.parquet", filters=[("domain", "=", domain)])
    assert sorted(found["items"]["title"].to_pylist()) == sorted(catalogue["title"].to_pylist())


def test_recbole_is_told_of_the_three_parts(exported: Path) -> None:
    settings = yaml.safe_load((exported / "recbole/toys/recbole.yaml").read_text())
    assert settings["benchmark_filename"] == ["train", "valid", "test"] and settings["field_separator"] == "\t"
    header = (exported / "recbole/toys/toys.test.inter").read_text().splitlines()[0]
    assert header == "user_id:token\titem_id:token\ttimestamp:float"
    assert Path(settings["data_path"]) == exported / "recbole"


def test_an_unfinished_preparation_exports_nothing(raw: Path, copy_of_prepared: Path) -> None:
    (copy_of_prepared / "stages/queries.json").unlink()
    with pytest.raises(DataError, match="queries not finished"):
        export_recbole(shops.config(shops.config_values(raw, copy_of_prepared)))
    assert not (copy_of_prepared / "recbole").exists()


def test_an_id_that_atomic_files_cannot_hold_is_named_and_a_title_that_they_cannot_hold_is_mended(
        exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(exported, tmp_path / "out")
    layout = Layout(tmp_path / "out")
    catalogue = pq.read_table(layout.catalogue)
    at = catalogue["domain"].to_pylist().index("toys")
    titles = catalogue["title"].to_pylist()
    titles[at] = '"Quoted" robot'
    pq.write_table(catalogue.set_column(catalogue.schema.get_field_index("title"), "title", pa.array(titles)),
                   layout.catalogue)
    engine = DuckDBEngine(memory_limit="500MB", threads=1, spill=tmp_path / "spill")
    given = {"corpora": Corpora(("toys",), ()), "split": Split.model_validate_json(layout.split.read_text())}
    with caplog.at_level("INFO"):
        write_recbole(engine, layout, **given)
    assert ' Quoted" robot\n' in (layout.out / "recbole/toys/toys.item").read_text()
    assert "tabs, line ends or a leading quote of 1 title became spaces" in caplog.text
    events = pq.read_table(layout.interactions).to_pylist()
    next(e for e in events if e["domain"] == "toys" and e["ts_ms"] >= given["split"].t_test)["user_id"] = "a\tb"
    write_parquet([pa.RecordBatch.from_pylist(events, schema=CLEAN_INTERACTIONS)], layout.interactions,
                  schema=CLEAN_INTERACTIONS)
    with pytest.raises(DataError, match=r"toys\.test\.inter: 1 value of user_id with a tab"):
        write_recbole(engine, layout, **given)
    engine.close()


def test_the_card_lists_every_corpus_and_is_left_alone_when_nothing_changed(
        copy_of_prepared: Path, raw: Path) -> None:
    path = copy_of_prepared / "packed/README.md"
    text, before = path.read_text(), path.stat().st_mtime_ns
    front = yaml.safe_load(text.split("---\n")[1])
    corpora = list_corpora(copy_of_prepared / "packed")
    assert {c["config_name"] for c in front["configs"]} == {c.replace("/", "--") for c in corpora}
    assert all(f"| {name} | " in text for name in corpora) and "leak audit: passed" in text
    assert front["size_categories"] == ["1K<n<10K"] and "seq_len" not in text and "exactly 256 tokens" in text
    prepare(shops.config(shops.config_values(raw, copy_of_prepared)))
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["mixed", "specific/toys"])
def test_load_dataset_opens_a_shard_and_by_the_card_a_corpus(prepared: Path, name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed (extra dev)")
    corpus = PackedCorpus(prepared / "packed" / name)
    shard = corpus.manifest.shards[0]
    rows = datasets.load_dataset("arrow", data_files=str(prepared / "packed" / name / shard.file), split="train",
                                 cache_dir=str(tmp_path))
    assert len(rows) == shard.rows and rows[0]["input_ids"] == np.asarray(corpus[0].input_ids).tolist()
    whole = datasets.load_dataset(str(prepared / "packed"), name.replace("/", "--"), split="train",
                                  cache_dir=str(tmp_path))
    assert len(whole) == corpus.manifest.n_rows
    assert whole[len(whole) - 1]["doc_lens"] == np.asarray(corpus[len(corpus) - 1].doc_lens).tolist()
