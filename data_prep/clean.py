"""Stage 2, clean: titles, brands and categories made plain, unusable items and events dropped and counted; the k-core.

reads: `interactions/ingested.parquet`, `items/ingested.parquet`. writes: `items/titled.parquet` (titles after
cleaning), `items/mapping.parquet` (which item stands for which, and why one was dropped), `items/clean.parquet`,
`interactions/clean.parquet` (sorted by user, time, hash). Titles are cleaned in Python, one batch in memory.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError, n_of, raise_all
from cprec.log import get_logger
from data_prep.config import CleanSettings
from data_prep.engine import Engine, Table, event_hash, write_parquet
from data_prep.records import CLEAN_INTERACTIONS, ITEMS, Corpora, Counts, Layout, title_key

log = get_logger(__name__)

TITLED_ITEMS = ITEMS.append(pa.field("title_key", pa.string()))
MAPPING = pa.schema([("domain", pa.string()), ("item_id", pa.string()), ("stands_for", pa.string()),
                     ("dropped", pa.string())])
MISSING = "user, item or time is missing"
UNKNOWN = "its domain is unknown"
NOT_CHOSEN = "its domain is not chosen"
NO_TIME = "its time is not positive"
NO_ITEM = "the catalogue has no such item"
NO_TITLE = "its item has no title"
IN_UNSEEN = "its title is in an unseen domain's catalogue"
ID_IN_UNSEEN = "its id is in an unseen domain's catalogue"
MUCH_LOST = 0.1
"""From this share of a domain's events on that no item is known of, the user is warned."""
_CONTROL = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")
_TAG = re.compile(
    r"</?(?:a|b|big|br|center|div|em|font|form|h[1-6]|hr|i|img|input|li|link|meta|noscript|ol|p|script|small|span|"
    r"strong|style|sub|sup|table|tbody|td|th|tr|u|ul)(?:\s*/?>|[\s/][^<>]*(?:>|$))", re.IGNORECASE)
"""Tags of HTML that occur in scraped titles; `</s>` or `<|im_start|>` is none of them: such titles are text."""
_HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
"""What a page does not show, with its content."""
_CODE = re.compile(r"getTime\(\)|function ?\([\w, ]*\) ?\{|document\.(?:getElement|write|cookie)|\bvar [\w$]+ ?=")
"""Marks of the page code that some titles of Amazon 2018 consist of."""

ENTITIES = "HTML entities resolved"
CONTROL = "control characters taken for spaces"
TAGS = "HTML tags removed"
CODE = "page code instead of a title, taken as missing"
NOTHING = "nothing left, taken as missing"
SPACES = "white space made single spaces"
CUT = "cut"


@dataclass(frozen=True)
class Title:
    """A cleaned title, and what was done to it, of the constants above."""

    text: str
    repairs: frozenset[str] = frozenset()


def clean_title(title: str, *, max_chars: int) -> Title | None:
    """The title on one line: HTML tags removed, then entities resolved, once, so that what they spell is text; every
    run of white space and control characters one space.

    Longer than `max_chars`, it is cut at the last word border before (inside the word where it has none).
    None when nothing is left, or when it is code of a web page.
    """
    if is_page_code(title):
        return None
    repairs: set[str] = set()
    text = title
    if "<" in text and (shown := _TAG.sub(" ", _HIDDEN.sub(" ", text))) != text:
        text = shown
        repairs.add(TAGS)
    if "&" in text and (resolved := html.unescape(text)) != text:
        text = resolved
        repairs.add(ENTITIES)
    if not text.isprintable() and (plain := text.translate(_CONTROL)) != text:
        text = plain
        repairs.add(CONTROL)
    single = " ".join(text.split())
    if single != text and not repairs:
        repairs.add(SPACES)
    if len(single) > max_chars:
        head = single[:max_chars + 1]
        border = head.rfind(" ")
        single = head[:border] if border > 0 else head[:max_chars]
        repairs.add(CUT)
    return Title(single, frozenset(repairs)) if single else None


def is_page_code(title: str) -> bool:
    """Whether the title is a script that a scraper took for one, as some of Amazon 2018 are."""
    return _CODE.search(_HIDDEN.sub(" ", title) if "<" in title else title) is not None


