"""The parsers by name: each turns one dataset of the config into interactions and items of the one schema.

reads: what its parsers read. writes: nothing, costs nothing: tables are lazy until the pipeline writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from data_prep.config import Dataset
from data_prep.engine import Table
from data_prep.parsers import amazon, complete_journey, movielens, recbole, tabular
from data_prep.records import Counts
from data_prep.sources import Inputs


class FindInputs(Protocol):
    """The files that a dataset is made of, and how each is read. DataError when one is missing."""

    def __call__(self, dataset: Dataset) -> Inputs: ...


class Parse(Protocol):
    """Turns a dataset's events and items, under our names (`Field.name`), into lazy tables (interactions, items) with
    the columns of `data_prep.records`."""

    def __call__(self, dataset: Dataset, events: Table, items: Table, counts: Counts) -> tuple[Table, Table]: ...


@dataclass(frozen=True)
class Parser:
    """A source format: `inputs` are found, staged and read before `parse` is asked."""

    inputs: FindInputs
    parse: Parse


PARSERS = {
    "amazon": Parser(amazon.inputs, amazon.parse),
    "complete_journey": Parser(complete_journey.inputs, complete_journey.parse),
    "movielens": Parser(movielens.inputs, movielens.parse),
    "recbole": Parser(recbole.inputs, recbole.parse),
    "tabular": Parser(tabular.inputs, tabular.parse),
}
