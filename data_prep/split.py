"""Stage 3, split: one clock for all domains; what lies after it is held out, what is learned from lies before.

reads: `interactions/clean.parquet`. writes: `holdout.parquet` (the hash of every event from `t_valid` on),
`interactions/train.parquet` (the training window of the pre-training domains), `split.json`. Out of core.
"""

from __future__ import annotations

import pyarrow as pa

from cprec.errors import DataError
from cprec.format import file_hash, write_atomically
from data_prep.config import SplitSettings
from data_prep.engine import Engine, Table
from data_prep.records import CLEAN_INTERACTIONS, Corpora, Counts, Layout, Split, digest

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
            raise DataError(f"split: no event falls into {part} with t_valid={t_valid}, t_test={t_test}; "
                            f"give other split.quantiles or times inside the data")
    held_out = events.filter(events.ts_ms >= t_valid)
    engine.write(held_out, layout.holdout, schema=HOLDOUT, order_by=["h"])
    _write_train(engine, layout, events, t_valid, corpora=corpora, regime=regime, counts=counts)
    return Split(t_valid=t_valid, t_test=t_test, counts=parts,
                 hash=digest([t_valid, t_test, regime, file_hash(layout.holdout)]))


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
        raise DataError(f"split: quantiles {list(settings.quantiles)} fall on one time stamp ({t_valid}); give "
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
