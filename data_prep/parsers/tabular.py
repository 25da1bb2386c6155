"""Parser of plain tables: Parquet or CSV interactions and items, with the user's own column names.

reads: `path` (interactions) and `items`, each a file or a folder of files of one kind, chosen by suffix.
"""

from __future__ import annotations

from pathlib import Path

from cprec.errors import DataError
from data_prep.config import Dataset
from data_prep.engine import Engine, Table
from data_prep.mapping import map_interactions, map_items, need_columns
from data_prep.sources import files_of, labelled

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv")


def sources(dataset: Dataset) -> dict[str, Path]:
    """The files it reads. Raises DataError when there are none."""
    if dataset.items is None:
        raise DataError(f"dataset {dataset.path}: the tabular parser needs `items`, the file with the titles")
    return {label: file for path in (dataset.path, dataset.items)
            for label, file in labelled(path, files_of(path, PARQUET + CSV)).items()}


def parse(engine: Engine, dataset: Dataset) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`; a missing column is a DataError."""
    assert dataset.items is not None, "sources() was asked first"
    columns = dataset.columns
    if dataset.domain is None and columns.domain is None:
        raise DataError(f"dataset {dataset.path}: set `domain`, or `columns.domain` to the column that says it")
    events, items = _read(engine, dataset.path), _read(engine, dataset.items)
    wanted = {"user_id": columns.user_id or "user_id", "item_id": columns.item_id or "item_id",
              "timestamp": columns.timestamp or "timestamp"}
    title = columns.title or "title"
    shop = {} if dataset.domain else {"domain": columns.domain or ""}
    need_columns(events, wanted | shop | ({"rating": columns.rating} if columns.rating else {}), source=dataset.path)
    optional = {"brand": columns.brand, "category": columns.category}
    need_columns(items, {"item_id": wanted["item_id"], "title": title} | shop
                 | {meaning: name for meaning, name in optional.items() if name}, source=dataset.items)
    return (
        map_interactions(events, wanted, unit=columns.timestamp_unit, source=dataset.path,
                         domain=dataset.domain, domain_column=columns.domain, rating=columns.rating),
        map_items(items, item_id=wanted["item_id"], title=title, domain=dataset.domain or items[columns.domain],
                  brand=columns.brand, category=columns.category),
    )


def _read(engine: Engine, path: str) -> Table:
    files = files_of(path, PARQUET + CSV)
    kinds = {f.suffix for f in files}
    if kinds <= set(PARQUET):
        return engine.read(files)
    if len(kinds) == 1 and kinds <= set(CSV):
        return engine.read_text(files, delimiter="\t" if kinds == {".tsv"} else ",", quote='"')
    raise DataError(f"{path}: {', '.join(sorted(kinds))} files cannot be read as one table; use one kind of "
                    f"{', '.join(PARQUET + CSV)}")
