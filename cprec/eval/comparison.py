"""All numbers of a comparison: metrics per domain, macro and by slice with intervals, and paired differences.

reads: finished evaluation folders of the same queries, see `cprec.eval.answers`. writes: nothing. costs: 2,000
bootstrap resamples per number and 10,000 permutations per difference, seconds for some thousands of users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from cprec.errors import DataError, did_you_mean
from cprec.eval.answers import SLICES, Evaluation, load_evaluation
from cprec.eval.metrics import METRICS, TABLE_METRICS, chance_hit_rate
from cprec.eval.results import ASKED, EvalManifest
from cprec.eval.stats import (
    Observations,
    detectable_difference,
    holm,
    mcnemar,
    mean_intervals,
    paired_differences,
    seed_deviations,
)
from cprec.format import Target

COMPARED = ("NDCG@10", "HR@10", "NLL")
"""What differences are made of; the first is the primary endpoint, on the primary row."""
MACRO_NAMES = {"pretrain": "pre-training domains (macro)", "unseen": "unseen domains (macro)"}
Folders = str | Path | Sequence[str | Path]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Record):
    """One evaluated model or baseline: what it was, and what its evaluations counted over all domains and seeds."""

    name: str
    what: list[str]
    """Per seed."""
    dtype: str
    control: str | None
    scoring: str
    rank_up_to: int | None
    """Ranks beyond are infinite."""
    n_seeds: int
    n_queries: int
    n_certified: int
    n_histories_cut: int
    """Prompts whose oldest items did not fit the model's context."""
    n_nodes: int
    """Trie prefixes put through the model."""
    n_tokens: int
    """Tokens put through the model, the prompts' included; 0 where they are not counted."""
    seconds: float

    @property
    def line(self) -> str:
        """Itself in words."""
        seeds = f"{self.n_seeds} seed{'s' if self.n_seeds > 1 else ''}"
        said = f"{self.name}: {', '.join(dict.fromkeys(self.what))}, {seeds}"
        if self.control:
            said += f", CONTROL {self.control}"
        if not self.dtype:
            return f"{said}, {self.n_queries} queries"
        said += "" if self.scoring == "sum" else f", scores {self.scoring}"
        if self.rank_up_to is not None:
            said += (f", ranks beyond {self.rank_up_to} not told apart (0 in MRR; no AUC, and no HR@K or NDCG@K of a "
                     f"larger K)")
        tokens = f", {self.n_tokens / self.n_queries:.0f} tokens" if self.n_tokens else ""
        return (f"{said}, {self.dtype}, {self.n_certified} of {self.n_queries} ranks certified, "
                f"{self.n_nodes / self.n_queries:.0f} trie prefixes{tokens} and {self.seconds / self.n_queries:.2f} s "
                f"a query, {self.n_histories_cut} histories cut to the context")


class Row(_Record):
    """One line of the tables: a domain, the macro average over all of one kind, or a slice of that."""

    name: str
    kind: Literal["pretrain", "unseen"]
    is_macro: bool
    domains: list[str]
    slice: str | None
    n_queries: int
    n_users: int
    n_items: int
    """Catalogue size; summed in a macro row."""
    chance_hr10: float
    """Expected HR@10 of a random order of the candidates."""
    detectable_hr10: float
    """Smallest difference in HR@10 that a paired test of so many users finds with 80 % power, if it is two-sided at
    5 % and 8 % of them are hit by one of the two models only."""


class Cell(_Record):
    """One metric of one model in one row, with its 95 % interval over users and seeds."""

    row: str
    model: str
    metric: str
    mean: float
    low: float
    high: float
    seed_sd: float | None
    """Standard deviation of the mean over seeds; null with one."""


class Coverage(_Record):
    """Share of the catalogue in somebody's ten best (of the first seed); it grows with the number of users. There is
    none where shorter lists were asked for."""

    row: str
    model: str
    share: float


class Versus(_Record):
    """Difference of a model to the reference in one row, paired over users."""

    row: str
    model: str
    reference: str
    metric: str
    mean: float
    low: float
    high: float
    p: float
    """Of a sign-flip permutation over users, two-sided."""
    p_holm: float
    """Adjusted for all differences of its family: those of the primary endpoint, or all others."""
    p_mcnemar: float | None
    """Exact, not adjusted; of hit rates with one query per user and one seed."""
    is_primary: bool


class Report(_Record):
    """All numbers of a comparison, and how the queries were made. A metric that is not defined for all of a model's
    answers has no cell: NLL without a probability, AUC of infinite ranks."""

    models: list[Entry]
    protocol: str
    """See `cprec.eval.protocols`; one for all."""
    regime: Literal["overlap", "disjoint"]
    target: Target
    seen: Literal["exclude", "include"]
    items: Literal["all", "warm"]
    split: dict[str, int]
    split_hash: str
    n_query_sets: int
    """Different sets of queries among the seeds: orders of tied events."""
    limit: int | None
    rows: list[Row]
    slices: list[Row]
    cells: list[Cell]
    coverage: list[Coverage]
    differences: list[Versus]


