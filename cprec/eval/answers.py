"""Finished evaluations together with the queries that they answered: what every metric and every slice is made of.

reads: evaluation folders, and the queries folders that their manifests name. writes: nothing. costs: holds all answers
of the evaluations at hand, 100 bytes a query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.eval.controls import chosen_queries, controlled
from cprec.eval.metrics import METRICS, Answers, Floats, coverage
from cprec.eval.queries import Catalogue, DomainQueries, Ints, load_queries
from cprec.eval.results import EvalInputs, EvalManifest, read_evaluation
from cprec.eval.stats import Observations
from cprec.format import MANIFEST, file_hash

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DomainAnswers:
    """Answers to one domain's queries; entry i of every field is of query i."""

    answers: Answers
    users: list[str]
    top10: list[Ints]
    n_items: int
    """Size of the catalogue."""
    n_history: Ints
    """Items in the history."""
    is_cold: Bools
    is_repeat: Bools
    is_head: Bools
    """The target is one of the most bought items that make up half of the training events."""

    def chosen(self, slice_name: str | None) -> Bools:
        """Which queries are in the slice; None: all."""
        return np.ones(len(self.users), dtype=np.bool_) if slice_name is None else SLICES[slice_name](self)


Slice = Callable[[DomainAnswers], Bools]
SLICES: dict[str, Slice] = {
    "history of 1 to 5": lambda d: d.n_history <= 5,
    "history of 6 to 20": lambda d: (d.n_history > 5) & (d.n_history <= 20),
    "history of more than 20": lambda d: d.n_history > 20,
    "warm target": lambda d: ~d.is_cold,
    "cold target": lambda d: d.is_cold,
    "head target": lambda d: d.is_head,
    "tail target": lambda d: ~d.is_head,
    "new target": lambda d: ~d.is_repeat,
    "repeated target": lambda d: d.is_repeat,
}
"""Which queries of a domain a slice has. Those that hold all queries, or none, are not shown."""


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation."""

    folder: str
    manifest: EvalManifest
    domains: dict[str, DomainAnswers]

    def observations(self, metrics: Sequence[str], domains: Sequence[str],
                     slice_name: str | None = None) -> Observations:
        """The metrics' values of every query of the domains, or of those in the slice, (queries, metrics); domains
        without one are left out."""
        values, users, numbers = [np.zeros((0, len(metrics)))], [], [np.zeros(0, dtype=np.int64)]
        for name in domains:
            of = self.domains[name]
            chosen = of.chosen(slice_name)
            if chosen.any():
                values.append(np.stack([METRICS[m](of.answers)[chosen] for m in metrics], axis=1))
                users += [of.users[i] for i in np.flatnonzero(chosen)]
                numbers.append(np.full(int(chosen.sum()), len(numbers) - 1))
        return Observations(np.concatenate(values), users, np.concatenate(numbers))

    def coverage(self, domains: Sequence[str]) -> float | None:
        """Mean over the domains of the share of the catalogue that is in somebody's ten best; None where the lists were
        asked to be shorter."""
        if self.manifest.inputs.top_k < 10:
            return None
        return float(np.mean([coverage(self.domains[d].top10, self.domains[d].n_items) for d in domains]))


def load_evaluation(folder: str | Path) -> Evaluation:
    """The evaluation, its queries read again. Raises DataError when either is missing, or the queries are others."""
    manifest = read_evaluation(folder)
    inputs = manifest.inputs
    path = Path(inputs.queries) / MANIFEST
    if not path.is_file() or file_hash(path) != inputs.queries_hash:
        found = "are others now" if path.is_file() else "are not there"
        raise DataError(f"{folder} answered the queries in {inputs.queries}, which {found}; start where the folder is, "
                        f"or evaluate again")
    domains = {}
    for domain in manifest.domains:
        chosen = chosen_queries(_queries(inputs.queries, domain, inputs.queries_hash), inputs, manifest.split)
        queries = controlled(chosen, inputs.control)
        table = pq.read_table(Path(folder) / f"{domain}.parquet", partitioning=None)
        if table["user_id"].to_pylist() != queries.user_ids:
            raise DataError(f"{folder}/{domain}.parquet has other users than {inputs.queries}; evaluate again")
        domains[domain] = _joined(table, queries, inputs, n_history=np.diff(chosen.histories.offsets))
    return Evaluation(str(folder), manifest, domains)


@functools.lru_cache(maxsize=64)
def _queries(folder: str, domain: str, _manifest_hash: str) -> DomainQueries:
    return load_queries(folder, domain)


def _joined(table: pa.Table, queries: DomainQueries, inputs: EvalInputs, *, n_history: Ints) -> DomainAnswers:
    catalogue = queries.catalogue
    top10 = [np.asarray(items[:10], dtype=np.int64) for items in table["top10"].to_pylist()]
    line_bytes = np.array([len(catalogue.lines[t].encode()) for t in queries.targets], dtype=np.float64)
    events = [catalogue.n_train[items].mean() if len(items) else 0.0 for items in top10]
    answers = Answers(
        rank=_floats(table, "rank"), known_up_to=np.full(len(table), inputs.rank_up_to or np.inf),
        n_candidates=_floats(table, "n_candidates"), nll=_floats(table, "nll"), n_bytes=line_bytes,
        top10_events=np.where(inputs.top_k < 10, np.nan, events),
        valid=np.nan_to_num(_floats(table, "valid_share"), nan=1.0))
    return DomainAnswers(
        answers=answers, users=queries.user_ids, top10=top10, n_items=len(catalogue),
        n_history=n_history, is_cold=queries.is_cold,
        is_repeat=queries.is_repeat, is_head=_is_head(catalogue)[queries.targets])


def _is_head(catalogue: Catalogue) -> Bools:
    """Of every item, whether the items bought more often make up less than half of the training events."""
    order = np.argsort(-catalogue.n_train, kind="stable")
    before = np.cumsum(catalogue.n_train[order]) - catalogue.n_train[order]
    head = np.zeros(len(catalogue), dtype=np.bool_)
    head[order] = (2 * before < catalogue.n_train.sum()) & (catalogue.n_train[order] > 0)
    return head


def _floats(table: pa.Table, column: str) -> Floats:
    """A numeric column as float64, null as NaN."""
    return np.asarray(table[column].to_numpy(), dtype=np.float64)
