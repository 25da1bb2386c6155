"""Parser of plain tables: Parquet, CSV, TSV or JSON lines of interactions and items, with the user's column names.

reads: `path` (interactions) and `items`, each a file, a folder or a glob; the kind is told by the suffix.
"""

from __future__ import annotations

from cprec.errors import DataError
from data_prep.config import Dataset
from data_prep.engine import Table
from data_prep.mapping import event_fields, item_fields, map_interactions, map_items
from data_prep.records import Counts
from data_prep.sources import DELIMITED, JSON, PARQUET, Field, Input, Inputs, Reader, find

KINDS = {**dict.fromkeys(PARQUET, "parquet"), **dict.fromkeys(DELIMITED, "delimited"), **dict.fromkeys(JSON, "json")}


def inputs(dataset: Dataset) -> Inputs:
    """The files it reads. Raises DataError when there are none, they are of no known kind, or `encoding` is of none."""
    columns = dataset.columns
    if dataset.items is None:
        raise DataError(f"dataset {dataset.path}: the tabular parser needs `items`, the file with the titles")
    if dataset.domain is None and columns.domain is None:
        raise DataError(f"dataset {dataset.path}: set `domain`, or `columns.domain` to the column that says it")
    shop = () if columns.domain is None else (Field(name="domain", of=(columns.domain,)),)
    found = Inputs(events=_inputs(dataset, dataset.path, event_fields(columns) + shop),
                   items=_inputs(dataset, dataset.items, item_fields(columns) + shop))
    if dataset.encoding is not None and not any(i.reader.kind == "delimited" for i in (*found.events, *found.items)):
        raise DataError(f"dataset {dataset.path}: encoding={dataset.encoding} cannot be set, JSON lines and Parquet "
                        f"are UTF-8; remove it")
    return found


def parse(dataset: Dataset, events: Table, items: Table, counts: Counts) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`."""
    return (map_interactions(events, unit=dataset.columns.timestamp_unit, source=dataset.path, domain=dataset.domain,
                             counts=counts),
            map_items(items, domain=dataset.domain))


def _inputs(dataset: Dataset, path: str, fields: tuple[Field, ...]) -> tuple[Input, ...]:
    found = find(path, tuple(KINDS))
    unknown = sorted({s.suffix for s in found} - set(KINDS))
    kinds = {KINDS[s.suffix] for s in found} if not unknown else set()
    if unknown or ("parquet" in kinds and len(kinds) > 1):
        raise DataError(f"{path}: {', '.join(sorted({s.suffix or s.label for s in found}))} files cannot be read as "
                        f"one table; use Parquet, or text: {', '.join(KINDS)}")
    return tuple(Input(s, Reader(kind=KINDS[s.suffix], fields=fields, delimiter="\t" if s.suffix == ".tsv" else ",",
                                 quote='"', encoding=dataset.encoding or "utf-8")) for s in found)
