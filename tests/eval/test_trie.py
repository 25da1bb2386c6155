"""The trie: every line is one path, ranges of items are right, shared tokens are stored once."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.eval.trie import build_trie
from cprec.eval.walk import Candidates, TrieTensors

CPU = torch.device("cpu")
LINES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=30)


def test_the_example_of_the_module_is_true() -> None:
    trie = build_trie([[5, 6], [5, 6], [5], [7, 8]])
    assert trie.token.tolist() == [-1, 5, 7, 6, 8]
    assert trie.parent.tolist() == [-1, 0, 0, 1, 2]
    assert trie.depth.tolist() == [0, 1, 1, 2, 2]
    assert trie.n_children.tolist() == [2, 1, 1, 0, 0]
    assert trie.n_complete.tolist() == [0, 1, 0, 2, 1]
    assert trie.leaf_of.tolist() == [3, 3, 1, 4]
    assert trie.n_nodes == 5
    counted = Candidates(TrieTensors.of(trie, CPU), np.array([[True, False, True, True], [False] * 4]))
    complete, below = counted.count(torch.tensor([0] * 5 + [1]), torch.tensor([0, 1, 2, 3, 4, 0]))
    assert complete.tolist() == [0, 1, 0, 1, 1, 0]
    assert below.tolist() == [3, 1, 1, 0, 0, 0]
    # the deepest line below each node
    assert trie.best_below(trie.depth.astype(float)).tolist() == [2, 2, 2, -np.inf, -np.inf]


@settings(max_examples=60, deadline=None)
@given(LINES)
def test_every_item_is_found_by_its_tokens_and_every_prefix_is_one_node(lines: list[list[int]]) -> None:
    trie = build_trie(lines)
    for item, line in enumerate(lines):
        assert trie.token[trie.path(item)].tolist() == line
    prefixes = {tuple(line[:n]) for line in lines for n in range(len(line) + 1)}
    assert trie.n_nodes == len(prefixes)
    assert sorted(trie.items.tolist()) == list(range(len(lines)))


@settings(max_examples=60, deadline=None)
@given(LINES, st.integers(0, 2**30 - 1))
def test_counts_below_a_node_are_those_of_its_subtree(lines: list[list[int]], mask: int) -> None:
    trie = build_trie(lines)
    candidates = np.array([bool(mask >> i & 1) for i in range(len(lines))])
    counted = Candidates(TrieTensors.of(trie, CPU), candidates[None])
    nodes = torch.arange(trie.n_nodes)
    complete, below = counted.count(torch.zeros_like(nodes), nodes)
    deepest = trie.best_below(np.where(trie.n_complete > 0, trie.depth, 0.0))
    for node in range(trie.n_nodes):
        on_path = [node == 0 or node in trie.path(i) for i in range(len(lines))]
        ends = trie.leaf_of == node
        assert complete[node] == (candidates & ends).sum()
        assert below[node] == (candidates & on_path & ~ends).sum()
        assert deepest[node] == max((len(lines[i]) for i in np.flatnonzero(on_path & ~ends)), default=-np.inf)


@settings(max_examples=30, deadline=None)
@given(LINES)
def test_children_come_in_order_with_the_place_of_their_parent(lines: list[list[int]]) -> None:
    trie = build_trie(lines)
    nodes = np.flatnonzero(trie.n_children > 0)[::-1].copy()
    children, parents = (x.numpy() for x in TrieTensors.of(trie, CPU).children(torch.as_tensor(nodes)))
    assert (trie.parent[children] == nodes[parents]).all()
    assert len(children) == trie.n_children[nodes].sum()
