"""Frozen ranking queries of one domain, its catalogue, and the prompts that a tokenizer makes of them.

reads: `queries/<domain>.parquet`, `queries/<domain>.items.parquet` and their manifest (see QueriesManifest in
`cprec/format.py`), hashes checked. writes: nothing. costs: holds one domain's columns as arrays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import ConfigError, DataError, did_you_mean
from cprec.format import QueriesManifest, read_queries_manifest
from cprec.template import Template
from cprec.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Seen = Literal["exclude", "include"]

QUERY_COLUMNS = ("user_id", "history", "seen", "target", "query_ts", "is_repeat", "is_cold")
ITEM_COLUMNS = ("item", "item_id", "title", "line", "n_train", "first_ts")


@dataclass(frozen=True)
class Ragged:
    """Lists of item numbers, one per query: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Ints
    offsets: Ints

    def __getitem__(self, i: int) -> Ints:
        return self.values[self.offsets[i]:self.offsets[i + 1]]

    def take(self, rows: Ints) -> Ragged:
        """Only the lists of these numbers, in this order."""
        lists = [self[int(i)] for i in rows]
        return Ragged(np.concatenate([*lists, np.zeros(0, np.int64)]), np.cumsum([0, *map(len, lists)]))


@dataclass(frozen=True)
class Catalogue:
    """The items that a query may ask for; item i is entry i of every field."""

    item_ids: list[str]
    titles: list[str]
    lines: list[str]
    n_train: Ints
    """Events in the training window."""
    first_ts: Ints
    """First event in the data, ms: the item does not exist before."""

    def __len__(self) -> int:
        return len(self.lines)


@dataclass(frozen=True)
class DomainQueries:
    """One domain's queries; query i is entry i of every field."""

    domain: str
    catalogue: Catalogue
    excludes_seen: bool
    """Whether items that the user had before are no candidates."""
    user_ids: list[str]
    histories: Ragged
    """What the model is shown, oldest first."""
    seen: Ragged
    """All distinct items before the target, also those older than the history shown."""
    targets: Ints
    query_ts: Ints
    """Moment of the target event, ms."""
    is_repeat: Bools
    is_cold: Bools
    warm_until: int | None = None
    """If given, items that come later, ms, are no candidates."""

    def __len__(self) -> int:
        return len(self.user_ids)

    def candidates(self, i: int) -> Bools:
        """Mask over the items: those that exist at the moment of query i and, if so filtered, were not seen before.

        The target is always one.
        """
        mask: Bools = self.catalogue.first_ts <= self.query_ts[i]
        if self.warm_until is not None:
            mask &= self.catalogue.first_ts < self.warm_until
        if self.excludes_seen:
            mask[self.seen[i]] = False
        mask[self.targets[i]] = True
        return mask

    def take(self, rows: Ints) -> DomainQueries:
        """Only the queries of these numbers, in this order."""
        return replace(self, user_ids=[self.user_ids[i] for i in rows], histories=self.histories.take(rows),
                       seen=self.seen.take(rows), targets=self.targets[rows], query_ts=self.query_ts[rows],
                       is_repeat=self.is_repeat[rows], is_cold=self.is_cold[rows])

    def head(self, n: int | None) -> DomainQueries:
        """The first `n` queries in the file's order, or all of them."""
        return self if n is None else self.take(np.arange(min(n, len(self))))

    def filtered(self, *, seen: Seen, warm_until: int | None) -> DomainQueries:
        """The same queries under another filter: with or without items had before, and with warm items alone.

        Queries whose target the filter would take away are left out.
        """
        keep = np.ones(len(self), dtype=bool)
        if seen == "exclude":
            keep &= ~self.is_repeat
        if warm_until is not None:
            keep &= self.catalogue.first_ts[self.targets] < warm_until
        return replace(self.take(np.flatnonzero(keep)), excludes_seen=seen == "exclude", warm_until=warm_until)


def load_queries(folder: str | os.PathLike[str], domain: str) -> DomainQueries:
    """Queries and catalogue of one domain. Raises DataError for an unknown domain, altered files or a wrong schema."""
    manifest = read_queries_manifest(folder)
    if domain not in manifest.domains:
        raise DataError(f"{folder} has no queries of domain {domain!r}; {did_you_mean(domain, manifest.domains)}")
    path, items_path = (Path(folder) / f"{domain}{suffix}" for suffix in (".parquet", ".items.parquet"))
    catalogue = _read_catalogue(items_path)
    return _read_queries(path, domain, catalogue, manifest)