def clean(engine: Engine, layout: Layout, settings: CleanSettings, *, corpora: Corpora, seed: int) -> Counts:
    """Run the stage; every dropped or changed row is in the counts."""
    counts = Counts("clean")
    _clean_titles(layout, settings, counts)
    _map_items(engine, layout, settings, corpora, counts)
    _clean_events(engine, layout, settings, corpora, counts, seed=seed)
    items, mapping = engine.read(layout.titled_items), engine.read(layout.item_mapping)
    used = engine.read(layout.interactions).select("domain", "item_id").distinct()
    standing = mapping.filter((mapping.dropped == "") & (mapping.item_id == mapping.stands_for))
    usable = engine.count(standing)
    kept = _one_row_each(items).semi_join(used, ["domain", "item_id"])
    n_items = engine.write(kept, layout.items, schema=TITLED_ITEMS, order_by=["domain", "item_id"])
    counts.add("items without a usable event", usable - n_items)
    counts.add("items kept", n_items)
    return counts


def k_core(engine: Engine, path: Path, settings: CleanSettings, counts: Counts) -> None:
    """Shrink the training events in `path` until every user has `min_user_events` and every item `min_item_events`
    in its domain. Only ever called on the training window: later events must not decide what is learned from."""
    n_before = engine.count(engine.read(path))
    n_last = -1
    n_events = n_before
    while settings.min_user_events * settings.min_item_events > 1 and n_events != n_last:
        events = engine.read(path)
        of_user = events.count().over(group_by=["domain", "user_id"])
        of_item = events.count().over(group_by=["domain", "item_id"])
        counted = events.mutate(of_user=of_user, of_item=of_item)
        core = counted.filter((counted.of_user >= settings.min_user_events)
                              & (counted.of_item >= settings.min_item_events))
        n_last, n_events = n_events, engine.write(core, path, schema=CLEAN_INTERACTIONS,
                                                  order_by=["user_id", "ts_ms", "h"])
    counts.add("training events outside the k-core", n_before - n_events)


def _clean_titles(layout: Layout, settings: CleanSettings, counts: Counts) -> None:
    max_chars = settings.max_title_chars
    of_titles: Counter[str] = Counter()
    of_others: Counter[str] = Counter()

    def titled() -> Iterator[pa.RecordBatch]:
        for batch in pq.ParquetFile(layout.raw_items).iter_batches():
            titles = _cleaned(batch["title"], max_chars=max_chars, repairs=of_titles)
            made = {"title": titles, "title_key": pa.array([t and title_key(t) for t in titles.to_pylist()],
                                                           pa.string())}
            made |= {name: _cleaned(batch[name], max_chars=max_chars, repairs=of_others)
                     for name in ("brand", "category")}
            made |= {name: batch[name] for name in ("domain", "item_id")}
            yield pa.record_batch([made[name] for name in TITLED_ITEMS.names], schema=TITLED_ITEMS)

    counts.add("items read", write_parquet(titled(), layout.titled_items, schema=TITLED_ITEMS))
    for what, repairs in (("titles", of_titles), ("brands and categories", of_others)):
        for repair in (TAGS, CODE, ENTITIES, CONTROL, SPACES, NOTHING):
            counts.add(f"{what}: {repair}", repairs[repair])
        counts.add(f"{what}: cut to {max_chars} characters", repairs[CUT])


def _cleaned(column: pa.Array, *, max_chars: int, repairs: Counter[str]) -> pa.Array:
    """The texts as `clean_title` gives them; what it did is added to `repairs`, per row."""
    encoded = column.dictionary_encode()  # brands and categories repeat
    raw = encoded.dictionary.to_pylist()
    n_rows = np.bincount(encoded.indices.drop_null(), minlength=len(raw)).tolist()
    texts: list[str | None] = []
    for text, n in zip(raw, n_rows, strict=True):
        title = clean_title(text, max_chars=max_chars)
        for repair in title.repairs if title else {CODE} if is_page_code(text) else {NOTHING}:
            repairs[repair] += n
        texts.append(title.text if title else None)
    return pa.array(texts, pa.string()).take(encoded.indices)


def _one_row_each(items: Table) -> Table:
    """One row per (domain, item_id): the smallest title, brand, category where the source repeats it."""
    order = [ibis.asc(items[c], nulls_first=False) for c in ("title", "brand", "category")]
    numbered = items.mutate(nth=ibis.row_number().over(group_by=["domain", "item_id"], order_by=order))
    return numbered.filter(numbered.nth == 0).drop("nth")


