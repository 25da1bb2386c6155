"""docs/scale.md's tables: the constants that were measured, and what they come to at 10^11 events on a cluster.

reads: the results of `benchmarks/prep/run.py`. writes: nothing; gives the page with its tables filled in. Formulas are
those that the page states; what is assumed and not measured is in ASSUMED and shown as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.prep.growth import PER_ITEM
from benchmarks.prep.tables import head, machine, row, tables

MARKS = "<!-- {name}:begin -->", "<!-- {name}:end -->"
RELATIONAL = ("ingest", "clean", "split", "sequences", "queries", "audit")
EVENT_ARTIFACTS = ("raw files", "interactions as ingested", "interactions, clean", "interactions, training",
                   "histories", "packed")


@dataclass(frozen=True)
class Assumed:
    """What no measurement here can say: the size of the shop, the machines."""

    n_events: float = 1e11
    n_items: float = 1e9
    nodes: int = 64
    cores_per_node: int = 64
    efficiency: float = 0.5
    """Share of perfect scaling that is left on a cluster: stragglers, shuffles, shared disks."""
    network_gb_s: float = 3.0
    """Per node, each way: 25 Gbit/s."""
    exchanges: int = 30
    """Times that the events cross the network, at most: see the page's table of exchanges; at so many items none of
    them is saved by sending the items to every executor."""
    written: int = 5
    """Artifacts that hold every event, at most: ingested, clean, training, specific and mixed histories."""
    shuffle_bytes_per_event: float = 60.0
    """An event on the wire, compressed: its hash (32 hexadecimal digits, 16 random bytes) takes most of it."""

    @property
    def cores(self) -> int:
        return self.nodes * self.cores_per_node


ASSUMED = Assumed()


@dataclass(frozen=True)
class Constants:
    """What the largest preparation tells; core-seconds take every core of the machine as busy, and are differences
    between the two largest sizes where two were measured: what a start costs is not paid per event."""

    n_events: int
    bytes_per_event: dict[str, float]
    bytes_per_item: dict[str, float]
    tokens_per_event: float
    core_us_per_event: dict[str, float]
    """Stage -> microseconds of a core per event."""
    pack_core_ns_per_token: float
    writer_us_per_event: float
    encode_core_us_per_item: float


def constants(found: dict[str, Any]) -> Constants:
    """The constants of the largest size that was measured."""
    size = found["growth"]["sizes"][-1]
    n, n_items, cores = size["n_events"], size["n_items"], found["machine"]["cores"]
    stages: dict[str, float] = size["run"]["stage_seconds"]
    before = found["growth"]["sizes"][-2] if len(found["growth"]["sizes"]) > 1 else None
    n_more = n - (before["n_events"] if before else 0)
    tokens_more = size["n_tokens"] - (before["n_tokens"] if before else 0)

    def more_s(stage: str) -> float:
        less: float = before["run"]["stage_seconds"].get(stage, 0.0) if before else 0.0
        return max(stages.get(stage, 0.0) - less, 0.0) * float(cores)

    artifacts: dict[str, int] = size["artifact_bytes"]
    return Constants(
        n_events=n, bytes_per_event={a: artifacts[a] / n for a in EVENT_ARTIFACTS},
        bytes_per_item={a: artifacts[a] / n_items for a in PER_ITEM}, tokens_per_event=size["n_tokens"] / n,
        core_us_per_event={s: more_s(s) / n_more * 1e6 for s in RELATIONAL},
        pack_core_ns_per_token=more_s("pack") / tokens_more * 1e9,
        encode_core_us_per_item=stages["encode"] * cores / n_items * 1e6,
        writer_us_per_event=size["writer_us_per_event"])


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with its parts between the marks made anew; a part that was not measured stays as it was."""
    page = _between(page, "measured", tables(found))
    if "growth" not in found:
        return page
    known = constants(found)
    page = _between(page, "constants", "\n".join([*machine(found), "", *_constants(known)]))
    return _between(page, "computed", "\n".join(_computed(known, ASSUMED)))


