"""Which of the frozen queries an evaluation asks, and queries made worse on purpose: what a model still gets right of
those, it has not read off the history.

reads: nothing. writes: nothing. A new control is one function and one line in CONTROLS.

    shuffled-target    every query asks for the target of another one: hit rates must fall to what popularity explains
    shuffled-history   every query shows the history of another one: a model that does not suffer does not read it
    no-history         every query shows nothing: how well the titles alone are known; a language model that gives them
                       few bits per byte before any training has read the catalogue elsewhere

The users, their candidates and the filter stay, so that the results are compared user by user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from cprec.errors import DataError
from cprec.eval.queries import DomainQueries, Ragged
from cprec.eval.results import EvalInputs

SEED = 17


def chosen_queries(frozen: DomainQueries, inputs: EvalInputs, split: Mapping[str, int]) -> DomainQueries:
    """The queries that are left under the evaluation's filter, up to its limit; before its control."""
    warm_until = split["t_valid"] if inputs.items == "warm" else None
    return frozen.filtered(seen=inputs.seen, warm_until=warm_until).head(inputs.limit)


def controlled(queries: DomainQueries, control: str | None) -> DomainQueries:
    """The queries after the control of this name, or as they are."""
    return queries if control is None else CONTROLS[control](queries)


def shuffled_target(queries: DomainQueries) -> DomainQueries:
    """Each query with the target of a random other one, among those that are candidates of it and not its own target.

    Raises DataError naming a query for which there is none.
    """
    rng = np.random.default_rng(SEED)
    taken = np.zeros(len(queries), dtype=np.int64)
    for i in range(len(queries)):
        is_candidate = queries.candidates(i)
        is_candidate[queries.targets[i]] = False
        others = np.flatnonzero(is_candidate[queries.targets])
        if not len(others):
            raise DataError(f"{queries.domain}: no other query's target is a candidate of query {i} (user "
                            f"{queries.user_ids[i]}); targets of {len(queries)} queries cannot be shuffled")
        taken[i] = rng.choice(others)
    targets = queries.targets[taken]
    is_repeat = np.array([t in queries.seen[i] for i, t in enumerate(targets)], dtype=np.bool_)
    return replace(queries, targets=targets, is_cold=queries.is_cold[taken], is_repeat=is_repeat)


def shuffled_history(queries: DomainQueries) -> DomainQueries:
    """Each query with the history of another one: the queries in random order, each with that of the next. What is
    left out as seen stays the user's own. Raises DataError where there is one query only."""
    if len(queries) < 2:
        raise DataError(f"{queries.domain} has one query; histories cannot be shuffled")
    order = np.random.default_rng(SEED).permutation(len(queries))
    other = np.empty_like(order)
    other[order] = np.roll(order, -1)
    lists = [queries.histories[i] for i in other]
    return replace(queries, histories=Ragged(np.concatenate(lists), np.cumsum([0, *map(len, lists)])))


def no_history(queries: DomainQueries) -> DomainQueries:
    """Each query with an empty history."""
    empty = Ragged(np.zeros(0, dtype=np.int64), np.zeros(len(queries) + 1, dtype=np.int64))
    return replace(queries, histories=empty)


CONTROLS: dict[str, Callable[[DomainQueries], DomainQueries]] = {
    "shuffled-target": shuffled_target, "shuffled-history": shuffled_history, "no-history": no_history,
}
