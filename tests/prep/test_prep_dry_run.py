"""--dry-run: the check of column mappings, the look at the sources, and how near the estimate comes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import ConfigError, DataError
from cprec.format import list_corpora, read_manifest
from data_prep import estimate as module
from data_prep.estimate import Estimate, Rows, estimate
from data_prep.pipeline import Preparation


@pytest.fixture
def values(raw: Path, tmp_path: Path) -> dict[str, Any]:
    return shops.config_values(raw, tmp_path / "out")


def look(values: dict[str, Any]) -> Estimate:
    config = shops.config(values)
    preparation = Preparation(config)
    return estimate(config, preparation.staging, template=preparation.template)


def test_events_are_counted_and_tokens_estimated_without_writing_anything(
        values: dict[str, Any], prepared: Path, tmp_path: Path) -> None:
    values["tokenizer"] = {"path": str(prepared / "tokenizer")}
    found = look(values)
    assert found.n_events == {shop: 60.0 * n for shop, n in shops.SHOPS.items()}
    assert all(seen.events.is_exact and seen.items.is_exact for seen in found.looks)
    made = sum(read_manifest(prepared / "packed" / name).n_tokens for name in list_corpora(prepared / "packed")
               if name.startswith("specific/"))
    assert 0.85 * made < found.n_tokens < 1.3 * made
    assert found.packed_bytes == 2 * 2 * found.n_tokens  # specific and mixed; 512 ids fit into two bytes
    assert not (tmp_path / "out").exists()


def test_every_mapping_that_names_no_column_is_told_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    values["datasets"][0]["columns"]["user_id"] = "usr_id"
    values["datasets"][1]["columns"]["title"] = "nome"
    with pytest.raises(DataError, match="2 problems") as e:
        look(values)
    assert "books.parquet has no column 'usr_id' (for user_id); did you mean 'user_id'?" in str(e.value)
    assert "games.items.parquet has no column 'nome' (for title)\n" in str(e.value)
    assert str(e.value).count("item_id, title") == 1, "the columns are listed once"


def test_a_text_source_is_judged_by_its_beginning(values: dict[str, Any], raw: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = tmp_path / "toys.csv", tmp_path / "garden.csv.gz"
    pyarrow.csv.write_csv(pq.read_table(raw / "toys.parquet"), plain)
    pyarrow.csv.write_csv(pq.read_table(raw / "garden.parquet"), tmp_path / "garden.csv")
    packed.write_bytes(gzip.compress((tmp_path / "garden.csv").read_bytes()))
    values["datasets"][2]["path"], values["datasets"][3]["path"] = str(plain), str(packed)
    found = look(values)
    assert found.looks[2].events == Rows(60 * 36 + 1, is_exact=False)  # the header counts as a line
    assert found.looks[3].events == Rows(60 * 20 + 1, is_exact=False)
    assert found.staged_bytes > 0
    monkeypatch.setattr(module, "HEAD_BYTES", 4096)  # of 54,000 bytes
    found = look(values)
    assert found.looks[2].events.n == pytest.approx(60 * 36, rel=0.02)


def test_of_many_files_some_are_looked_into(values: dict[str, Any], raw: Path, tmp_path: Path) -> None:
    table = pq.read_table(raw / "toys.parquet")
    (tmp_path / "toys").mkdir()
    for i in range(20):
        pq.write_table(table.slice(108 * i, 108), tmp_path / "toys" / f"{i:02d}.parquet")
    values["datasets"][2]["path"] = str(tmp_path / "toys")
    found = look(values).looks[2].events
    assert not found.is_exact and found.n == pytest.approx(60 * 36, rel=0.02) and str(found).startswith("about 2,1")


def test_a_domain_that_the_sample_lacks_and_what_is_assumed_are_noted(values: dict[str, Any], tmp_path: Path) -> None:
    values["domains"]["unseen"] = ["gardn"]
    notes = "\n".join(look(values).lines())
    assert "no sampled event is of domain 'gardn'; did you mean 'garden'" in notes
    assert "2.6 characters are taken for a token" in notes and "columns fit" in notes


def test_an_unknown_key_of_a_dataset_is_answered_with_the_known_ones(values: dict[str, Any]) -> None:
    values["datasets"][1]["columns"]["tittle"] = "name"
    values["datasets"][1]["colums"] = {}
    with pytest.raises(ConfigError) as e:
        shops.config(values)
    assert "datasets.1.columns.tittle: unknown key; did you mean 'title'" in str(e.value)
    assert "datasets.1.colums: unknown key; did you mean 'columns'" in str(e.value)
