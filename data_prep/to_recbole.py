"""A finished preparation as RecBole's atomic files, cut by its clock, so that others' models run on exactly our splits.

reads: `interactions/train.parquet`, `interactions/clean.parquet`, `catalogue.parquet`, `split.json`. writes, of every
domain: `recbole/<domain>/<domain>.train.inter`, `.valid.inter`, `.test.inter`, `.item`, and `recbole.yaml`, RecBole's
settings for them. Out of core.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from cprec.errors import DataError, n_of
from cprec.format import replacing, write_atomically
from cprec.log import get_logger
from data_prep.engine import Engine, Table
from data_prep.records import Corpora, Layout, Split

log = get_logger(__name__)
FOLDER = "recbole"
PARTS = ("train", "valid", "test")
EVENT_FIELDS = {"user_id": "user_id:token", "item_id": "item_id:token", "ts_ms": "timestamp:float"}
ITEM_FIELDS = {"item_id": "item_id:token", "title": "title:token_seq"}
BREAKING = '[\\t\\n\\r]|^"'
"""What would end a field or open a quoted one: RecBole reads with pandas, which takes a leading quote for one."""


def write_recbole(engine: Engine, layout: Layout, *, corpora: Corpora, split: Split) -> Path:
    """Write the files of every domain anew; the folder that they are in. Times are milliseconds since 1970.

    The training part is what baselines learn from here: of a pre-training domain the window of the corpora, of an
    unseen one its events before `t_valid`. Raises DataError for an id that a tab-separated file cannot hold, and for a
    domain whose name cannot be a folder's.
    """
    out = layout.out / FOLDER
    shutil.rmtree(out, ignore_errors=True)
    for domain in sorted((*corpora.pretrain, *corpora.unseen)):
        if Path(domain).name != domain:
            raise DataError(f"--export {FOLDER}: domain {domain!r} cannot be a folder's name; rename it in the config")
        folder = out / domain
        folder.mkdir(parents=True)
        events = engine.read(layout.interactions).filter(ibis._.domain == domain)
        windows = {"train": events.filter(ibis._.ts_ms < split.t_valid),
                   "valid": events.filter((ibis._.ts_ms >= split.t_valid) & (ibis._.ts_ms < split.t_test)),
                   "test": events.filter(ibis._.ts_ms >= split.t_test)}
        if domain in corpora.pretrain:
            windows["train"] = engine.read(layout.train).filter(ibis._.domain == domain)
        n = {part: _write(engine, window.order_by(["user_id", "ts_ms", "h"]), EVENT_FIELDS,
                          folder / f"{domain}.{part}.inter") for part, window in windows.items()}
        items = engine.read(layout.catalogue).filter(ibis._.domain == domain).order_by("item_id")
        n_items = _write(engine, items, ITEM_FIELDS, folder / f"{domain}.item")
        write_atomically(folder / "recbole.yaml", _settings(out))
        log.info("%s: %s, %s", folder, ", ".join(n_of(n[part], f"{part} event") for part in PARTS),
                 n_of(n_items, "item"))
    return out


def _settings(out: Path) -> str:
    """RecBole's own config for general recommenders on these parts, by name of its parameters."""
    values = {
        "data_path": str(out), "benchmark_filename": list(PARTS), "field_separator": "\t", "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]},
        "eval_args": {"order": "TO", "group_by": "user", "mode": "full"}}
    return "# The splits of this preparation, as RecBole loads them\n" + yaml.safe_dump(values, sort_keys=False)


def _write(engine: Engine, table: Table, fields: dict[str, str], path: Path) -> int:
    """The rows as one atomic file with a typed header; how many. By rename."""
    n_rows = n_changed = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as f:
        f.write("\t".join(fields.values()) + "\n")
        for batch in engine.batches(table.select(*fields)):
            columns = []
            for name in fields:
                texts = pc.fill_null(batch[name].cast(pa.string()), "")
                n_broken = pc.sum(pc.match_substring_regex(texts, BREAKING)).as_py() or 0
                if n_broken and name != "title":
                    raise DataError(f"{path.name}: {n_of(n_broken, 'value')} of {name} with a tab, a line end or a "
                                    f"leading quote, which RecBole's files cannot hold; write such ids otherwise")
                n_changed += n_broken
                columns.append(pc.replace_substring_regex(texts, BREAKING, " ") if n_broken else texts)
            f.writelines(_lines(columns))
            n_rows += batch.num_rows
    if n_changed:
        log.info("%s: tabs, line ends or a leading quote of %s became spaces", path.name, n_of(n_changed, "title"))
    return n_rows


def _lines(columns: list[pa.Array]) -> Iterator[str]:
    joined: pa.Array = pc.binary_join_element_wise(*columns, "\t")
    return (f"{line}\n" for line in joined.to_pylist())