def make_report(folders: Mapping[str, Folders], *, reference: str | None = None) -> Report:
    """Report over evaluation folders by name; several folders of one name are its seeds. With `reference`, every other
    model's difference to that one.

    Raises DataError when the evaluations did not answer the same queries by the same protocol, two seeds are one and
    the same, or the reference is none of them.
    """
    models = {name: [load_evaluation(f) for f in _listed(given)] for name, given in folders.items()}
    _refuse_other_queries(models)
    if reference is not None and reference not in models:
        raise DataError(f"reference {reference!r} is none of the models; {did_you_mean(reference, models)}")
    first = next(iter(models.values()))[0]
    rows = list(_rows(first))
    slices = list(_slices(first, rows))
    cells = [cell for row in [*rows, *slices] for name, seeds in models.items()
             for cell in _cells(row, name, TABLE_METRICS if row.slice else METRICS, seeds)]
    m = first.manifest
    hashes = {e.manifest.inputs.queries_hash for seeds in models.values() for e in seeds}
    return Report(
        models=[_entry(name, seeds) for name, seeds in models.items()], protocol=m.inputs.protocol, regime=m.regime,
        target=m.target, seen=m.seen, items=m.inputs.items, split=m.split, split_hash=m.split_hash,
        n_query_sets=len(hashes), limit=m.inputs.limit, rows=rows, slices=slices, cells=cells,
        differences=[] if reference is None else _differences(rows, models, reference),
        coverage=[Coverage(row=row.name, model=name, share=share) for row in rows for name, seeds in models.items()
                  if (share := seeds[0].coverage(row.domains)) is not None])


def _listed(given: Folders) -> list[str | Path]:
    return [given] if isinstance(given, str | Path) else list(given)


def short_name(manifest: EvalManifest) -> str:
    """What a table calls a model whose user gave no name: a baseline's name, or the end of its path."""
    baseline = manifest.inputs.model.removeprefix("baseline:")
    return baseline if baseline != manifest.inputs.model else "/".join(Path(baseline).parts[-2:])


def _refuse_other_queries(models: Mapping[str, Sequence[Evaluation]]) -> None:
    """Raise DataError unless all seeds ask about the same domains by one protocol and filter, those of one model in one
    way, and each model answers the queries of the others in the same order (or one set of them only, which all others
    answer)."""
    every = [e for seeds in models.values() for e in seeds]
    for other in every[1:]:
        for field in ASKED:
            _refuse(every[0], other, field)
    for name, seeds in models.items():
        for other in seeds[1:]:
            for field in ("control", "scoring", "rank_up_to", "top_k", "dtype"):
                _refuse(seeds[0], other, field)
        _refuse_one_seed_twice(name, seeds)
    longest = max(models.values(), key=len)
    for seeds in models.values():
        if len(seeds) not in (1, len(longest)):
            raise DataError(f"{len(seeds)} seeds ({', '.join(e.folder for e in seeds)}) cannot be held against "
                            f"{len(longest)} ({', '.join(e.folder for e in longest)}); give one or as many")
        for i, theirs in enumerate(longest):
            _refuse(theirs, seeds[i if len(seeds) > 1 else 0], "queries_hash")


def _refuse_one_seed_twice(name: str, seeds: Sequence[Evaluation]) -> None:
    """Raise DataError where two seeds are the same weights on the same queries: they would vary by nothing."""
    first: dict[tuple[str, str], str] = {}
    for e in seeds:
        made_of = e.manifest.inputs.model_hash, e.manifest.inputs.queries_hash
        if made_of in first:
            raise DataError(f"{name}: {first[made_of]} and {e.folder} are one model on one set of queries, not two "
                            f"seeds; give each of them once")
        first[made_of] = e.folder


def _refuse(a: Evaluation, b: Evaluation, field: str) -> None:
    theirs, ours = (getattr(e.manifest.inputs, field) for e in (a, b))
    if theirs != ours:
        raise DataError(f"{a.folder} and {b.folder} did not answer the same queries in the same way: {field} is "
                        f"{theirs} and {ours}; evaluate both with the same queries and options")


def _entry(name: str, seeds: Sequence[Evaluation]) -> Entry:
    domains = [d for e in seeds for d in e.manifest.domains.values()]
    inputs = [e.manifest.inputs for e in seeds]
    return Entry(name=name, what=[i.model for i in inputs], dtype=inputs[0].dtype, control=inputs[0].control,
                 scoring=inputs[0].scoring, rank_up_to=inputs[0].rank_up_to, n_seeds=len(seeds),
                 n_queries=sum(d.n_queries for d in domains),
                 n_certified=sum(d.n_certified for d in domains), n_nodes=sum(d.n_nodes for d in domains),
                 n_tokens=sum(d.n_tokens for d in domains),
                 n_histories_cut=sum(d.n_histories_cut for d in domains), seconds=sum(d.seconds for d in domains))