def _map_items(engine: Engine, layout: Layout, settings: CleanSettings, corpora: Corpora, counts: Counts) -> None:
    """Write which item stands for which; `dropped` says why an item is out, empty when it stays."""
    everything = engine.read(layout.titled_items)
    chosen = everything.filter(everything.domain.isin([*corpora.pretrain, *corpora.unseen]))
    items = _one_row_each(chosen)
    n_chosen = engine.count(chosen)
    counts.add("items of domains not chosen", engine.count(everything) - n_chosen)
    unseen = chosen.filter(chosen.domain.isin(list(corpora.unseen)))  # with every title of a repeated item
    unseen_keys = unseen.select(unseen_key="title_key").distinct()
    unseen_ids = unseen.select(unseen_id="item_id").distinct()
    items = items.left_join(unseen_keys, items.title_key == unseen_keys.unseen_key)
    items = items.left_join(unseen_ids, items.item_id == unseen_ids.unseen_id)
    is_learned = items.domain.isin(list(corpora.pretrain))
    items = items.mutate(dropped=ibis.cases(
        (items.title.isnull(), NO_TITLE),
        (is_learned & items.unseen_key.notnull(), IN_UNSEEN),
        (is_learned & items.unseen_id.notnull() & settings.shared_item_ids, ID_IN_UNSEEN),
        else_=""))
    stands_for = items.item_id
    if settings.merge_same_titles:
        twin_id = items.item_id.min().over(group_by=["domain", "title_key", "dropped"])
        stands_for = ibis.cases((items.dropped == "", twin_id), else_=items.item_id)
    n_items = engine.write(items.mutate(stands_for=stands_for), layout.item_mapping, schema=MAPPING,
                           order_by=["domain", "item_id"])
    counts.add("item rows repeated in the source", n_chosen - n_items)
    titles = chosen.filter(chosen.title.notnull()).group_by(["domain", "item_id"]).agg(n=chosen.title.nunique())
    counts.add("items with several titles, the first in code point order kept",
               engine.count(titles.filter(titles.n > 1)))
    shops = chosen.group_by("item_id").agg(n=chosen.domain.nunique())
    counts.add("item ids listed in several domains", engine.count(shops.filter(shops.n > 1)))
    mapping = engine.read(layout.item_mapping)
    if settings.untitled_items == "error":
        _refuse_untitled(engine, mapping)
    dropped = mapping.filter(mapping.dropped != "")
    n_dropped = {(d, reason): int(n) for d, reason, n in _count_by(engine, dropped, ["domain", "dropped"])}
    for domain in sorted((*corpora.pretrain, *corpora.unseen)):
        for reason in _item_reasons(domain, corpora, settings):
            counts.add(f"items of {domain} dropped: {reason}", n_dropped.get((domain, reason), 0))
    counts.add("items merged into one of the same title",
               engine.count(mapping.filter(mapping.item_id != mapping.stands_for)))


def _refuse_untitled(engine: Engine, mapping: Table) -> None:
    """Raise DataError naming the first items that have no title, if there are any."""
    untitled = mapping.filter(mapping.dropped == NO_TITLE)
    n = engine.count(untitled)
    if n:
        first = engine.rows(untitled.order_by(["domain", "item_id"]).select("domain", "item_id").limit(3))
        named = ", ".join(f"{row['item_id']} of {row['domain']}" for row in first)
        raise DataError(f"{n} {'item has' if n == 1 else 'items have'} no title: {named}"
                        f"{', ...' if n > len(first) else ''}; give them one in the "
                        f"source, or set clean.untitled_items=drop to leave them and their events out, counted")


def _count_by(engine: Engine, table: Table, by: Sequence[str]) -> list[tuple[str, ...]]:
    grouped = table.group_by(list(by)).agg(n=table.count()).order_by(list(by))
    return [tuple(row.values()) for row in engine.rows(grouped)]


def _item_reasons(domain: str, corpora: Corpora, settings: CleanSettings) -> list[str]:
    """Why an item of the domain may be left out, by this config."""
    is_compared = domain in corpora.pretrain and bool(corpora.unseen)
    return [reason for reason, applies in (
        (NO_TITLE, settings.untitled_items == "drop"), (IN_UNSEEN, is_compared),
        (ID_IN_UNSEEN, is_compared and settings.shared_item_ids)) if applies]


