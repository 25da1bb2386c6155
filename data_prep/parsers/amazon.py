"""Parser of Amazon Reviews 2014, 2018 and 2023: reviews, ratings-only CSV, the 2023 benchmark's CSV; and metadata.

reads: `path` (reviews as JSON lines, or CSV) and `items` (metadata as JSON lines or, 2014, Python literals), each a
file, folder or glob; of several files at `path` those called `meta_*` are left to `items`, which leaves it its reviews.
user = reviewerID or user_id, item = parent_asin or else asin, brand = brand or store, category = the category path or
main_category.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from cprec.errors import ConfigError, DataError
from cprec.log import get_logger
from data_prep.config import Dataset
from data_prep.engine import Table
from data_prep.mapping import event_fields, item_fields, map_interactions, map_items
from data_prep.records import Counts
from data_prep.sources import DELIMITED, JSON, Input, Inputs, Reader, Source, empty, find, first_lines

log = get_logger(__name__)

LAYOUTS = {"user_item": ("user_id", "item_id", "rating", "timestamp"),
           "item_user": ("item_id", "user_id", "rating", "timestamp")}
ITEM_ID = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
"""An ASIN: B and nine more, or an ISBN-10. No user's id is like that."""
REVIEWERS = ("user_id", "reviewerID")
"""Who wrote a review; metadata know nobody."""


def inputs(dataset: Dataset) -> Inputs:
    """The files it reads, and how: looks into each for what it is. Raises DataError when one is missing, empty or
    unclear, ConfigError for a `layout` where the files say theirs."""
    if dataset.items is None:
        raise DataError(f"dataset {dataset.path}: the amazon parser needs `items`, the metadata with the titles")
    if dataset.domain is None:
        raise DataError(f"dataset {dataset.path}: set `domain`, the shop's name")
    found = find(dataset.path, JSON + DELIMITED)
    reviews = [s for s in found if not _is_called_meta(s)] if len(found) > 1 else found
    named = find(dataset.items, JSON)
    read_already = {s.place for s in reviews}
    titled = [s for s in named if _is_called_meta(s) or s.place not in read_already] or named
    return Inputs(events=tuple(Input(s, _events_reader(s, dataset)) for s in reviews),
                  items=tuple(Input(s, _items_reader(s, dataset)) for s in titled))


def parse(dataset: Dataset, events: Table, items: Table, counts: Counts) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`."""
    return (map_interactions(events, unit=dataset.columns.timestamp_unit, source=dataset.path, domain=dataset.domain,
                             counts=counts),
            map_items(items, domain=dataset.domain))


def _is_called_meta(source: Source) -> bool:
    return PurePosixPath(source.place).name.startswith("meta_")


def _events_reader(source: Source, dataset: Dataset) -> Reader:
    fields = event_fields(dataset.columns, user_id=REVIEWERS, item_id=("parent_asin", "asin"),
                          timestamp=("timestamp", "unixReviewTime", "sort_timestamp"), rating=("rating", "overall"))
    if source.suffix not in DELIMITED:
        _refuse_layout(source, dataset, "JSON lines, which name their fields")
        return Reader(kind="json", fields=fields)
    lines = first_lines(source)
    if not lines:
        raise empty(source.label)
    rows = [row for row in csv.reader(line.decode(errors="replace") for line in lines) if row]
    if rows and not _is_number(rows[0][-1]) and "timestamp" in [c.strip() for c in rows[0]]:
        _refuse_layout(source, dataset, "a table whose header names its columns")
        return Reader(kind="delimited", fields=fields, quote='"')
    layout = _layout_of(rows, source) if dataset.layout == "auto" else dataset.layout
    log.info("%s: read as %s", source.label, ", ".join(LAYOUTS[layout]))
    return Reader(kind="delimited", fields=event_fields(dataset.columns), names=LAYOUTS[layout])


def _refuse_layout(source: Source, dataset: Dataset, what: str) -> None:
    if dataset.layout != "auto":
        raise ConfigError(f"dataset {dataset.path}: layout={dataset.layout} is of ratings without a header, but "
                          f"{source.label} is {what}; remove it")


def _layout_of(rows: list[list[str]], source: Source) -> str:
    """Which of the first two columns holds items; told by the look of their ids. Raises DataError when unclear."""
    votes: Counter[str] = Counter()
    for row in rows:
        if len(row) == 4:
            is_item = [ITEM_ID.fullmatch(c.strip()) is not None for c in row[:2]]
            votes["item_user" if is_item == [True, False] else "user_item" if is_item == [False, True] else "?"] += 1
    if len(votes) != 1 or "?" in votes:
        shown = f"; its first line: {','.join(rows[0])}" if rows else ""
        raise DataError(f"{source.label}: it is not clear which column of these ratings holds users and which items"
                        f"{shown}; set the dataset's `layout` to user_item or item_user, or give other files")
    return next(iter(votes))


def _items_reader(source: Source, dataset: Dataset) -> Reader:
    fields = item_fields(dataset.columns, item_id=("parent_asin", "asin"), brand=("brand", "store"),
                         category=("category", "categories", "main_category"))
    lines = first_lines(source)
    if not lines:
        raise empty(source.label)
    for line in lines:
        for kind, parse_line in (("json", json.loads), ("python", ast.literal_eval)):
            try:
                value = parse_line(line.decode())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(value, dict):
                _refuse_reviews(source, value)
                return Reader(kind=kind, fields=fields)
    raise DataError(f"{source.label} holds neither JSON lines nor Python literals; give Amazon's metadata as `items`")


def _refuse_reviews(source: Source, first: dict[str, Any]) -> None:
    """Raise DataError for a file whose `first` line is a review's: its title is no item's."""
    shown = next((name for name in REVIEWERS if name in first), None)
    if shown is not None:
        raise DataError(f"{source.label}, given as `items`, holds reviews: its first line has a {shown!r}; name the "
                        f"metadata's files there, by a glob such as meta_*")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
