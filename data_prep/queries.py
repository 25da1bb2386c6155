"""Stage 6', queries: frozen ranking queries of every domain, one per user unless asked otherwise, and the titles.

reads: `interactions/clean.parquet`, `catalogue.parquet`, `split.json`. writes: `queries/<domain>.parquet`,
`queries/<domain>.items.parquet` and last `queries/manifest.json`, as `cprec.format.QueriesManifest` documents them.
Out of core.
"""

from __future__ import annotations

import ibis
import pyarrow as pa

from cprec.errors import DataError, n_of
from cprec.format import MANIFEST, QueriesManifest, file_hash, write_atomically
from cprec.template import Template
from data_prep.config import QuerySettings
from data_prep.engine import Engine, Table, in_order
from data_prep.records import Corpora, Counts, Layout, Split, utc

ITEMS = pa.schema([
    ("item", pa.int32()), ("item_id", pa.string()), ("title", pa.string()), ("line", pa.string()),
    ("n_train", pa.int64()), ("first_ts", pa.int64()),
])
QUERIES = pa.schema([
    ("user_id", pa.string()), ("history", pa.list_(pa.int32())), ("seen", pa.list_(pa.int32())),
    ("target", pa.int32()), ("query_ts", pa.int64()), ("is_repeat", pa.bool_()), ("is_cold", pa.bool_()),
])


def write_queries(engine: Engine, layout: Layout, settings: QuerySettings, *, corpora: Corpora, split: Split,
                  template: Template, regime: str, seed: int) -> Counts:
    """Write the queries of every domain. Raises DataError naming the domains that have none."""
    counts = Counts("queries")
    n_queries: dict[str, int] = {}
    n_items: dict[str, int] = {}
    domains = sorted((*corpora.pretrain, *corpora.unseen))
    for domain in domains:
        items = engine.read(layout.catalogue).filter(ibis._.domain == domain)
        n_items[domain] = engine.write(items, layout.queries / f"{domain}.items.parquet", schema=ITEMS,
                                       order_by=["item_id"], number="item")
        events = _events(engine, layout, domain)
        queries = make_queries(events, settings, split=split, seed=seed)
        n_queries[domain] = engine.write(queries, layout.queries / f"{domain}.parquet", schema=QUERIES,
                                         order_by=["user_id", "until"])
        counts.add(f"{domain}: queries", n_queries[domain])
        counts.add(f"{domain}: items to rank", n_items[domain])
    empty = [d for d in domains if not n_queries[d]]
    if empty:
        new = ", of an item that is new to them" if settings.seen == "exclude" else ""
        again = "set queries.seen: include to count what users buy again, " if new else ""
        later = "" if settings.target == "leave_one_out" else f" from {utc(split.t_test)} ({split.t_test} ms) on"
        raise DataError(f"no ranking query in {', '.join(empty)}: no user there has "
                        f"{n_of(settings.min_history, 'event')} before an event{later}{new} (seen: {settings.seen}); "
                        f"{again}lower queries.min_history, move the clock earlier (split.quantiles, or split.t_valid "
                        f"and split.t_test), or take the domain out")
    files = [f"{d}{suffix}" for d in domains for suffix in (".items.parquet", ".parquet")]
    manifest = QueriesManifest.model_validate({
        "domains": {d: "pretrain" if d in corpora.pretrain else "unseen" for d in domains},
        "n_queries": n_queries, "n_items": n_items, "template": template,
        "split": {"t_valid": split.t_valid, "t_test": split.t_test}, "split_hash": split.hash, "regime": regime,
        "target": settings.target, "seen": settings.seen, "max_history": settings.max_history, "seed": seed,
        "files": {f: file_hash(layout.queries / f) for f in files}})
    write_atomically(layout.queries / MANIFEST, manifest.model_dump_json(indent=1))
    return counts


def _events(engine: Engine, layout: Layout, domain: str) -> Table:
    """The domain's events with the number and first time of their item."""
    events = engine.read(layout.interactions)
    items = engine.read(layout.queries / f"{domain}.items.parquet").select("item", "item_id", "first_ts")
    return events.filter(events.domain == domain).inner_join(items, "item_id")


def make_queries(events: Table, settings: QuerySettings, *, split: Split, seed: int) -> Table:
    """Queries of a domain: the targets are events from `t_test` on (`leave_one_out`: whenever) that have `min_history`
    events before them (and, with `seen: exclude`, whose item is new to the user), of every user the first, the last or
    (`successive`) all; the history is all that came before.

    `max_per_domain` draws user by user; of the last one drawn only the first successive targets may be left.
    """
    order = [events.ts_ms, events.h]
    placed = events.mutate(place=ibis.row_number().over(group_by="user_id", order_by=order),
                           again=ibis.row_number().over(group_by=["user_id", "item"], order_by=order) > 0)
    qualifies = placed.place >= settings.min_history
    if settings.target != "leave_one_out":
        qualifies = qualifies & (placed.ts_ms >= split.t_test)
    if settings.seen == "exclude":
        qualifies = qualifies & ~placed.again
    possible = placed.filter(qualifies)
    latest = settings.target in ("last", "leave_one_out")
    nearest = possible.place.desc() if latest else possible.place.asc()
    ranked = possible.mutate(choice=ibis.row_number().over(group_by="user_id", order_by=nearest))
    chosen = ranked if settings.target == "successive" else ranked.filter(ranked.choice == 0)
    targets = chosen.select(
        "user_id", target="item", query_ts="ts_ms", is_repeat="again", until="place",
        is_cold=chosen.first_ts >= split.t_valid,
        lot=ibis.literal("\x1f").join([ibis.literal(str(seed)), chosen.domain, chosen.user_id]).hexdigest("md5"))
    if settings.max_per_domain is not None:
        targets = targets.order_by(["lot", "user_id", "until"]).limit(settings.max_per_domain)
    before = placed.select("user_id", "item", "place", "again").inner_join(targets, "user_id")
    before = before.filter(before.place < before.until)
    by = ["user_id", "target", "query_ts", "is_repeat", "is_cold", "until"]
    return before.group_by(by).agg(
        history=in_order(before["item"], by=before.place, where=before.place >= before.until - settings.max_history),
        seen=in_order(before["item"], by=before.place, where=~before.again))