def _event_reasons(corpora: Corpora, settings: CleanSettings) -> list[str]:
    """Why an event may be left out, by this config; in the order in which they are looked for."""
    of_items = [r for d in (*corpora.pretrain, *corpora.unseen) for r in _item_reasons(d, corpora, settings)]
    return [MISSING, UNKNOWN, NOT_CHOSEN, NO_TIME, NO_ITEM, *dict.fromkeys(of_items)]


def _require_events(engine: Engine, events: Table, fates: dict[str, dict[str, int]]) -> None:
    """Raise one DataError naming every domain none of whose events stays, and why; warn where many have no item.

    `fates`: domain -> reason (empty: it stays) -> events.
    """
    problems: list[str] = []
    for domain, fate in fates.items():
        n_lost, n_events = fate.get(NO_ITEM, 0), sum(fate.values())
        if not fate.get(""):
            why = "; ".join(f"{n_of(n, 'event')} dropped: {reason}" for reason, n in fate.items()) or "it has none"
            problems.append(f"domain {domain!r}: no event is left after cleaning: {why}"
                            f"{_unmatched(engine, events, domain) if n_lost else ''}")
        elif n_lost >= MUCH_LOST * n_events:
            log.warning("clean: %s of %s of domain %s (%.1f %%) dropped, the catalogue has no such item%s",
                        f"{n_lost:,}", n_of(n_events, "event"), domain, 100 * n_lost / n_events,
                        _unmatched(engine, events, domain))
    raise_all(problems, of="clean", error=DataError)


def _unmatched(engine: Engine, events: Table, domain: str) -> str:
    """How many of the domain's item ids the items have, with some of those that they lack, and the way out."""
    mine = events.filter((events.domain == domain) & events.item_id.notnull())
    (n,) = engine.rows(mine.agg(all=mine.item_id.nunique(), known=mine.item_id.nunique(where=mine.map_item.notnull())))
    lacking = mine.filter(mine.map_item.isnull()).select("item_id").distinct().order_by("item_id").limit(3)
    named = ", ".join(repr(row["item_id"]) for row in engine.rows(lacking))
    return (f"; of {n_of(int(n['all']), 'item id')} in its events {int(n['known']):,} are in its item file, not so "
            f"{named}: correct columns.item_id or the dataset's `items`, or write the ids of both files alike")


def _clean_events(engine: Engine, layout: Layout, settings: CleanSettings, corpora: Corpora, counts: Counts, *,
                  seed: int) -> None:
    raw = engine.read(layout.raw_interactions)
    mapping = engine.read(layout.item_mapping).rename(map_domain="domain", map_item="item_id")
    events = raw.left_join(mapping, [raw.domain == mapping.map_domain, raw.item_id == mapping.map_item])
    missing = events.user_id.isnull() | events.item_id.isnull() | events.ts_ms.isnull()
    events = events.mutate(reason=ibis.cases(
        (missing, MISSING),
        (events.domain.isnull(), UNKNOWN),
        (events.domain.notin([*corpora.pretrain, *corpora.unseen]), NOT_CHOSEN),
        (events.ts_ms <= 0, NO_TIME),
        (events.dropped.isnull(), NO_ITEM),
        (events.dropped != "", events.dropped),
        else_=""))
    counts.add("events read", engine.count(raw))
    chosen = [*corpora.pretrain, *corpora.unseen]
    fates: dict[str, dict[str, int]] = {d: {} for d in (*chosen, "")}  # "": of no domain that is chosen
    of = ibis.ifelse(events.domain.isin(chosen), events.domain, "")
    for domain, reason, n in _count_by(engine, events.mutate(of=of), ["of", "reason"]):
        fates[domain][reason] = int(n)
    for reason in _event_reasons(corpora, settings):
        counts.add(f"events dropped: {reason}", sum(fate.get(reason, 0) for fate in fates.values()))
    n_good = sum(fate.get("", 0) for fate in fates.values())
    _require_events(engine, events, {d: fates[d] for d in sorted(chosen)})
    good = events.filter(events.reason == "").drop("item_id").rename(item_id="stands_for")
    # the hash names user, domain, item and time: of equal events the one with the highest rating stays
    n_kept = engine.write(good.mutate(h=event_hash(good, seed=seed)), layout.interactions, schema=CLEAN_INTERACTIONS,
                          order_by=["user_id", "ts_ms", "h", "rating"], last_of="h")
    counts.add("events dropped: the same user, item and time again", n_good - n_kept)
    counts.add("events kept", n_kept)