def _rows(evaluation: Evaluation) -> Iterator[Row]:
    """Every domain of a kind, then the kind's macro average; pre-training domains first."""
    for kind in MACRO_NAMES:
        domains = [d for d, s in evaluation.manifest.domains.items() if s.kind == kind]
        yield from (_row(evaluation, d, [d]) for d in domains)
        if len(domains) > 1:
            yield _row(evaluation, MACRO_NAMES[kind], domains)


def _slices(evaluation: Evaluation, rows: Iterable[Row]) -> Iterator[Row]:
    """Of each kind, over all its domains, every slice that some but not all of the queries are in."""
    for whole in {row.kind: row for row in rows}.values():  # the macro row, or the only domain's
        for name, is_in in SLICES.items():
            sizes = {d: int(is_in(evaluation.domains[d]).sum()) for d in whole.domains}
            if 0 < sum(sizes.values()) < whole.n_queries:
                yield _row(evaluation, f"{whole.name}: {name}", [d for d, n in sizes.items() if n], name)


def _row(evaluation: Evaluation, name: str, domains: list[str], slice_name: str | None = None) -> Row:
    here = [evaluation.domains[d] for d in domains]
    chosen = [d.chosen(slice_name) for d in here]
    users = {d.users[i] for d, mask in zip(here, chosen, strict=True) for i in np.flatnonzero(mask)}
    chance = [chance_hit_rate(d.answers.n_candidates[mask]) for d, mask in zip(here, chosen, strict=True)]
    return Row(name=name, kind=evaluation.manifest.domains[domains[0]].kind, is_macro=len(domains) > 1, domains=domains,
               slice=slice_name, n_queries=int(sum(mask.sum() for mask in chosen)), n_users=len(users),
               n_items=sum(d.n_items for d in here), chance_hr10=float(np.mean(chance)),
               detectable_hr10=detectable_difference(len(users)))


def _observed(row: Row, metrics: Iterable[str],
              models: Sequence[Sequence[Evaluation]]) -> tuple[list[str], list[list[Observations]]]:
    """Those of the metrics that are defined for all queries of all models, and their values: per model and seed."""
    asked = list(metrics)
    found = [[e.observations(asked, row.domains, row.slice) for e in seeds] for seeds in models]
    is_there = ~np.isnan(np.concatenate([x.values for seeds in found for x in seeds])).any(axis=0)
    if not all(len(x.values) for seeds in found for x in seeds):  # a control's targets may be in no such slice
        is_there[:] = False
    kept = [[Observations(x.values[:, is_there], x.users, x.domains) for x in seeds] for seeds in found]
    return [m for m, there in zip(asked, is_there, strict=True) if there], kept


def _cells(row: Row, name: str, metrics: Iterable[str], seeds: Sequence[Evaluation]) -> list[Cell]:
    defined, (observed,) = _observed(row, metrics, [seeds])
    if not defined:
        return []
    deviations: Sequence[float | None] = seed_deviations(observed) or [None] * len(defined)
    return [Cell(row=row.name, model=name, metric=metric, mean=i.mean, low=i.low, high=i.high, seed_sd=sd)
            for metric, i, sd in zip(defined, mean_intervals(observed), deviations, strict=True)]


def _differences(rows: Sequence[Row], models: Mapping[str, Sequence[Evaluation]], reference: str) -> list[Versus]:
    primary = _primary(rows)
    found = [versus for row in rows for name in models if name != reference
             for versus in _versus(row, name, reference, models, is_primary=row is primary)]
    adjusted: dict[int, float] = {}
    for family in (True, False):
        places = [i for i, v in enumerate(found) if v.is_primary is family]
        adjusted |= zip(places, holm([found[i].p for i in places]), strict=True)
    return [v.model_copy(update={"p_holm": adjusted[i]}) for i, v in enumerate(found)]


def _primary(rows: Sequence[Row]) -> Row:
    """The row of the primary endpoint: over the unseen domains, or over the others where there are none."""
    return rows[-1]  # unseen domains come last, and their macro average after them


def _versus(row: Row, name: str, reference: str, models: Mapping[str, Sequence[Evaluation]], *,
            is_primary: bool) -> Iterator[Versus]:
    """Of every metric that both have; not yet adjusted."""
    defined, (a, b) = _observed(row, COMPARED, [models[name], models[reference]])
    for k, (metric, d) in enumerate(zip(defined, paired_differences(a, b), strict=True)):
        hits = [Observations(x.values[:, k], x.users, x.domains) for x in (a[0], b[0])]
        exact = mcnemar(*hits) if metric.startswith("HR") and len(a) == len(b) == 1 else None
        yield Versus(row=row.name, model=name, reference=reference, metric=metric, mean=d.mean, low=d.low, high=d.high,
                     p=d.p, p_holm=d.p, p_mcnemar=exact, is_primary=is_primary and metric == COMPARED[0])
