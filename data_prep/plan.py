"""Which documents a history becomes, and which documents share a row: decided from lengths alone.

reads: nothing. writes: nothing. Costs about 70 bytes per document of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cprec.format import ITEM_BITS
from data_prep.ragged import Ints
from data_prep.records import PackMode


@dataclass(frozen=True)
class Documents:
    """The documents of one part, one entry per document, in the order of their ids."""

    ids: Ints
    n_items: Ints
    n_tokens: Ints
    n_target_tokens: Ints
    """Tokens at its end that the loss is taken on; all of `n_tokens` but for templates with a target."""
    first_event: Ints
    """Where its items start in `events`."""
    events: npt.NDArray[np.int32]
    """Catalogue numbers of the part's histories, end to end."""
    dropped: dict[int, int]
    """Item whose line alone does not fit into a row -> how many of its events were dropped."""
    n_alone: int = 0
    """Events dropped because nothing stood before them, where a template needs a history before its target."""

    def __len__(self) -> int:
        return len(self.ids)


def document_ids(history_ids: Ints, first_items: Ints) -> Ints:
    """Ids of the documents that start at these items of these histories; see `cprec.format.ITEM_BITS`."""
    ids: Ints = (history_ids << ITEM_BITS) | first_items
    return ids


@dataclass(frozen=True)
class Runs:
    """Consecutive items of histories, in order: one run is what one document holds."""

    place: Ints
    """Which history, by its place among those given."""
    first_item: Ints
    n_items: Ints
    n_tokens: Ints
    """Tokens of its items."""
    dropped: dict[int, int]
    """Item whose line alone does not fit -> its events."""
    n_alone: int
    """Events in runs of too few items."""


def cut_histories(events: npt.NDArray[np.int32], lengths: Ints, line_lens: npt.NDArray[np.int32], *, room: int,
                  min_items: int = 1) -> Runs:
    """Cut each history at item borders into runs of at most `room` tokens.

    `events` are the histories' items end to end, `lengths` how many each has, `line_lens` tokens by catalogue number.
    Dropped are events of items whose line alone does not fit; and those in a run of fewer than `min_items` (1 or 2), to
    which the run before has no item to give.
    """
    starts = np.cumsum(lengths) - lengths
    event_tokens = line_lens[events]
    totals = np.add.reduceat(event_tokens, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)
    long = np.flatnonzero((totals > room) | (lengths < min_items))
    if not len(long):
        return Runs(np.arange(len(lengths)), np.zeros_like(lengths), lengths, totals, {}, 0)
    dropped: dict[int, int] = {}
    n_alone = 0
    cuts: list[tuple[int, int, int, int]] = []
    for history in long.tolist():  # few: only histories longer than a row
        mine = slice(int(starts[history]), int(starts[history] + lengths[history]))
        tokens = event_tokens[mine].tolist()
        for item in events[mine][event_tokens[mine] > room].tolist():
            dropped[item] = dropped.get(item, 0) + 1
        runs = cut_to_fit(tokens, room=room)
        if min_items == 2:
            runs = _with_company(runs, tokens, room=room)
        cuts += [(history, first, n, sum(tokens[first:first + n])) for first, n in runs if n >= min_items]
        n_alone += sum(n for _, n in runs if n < min_items)
    whole = np.setdiff1d(np.arange(len(lengths)), long, assume_unique=True)
    cut = np.array(cuts, dtype=np.int64).reshape(-1, 4).T
    place = np.concatenate([whole, cut[0]])
    order = np.argsort(place, kind="stable")
    first, n_items, n_tokens = (np.concatenate([of_whole, of_cut])[order] for of_whole, of_cut in zip(
        (np.zeros_like(whole), lengths[whole], totals[whole]), cut[1:], strict=True))
    return Runs(place[order], first, n_items, n_tokens, dropped, n_alone)


def cut_to_fit(item_tokens: Sequence[int], *, room: int) -> list[tuple[int, int]]:
    """Runs (first, n) of consecutive items of at most `room` tokens each, as few as possible, covering every item
    that fits on its own.

    >>> cut_to_fit([3, 4, 5, 9, 2], room=8)  # 3 + 4, then 5; the item of 9 tokens fits nowhere
    [(0, 2), (2, 1), (4, 1)]
    """
    runs: list[tuple[int, int]] = []
    first, used = 0, 0
    for i, n_tokens in enumerate([*item_tokens, room + 1]):  # the sentinel closes the last run
        if used + n_tokens > room:
            if i > first:
                runs.append((first, i - first))
            first, used = i, 0
        if n_tokens > room:
            first = i + 1
        else:
            used += n_tokens
    return runs


