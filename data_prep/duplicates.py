"""Items that share a title, inside a domain or between domains: found after cleaning, listed for the audit, counted.

reads: `items/titled.parquet`. writes: `duplicates.parquet`. Titles are one when `records.title_key` makes them one.
Out of core.
"""

from __future__ import annotations

from dataclasses import dataclass

import ibis
import pyarrow as pa

from data_prep.engine import Engine, Table
from data_prep.records import Corpora, Counts, Layout

DUPLICATES = pa.schema([
    ("title_key", pa.string()),
    ("domain", pa.string()),
    ("item_id", pa.string()),
    ("title", pa.string()),  # as cleaned; rows of one key with equal titles are exact duplicates
])


@dataclass(frozen=True)
class Shared:
    """How many titles two domains have in common or, of one domain, several of its items: normalised, and exactly."""

    normalised: int
    exact: int


def write_duplicates(engine: Engine, layout: Layout, *, corpora: Corpora, counts: Counts) -> None:
    """List every item of the chosen domains whose title another item has, once per title; see `count_duplicates`."""
    titled = engine.read(layout.titled_items)
    chosen = titled.filter(titled.domain.isin([*corpora.pretrain, *corpora.unseen]) & titled.title_key.notnull())
    items = chosen.select(*DUPLICATES.names).distinct()
    n_items = items.select("title_key", "domain", "item_id").distinct().group_by("title_key").agg(n=ibis._.count())
    shared = items.semi_join(n_items.filter(n_items.n > 1), "title_key")
    engine.write(shared, layout.duplicates, schema=DUPLICATES, order_by=DUPLICATES.names)
    listed = engine.read(layout.duplicates)
    n_domains = listed.group_by("title_key").agg(n=listed.domain.nunique())
    counts.add("items with a title that another one has", engine.count(listed.select("domain", "item_id").distinct()))
    counts.add("titles of several items", engine.count(n_domains))
    counts.add("titles of items in several domains", engine.count(n_domains.filter(n_domains.n > 1)))


def count_duplicates(engine: Engine, layout: Layout) -> dict[tuple[str, str], Shared]:
    """What any two domains share, in both orders, and of (d, d), what several items of d share; without those that
    share nothing."""
    listed = engine.read(layout.duplicates)
    normalised, exact = ({(r["domain"], r["other"]): int(r["n"]) for r in engine.rows(_pairs(listed, text))}
                         for text in ("title_key", "title"))
    return {pair: Shared(n, exact.get(pair, 0)) for pair, n in normalised.items()}


def _pairs(listed: Table, text: str) -> Table:
    once = listed.select("domain", "item_id", text).distinct().group_by(["domain", text]).agg(n_items=ibis._.count())
    others = once.view().select(other="domain", other_text=text)
    pairs = once.inner_join(others, once[text] == others.other_text)
    shared = pairs.filter((pairs.domain != pairs.other) | (pairs.n_items > 1))
    return shared.group_by(["domain", "other"]).agg(n=ibis._.count()).order_by(["domain", "other"])
