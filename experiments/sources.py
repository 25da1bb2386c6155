"""The raw logs of a world, made ready for `launch/prepare.py`: thinned by user, and brought onto one clock.

    python -m experiments.sources --world amazon --form cpu --data FOLDER --out work/experiments/cpu/sources
    python -m experiments.sources --control shuffled --prepared work/experiments/cpu/prepare/prepared --out ...

reads: a data folder (see experiments/README.md), or what a preparation kept. writes: `interactions/<domain>.parquet`
and `items/<domain>.parquet`, and `prepare.yaml`, the config of a preparation without its `out` and tokenizer. costs:
holds one domain at a time; a control all events.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from cprec import cli
from cprec.errors import ConfigError, DataError
from cprec.format import replacing, write_atomically
from cprec.log import get_logger
from cprec.settings import apply_overrides
from experiments.forms import Form, Source, World, load_form, load_world

log = get_logger(__name__)
Ints = npt.NDArray[np.int64]
DAY_MS = 86_400_000
SEED = 17
CONTROLS = ("shuffled", "titles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world")
    parser.add_argument("--form")
    parser.add_argument("--data", help="folder with interactions/ and items/")
    parser.add_argument("--control", choices=CONTROLS)
    parser.add_argument("--prepared", help="of a control: the preparation whose training events it disturbs")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if args.control:
        write_control(Path(args.prepared), args.control, args.out)
    else:
        write_sources(load_world(args.data, args.world), load_form(args.form), args.data, args.out)


def write_sources(world: World, form: Form, data: str | None, out: Path) -> None:
    """The world's logs at the form's size, and `prepare.yaml`. Raises ConfigError without the data folder they need."""
    values = apply_overrides(world.prepare, [f"{k}={v}" for k, v in form.data.prepare.items()])
    if not world.sources:
        _write_config(out, values)
        return
    if data is None:
        raise ConfigError("this world needs --data: a folder with interactions/<file>.parquet and items/<file>.parquet")
    clock = (values["split"]["t_valid"], values["split"]["t_test"])
    datasets = []
    for domain, source in world.sources.items():
        share = form.data.users_pretrain if domain in world.pretrain else form.data.users_unseen
        events = _read(Path(data) / "interactions" / f"{source.file}.parquet", share, source, clock)
        items = _read_table(Path(data) / "items" / f"{source.file}.parquet", ["item_id", "title"])
        paths = {part: out / part / f"{domain}.parquet" for part in ("interactions", "items")}
        _write(paths["interactions"], events)
        _write(paths["items"], items.filter(pc.is_in(items["item_id"], events["item_id"].combine_chunks())))
        datasets.append({"parser": "tabular", "domain": domain, "path": str(paths["interactions"]),
                         "items": str(paths["items"]), "columns": {"timestamp_unit": "ms"}})
    _write_config(out, {"datasets": datasets, **values})


def _read(path: Path, share: float, source: Source, clock: tuple[int, int]) -> pa.Table:
    """The events of a share of the users, with their times in ms on the one clock. Raises DataError."""
    table = _read_table(path, ["user_id", "item_id", "timestamp"])
    table = table.filter(pa.array(_drawn(table["user_id"].to_pylist(), share)))
    ms = table["timestamp"].to_numpy().astype(np.int64) * 1000
    if source.clock == "own":
        ms = onto_clock(ms, clock)
    elif source.clock == "order":
        ms = by_order(np.asarray(table["user_id"].to_pylist()), ms, clock)
    log.info("%s: %s events, clock: %s", path.stem, f"{len(table):,}", source.clock)
    return table.set_column(2, "timestamp", pa.array(ms))


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{path} cannot be read: {str(e).splitlines()[0]}; see experiments/README.md for what --data "
                        f"has to hold") from None


def _drawn(users: list[str], share: float) -> list[bool]:
    """Whether each event's user is in the share: by a hash of the id, so alike in every domain."""
    kept = {u: int(hashlib.md5(f"{SEED}\x1f{u}".encode()).hexdigest()[:8], 16) < share * 2**32 for u in set(users)}
    return [kept[u] for u in users]


