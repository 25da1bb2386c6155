"""Stage 4, sequences: the numbered catalogue, and histories per (domain, user) and per user over all domains.

reads: `interactions/{clean,train}.parquet`, `items/clean.parquet`, `split.json`. writes: `catalogue.parquet` and
`histories/<corpus>.parquet` for `specific/<domain>`, `mixed` and `valid/<domain>`. Out of core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ibis
import numpy as np
import pyarrow as pa

from cprec.errors import DataError
from cprec.log import get_logger
from cprec.template import Template
from data_prep.config import SequenceSettings
from data_prep.engine import Engine, Table, in_order, numbered, write_parquet
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
    names = [n for n in CATALOGUE.names if n not in ("item", "line")]
    ordered = items.select(*names).order_by(["domain", "item_id"])

    n_escaped = 0

    def lined() -> Iterator[pa.RecordBatch]:
        nonlocal n_escaped
        for batch in numbered(engine.batches(ordered), "item"):
            rows = batch.select(["title", "domain", "brand", "category"]).to_pylist()
            fields = [{k: v or "" for k, v in row.items()} for row in rows]
            lines = [template.line(of_item) for of_item in fields]
            n_escaped += sum(template.escapes(of_item) for of_item in fields)
            yield batch.append_column("line", pa.array(lines, pa.string()))

    n_items = write_parquet(lined(), layout.catalogue, schema=CATALOGUE)
    counts.add("items in the catalogue", n_items)
    counts.add("items with a character that is no text to every tokenizer, written otherwise", n_escaped)


def write_histories(engine: Engine, layout: Layout, settings: SequenceSettings, *, corpora: Corpora, split: Split,
                    counts: Counts) -> None:
    """Write every corpus' histories. Raises DataError for a pre-training domain without any."""
    catalogue = engine.read(layout.catalogue).select("domain", "item_id", "item")
    train = engine.read(layout.train).inner_join(catalogue, ["domain", "item_id"])
    if settings.min_rating is not None and not engine.count(train.filter(train.rating.notnull())):
        raise DataError(f"sequences.min_rating={settings.min_rating}, but no training event has a rating; name the "
                        f"datasets' columns.rating, or set min_rating to null")
    clean = engine.read(layout.interactions)
    valid = clean.filter((clean.ts_ms >= split.t_valid) & (clean.ts_ms < split.t_test)).inner_join(
        catalogue, ["domain", "item_id"])
    for corpus in corpora.all:
        kind, _, domain = corpus.partition("/")
        of_domain = (valid if kind == "valid" else train).filter(ibis._.domain == domain) if domain else train
        min_domains = settings.mixed_min_domains if corpus == "mixed" else 1
        marked = mark_events(of_domain, settings, is_train=kind != "valid", min_domains=min_domains)
        n_histories = _write_corpus(engine, layout, settings, marked, corpus, counts, min_domains=min_domains)
        if n_histories == 0 and kind == "specific":
            raise DataError(f"domain {domain!r} has no training history of {settings.min_items} or more items; take it "
                            f"out of domains.pretrain, lower sequences.min_items or move the clock (see report.md)")
        if n_histories == 0:
            of_domains = f" and {min_domains} or more domains (sequences.mixed_min_domains)" if min_domains > 1 else ""
            log.warning("corpus %s has no history of %d or more items%s and is left out", corpus, settings.min_items,
                        of_domains)


@dataclass(frozen=True)
class Marked:
    """Events with `session`, which of its user's histories each is in, and `dropped`, why no history holds it (empty
    for what stays); and every reason that was looked for, whether it was met or not."""

    events: Table
    reasons: tuple[str, ...] = ()

    def drop(self, condition: Any, reason: str) -> Marked:
        """With `reason` on every event that stayed so far and meets the condition."""
        is_dropped = (self.events.dropped == "") & condition.fill_null(False)
        return Marked(self.events.mutate(dropped=ibis.ifelse(is_dropped, reason, self.events.dropped)),
                      (*self.reasons, reason))


def mark_events(events: Table, settings: SequenceSettings, *, is_train: bool, min_domains: int = 1) -> Marked:
    """The events, parted into sessions, with what is left out marked.

    The rules are applied one after the other, each to what the ones before it left, all in the order (ts_ms, h):
    rating, sessions, repeats (inside a session), cap (over a user's sessions), number of domains (of a session).
    Held-out events (`is_train` false) are parted into sessions, and all stay.
    """
    marked = Marked(events.mutate(session=ibis.literal(0, "int64"), dropped=ibis.literal("")))
    if is_train and settings.min_rating is not None:
        least = float(np.float32(settings.min_rating))  # ratings are float32, where 3.6 lies below 3.6
        marked = marked.drop(marked.events.rating.cast("float64") < least, f"rated below {settings.min_rating:g}")
    if settings.session_gap_s is not None:
        marked = replace(marked, events=_with_sessions(marked.events, settings.session_gap_s))
    if is_train and settings.repeats != "keep":
        marked = marked.drop(_is_repeat(marked.events, settings.repeats),
                             f"repeating an item (repeats: {settings.repeats})")
    if is_train and settings.max_events is not None:
        marked = replace(marked, events=_with_rank(marked.events, settings.max_events_by))
        marked = marked.drop(marked.events["rank"] >= settings.max_events,
                             f"beyond a user's {settings.max_events} (by: {settings.max_events_by})")
    if min_domains > 1:
        marked = replace(marked, events=_with_n_domains(marked.events))
        marked = marked.drop(marked.events.n_domains < min_domains, f"in histories of fewer than {min_domains} domains")
    return marked


