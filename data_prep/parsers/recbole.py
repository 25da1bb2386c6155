"""Parser of RecBole's atomic files: tab-separated `.inter` and `.item` with typed headers (`user_id:token`).

reads: `<name>.inter` and `<name>.item` (of a folder: the only pair in it). domain = the dataset's `domain`, default
the file's stem. Time stamps are seconds unless the columns say otherwise.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from cprec.errors import DataError
from data_prep.config import Dataset
from data_prep.engine import Table
from data_prep.mapping import event_fields, item_fields, map_interactions, map_items
from data_prep.records import Counts
from data_prep.sources import Field, Input, Inputs, Reader, Source, beside, find, find_one, named

TITLE_NAMES = ("movie_title", "title", "name", "item_name")
CATEGORY_NAMES = ("category", "categories", "class", "genre")


def inputs(dataset: Dataset) -> Inputs:
    """The two files it reads. Raises DataError when one is missing."""
    inter = _inter_file(dataset)
    item = find_one(dataset.items) if dataset.items else beside(inter, f"{_stem(inter)}.item")
    events = event_fields(dataset.columns)
    items = item_fields(dataset.columns, title=TITLE_NAMES, category=CATEGORY_NAMES)
    return Inputs(events=(_input(inter, events, dataset),), items=(_input(item, items, dataset),))


def parse(dataset: Dataset, events: Table, items: Table, counts: Counts) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`. `columns.title: item_id` is a title too."""
    domain = dataset.domain or _stem(_inter_file(dataset))
    return (map_interactions(events, unit=dataset.columns.timestamp_unit, source=dataset.path, domain=domain,
                             counts=counts),
            map_items(items, domain=domain))


def _input(source: Source, fields: tuple[Field, ...], dataset: Dataset) -> Input:
    return Input(source, Reader(kind="delimited", fields=fields, delimiter="\t", has_typed_header=True,
                                encoding=dataset.encoding or "utf-8"))  # atomic files have no quoting


def _inter_file(dataset: Dataset) -> Source:
    found = find(dataset.path)
    files = found if len(found) == 1 else named(found, "*.inter")
    if len(files) != 1:
        names = ", ".join(f.label for f in files) or "none"
        raise DataError(f"{dataset.path} must hold exactly one .inter file, found {names}; name the file itself")
    return files[0]


def _stem(source: Source) -> str:
    return PurePosixPath(source.place).name.partition(".inter")[0]