def _between(page: str, name: str, text: str) -> str:
    begin, end = (mark.format(name=name) for mark in MARKS)
    assert begin in page and end in page, f"docs/scale.md has no marks of {name}"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def _constants(known: Constants) -> Iterator[str]:
    yield from head(f"Constants, from {known.n_events:,} events", ["constant", "value"])
    yield from (row([f"`b` of {a}", f"{b:.1f} bytes per event"]) for a, b in known.bytes_per_event.items())
    yield from (row([f"`b` of {a}", f"{b:.1f} bytes per item"]) for a, b in known.bytes_per_item.items())
    yield row(["`k`", f"{known.tokens_per_event:.2f} tokens in packed corpora per event"])
    yield from (row([f"`c` of {s}", f"{us:.2f} core-microseconds per event"])
                for s, us in known.core_us_per_event.items())
    yield row(["`c` of encode", f"{known.encode_core_us_per_item:.1f} core-microseconds per item"])
    yield row(["`w`", f"{known.writer_us_per_event:.2f} microseconds of the one writer per event and artifact"])
    yield row(["`c` of pack", f"{known.pack_core_ns_per_token:.2f} core-nanoseconds per token"])


def _computed(known: Constants, assumed: Assumed) -> Iterator[str]:
    n, items = assumed.n_events, assumed.n_items
    yield (f"Assumed, not measured: {n:.0e} events, {items:.0e} items; {assumed.nodes} nodes of "
           f"{assumed.cores_per_node} cores, {assumed.network_gb_s} GB/s each way per node; {assumed.efficiency:.0%} "
           f"of perfect scaling; {assumed.exchanges} exchanges of {assumed.shuffle_bytes_per_event:.0f} bytes per "
           f"event; {assumed.written} artifacts of the size of all events written.")
    yield ""
    yield from head("Bytes", ["artifact", "TB"])
    volumes = {a: b * n for a, b in known.bytes_per_event.items()} | {
        a: b * items for a, b in known.bytes_per_item.items()}
    yield from (row([a, f"{b / 1e12:,.2f}"]) for a, b in volumes.items())
    yield row(["all", f"{sum(volumes.values()) / 1e12:,.1f}"])
    yield row(["tokens packed", f"{known.tokens_per_event * n:.1e}"])
    shuffled = assumed.exchanges * assumed.shuffle_bytes_per_event * n
    yield row(["crossing the network", f"{shuffled / 1e12:,.1f}"])
    yield ""
    yield from head("Time", ["stage", "runs on", "core-hours", "hours on the cluster"])
    hours = {s: us * 1e-6 * n / 3600 for s, us in known.core_us_per_event.items()}
    hours |= {"encode": known.encode_core_us_per_item * 1e-6 * items / 3600,
              "pack": known.pack_core_ns_per_token * 1e-9 * known.tokens_per_event * n / 3600}
    for stage, core_hours in hours.items():
        engine = "worker processes" if stage in ("encode", "pack") else "the relational engine"
        yield row([stage, engine, f"{core_hours:,.0f}", f"{core_hours / assumed.cores / assumed.efficiency:,.2f}"])
    network = shuffled / (assumed.nodes * assumed.network_gb_s * 1e9) / 3600
    yield row(["exchanges", "network", "", f"{network:,.2f}"])
    writer = known.writer_us_per_event * 1e-6 * n * assumed.written / 3600
    yield row(["one writer per artifact", "one core of the driver", f"{writer:,.0f}", f"{writer:,.1f}"])
    total = sum(hours.values())
    alone = total / assumed.cores / assumed.efficiency + network
    yield row(["all, without the writer", "", f"{total:,.0f}", f"{alone:,.1f}"])
    yield row(["all", "", f"{total + writer:,.0f}", f"{alone + writer:,.1f}"])