def _with_n_domains(marked: Table) -> Table:
    """With `n_domains`, of how many domains the events that stay of the same session are."""
    domain = ibis.ifelse(marked.dropped == "", marked.domain, ibis.null("string"))
    by = ["user_id", "session"]
    of_session = marked.mutate(kept_domain=domain).group_by(by).agg(n_domains=ibis._.kept_domain.nunique())
    return marked.inner_join(of_session, by)


def _with_sessions(marked: Table, gap_s: int) -> Table:
    """Number the sessions of each user from 0; what was dropped before neither joins nor parts the others."""
    order = [marked.ts_ms, marked.h]
    by = ["user_id", "dropped"]
    before = marked.ts_ms.lag().over(group_by=by, order_by=order)
    starts = marked.mutate(starts=((marked.ts_ms - before) > 1000 * gap_s).fill_null(False).cast("int64"))
    return starts.mutate(session=starts.starts.sum().over(ibis.cumulative_window(group_by=by, order_by=order))
                         .cast("int64")).drop("starts")


def _is_repeat(marked: Table, repeats: str) -> Any:
    """Whether an event's item is that of the event before it (`consecutive`), or came before at all (`first`)."""
    by, order = ["user_id", "session", "dropped"], [marked.ts_ms, marked.h]
    if repeats == "first":
        return ibis.row_number().over(group_by=[*by, "item"], order_by=order) > 0
    return marked["item"] == marked["item"].lag().over(group_by=by, order_by=order)


def _with_rank(marked: Table, by: str) -> Table:
    """With `rank`, the place of each event among its user's in the order in which a cap keeps them, from 0.

    `latest`: the latest first. `draw`: priority sampling (Duffield, Lund and Thorup, 2007) with weight 1 / age, where
    the latest event has age 1, the one before it 2, ...: smallest age * u first, u from 1 to 2**28 out of the event's
    hash. Whole numbers below 2**53, in float64 for Spark's int is narrower than Ibis takes it for: every engine draws
    alike.
    """
    group = ["user_id", "dropped"]
    latest_first = [marked.ts_ms.desc(), marked.h.desc()]
    aged = marked.mutate(rank=ibis.row_number().over(group_by=group, order_by=latest_first))
    if by == "latest":
        return aged
    u = sum((_hex_digit(aged.h.substr(16 + i, 1)).cast("float64") * 16**i for i in range(7)), start=ibis.literal(1))
    drawn = aged.mutate(priority=(aged["rank"].cast("float64") + 1) * u)
    return drawn.mutate(rank=ibis.row_number().over(group_by=group, order_by=[drawn.priority, drawn["rank"]]))


def _write_corpus(engine: Engine, layout: Layout, settings: SequenceSettings, marked: Marked, corpus: str,
                  counts: Counts, *, min_domains: int) -> int:
    """Cut each user's events into windows and write those long enough and of enough domains; returns the number of
    histories."""
    events = marked.events
    by = ("user_id", "session") if settings.session_gap_s is not None else ("user_id",)
    sizes = events.group_by([*by, "dropped"]).agg(n=events.count())
    summed = sizes.group_by("dropped").agg(n=sizes.n.sum(), n_short=sizes.n.sum(where=sizes.n < settings.min_items))
    met = {r["dropped"]: (int(r["n"]), int(r["n_short"] or 0)) for r in engine.rows(summed)}
    n_events, n_short = met.pop("", (0, 0))
    windows = cut_windows(events.filter(events.dropped == ""), max_items=settings.max_items,
                          min_items=settings.min_items, by=by)
    kept = windows.filter((windows["items"].length() >= settings.min_items) & (windows.domains.length() >= min_domains))
    schema = MIXED if corpus == "mixed" else HISTORIES
    path = layout.histories(corpus)
    n_histories = engine.write(kept, path, schema=schema, order_by=[*by, "window"], number="history_id")
    n_items = engine.rows(engine.read(path).agg(n=ibis._["items"].length().sum()))[0]["n"] or 0
    counts.add(f"{corpus}: histories", n_histories)
    counts.add(f"{corpus}: events in them", int(n_items))
    for reason in marked.reasons:
        counts.add(f"{corpus}: events {reason}, dropped", met.get(reason, (0, 0))[0])
    if min_domains > 1:  # no cut makes a window short: what is in no short history was in a window of few domains
        counts.add(f"{corpus}: events in windows of fewer than {min_domains} domains, dropped",
                   n_events - int(n_items) - n_short)
    counts.add(f"{corpus}: events in histories of fewer than {settings.min_items} items, dropped", n_short)
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
    return placed.group_by([*by, "window"]).agg(
        items=in_order(placed["item"], by=placed.place), ts=in_order(placed.ts_ms, by=placed.place),
        domains=placed.domain.collect(distinct=True).sort())
