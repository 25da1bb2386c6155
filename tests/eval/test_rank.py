"""Exact ranking: pruned tree search against brute-force scoring of every line by a plain forward pass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cprec.errors import CheckpointError
from cprec.eval.metrics import Ranked
from cprec.eval.rank import rank_query
from cprec.eval.trie import build_trie
from tests.eval.models import KINDS, plain_scores, random_model

VOCAB = 40
END = 1


def catalogue(n: int = 60, seed: int = 0) -> list[list[int]]:
    """Lines of 1-5 tokens and an end; with duplicates, and one that begins another even with its end."""
    rng = np.random.default_rng(seed)
    lines = [[*rng.integers(2, 12, rng.integers(1, 6)).tolist(), END] for _ in range(n - 4)]
    return [*lines, lines[3], lines[3], [*lines[5], 7, END], lines[7][:-1]]


def prompt_of(n_tokens: int, seed: int = 1) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(2, VOCAB, n_tokens)]


def brute_force(scores: list[float], target: int, candidates: np.ndarray, tolerance: float) -> float:
    others = [s for i, s in enumerate(scores) if candidates[i] and i != target]
    better = sum(s > scores[target] + tolerance for s in others)
    equal = sum(abs(s - scores[target]) <= tolerance for s in others)
    return 1 + better + equal / 2


def assert_equals_brute_force(found: Ranked, scores: list[float], target: int, candidates: np.ndarray,
                              tolerance: float = 1e-9) -> None:
    assert found.certified
    assert found.rank == brute_force(scores, target, candidates, tolerance)
    assert found.score == pytest.approx(scores[target], abs=tolerance)
    assert found.n_candidates == candidates.sum()
    by_score = sorted((i for i in range(len(scores)) if candidates[i]), key=lambda i: -scores[i])
    best = [scores[i] for i in by_score[:len(found.top_items)]]
    assert len(found.top_items) == min(10, candidates.sum()) == len(set(found.top_items.tolist()))
    np.testing.assert_allclose(found.top_scores, best, atol=tolerance)
    np.testing.assert_allclose([scores[i] for i in found.top_items], best, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.1, 0.5], ids=["flat", "peaked"])
def test_every_rank_and_top_list_equals_brute_force_in_float64(kind: str, spread: float) -> None:
    lines = catalogue()
    model, plain = (random_model(kind, vocab_size=VOCAB, spread=spread, attention=a) for a in ("cprec_tree", "sdpa"))
    prompt, trie = prompt_of(9), build_trie(lines)
    scores = plain_scores(plain, prompt, lines)
    everything = np.ones(len(lines), dtype=bool)
    for target in range(len(lines)):
        found = rank_query(model, trie, prompt, target, everything, max_nodes=7)
        assert_equals_brute_force(found, scores, target, everything)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_brute_force_in_float32_where_scores_differ_by_more_than_rounding(kind: str) -> None:
    lines = catalogue(40)
    model, plain = (random_model(kind, vocab_size=VOCAB, dtype=torch.float32, attention=a)
                    for a in ("cprec_tree", "sdpa"))
    prompt, trie = prompt_of(9), build_trie(lines)
    scores = plain_scores(plain, prompt, lines)
    everything = np.ones(len(lines), dtype=bool)
    for target in range(0, len(lines), 3):
        found = rank_query(model, trie, prompt, target, everything)
        assert_equals_brute_force(found, scores, target, everything, tolerance=1e-4)


def test_sixteen_bit_models_are_ranked_exactly_by_their_own_scores() -> None:
    lines = catalogue()
    model = random_model(vocab_size=VOCAB, dtype=torch.bfloat16)
    trie, everything = build_trie(lines), np.ones(len(lines), dtype=bool)
    found = [rank_query(model, trie, prompt_of(9), t, everything) for t in range(0, len(lines), 7)]
    assert all(f.certified for f in found)


def test_items_with_equal_tokens_tie_and_share_the_middle_rank() -> None:
    lines = [[5, END], [6, END], [5, END], [5, END], [7, END]]
    model = random_model(vocab_size=VOCAB)
    trie, everything = build_trie(lines), np.ones(5, dtype=bool)
    ranks = [rank_query(model, trie, prompt_of(4), t, everything).rank for t in range(5)]
    assert ranks[0] == ranks[2] == ranks[3]
    n_better = sum(ranks[t] < ranks[0] for t in (1, 4))
    assert ranks[0] == 1 + n_better + 2 / 2


def test_items_outside_the_candidates_never_count_and_are_never_listed() -> None:
    lines = catalogue()
    model, plain = random_model(vocab_size=VOCAB), random_model(vocab_size=VOCAB, attention="sdpa")
    prompt, trie = prompt_of(6), build_trie(lines)
    scores = plain_scores(plain, prompt, lines)
    order = np.argsort(scores)
    candidates = np.ones(len(lines), dtype=bool)
    candidates[order[-20:]] = False  # the twenty best were seen, or do not exist yet
    candidates[58] = candidates[3] = True
    for target in (int(order[0]), int(order[30]), 3):
        found = rank_query(model, trie, prompt, target, candidates)
        assert_equals_brute_force(found, scores, target, candidates)
        assert candidates[found.top_items].all()


def test_the_target_is_a_candidate_even_where_the_mask_forgets_it() -> None:
    lines = catalogue()
    model, trie = random_model(vocab_size=VOCAB), build_trie(lines)
    mask = np.zeros(len(lines), dtype=bool)
    found = rank_query(model, trie, prompt_of(6), 12, mask)
    assert (found.rank, found.n_candidates, found.top_items.tolist()) == (1, 1, [12])
    assert not mask.any()


def test_a_line_that_begins_another_is_ranked_like_any() -> None:
    lines = [[5, END], [5, END, 7, END], [5], [6, END]]
    model, plain = random_model(vocab_size=VOCAB), random_model(vocab_size=VOCAB, attention="sdpa")
    prompt, trie, everything = prompt_of(5), build_trie(lines), np.ones(4, dtype=bool)
    scores = plain_scores(plain, prompt, lines)
    for target in range(4):
        found = rank_query(model, trie, prompt, target, everything)
        assert_equals_brute_force(found, scores, target, everything)


def test_a_peaked_model_needs_far_fewer_nodes_than_the_trie_has() -> None:
    lines = [[*word, END] for word in itertools.product(range(2, 8), repeat=4)]
    trie, everything = build_trie(lines), np.ones(6**4, dtype=bool)
    flat, peaked = random_model(vocab_size=8, spread=0.05), random_model(vocab_size=8, spread=0.05)
    with torch.no_grad():
        peaked.get_output_embeddings().weight *= 50
    n_nodes = []
    for model in (flat, peaked):
        favourite = int(rank_query(model, trie, [3, 4, 5], 0, everything).top_items[0])
        found = rank_query(model, trie, [3, 4, 5], favourite, everything)
        assert (found.rank, found.certified) == (1, True)
        n_nodes.append(found.n_nodes)
    assert n_nodes[1] < n_nodes[0]
    assert n_nodes[1] < (6 + 36 + 216 + 1296) / 5  # a fifth of the nodes that have children


def test_chunks_of_one_node_give_what_one_chunk_gives() -> None:
    lines = catalogue()
    model, trie, everything = random_model("qwen2", vocab_size=VOCAB), build_trie(lines), np.ones(60, dtype=bool)
    one, all_ = (rank_query(model, trie, prompt_of(9), 20, everything, max_nodes=n) for n in (1, 1000))
    assert (one.rank, one.n_nodes, one.top_items.tolist()) == (all_.rank, all_.n_nodes, all_.top_items.tolist())
    assert one.score == pytest.approx(all_.score, abs=1e-12)


def test_a_model_with_broken_weights_is_refused() -> None:
    model, trie = random_model(vocab_size=VOCAB), build_trie(catalogue())
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(CheckpointError, match="log-probability of nan"):
        rank_query(model, trie, [5, 6], 0, np.ones(60, dtype=bool))
