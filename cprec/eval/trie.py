"""A token trie over a catalogue's lines, as flat arrays: what the exact search walks instead of single titles.

reads: the lines' token ids. writes: nothing. costs: about 40 bytes a node plus one sort of the lines; a catalogue of
17,000 titles has some 130,000 nodes.

Nodes are numbered level by level, so that a node's children are neighbours, and items are kept in the lexicographic
order of their tokens, so that the items below a node are neighbours too:

    lines [5 6] [5 6] [5] [7 8]      node   token  parent  items it completes  items below
                                     0      -      -       -                   all four
                                     1      5      0       [5]                 [5 6] [5 6]
                                     2      7      0       -                   [7 8]
                                     3      6      1       [5 6] [5 6]         -
                                     4      8      2       [7 8]               -
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trie:
    """Node arrays of one length, the root first; `items` holds every item number once, in the order of its tokens.

    A node's own subtree is `items[item_start:item_stop]`, and the first `n_complete` of these are the items whose
    line ends at the node: several when token sequences are equal, none at most inner nodes.
    """

    token: Ints
    parent: Ints
    depth: Ints
    first_child: Ints
    n_children: Ints
    item_start: Ints
    n_complete: Ints
    item_stop: Ints
    items: Ints
    leaf_of: Ints
    """Item -> the node that completes it."""

    @property
    def n_nodes(self) -> int:
        """Nodes with the root; those with children are what an unpruned search would forward."""
        return len(self.token)

    def path(self, item: int) -> Ints:
        """Nodes from the root's child down to the node that completes `item`."""
        nodes = [int(self.leaf_of[item])]
        while (parent := int(self.parent[nodes[-1]])) > 0:
            nodes.append(parent)
        return np.array(nodes[::-1], dtype=np.int64)

    def best_below(self, values: Floats) -> Floats:
        """The largest of the nodes' values strictly below each node; -inf where there is nothing below."""
        best = np.full(self.n_nodes, -np.inf)
        for first, stop in reversed(list(itertools.pairwise(np.append(np.unique(self.depth, return_index=True)[1],
                                                                      self.n_nodes)))):
            nodes = np.arange(max(first, 1), stop)
            np.maximum.at(best, self.parent[nodes], np.maximum(values[nodes], best[nodes]))
        return best


def build_trie(lines: Sequence[Sequence[int]]) -> Trie:
    """Trie of the items' lines; item i is `lines[i]`. No line may be empty; one may be the beginning of another."""
    assert len(lines) > 0 and all(len(line) > 0 for line in lines), "a line without a token has no score"
    items = np.array(sorted(range(len(lines)), key=lambda i: list(lines[i])), dtype=np.int64)
    ordered = [lines[i] for i in items]
    lens = np.array([len(line) for line in ordered])
    shared = np.array([0] + [_n_shared(a, b) for a, b in itertools.pairwise(ordered)])
    levels = [_level(depth, ordered, lens, shared) for depth in range(1, int(lens.max()) + 1)]

    sizes = [1] + [len(level.start) for level in levels]
    firsts = np.concatenate([[0], np.cumsum(sizes)])  # level -> its first node
    n_items = len(items)
    start = np.concatenate([[0], *(level.start for level in levels)])
    stop = np.concatenate([[n_items], *(level.stop for level in levels)])
    n_complete = np.concatenate([[0], *(level.n_complete for level in levels)])
    parent = np.full(len(start), -1, dtype=np.int64)
    above = np.array([0])
    for depth, level in enumerate(levels, 1):
        parent[firsts[depth]:firsts[depth + 1]] = firsts[depth - 1] + np.searchsorted(above, level.start, "right") - 1
        above = level.start
    n_children = np.bincount(parent[1:], minlength=len(parent))
    leaf_of = np.empty(n_items, dtype=np.int64)
    nodes, places = _spread(np.arange(len(start)), start, n_complete)
    leaf_of[items[places]] = nodes
    return Trie(token=np.concatenate([[-1], *(level.token for level in levels)]), parent=parent,
                depth=np.repeat(np.arange(len(sizes)), sizes), first_child=1 + np.cumsum(n_children) - n_children,
                n_children=n_children, item_start=start, n_complete=n_complete, item_stop=stop, items=items,
                leaf_of=leaf_of)


@dataclass(frozen=True)
class _Level:
    token: Ints
    start: Ints
    stop: Ints
    n_complete: Ints


def _level(depth: int, ordered: list[Sequence[int]], lens: Ints, shared: Ints) -> _Level:
    """Nodes of one depth: runs of lines, in lexicographic order, that agree in their first `depth` tokens."""
    borders = np.append(np.flatnonzero(shared < depth), len(ordered))
    runs = np.flatnonzero(lens[borders[:-1]] >= depth)
    start, stop = borders[runs], borders[runs + 1]
    ends_here = np.concatenate([[0], np.cumsum(lens == depth)])
    token = np.array([ordered[i][depth - 1] for i in start], dtype=np.int64)
    return _Level(token, start, stop, ends_here[stop] - ends_here[start])


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two lines."""
    n = min(len(a), len(b))
    return next((k for k in range(n) if a[k] != b[k]), n)


def _spread(values: Ints, starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Each value `counts` times, beside the numbers start, start + 1, ... of its range."""
    owner = np.repeat(np.arange(len(values)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return values[owner], starts[owner] + within
