"""Stage 4, sequences: the numbered catalogue, and histories per (domain, user) and per user over all domains.

reads: `interactions/{clean,train}.parquet`, `items/clean.parquet`, `split.json`. writes: `catalogue.parquet` and
`histories/<corpus>.parquet` for `specific/<domain>`, `mixed` and `valid/<domain>`. Out of core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ibis
import pyarrow as pa

from cprec.errors import DataError
from cprec.format import Template
from cprec.log import get_logger
from data_prep.config import SequenceSettings
from data_prep.engine import Engine, Table, write_parquet
from data_prep.records import Corpora, Counts, Layout, Split

log = get_logger(__name__)

CATALOGUE = pa.schema([
    ("item", pa.int32()),  # its number: place in the order (domain, item_id)
    ("domain", pa.string()),
    ("item_id", pa.string()),
    ("title", pa.string()),
    ("title_key", pa.string()),
    ("brand", pa.string()),
    ("category", pa.string()),
    ("n_train", pa.int64()),  # events in the training window, whatever its domain is used for
    ("first_ts", pa.int64()),  # ms, first event in the data
    ("line", pa.string()),  # as the template renders it
])
HISTORIES = pa.schema([
    ("history_id", pa.int64()),  # its row
    ("user_id", pa.string()),
    ("items", pa.list_(pa.int32())),  # catalogue numbers, oldest first
    ("ts", pa.list_(pa.int64())),  # ms, of each item
])
MIXED = HISTORIES.append(pa.field("domains", pa.list_(pa.string())))  # the different ones, sorted


def write_catalogue(engine: Engine, layout: Layout, *, template: Template, split: Split, counts: Counts) -> None:
    """Write the catalogue of all chosen domains, numbered by (domain, item_id), each item with its line."""
    events = engine.read(layout.interactions)
    in_train = (events.ts_ms < split.t_valid).cast("int64")
    seen = events.group_by(["domain", "item_id"]).agg(n_train=in_train.sum(), first_ts=events.ts_ms.min())
    items = engine.read(layout.items).inner_join(seen, ["domain", "item_id"])
    number = ibis.row_number().over(order_by=[items.domain, items.item_id])
    names = [n for n in CATALOGUE.names if n != "line"]
    ordered = items.mutate(item=number).select(*names).order_by("item")

    def lined() -> Iterator[pa.RecordBatch]:
        for batch in engine.batches(ordered):
            fields = batch.select(["title", "domain", "brand", "category"]).to_pylist()
            lines = [template.line({k: v or "" for k, v in row.items()}) for row in fields]
            yield batch.append_column("line", pa.array(lines, pa.string()))

    n_items = write_parquet(lined(), layout.catalogue, schema=CATALOGUE)
    counts.add("items in the catalogue", n_items)


def write_histories(engine: Engine, layout: Layout, settings: SequenceSettings, *, corpora: Corpora, split: Split,
                    counts: Counts) -> None:
    """Write every corpus' histories. Raises DataError for a pre-training domain without any."""
    catalogue = engine.read(layout.catalogue).select("domain", "item_id", "item")
    train = engine.read(layout.train).inner_join(catalogue, ["domain", "item_id"])
    clean = engine.read(layout.interactions)
    valid = clean.filter((clean.ts_ms >= split.t_valid) & (clean.ts_ms < split.t_test)).inner_join(
        catalogue, ["domain", "item_id"])
    for corpus in corpora.all:
        kind, _, domain = corpus.partition("/")
        if corpus == "mixed":
            events = _of_many_domains(train, settings.mixed_min_domains)
        else:
            events = (train if kind == "specific" else valid).filter(ibis._.domain == domain)
        n_histories = _write_corpus(engine, layout, settings, events, corpus, counts)
        if n_histories == 0 and kind == "specific":
            raise DataError(f"domain {domain!r} has no training history of {settings.min_items} or more items; take it "
                            f"out of domains.pretrain, lower sequences.min_items or move the clock (see report.md)")
        if n_histories == 0:
            log.warning("corpus %s has no history of %d or more items and is left out", corpus, settings.min_items)


def _of_many_domains(train: Table, min_domains: int) -> Table:
    per_user = train.group_by("user_id").agg(n_domains=train.domain.nunique())
    return train.semi_join(per_user.filter(per_user.n_domains >= min_domains), "user_id")


def _write_corpus(engine: Engine, layout: Layout, settings: SequenceSettings, events: Table, corpus: str,
                  counts: Counts) -> int:
    """Cut each user's events into windows and write those long enough; returns the number of histories."""
    n_events = engine.count(events)
    windows = cut_windows(events, max_items=settings.max_items, min_items=settings.min_items)
    kept = windows.filter(windows["items"].length() >= settings.min_items)
    numbered = kept.mutate(history_id=ibis.row_number().over(order_by=[kept.user_id, kept.window]))
    schema = MIXED if corpus == "mixed" else HISTORIES
    path = layout.histories(corpus)
    n_histories = engine.write(numbered, path, schema=schema, order_by=["history_id"])
    n_items = engine.rows(engine.read(path).agg(n=ibis._["items"].length().sum()))[0]["n"] or 0
    counts.add(f"{corpus}: histories", n_histories)
    counts.add(f"{corpus}: events in them", int(n_items))
    counts.add(f"{corpus}: events in histories of fewer than {settings.min_items} items, dropped",
               n_events - int(n_items))
    return n_histories


def _hex_digit(text: Any) -> Any:
    """Value of one hexadecimal digit; the same expression on every engine."""
    return ibis.literal("0123456789abcdef").find(text)


def cut_windows(events: Table, *, max_items: int, min_items: int = 1, by: Sequence[str] = ("user_id",)) -> Table:
    """Each group's events in order (ts_ms, h), cut into windows of at most `max_items`.

    Lengths of one group's windows differ by at most one: event i of n goes to window i * k // n of k. The bound itself
    is drawn per group, between a quarter of `max_items` and all of it: documents of many lengths fill packed rows to
    the brim, where documents of one length leave the same gap in every row. It is never below 2 * min_items - 1, so
    that no cut makes a window shorter than `min_items`.
    """
    place = ibis.row_number().over(group_by=list(by), order_by=[events.ts_ms, events.h])
    group = ibis.window(group_by=list(by))
    h = events.h.min().over(group)
    drawn = (16 * _hex_digit(h.substr(30, 1)) + _hex_digit(h.substr(31, 1))) % (max_items * 3 // 4 + 1)
    placed = events.mutate(place=place, n=events.count().over(group),
                           bound=ibis.greatest(max_items - drawn, 2 * min_items - 1))
    n_windows = ibis.ifelse(placed.n <= max_items, 1, (placed.n + placed.bound - 1) // placed.bound)
    placed = placed.mutate(window=((placed.place * n_windows) // placed.n).cast("int64"))
    order = [placed.ts_ms, placed.h]
    return placed.group_by([*by, "window"]).agg(
        items=placed["item"].collect(order_by=order), ts=placed.ts_ms.collect(order_by=order),
        domains=placed.domain.collect(distinct=True).sort())
