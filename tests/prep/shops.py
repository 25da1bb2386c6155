"""Small shops for tests: their interaction logs on disk, and a config that prepares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.settings import parse_settings
from data_prep.config import PrepConfig
from data_prep.engine import Engine, write_parquet
from data_prep.engines.duckdb import DuckDBEngine
from data_prep.records import INTERACTIONS, ITEMS

DAY_MS = 86_400_000
START_MS = 1_500_000_000_000
WORDS = ["red", "blue", "old", "new", "small", "large", "soft", "hard", "wild", "calm", "lamp", "chair", "rope",
         "glove", "spade", "kite", "drum", "book", "clock", "vase", "shelf", "brush", "crate", "stool", "bench"]
SHOPS = {"books": 30, "games": 24, "toys": 36, "garden": 20}
N_USERS = 40


def engine(folder: Path) -> Engine:
    """A small engine that spills below `folder`."""
    return DuckDBEngine(memory_limit="500MB", threads=1, spill=folder / "spill")


def title(domain: str, i: int, rng: np.random.Generator) -> str:
    """A title that no other shop has."""
    return f"{' '.join(rng.choice(WORDS, size=3)).title()} {domain} No. {i} (2.5 oz)"


def write_shops(folder: Path, *, seed: int = 5) -> None:
    """`<shop>.parquet` and `<shop>.items.parquet` for each of `SHOPS`: 40 people over 100 days, many ties of time.

    Garden sells one thing that books has too, under a title that differs in case and dots only.
    """
    rng = np.random.default_rng(seed)
    for shop, n_items in SHOPS.items():
        titles = [title(shop, i, rng) for i in range(n_items)]
        if shop == "books":
            titles[3] = "The Garden Almanac, Vol. 1"
        if shop == "garden":
            titles[0] = "the garden almanac vol 1"
        items = {"item_id": [f"{shop[0]}{i:03d}" for i in range(n_items)], "title": titles}
        pq.write_table(pa.table(items), folder / f"{shop}.items.parquet")
        n_events = 60 * n_items
        events = {
            "user_id": [f"u{u:02d}" for u in rng.integers(0, N_USERS, n_events)],
            "item_id": [f"{shop[0]}{i:03d}" for i in rng.integers(0, n_items, n_events)],
            "timestamp": (START_MS + DAY_MS * rng.integers(0, 100, n_events)).tolist(),
        }
        pq.write_table(pa.table(events), folder / f"{shop}.parquet")


def config_values(raw: Path, out: Path) -> dict[str, Any]:
    """A config for the shops in `raw`, as a YAML file would give it."""
    return {
        "out": str(out), "workers": 1, "engine": {"memory_limit": "500MB", "threads": 1},
        "datasets": [{"parser": "tabular", "domain": shop, "path": str(raw / f"{shop}.parquet"),
                      "items": str(raw / f"{shop}.items.parquet"), "columns": {"timestamp_unit": "ms"}}
                     for shop in SHOPS],
        "domains": {"pretrain": ["books", "games", "toys"], "unseen": ["garden"]},
        "sequences": {"min_items": 2, "max_items": 12},
        "tokenizer": {"train_vocab_size": 512},
        "pack": {"seq_len": 256, "shard_rows": 8, "window": 64},
        "queries": {"max_per_domain": 20},
    }


def config(values: dict[str, Any]) -> PrepConfig:
    return parse_settings(PrepConfig, values, source="test")


def write_events(path: Path, rows: list[tuple[str, str, str, int]]) -> None:
    """Interactions of the schema from (user, domain, item, ts_ms)."""
    table = pa.table({name: [r[i] for r in rows] for i, name in enumerate(("user_id", "domain", "item_id", "ts_ms"))})
    table = table.append_column("rating", pa.nulls(len(rows), pa.float32())).select(INTERACTIONS.names)
    write_parquet(table.cast(INTERACTIONS).to_batches(), path, schema=INTERACTIONS)


def write_items(path: Path, rows: list[tuple[str, str, str | None]]) -> None:
    """Items of the schema from (domain, item, title)."""
    table = pa.table({name: pa.array([r[i] for r in rows], pa.string())
                      for i, name in enumerate(("domain", "item_id", "title"))})
    for name in ("brand", "category"):
        table = table.append_column(name, pa.nulls(len(rows), pa.string()))
    write_parquet(table.cast(ITEMS).to_batches(), path, schema=ITEMS)


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative name, but pictures and the config, which says where and by how many."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "config.yaml" and p.suffix != ".png"}


NASTY = {"_ toys [new], 1*": 8, "Bücher & Co's": 8, "garden {x}\\": 8}
"""Domains whose names mean something to a shell, to SQL, to a pattern, or hide a file."""


def write_nasty_shop(folder: Path, *, seed: int = 3) -> None:
    """`events.parquet` and `items.parquet` of the shops `NASTY`: all that engines may take differently.

    Ties of time, repeated events with other ratings (also none, NaN, both zeros, infinity, text), ids and users that
    are null, empty, of spaces, of letters beyond the first plane or in quotes, titles that need cleaning, items twice.
    """
    rng = np.random.default_rng(seed)
    odd = ["", " ", "É", "e\u0301", "ß", "SS", "İ", "😀", "\uffff", "𝒜", "a'b", 'a"b', "a\\b", "null", "\x1f", "%s",
           "1.0"]
    users = [f"u{u}" for u in range(20)] + odd
    domains = list(NASTY)
    items = [f"i{i}" for i in range(12)] + odd
    n = 1500
    ratings = ["5", "4.5", " 3 ", "nan", "inf", "-0.0", "0", "1e400", "5f", "0x1p3", "1_0", None, "", "0.1"]
    days = START_MS + DAY_MS * rng.integers(0, 40, n)
    events = {
        "user_id": [None if u == 0 else users[u] for u in rng.integers(0, len(users), n)],
        "shop": [None if d == 3 else domains[d] for d in rng.integers(0, 4, n)],
        "item_id": [None if i == 1 else items[i] for i in rng.integers(0, len(items), n)],
        "timestamp": [None if t % 97 == 0 else float("nan") if t % 89 == 0 else -1.0 if t % 83 == 0 else float(t)
                      for t in (days + rng.integers(0, 3, n) * rng.integers(0, 2, n)).tolist()],
        "rating": [ratings[r] for r in rng.integers(0, len(ratings), n)],
    }
    titles = ["Red &amp; blue", " Tabs\tand\nlines ", "the ßig one", "THE SSIG ONE", "ﬁne", "fine", None, "",
              "a\u00a0b", "日本 語"]
    rows = [(d, i, titles[rng.integers(0, len(titles))] if rng.random() < 0.3 else f"{d} {n} {i!r}")
            for d in domains for n, i in enumerate([*items, *items[:5]])]
    rows += [(None, "i3", "nowhere"), (domains[0], None, "nameless")]
    write = {"shop": [r[0] for r in rows], "item_id": [r[1] for r in rows], "title": [r[2] for r in rows],
             "brand": [None if n % 3 else f"b{n % 4}" for n in range(len(rows))]}
    pq.write_table(pa.table(events), folder / "events.parquet")
    pq.write_table(pa.table(write), folder / "items.parquet")


def nasty_values(raw: Path, out: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """A config for the nasty shop; every optional rule on."""
    domains = list(NASTY)
    return {
        "out": str(out), "workers": 1, "engine": engine,
        "datasets": [{"parser": "tabular", "path": str(raw / "events.parquet"), "items": str(raw / "items.parquet"),
                      "columns": {"domain": "shop", "timestamp_unit": "ms"}}],
        "domains": {"pretrain": domains[:2], "unseen": domains[2:]},
        "clean": {"untitled_items": "drop", "merge_same_titles": True, "min_user_events": 3, "min_item_events": 2},
        "regime": "overlap", "sequences": {"min_items": 2, "max_items": 6}, "tokenizer": {"train_vocab_size": 512},
        "pack": {"seq_len": 256, "shard_rows": 8, "window": 64},
        "queries": {"max_per_domain": 10, "min_history": 2},
    }