def _read_catalogue(path: Path) -> Catalogue:
    table = _read(path, ITEM_COLUMNS)
    if table["item"].to_pylist() != list(range(len(table))):
        raise DataError(f"{path}: column item is not 0, 1, 2, ... in order; prepare the queries again")
    return Catalogue(item_ids=table["item_id"].to_pylist(), titles=table["title"].to_pylist(),
                     lines=table["line"].to_pylist(), n_train=_ints(table["n_train"]),
                     first_ts=_ints(table["first_ts"]))


def _read_queries(path: Path, domain: str, catalogue: Catalogue, manifest: QueriesManifest) -> DomainQueries:
    table = _read(path, QUERY_COLUMNS)
    histories, seen, targets = _ragged(table["history"]), _ragged(table["seen"]), _ints(table["target"])
    for name, numbers in (("history", histories.values), ("seen", seen.values), ("target", targets)):
        wrong = numbers[(numbers < 0) | (numbers >= len(catalogue))]
        if len(wrong):
            raise DataError(f"{path}: column {name} names item {wrong[0]}, the catalogue has {len(catalogue)} items; "
                            f"prepare the queries again")
    if manifest.seen == "exclude":
        again = [i for i in range(len(targets)) if targets[i] in seen[i]]
        if again:
            raise DataError(f"{path}: row {again[0]}: the target is among the seen items, which the manifest excludes; "
                            f"prepare the queries again")
    return DomainQueries(
        domain=domain, catalogue=catalogue, excludes_seen=manifest.seen == "exclude",
        user_ids=table["user_id"].to_pylist(), histories=histories, seen=seen, targets=targets,
        query_ts=_ints(table["query_ts"]), is_repeat=table["is_repeat"].to_numpy(), is_cold=table["is_cold"].to_numpy())


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowInvalid) as e:
        raise DataError(f"{path} is not readable Parquet: {e}; prepare the queries again") from None
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}; "
                        f"prepare the queries again")
    return table


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _ragged(column: pa.ChunkedArray) -> Ragged:
    lists: Any = column.combine_chunks()
    lengths = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True)
class Prompt:
    """Token ids of one query's prompt, and how many of the oldest items it left out to fit."""

    ids: list[int]
    n_dropped: int


def encode_lines(template: Template, tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int]]:
    """Ids of each item's text as it stands in a document, be it in the history or as the target.

    Raises DataError where a tokenizer merges it with what stands before it, or where that changes its ids.
    """
    encoded = tokenizer.encode_after(template.any_line, lines)
    for before in (template.lead_in, template.before_target or ""):
        for line, ids, here in zip(lines, encoded, tokenizer.encode_after(before, lines) if before else encoded,
                                   strict=True):
            if ids != here:
                raise DataError(f"tokenizer {tokenizer.name} encodes {line[:200]!r} after {before[-20:]!r} as "
                                f"{here[:9]} ..., after an item as {ids[:9]} ...: it cannot be ranked with template "
                                f"{template.name!r}")
    return encoded


class Prompts:
    """Prompts as documents begin in training, up to the item to predict: [bos], the lead-in, the history's items, and
    what a supervised template has before the target; never a cut item."""

    def __init__(self, template: Template, tokenizer: Tokenizer, lines: list[list[int]], *, max_tokens: int) -> None:
        self._start = tokenizer.encode_start(template.lead_in)
        self._before_target = tokenizer.encode_after(template.any_line, [template.before_target or ""])[0]
        self._lines = lines
        self._room = max_tokens - len(self._start) - len(self._before_target)
        if self._room < 0 or not self._start:
            raise ConfigError(f"a prompt of at most {max_tokens} tokens cannot hold the lead-in of template "
                              f"{template.name!r} ({max_tokens - self._room} tokens); rank with a model of a longer "
                              f"context")

    def prompt(self, history: Ints) -> Prompt:
        """The prompt of a history, oldest items dropped whole where all do not fit."""
        lens = [len(self._lines[i]) for i in history[::-1]]
        n_kept = int(np.searchsorted(np.cumsum(lens), self._room, side="right"))
        kept = history[len(history) - n_kept:]
        ids = [*self._start, *(t for i in kept for t in self._lines[i]), *self._before_target]
        return Prompt(ids, len(history) - n_kept)
