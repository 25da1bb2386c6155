"""What people did in one domain before the test clock: what baselines learn from, and what they are tuned on.

reads: `interactions/train.parquet` and `interactions/clean.parquet` of a preparation, `item_id`s of the queries'
catalogue. writes: nothing. costs: holds one domain's events as arrays.

Of a pre-training domain a baseline learns from the window that models learn from; of an unseen domain from its own
events before the validation clock, which a model that is ranked without fine-tuning never saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.eval.queries import Catalogue, DomainQueries, Ints, Ragged
from cprec.format import QueriesManifest

COLUMNS = ["user_id", "item_id", "ts_ms", "h"]


@dataclass(frozen=True)
class Sequences:
    """Item numbers of every user's events in the training window, oldest first."""

    items: Ragged
    n_items: int
    """Size of the catalogue."""

    def __len__(self) -> int:
        return len(self.items.offsets) - 1

    def __iter__(self) -> Iterator[Ints]:
        return (self.items[i] for i in range(len(self)))


@dataclass(frozen=True)
class DomainEvents:
    """One domain before the test clock."""

    train: Sequences
    validation: DomainQueries
    """One query per user with an event in the validation window, as the test's are made (of successive targets the
    first): same catalogue, filter and longest history. They are a sample where there are many."""


def load_events(queries_folder: str | Path, manifest: QueriesManifest, queries: DomainQueries, *,
                max_validation: int = 1000, seed: int = 0) -> DomainEvents:
    """Events of the queries' domain, from the preparation that the queries folder lies in. Raises DataError when the
    events are not there."""
    prepared, domain = Path(queries_folder).resolve().parent, queries.domain
    before_test = pc.field("ts_ms") < manifest.split["t_test"]
    everything = _read(prepared / "interactions/clean.parquet", domain, before_test, queries.catalogue)
    in_window = pc.field("ts_ms") < manifest.split["t_valid"]
    if manifest.domains[domain] == "pretrain":
        train = _read(prepared / "interactions/train.parquet", domain, in_window, queries.catalogue)
    else:
        train = everything.filter(in_window)
    if not len(train):
        raise DataError(f"{domain} has no event before the validation clock ({manifest.split['t_valid']} ms): a "
                        f"baseline has nothing to learn from; leave the domain out (--domains)")
    _, sequences = _by_user(train)
    chosen = _validation(everything, queries, manifest, n_most=max_validation, seed=seed).filtered(
        seen="exclude" if queries.excludes_seen else "include", warm_until=queries.warm_until)
    if not len(chosen):
        raise DataError(f"{domain} has no user with a history and an event from {manifest.split['t_valid']} ms to "
                        f"{manifest.split['t_test']} ms: a baseline cannot be tuned; leave the domain out (--domains)")
    return DomainEvents(Sequences(sequences, len(queries.catalogue)), chosen)


def _read(path: Path, domain: str, where: pc.Expression, catalogue: Catalogue) -> pa.Table:
    """The domain's events in the order (user, time, h), with `item`, their number in the catalogue."""
    if not path.is_file():
        raise DataError(f"{path} is missing: a baseline learns from the preparation that made the queries, and looks "
                        f"for it beside them; give --queries as it lies in its preparation")
    table = pq.read_table(path, columns=COLUMNS, filters=(pc.field("domain") == domain) & where, partitioning=None)
    numbers = pc.index_in(table["item_id"], value_set=pa.array(catalogue.item_ids, pa.string()))
    if numbers.null_count:
        strange = table["item_id"].filter(pc.is_null(numbers))[0]
        raise DataError(f"{path} has item {strange} of {domain}, which its queries' catalogue lacks: the two are of "
                        f"different preparations; prepare again")
    order = [("user_id", "ascending"), ("ts_ms", "ascending"), ("h", "ascending")]
    return table.append_column("item", numbers.cast(pa.int64())).sort_by(order)


def _by_user(events: pa.Table) -> tuple[list[str], Ragged]:
    """Users and their items, of events that are in order."""
    runs = pc.run_end_encode(events["user_id"].combine_chunks())
    ends = np.asarray(runs.run_ends.to_numpy(), dtype=np.int64)
    items = np.asarray(events["item"].to_numpy(), dtype=np.int64)
    return runs.values.to_pylist(), Ragged(items, np.concatenate([[0], ends]))


def _validation(events: pa.Table, queries: DomainQueries, manifest: QueriesManifest, *, n_most: int,
                seed: int) -> DomainQueries:
    """Queries about the first or last event in the validation window, as the manifest says of the test's."""
    users, items = _by_user(events)
    times = np.asarray(events["ts_ms"].to_numpy(), dtype=np.int64)
    drawn = sorted(range(len(users)), key=lambda u: hashlib.md5(f"{seed}\x1f{users[u]}".encode()).digest())
    found: dict[str, tuple[Ints, int, int]] = {}
    for u in drawn:
        place = _target(items[u], times[items.offsets[u]:items.offsets[u + 1]], manifest)
        if place:
            found[users[u]] = items[u], place, int(times[items.offsets[u] + place])
        if len(found) == n_most:
            break
    return _as_queries(found, queries, manifest)


def _target(items: Ints, times: Ints, manifest: QueriesManifest) -> int | None:
    """Place of a user's target: in the validation window, with a history, and new to the user where repeats are left
    out; None if there is none."""
    possible = times >= manifest.split["t_valid"]
    possible[0] = False
    if manifest.seen == "exclude":
        is_new = np.zeros(len(items), dtype=np.bool_)
        is_new[np.unique(items, return_index=True)[1]] = True
        possible &= is_new
    places = np.flatnonzero(possible)
    return int(places[-1 if manifest.target in ("last", "leave_one_out") else 0]) if len(places) else None


def _as_queries(found: Mapping[str, tuple[Ints, int, int]], queries: DomainQueries,
                manifest: QueriesManifest) -> DomainQueries:
    histories = [items[max(0, place - manifest.max_history):place] for items, place, _ in found.values()]
    seen = [np.unique(items[:place]) for items, place, _ in found.values()]
    targets = np.array([items[place] for items, place, _ in found.values()], dtype=np.int64)
    return DomainQueries(
        domain=queries.domain, catalogue=queries.catalogue, excludes_seen=queries.excludes_seen, user_ids=list(found),
        histories=ragged(histories), seen=ragged(seen), targets=targets,
        query_ts=np.array([ts for _, _, ts in found.values()], dtype=np.int64),
        is_repeat=np.array([t in s for t, s in zip(targets, seen, strict=True)], dtype=np.bool_),
        is_cold=queries.catalogue.first_ts[targets] >= manifest.split["t_valid"])


def ragged(lists: list[Ints]) -> Ragged:
    """The lists as one."""
    values = np.concatenate(lists) if lists else np.zeros(0, dtype=np.int64)
    return Ragged(values, np.cumsum([0, *map(len, lists)]))