def onto_clock(ms: Ints, clock: tuple[int, int]) -> Ints:
    """Times moved along a straight line, so that the 0.8 and 0.9 quantiles come to stand at the clock's two moments.
    The order of events, and which of them are at one time, stay. Raises DataError where both quantiles are one time."""
    low, high = np.quantile(ms, [0.8, 0.9], method="lower")
    if low == high:
        raise DataError("the 0.8 and 0.9 quantiles of the time stamps are the same; give the domain clock: order")
    moved: Ints = (clock[0] + np.rint((ms - low) * ((clock[1] - clock[0]) / (high - low)))).astype(np.int64)
    if len(np.unique(moved)) < len(np.unique(ms)) or moved.min() <= 0:
        raise DataError("the time stamps lie too far apart to be brought onto the clock; give clock: order")
    return moved


def by_order(users: npt.NDArray[Any], ms: Ints, clock: tuple[int, int]) -> Ints:
    """Times by place alone: of each user the last event at the test clock, the one before at the validation clock, the
    others a day apart before it. Events at the same time stay in the order given."""
    order = np.lexsort((np.arange(len(ms)), ms, users))
    sorted_users = users[order]
    ends = np.append(np.flatnonzero(sorted_users[1:] != sorted_users[:-1]), len(ms) - 1)
    from_end = np.repeat(ends, np.diff(ends, prepend=-1)) - np.arange(len(ms))
    placed = np.empty(len(ms), dtype=np.int64)
    placed[order] = np.select([from_end == 0, from_end == 1], [clock[1], clock[0]],
                              clock[0] - (from_end - 1) * DAY_MS)
    return placed


def write_control(prepared: Path, control: str, out: Path) -> None:
    """What the preparation kept, with its training events disturbed: `shuffled`: each user's in random order; `titles`:
    each domain's dealt out to random users, so that nothing but the titles and how often they come is left."""
    events = pq.read_table(prepared / "interactions/clean.parquet", partitioning=None)
    config = yaml.safe_load((prepared / "config.yaml").read_text(encoding="utf-8"))
    t_valid = yaml.safe_load((prepared / "split.json").read_text(encoding="utf-8"))
    is_train = events["ts_ms"].to_numpy() < t_valid["t_valid"]
    is_train &= np.isin(np.asarray(events["domain"].to_pylist()), config["domains"]["pretrain"])
    train, rest = events.filter(pa.array(is_train)), events.filter(pa.array(~is_train))
    rng = np.random.default_rng(SEED)
    if control == "shuffled":
        column, within = "ts_ms", train["user_id"]
    else:
        column, within = "user_id", train["domain"]
    order = _permuted_within(np.asarray(within.to_pylist()), rng)
    values = train[column].combine_chunks().take(pa.array(order))
    at = train.schema.get_field_index(column)
    _write(out / "interactions.parquet", pa.concat_tables([train.set_column(at, column, values), rest]))
    items = prepared / "items/clean.parquet"
    _write_config(out, {
        **{k: config[k] for k in ("domains", "clean", "sequences", "pack", "queries", "workers")},
        "split": {k: t_valid[k] for k in ("t_valid", "t_test")},
        "datasets": [{"parser": "tabular", "path": str(out / "interactions.parquet"), "items": str(items),
                      "columns": {"timestamp": "ts_ms", "timestamp_unit": "ms", "domain": "domain"}}]})


def _permuted_within(groups: npt.NDArray[Any], rng: np.random.Generator) -> Ints:
    """A permutation of the places that leaves every place in its group."""
    places = np.argsort(groups, kind="stable")
    mixed = np.lexsort((rng.random(len(groups)), groups))
    order = np.empty(len(groups), dtype=np.int64)
    order[places] = mixed
    return order


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(table, partial)


def _write_config(out: Path, values: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "prepare.yaml", yaml.safe_dump(values, sort_keys=False))


if __name__ == "__main__":
    cli.run(main)
