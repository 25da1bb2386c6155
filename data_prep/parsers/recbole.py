"""Parser of RecBole's atomic files: tab-separated `.inter` and `.item` with typed headers (`user_id:token`).

reads: `<name>.inter` and `<name>.item` (of a folder: the only pair in it). domain = the dataset's `domain`, default
the file's stem. Time stamps are seconds unless the columns say otherwise.
"""

from __future__ import annotations

from pathlib import Path

from cprec.errors import DataError
from data_prep.config import Dataset
from data_prep.engine import Engine, Table
from data_prep.mapping import map_interactions, map_items, need_columns
from data_prep.sources import labelled, locate

TITLE_NAMES = ("movie_title", "title", "name", "item_name")


def sources(dataset: Dataset) -> dict[str, Path]:
    """The two files it reads. Raises DataError when one is missing."""
    inter = _inter_file(dataset)
    item = locate(dataset.items) if dataset.items else inter.with_suffix(".item")
    if not item.is_file():
        raise DataError(f"{inter} has no {item.name} beside it; give the dataset's `items` file")
    if dataset.items:
        return labelled(dataset.path, [inter]) | labelled(dataset.items, [item])
    return labelled(dataset.path, [inter, item])


def parse(engine: Engine, dataset: Dataset) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`. `columns.title: item_id` is a title too."""
    inter, item = sources(dataset).values()
    domain = dataset.domain or inter.stem
    columns = dataset.columns
    events, items = _read(engine, inter), _read(engine, item)
    title = columns.title or next((n for n in TITLE_NAMES if n in items.columns), TITLE_NAMES[0])
    wanted = {"user_id": columns.user_id or "user_id", "item_id": columns.item_id or "item_id",
              "timestamp": columns.timestamp or "timestamp"}
    need_columns(events, wanted, source=str(inter))
    need_columns(items, {"item_id": wanted["item_id"], "title": title}, source=str(item))
    return (
        map_interactions(events, wanted, unit=columns.timestamp_unit, source=str(inter), domain=domain,
                         domain_column=None, rating=columns.rating),
        map_items(items, item_id=wanted["item_id"], title=title, domain=domain, brand=columns.brand,
                  category=columns.category),
    )


def _inter_file(dataset: Dataset) -> Path:
    found = locate(dataset.path)
    if found.is_file():
        return found
    files = sorted(found.glob("*.inter"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise DataError(f"{dataset.path} must hold exactly one .inter file, found {names}; name the file itself")
    return files[0]


def _read(engine: Engine, path: Path) -> Table:
    """The file's table with the type taken off its headers; atomic files have no quoting."""
    table = engine.read_text([path], delimiter="\t", quote="")
    return table.rename({name.partition(":")[0]: name for name in table.columns})
