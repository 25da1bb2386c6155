"""Stage 3, split: one clock for all domains; what lies after it is held out, what is learned from lies before.

reads: `interactions/clean.parquet`. writes: `holdout.parquet` (the hash of every event from `t_valid` on),
`interactions/train.parquet` (the training window of the pre-training domains), `split.json`. Out of core.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from cprec.errors import DataError, n_of
from cprec.format import file_hash, write_atomically
from cprec.log import get_logger
from data_prep.config import SplitSettings
from data_prep.engine import Engine, Table
from data_prep.records import CLEAN_INTERACTIONS, Corpora, Counts, Layout, Split, digest, utc

log = get_logger(__name__)

HOLDOUT = pa.schema([("h", pa.string())])


def split(engine: Engine, layout: Layout, settings: SplitSettings, *, corpora: Corpora, regime: str,
          counts: Counts) -> Split:
    """Set the clock and write both sides of it. Raises DataError when a side is empty.

    `disjoint` takes every user with a later event in an unseen domain out of the training window.
    """
    events = engine.read(layout.interactions)
    t_valid, t_test = _clock(engine, events, settings)
    parts = {
        "train": engine.count(events.filter(events.ts_ms < t_valid)),
        "valid": engine.count(events.filter((events.ts_ms >= t_valid) & (events.ts_ms < t_test))),
        "test": engine.count(events.filter(events.ts_ms >= t_test)),
    }
    for part, n in parts.items():
        counts.add(f"events in {part}", n)
        if not n:
            raise DataError(f"split: no event falls into {part} with t_valid={t_valid} ({utc(t_valid)}), "
                            f"t_test={t_test} ({utc(t_test)}); give other split.quantiles, or split.t_valid and "
                            f"split.t_test (ms since 1970) inside the data")
    held_out = events.filter(events.ts_ms >= t_valid)
    engine.write(held_out, layout.holdout, schema=HOLDOUT, order_by=["h"])
    _write_train(engine, layout, events, t_valid, corpora=corpora, regime=regime, counts=counts)
    return Split(t_valid=t_valid, t_test=t_test, counts=parts,
                 hash=digest([t_valid, t_test, regime, file_hash(layout.holdout)]))


@dataclass(frozen=True)
class Lived:
    """When a domain's events are, and how many of them lie in each part."""

    domain: str
    n: dict[str, int]
    first_ms: int
    last_ms: int

    def __str__(self) -> str:
        when = f"from {utc(self.first_ms)} to {utc(self.last_ms)}" if sum(self.n.values()) > 1 else utc(self.first_ms)
        return f"its {n_of(sum(self.n.values()), 'event')}: {when}"


def require_parts(engine: Engine, layout: Layout, settings: SplitSettings, *, made: Split, corpora: Corpora) -> None:
    """Raise DataError naming every domain that the clock leaves without what it is chosen for: training events (of a
    pre-training domain), test events (of every one). Warns of domains without validation events."""
    problems: list[str] = []
    idle: list[str] = []
    for lived in _lived(engine, layout, made):
        is_learned = lived.domain in corpora.pretrain
        missing = [part for part in ("train", "test") if not lived.n[part] and (is_learned or part == "test")]
        if missing:
            idle.append(lived.domain)
            problems.append(f"  {lived.domain} ({'pretrain' if is_learned else 'unseen'}) has no event in "
                            f"{' and none in '.join(missing)}; {lived}")
        elif not lived.n["valid"]:
            log.warning("split: %s has no event between t_valid (%s) and t_test (%s), so no validation corpus; %s",
                        lived.domain, utc(made.t_valid), utc(made.t_test), lived)
    if problems:
        now = f"now {list(settings.quantiles)}" if settings.t_valid is None else "not used while these are given"
        listed = "\n".join(problems)
        raise DataError(
            f"split: {n_of(len(idle), 'domain')} without events in a part of the clock: train ends before t_valid = "
            f"{utc(made.t_valid)} ({made.t_valid} ms), test begins at t_test = {utc(made.t_test)} ({made.t_test} ms)\n"
            f"{listed}\n  move the clock (split.t_valid and split.t_test, in ms since 1970; or split.quantiles, {now}) "
            f"or leave out {', '.join(idle)} (domains.pretrain, domains.unseen)")


def _lived(engine: Engine, layout: Layout, made: Split) -> list[Lived]:
    events = engine.read(layout.interactions)
    is_valid = (events.ts_ms >= made.t_valid) & (events.ts_ms < made.t_test)
    parts = {"train": events.ts_ms < made.t_valid, "valid": is_valid, "test": events.ts_ms >= made.t_test}
    found = events.group_by("domain").agg(first_ms=events.ts_ms.min(), last_ms=events.ts_ms.max(),
                                          **{part: inside.cast("int64").sum() for part, inside in parts.items()})
    return [Lived(row["domain"], {part: int(row[part]) for part in parts}, int(row["first_ms"]), int(row["last_ms"]))
            for row in engine.rows(found.order_by("domain"))]


def write_split(layout: Layout, made: Split) -> None:
    """Write `split.json`."""
    write_atomically(layout.split, made.model_dump_json(indent=1))


def read_split(layout: Layout) -> Split:
    """The clock of a prepared folder."""
    return Split.model_validate_json(layout.split.read_text(encoding="utf-8"))


def _clock(engine: Engine, events: Table, settings: SplitSettings) -> tuple[int, int]:
    """Given times, or the event at that share of all events in order of time (an event's own time, never between)."""
    if settings.t_valid is not None and settings.t_test is not None:
        return settings.t_valid, settings.t_test
    n_events = engine.count(events)
    if n_events == 0:
        raise DataError("split: no event is left after cleaning; look at report.md for the reasons")
    t_valid, t_test = (_time_at(engine, events, int(share * (n_events - 1))) for share in settings.quantiles)
    if t_valid == t_test:
        raise DataError(f"split: quantiles {list(settings.quantiles)} fall on one time stamp, {utc(t_valid)}; give "
                        f"split.t_valid and split.t_test, or quantiles further apart")
    return t_valid, t_test


def _time_at(engine: Engine, events: Table, place: int) -> int:
    """Time of event number `place` (from 0) in order of time: by counting, where a sort would move every event."""
    start = 0
    for width_ms in (86_400_000, 10_000, 1):  # days, then a day's 8,640 parts, then a part's milliseconds
        counted = events.group_by(slot=(events.ts_ms - start) // width_ms).agg(n=events.count())
        for row in engine.rows(counted.order_by("slot")):
            if place < row["n"]:
                break
            place -= row["n"]
        start += int(row["slot"]) * width_ms
        events = events.filter((events.ts_ms >= start) & (events.ts_ms < start + width_ms))
    return start


def _write_train(engine: Engine, layout: Layout, events: Table, t_valid: int, *, corpora: Corpora, regime: str,
                 counts: Counts) -> None:
    window = events.filter((events.ts_ms < t_valid) & events.domain.isin(list(corpora.pretrain)))
    n_window = engine.count(window)
    if regime == "disjoint":
        later = events.filter((events.ts_ms >= t_valid) & events.domain.isin(list(corpora.unseen)))
        window = window.anti_join(later.select("user_id").distinct(), "user_id")
    n_train = engine.write(window, layout.train, schema=CLEAN_INTERACTIONS, order_by=["user_id", "ts_ms", "h"])
    counts.add("training events of unseen domains, left out", engine.count(events.filter(events.ts_ms < t_valid))
               - n_window)
    if regime == "disjoint":
        counts.add("training events of held-out users, left out", n_window - n_train)
