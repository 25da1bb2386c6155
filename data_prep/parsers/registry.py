"""The parsers by name: each turns one dataset of the config into interactions and items of the one schema.

reads: what its parsers read. writes: nothing, costs nothing: tables are lazy until the pipeline writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_prep.config import Dataset
from data_prep.engine import Engine, Table
from data_prep.parsers import complete_journey, recbole, tabular


class Parse(Protocol):
    """Reads one dataset. Returns lazy tables (interactions, items) with the columns of `data_prep.records`."""

    def __call__(self, engine: Engine, dataset: Dataset) -> tuple[Table, Table]: ...


class Sources(Protocol):
    """The files that a dataset is made of, by the name that manifests give them. DataError when one is missing."""

    def __call__(self, dataset: Dataset) -> dict[str, Path]: ...


@dataclass(frozen=True)
class Parser:
    """A source format. `sources` is asked before `parse`."""

    sources: Sources
    parse: Parse


PARSERS = {
    "complete_journey": Parser(complete_journey.sources, complete_journey.parse),
    "recbole": Parser(recbole.sources, recbole.parse),
    "tabular": Parser(tabular.sources, tabular.parse),
}
