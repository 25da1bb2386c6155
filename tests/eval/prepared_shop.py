"""A small preparation's events and queries, written by hand, for tests of baselines."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.eval.folders import Query, Shop, write_queries

T_VALID, T_TEST = 500, 800
"""What `write_queries` says of its clock."""


def write_events(prepared: Path, events: list[tuple[str, str, int, int]], *, window: list[str]) -> None:
    """`interactions/` of events (user, domain, item number, ts), items named `i<number>` as the queries' are; the
    domains in `window` are pre-training ones."""
    folder = prepared / "interactions"
    folder.mkdir(parents=True)
    columns = {
        "user_id": [e[0] for e in events], "domain": [e[1] for e in events], "item_id": [f"i{e[2]}" for e in events],
        "ts_ms": pa.array([e[3] for e in events], pa.int64()), "h": [f"{n:032x}" for n in range(len(events))]}
    table = pa.table(columns)
    pq.write_table(table, folder / "clean.parquet")
    learned = [i for i, e in enumerate(events) if e[3] < T_VALID and e[1] in window]
    pq.write_table(table.take(learned), folder / "train.parquet")


def write_chain(prepared: Path, *, n_items: int = 12, n_users: int = 60, domain: str = "food") -> Path:
    """Everybody goes round the items in order, from a place of their own: after item i comes i + 1. Returns the queries
    folder, with one query per user about the next item."""
    events, queries = [], []
    for u in range(n_users):
        walk = [(u + step) % n_items for step in range(n_items - 2)]
        events += [(f"u{u:03d}", domain, item, 10 * step) for step, item in enumerate(walk[:-2])]
        events.append((f"u{u:03d}", domain, walk[-2], T_VALID + 1))
        events.append((f"u{u:03d}", domain, walk[-1], T_TEST + 1))
        queries.append(Query(f"u{u:03d}", walk[:-1], walk[-1], query_ts=T_TEST + 1))
    write_events(prepared, events, window=[domain])
    shop = Shop([f"Thing {i}" for i in range(n_items)], queries, n_train=[5] * n_items)
    return write_queries(prepared / "queries", {domain: shop})
