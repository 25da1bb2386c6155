"""A run's records as charts: rate, losses, speed, norms, each over the steps.

reads: nothing; records as `metrics.jsonl` has them, starts, the schedule. Costs: a tenth of a second per
chart, whatever the run's length: of more than MOST points each drawn one stands for several, and the caption says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from cprec.plots import Curve, Points, Steps, draw_svg
from cprec.report.markup import figure
from cprec.schedule import Schedule
from cprec.train.starts import Start

MOST = 500
"""Points of a curve that a chart of this size can show."""
Records = Sequence[Mapping[str, Any]]


def charts_of(records: Records, starts: Sequence[Start], schedule: Schedule, first_step: int) -> Iterator[str]:
    """The charts that the records have values for, as figures."""
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    marks = Steps((), [s.step for s in starts[1:]], [r["step"] for r in records if r["kind"] == "bad_step"])
    yield _rate_chart(train, schedule, first_step)
    losses = [("training", _points(train, "loss")), ("validation", _points(valid, "loss"))]
    yield _chart("Loss", "nats per predicted token", losses, marks)
    yield _chart("Training loss per corpus", "nats per predicted token", _per_corpus(train), marks)
    yield _chart("Validation loss per domain", "nats per predicted token",
                 [(name.removeprefix("valid/"), points) for name, points in _per_corpus(valid)], marks)
    yield _chart("Throughput", "tokens per second, padding included", [("tokens/s", _points(train, "tokens_per_s"))],
                 marks, from_zero=True)
    yield _chart("MFU", "model FLOP/s, percent of the device's peak",
                 [("MFU", [(step, 100 * share) for step, share in _points(train, "mfu")])], marks, from_zero=True)
    norms = [("mean of the record's steps", _points(train, "grad_norm")), ("largest", _points(train, "grad_norm_max"))]
    yield _chart("Gradient norm", "before clipping; logarithmic", norms, marks, is_log=True, keep=(_mean, max))
    yield _chart("Waiting for data", "seconds per step",
                 [("data", [(r["step"], r["time_s"]["data"]) for r in train])], marks, from_zero=True)


def _rate_chart(train: Records, schedule: Schedule, first_step: int) -> str:
    """The rate as it was used over the one that is planned, with the phases but the stable one shaded."""
    last = schedule.total_steps
    planned = sorted({*schedule.corners(), *range(first_step, last, max(1, (last - first_step) // MOST)), last - 1})
    curves = [Curve([(n + 1, schedule.lr(n)) for n in planned if n >= first_step], 7, ":"),
              Curve(thin(_points(train, "lr"))[0], 0, width=2)]
    corners = [n for n in (*schedule.corners(), last) if n >= first_step]
    shaded = [(a, b) for a, b in pairwise(sorted({first_step, *corners})) if schedule.phase(a) != "stable"]
    names = [schedule.phase(a) for a, _ in shaded]
    caption = f"Dotted: as planned.{f' Shaded: {_listed(names)}.' if names else ''}"
    return figure("Learning rate and phases", draw_svg(curves, Steps(shaded), from_zero=True), [], caption)


def _chart(title: str, unit: str, named: Sequence[tuple[str, Points]], marks: Steps, *, is_log: bool = False,
           from_zero: bool = False, keep: Sequence[Callable[[list[float]], float]] = ()) -> str:
    """One chart, or an empty string where there is nothing to draw. `keep`: how each curve is thinned."""
    drawn, most = [], 1
    for i, (name, points) in enumerate(named):
        kept = [(s, v) for s, v in points if v > 0] if is_log else points
        thinned, n = thin(kept, keep[i] if keep else _mean)
        most = max(most, n)
        drawn.append((name, thinned))
    drawn = [(name, points) for name, points in drawn if points]
    if not drawn:
        return ""
    svg = draw_svg([Curve(points, i) for i, (_, points) in enumerate(drawn)], marks, is_log=is_log, from_zero=from_zero)
    of = {_mean: "means", max: "the largest"}
    how = _listed([of[k] for k in keep]) if keep else "means"
    caption = f"{unit}. Points are {how} of {most} records." if most > 1 else f"{unit}."
    return figure(title, svg, [name for name, _ in drawn] if len(named) > 1 else [], caption[0].upper() + caption[1:])


def thin(points: Points, of: Callable[[list[float]], float] | None = None) -> tuple[Points, int]:
    """At most MOST points, each at the last step of as many neighbours as the second value says, with their mean or
    what `of` makes of them."""
    n = -(-len(points) // MOST)
    groups = [points[i:i + n] for i in range(0, len(points), n or 1)]
    return [(group[-1][0], (of or _mean)([v for _, v in group])) for group in groups], n


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _points(records: Records, field: str) -> list[tuple[int, float]]:
    return [(r["step"], r[field]) for r in records if r.get(field) is not None]


def _per_corpus(records: Records) -> list[tuple[str, Points]]:
    names = sorted({name for r in records for name in r["loss_by_corpus"]})
    return [(name, [(r["step"], r["loss_by_corpus"][name]) for r in records if name in r["loss_by_corpus"]])
            for name in names]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))