def _with_company(runs: Sequence[tuple[int, int]], item_tokens: Sequence[int], *,
                  room: int) -> list[tuple[int, int]]:
    """The runs, where a single item gets the one before it from a run that keeps two or more, if both fit."""
    moved: list[tuple[int, int]] = []
    for first, n in runs:
        if n == 1 and moved and sum(moved[-1]) == first and moved[-1][1] > 2 and sum(
                item_tokens[first - 1:first + 1]) <= room:
            moved[-1] = (moved[-1][0], moved[-1][1] - 1)
            first, n = first - 1, 2
        moved.append((first, n))
    return moved


@dataclass(frozen=True)
class RowPlan:
    """Pieces of documents in the order in which they stand in the rows; a piece is a whole document but in `concat`."""

    docs: Ints
    """(n_pieces,): which document, by its place among the part's."""
    n_tokens: Ints
    """(n_pieces,): tokens of the piece."""
    pieces_per_row: Ints
    """(n_rows,)"""
    skips: Ints
    """(n_pieces,): tokens of its document that stand in rows before."""

    def rows(self, first: int, n: int) -> RowPlan:
        """The plan of `n` rows from row `first` on."""
        ends = np.concatenate([[0], np.cumsum(self.pieces_per_row)])
        here = slice(int(ends[first]), int(ends[min(first + n, len(self.pieces_per_row))]))
        return RowPlan(self.docs[here], self.n_tokens[here], self.pieces_per_row[first:first + n], self.skips[here])


EXCHANGED = 32
"""One row in so many gives its documents to fill the gaps of the others."""


def best_fit(n_tokens: Ints, *, seq_len: int) -> RowPlan:
    """Best-fit decreasing, and then the gaps of its rows filled by exchange.

    The documents of every 32nd row are taken out. A row with g tokens free gives up a document of n tokens for one of
    n + g out of those, else for one that leaves it less room; what is then left of them is packed anew. Documents of
    any lengths fill their rows so to within a token in a thousand, where best fit alone leaves two or more.
    """
    plan = best_fit_decreasing(n_tokens, seq_len=seq_len)
    is_taken = np.arange(len(plan.pieces_per_row)) % EXCHANGED == EXCHANGED - 1
    of_taken = np.repeat(is_taken, plan.pieces_per_row)
    kept, left = _exchange(plan.docs[~of_taken], plan.pieces_per_row[~is_taken], plan.docs[of_taken], n_tokens, seq_len)
    again = best_fit_decreasing(n_tokens[left], seq_len=seq_len)
    docs = np.concatenate([kept, left[again.docs]])
    return RowPlan(docs, n_tokens[docs], np.concatenate([plan.pieces_per_row[~is_taken], again.pieces_per_row]),
                   np.zeros_like(docs))


def _exchange(kept: Ints, per_row: Ints, taken: Ints, n_tokens: Ints, seq_len: int) -> tuple[Ints, Ints]:
    """The documents of the kept rows, and those taken out, after exchanges that leave less room in the rows."""
    kept, ends = kept.copy(), np.cumsum(per_row)
    lens = n_tokens[kept]
    gaps = seq_len - np.add.reduceat(lens, ends - per_row) if len(ends) else ends
    pool: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by length
    for doc, n in zip(taken.tolist(), n_tokens[taken].tolist(), strict=True):
        pool[n].append(doc)
    lengths = sum(1 << n for n in set(n_tokens[taken].tolist()))  # bit n is set where the pool has one of n tokens
    for row in np.flatnonzero(gaps).tolist():
        begin, gap = int(ends[row] - per_row[row]), int(gaps[row])
        # how much longer the longest is that fits in place of each document: the highest bit of those n + 1 to n + gap
        longer_by = [((lengths >> n + 1) & ((1 << gap) - 1)).bit_length() for n in lens[begin:ends[row]].tolist()]
        most = max(longer_by)
        if most:
            place = begin + longer_by.index(most)
            n = int(lens[place])
            longer = pool[n + most].pop()
            lengths ^= (not pool[n + most]) << n + most
            pool[n].append(int(kept[place]))
            lengths |= 1 << n
            kept[place] = longer
    return kept, np.array(sorted(doc for docs in pool for doc in docs), dtype=np.int64)


