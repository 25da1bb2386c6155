"""Parser of MovieLens: 100K (`u.data`, `u.item`), 1M and 10M (`ratings.dat`, `movies.dat`), 20M to 32M (CSV).

reads: `path`, the unpacked folder or its ratings file, and the movies beside it or at `items`. domain = the dataset's
`domain`, default "movielens"; title with its year; category = the genres. Text that is not UTF-8 is latin-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ibis

from cprec.errors import DataError
from data_prep.config import Columns, Dataset
from data_prep.engine import Table
from data_prep.mapping import event_fields, item_fields, map_interactions, map_items
from data_prep.records import Counts
from data_prep.sources import Field, Input, Inputs, Reader, Source, beside, find, find_one, named

GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
"""Of the last columns of `u.item`, as its `u.genre` lists them."""
NO_GENRE = ("unknown", "(no genres listed)")
RATINGS = ("user_id", "item_id", "rating", "timestamp")


@dataclass(frozen=True)
class Edition:
    """The names of an edition's two files, and how they are read."""

    ratings: str
    movies: str
    events: Reader
    items: Reader


_EVENTS = event_fields(Columns())
_CSV_EVENTS = event_fields(Columns(user_id="userId", item_id="movieId", rating="rating"))
_FLAGS = tuple(Field(name=f"genre_{i}", of=(f"genre_{i}",)) for i in range(len(GENRES)))
EDITIONS = (
    Edition("u.data", "u.item", Reader(kind="delimited", fields=_EVENTS, delimiter="\t", names=RATINGS),
            Reader(kind="delimited", fields=(*item_fields(Columns()), *_FLAGS), delimiter="|", fallback="latin-1",
                   names=("item_id", "title", "released", "video", "url", *(f.name for f in _FLAGS)))),
    Edition("ratings.dat", "movies.dat", Reader(kind="delimited", fields=_EVENTS, delimiter="::", names=RATINGS),
            Reader(kind="delimited", fields=item_fields(Columns()), delimiter="::", fallback="latin-1",
                   names=("item_id", "title", "category"))),
    Edition("ratings.csv", "movies.csv", Reader(kind="delimited", fields=_CSV_EVENTS),
            Reader(kind="delimited", fields=item_fields(Columns(item_id="movieId", category="genres")), quote='"')),
)


def inputs(dataset: Dataset) -> Inputs:
    """The two files it reads. Raises DataError when one is missing, or `path` holds several editions."""
    found = [(edition, source) for edition in EDITIONS for source in named(find(dataset.path), edition.ratings)]
    if len(found) != 1:
        names = ", ".join(source.label for _, source in found) or "none"
        raise DataError(f"{dataset.path}: one of {', '.join(e.ratings for e in EDITIONS)} is needed, found {names}; "
                        f"name a ratings file itself")
    edition, ratings = found[0]
    return Inputs(events=(Input(ratings, edition.events),), items=(Input(_movies(dataset, edition, ratings),
                                                                         edition.items),))


def parse(dataset: Dataset, events: Table, items: Table, counts: Counts) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`; "Comedy, Drama" are the genres of a film."""
    domain = dataset.domain or "movielens"
    return (map_interactions(events, unit=dataset.columns.timestamp_unit, source=dataset.path, domain=domain,
                             counts=counts),
            map_items(items.mutate(category=_genres(items)), domain=domain))


def _movies(dataset: Dataset, edition: Edition, ratings: Source) -> Source:
    return beside(ratings, edition.movies) if dataset.items is None else find_one(dataset.items)


def _genres(items: Table) -> Any:
    if "genre_0" not in items.columns:
        listed = items.category.replace("|", ", ")
    else:
        flags = [ibis.ifelse(items[f"genre_{i}"] == "1", f", {name}", "") for i, name in enumerate(GENRES)]
        listed = flags[0]
        for flag in flags[1:]:
            listed = listed + flag
        listed = listed.substr(2)
    return ibis.ifelse(listed.isin(["", *NO_GENRE]), ibis.null("string"), listed)