def best_fit_decreasing(n_tokens: Ints, *, seq_len: int) -> RowPlan:
    """The longest document first, each into the fullest row that still takes it.

    Documents of one length are placed together: the smallest space s >= n that some row has is filled with s // n of
    them at once, which is what placing them one by one gives, since each leaves that row the fullest that takes the
    next. So the work grows with the number of different lengths and spaces; ties go to the earlier document, and to
    the row that came to its space last.

    >>> plan = best_fit_decreasing(np.array([5, 2, 6, 3]), seq_len=8)
    >>> plan.n_tokens.tolist(), plan.pieces_per_row.tolist()  # a row of 6 + 2, and one of 5 + 3
    ([6, 2, 5, 3], [2, 2])
    """
    assert len(n_tokens) == 0 or 0 < n_tokens.min() <= n_tokens.max() <= seq_len < 1 << 16, "lengths beyond a row"
    order = np.argsort((seq_len - n_tokens).astype(np.uint16), kind="stable")
    lengths, counts = np.unique(n_tokens, return_counts=True)
    rows_with: list[list[int]] = [[] for _ in range(seq_len + 1)]
    open_spaces = 0  # bit s is set where some row has exactly s free: the smallest s >= n is its lowest bit from n on
    n_rows = 0
    visited: list[int] = []  # rows, each time that documents of one length are put into them
    visits: list[tuple[int, int, int]] = []  # (rows, documents for each, documents for the last)
    for n, todo in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while todo:
            if fitting := open_spaces >> n:
                space = n + (fitting & -fitting).bit_length() - 1
            else:
                space = seq_len
                each = seq_len // n
                opened = -(-todo // each)
                rows_with[space] = list(range(n_rows + opened - 1, n_rows - 1, -1))  # taken from the end
                n_rows += opened
            rows, each = rows_with[space], space // n
            taken = rows[:-min(len(rows), -(-todo // each)) - 1:-1]
            del rows[-len(taken):]
            last = min(todo - each * (len(taken) - 1), each)
            todo -= each * (len(taken) - 1) + last
            visited += taken
            visits.append((len(taken), each, last))
            open_spaces = open_spaces & ~(1 << space) if not rows else open_spaces | 1 << space
            for left, some in ((space - n * each, taken[:-1]), (space - n * last, taken[-1:])):
                if left and some:
                    rows_with[left] += some
                    open_spaces |= 1 << left
    return _by_row(order, n_tokens, np.array(visited, np.int64), np.array(visits, np.int64).reshape(-1, 3), n_rows)


def _by_row(order: Ints, n_tokens: Ints, visited: Ints, visits: Ints, n_rows: int) -> RowPlan:
    """The plan of documents `order`, laid into rows `visited` as `visits` (rows, documents for each, for the last)
    says; in a row the longer document comes first."""
    n_taken, each, last = visits.T
    per_visit = np.repeat(each, n_taken)
    per_visit[np.cumsum(n_taken) - 1] = last
    row_of = np.repeat(visited, per_visit)
    # a stable sort by row, as two radix passes over 16 bits each
    by_row = np.argsort((row_of & 0xFFFF).astype(np.uint16), kind="stable")
    by_row = by_row[np.argsort((row_of >> 16).astype(np.uint16)[by_row], kind="stable")]
    docs = order[by_row]
    return RowPlan(docs, n_tokens[docs], np.bincount(row_of, minlength=n_rows), np.zeros_like(docs))


def one_per_row(n_tokens: Ints, *, seq_len: int) -> RowPlan:
    """Each document in a row of its own."""
    assert len(n_tokens) == 0 or n_tokens.max() <= seq_len, "a document longer than a row"
    docs = np.arange(len(n_tokens))
    return RowPlan(docs, n_tokens, np.ones_like(docs), np.zeros_like(docs))


def concat(n_tokens: Ints, *, seq_len: int) -> RowPlan:
    """Documents end to end, cut where a row ends; for comparison with stacks that train so."""
    ends = np.cumsum(n_tokens)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.union1d(ends, np.arange(seq_len, total, seq_len))
    starts = np.concatenate([[0], borders[:-1]])[:len(borders)]
    docs = np.searchsorted(ends, starts, side="right")
    return RowPlan(docs, borders - starts, np.bincount(starts // seq_len), starts - (ends - n_tokens)[docs])


PACK_MODES: dict[PackMode, Callable[..., RowPlan]] = {
    "best_fit": best_fit, "concat": concat, "one_per_row": one_per_row}
