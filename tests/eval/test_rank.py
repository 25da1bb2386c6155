"""Exact ranking: pruned tree search against brute-force scoring of every line by a plain forward pass."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

from cprec.errors import CheckpointError
from cprec.eval import walk
from cprec.eval.rank import Answer, Ranker, null_log_probs
from cprec.eval.scoring import MeanScoring, PmiScoring, Scoring
from cprec.eval.tree_attention import TreeState
from cprec.eval.trie import Trie, build_trie
from cprec.tokenizer import load_tokenizer
from tests.eval.models import CONFIGS, KINDS, PLAIN, plain_scores, random_model

VOCAB = 40
END = 1


def catalogue(n: int = 60, seed: int = 0) -> list[list[int]]:
    """Lines of 1-5 tokens and an end; with duplicates, and one that begins another even with its end."""
    rng = np.random.default_rng(seed)
    lines = [[*rng.integers(2, 12, rng.integers(1, 6)).tolist(), END] for _ in range(n - 4)]
    return [*lines, lines[3], lines[3], [*lines[5], 7, END], lines[7][:-1]]


def prompt_of(n_tokens: int, seed: int = 1) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(2, VOCAB, n_tokens)]


def rank_one(model: PreTrainedModel, trie: Trie, prompt: list[int], target: int, candidates: np.ndarray,
             **options: Any) -> Answer:
    return Ranker(model, trie, **options).rank([prompt], [target], candidates[None])[0]


def brute_force(scores: list[float], target: int, candidates: np.ndarray, tolerance: float) -> float:
    others = [s for i, s in enumerate(scores) if candidates[i] and i != target]
    better = sum(s > scores[target] + tolerance for s in others)
    equal = sum(abs(s - scores[target]) <= tolerance for s in others)
    return 1 + better + equal / 2


def assert_equals_brute_force(found: Answer, scores: list[float], target: int, candidates: np.ndarray,
                              tolerance: float = 1e-9) -> None:
    assert found.certified
    found = found.ranked
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
    n = len(lines)
    for found in (Ranker(model, trie, max_nodes=23).rank([prompt] * n, range(n), np.ones((n, n), dtype=bool)),
                  [rank_one(model, trie, prompt, t, np.ones(n, dtype=bool), max_nodes=7) for t in range(0, n, 9)]):
        for target, answer in zip(range(0, n, 1 if len(found) == n else 9), found, strict=True):
            assert_equals_brute_force(answer, scores, target, np.ones(n, dtype=bool))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_brute_force_in_float32_where_scores_differ_by_more_than_rounding(kind: str) -> None:
    lines = catalogue(40)
    model, plain = (random_model(kind, vocab_size=VOCAB, dtype=torch.float32, attention=a)
                    for a in ("cprec_tree", "sdpa"))
    prompt, trie = prompt_of(9), build_trie(lines)
    scores = plain_scores(plain, prompt, lines)
    everything = np.ones(len(lines), dtype=bool)
    for target in range(0, len(lines), 3):
        found = rank_one(model, trie, prompt, target, everything)
        assert_equals_brute_force(found, scores, target, everything, tolerance=1e-4)


def test_sixteen_bit_models_are_ranked_exactly_by_their_own_scores() -> None:
    lines = catalogue()
    model = random_model(vocab_size=VOCAB, dtype=torch.bfloat16)
    trie, everything = build_trie(lines), np.ones(len(lines), dtype=bool)
    found = [rank_one(model, trie, prompt_of(9), t, everything) for t in range(0, len(lines), 7)]
    assert all(f.certified for f in found)


def test_items_with_equal_tokens_tie_and_share_the_middle_rank() -> None:
    lines = [[5, END], [6, END], [5, END], [5, END], [7, END]]
    model = random_model(vocab_size=VOCAB)
    trie, everything = build_trie(lines), np.ones(5, dtype=bool)
    ranks = [rank_one(model, trie, prompt_of(4), t, everything).ranked.rank for t in range(5)]
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
        found = rank_one(model, trie, prompt, target, candidates)
        assert_equals_brute_force(found, scores, target, candidates)
        assert candidates[found.ranked.top_items].all()


def test_the_target_is_a_candidate_even_where_the_mask_forgets_it() -> None:
    lines = catalogue()
    model, trie = random_model(vocab_size=VOCAB), build_trie(lines)
    mask = np.zeros(len(lines), dtype=bool)
    found = rank_one(model, trie, prompt_of(6), 12, mask).ranked
    assert (found.rank, found.n_candidates, found.top_items.tolist()) == (1, 1, [12])
    assert not mask.any()


def test_a_line_that_begins_another_is_ranked_like_any() -> None:
    lines = [[5, END], [5, END, 7, END], [5], [6, END]]
    model, plain = random_model(vocab_size=VOCAB), random_model(vocab_size=VOCAB, attention="sdpa")
    prompt, trie, everything = prompt_of(5), build_trie(lines), np.ones(4, dtype=bool)
    scores = plain_scores(plain, prompt, lines)
    for target in range(4):
        found = rank_one(model, trie, prompt, target, everything)
        assert_equals_brute_force(found, scores, target, everything)


def test_a_peaked_model_needs_far_fewer_nodes_than_the_trie_has() -> None:
    lines = [[*word, END] for word in itertools.product(range(2, 8), repeat=4)]
    trie, everything = build_trie(lines), np.ones(6**4, dtype=bool)
    flat, peaked = random_model(vocab_size=8, spread=0.05), random_model(vocab_size=8, spread=0.05)
    with torch.no_grad():
        peaked.get_output_embeddings().weight *= 50
    n_nodes = []
    for model in (flat, peaked):
        favourite = int(rank_one(model, trie, [3, 4, 5], 0, everything).ranked.top_items[0])
        found = rank_one(model, trie, [3, 4, 5], favourite, everything)
        assert (found.ranked.rank, found.certified) == (1, True)
        n_nodes.append(found.ranked.n_nodes)
    assert n_nodes[1] < n_nodes[0]
    assert n_nodes[1] < (6 + 36 + 216 + 1296) / 5  # a fifth of the nodes that have children


def test_chunks_of_one_node_give_what_one_chunk_gives() -> None:
    lines = catalogue()
    model, trie, everything = random_model("qwen2", vocab_size=VOCAB), build_trie(lines), np.ones(60, dtype=bool)
    one, all_ = (rank_one(model, trie, prompt_of(9), 20, everything, max_nodes=n).ranked for n in (1, 1000))
    assert (one.rank, one.n_nodes, one.top_items.tolist()) == (all_.rank, all_.n_nodes, all_.top_items.tolist())
    assert one.score == pytest.approx(all_.score, abs=1e-12)


def test_a_model_with_broken_weights_is_refused() -> None:
    model, trie = random_model(vocab_size=VOCAB), build_trie(catalogue())
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(CheckpointError, match="log-probability of nan"):
        rank_one(model, trie, [5, 6], 0, np.ones(60, dtype=bool))


@pytest.mark.parametrize("kind", KINDS)
def test_users_ranked_together_get_what_each_gets_alone(kind: str) -> None:
    lines = catalogue()
    model, plain = (random_model(kind, vocab_size=VOCAB, attention=a) for a in ("cprec_tree", "sdpa"))
    prompts = [prompt_of(n, seed=n) for n in (3, 90, 1, 17, 64)]
    candidates = np.random.default_rng(2).random((5, len(lines))) < 0.7
    targets = [4, 58, 3, 0, 30]
    together = Ranker(model, build_trie(lines), max_nodes=11).rank(prompts, targets, candidates)
    for prompt, target, own, answer in zip(prompts, targets, candidates, together, strict=True):
        own = own | (np.arange(len(lines)) == target)
        assert_equals_brute_force(answer, plain_scores(plain, prompt, lines), target, own)


@pytest.mark.parametrize("scoring", ["mean-0.5", "mean-1", "pmi-0.5", "pmi-1"])
def test_other_scores_are_ranked_exactly_by_their_own_bounds(scoring: str) -> None:
    lines = catalogue()
    model, plain = (random_model(vocab_size=VOCAB, spread=0.5, attention=a) for a in ("cprec_tree", "sdpa"))
    prompt, trie, n = prompt_of(9), build_trie(lines), len(lines)
    log_probs, null = (np.array(plain_scores(plain, p, lines)) for p in (prompt, prompt[:2]))
    kind, value = scoring.split("-")
    if kind == "mean":
        scores = log_probs / np.array([len(line) for line in lines]) ** float(value)
        made: Scoring = MeanScoring.of(trie, float(value), torch.device("cpu"))
    else:
        scores = log_probs - float(value) * null
        made = PmiScoring.of(trie, null_log_probs(model, trie, prompt[:2]), float(value), torch.device("cpu"))
    found = Ranker(model, trie, scoring=made).rank([prompt] * n, range(n), np.ones((n, n), dtype=bool))
    for target, answer in enumerate(found):
        assert_equals_brute_force(answer, list(scores), target, np.ones(n, dtype=bool))
        assert answer.log_prob == pytest.approx(log_probs[target], abs=1e-9)


def test_ranks_beyond_the_limit_are_infinite_and_the_top_list_stays_exact() -> None:
    lines = [[*word, END] for word in itertools.product(range(2, 8), repeat=3)]
    model, trie, n = random_model(vocab_size=8, spread=0.5), build_trie(lines), 6**3
    everything = np.ones((n, n), dtype=bool)
    exact = Ranker(model, trie).rank([[3, 4]] * n, range(n), everything)
    limited = Ranker(model, trie, rank_up_to=20).rank([[3, 4]] * n, range(n), everything)
    for a, b in zip(exact, limited, strict=True):
        assert b.certified and b.ranked.top_items.tolist() == a.ranked.top_items.tolist()
        assert b.ranked.rank == (a.ranked.rank if a.ranked.rank <= 20 else np.inf)
    assert sum(b.ranked.n_nodes for b in limited) < sum(a.ranked.n_nodes for a in exact)


def test_forgetting_keys_and_values_that_no_open_prefix_needs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [[*word, END] for word in itertools.product(range(2, 7), repeat=4)]
    model, trie = random_model(vocab_size=8), build_trie(lines)
    arguments = ([[3, 4, 5], [6]], [624, 300], np.ones((2, len(lines)), dtype=bool))
    kept = Ranker(model, trie, max_nodes=8).rank(*arguments)
    monkeypatch.setattr(walk, "FIRST_SLOTS", 16)
    states: list[TreeState] = []
    keep = TreeState.keep
    monkeypatch.setattr(TreeState, "keep", lambda state, slots: (states.append(state), keep(state, slots))[1])
    forgot = Ranker(model, trie, max_nodes=8).rank(*arguments)
    assert states and states[-1].capacity < sum(a.ranked.n_nodes for a in forgot)
    for a, b in zip(kept, forgot, strict=True):
        assert (a.ranked.rank, a.ranked.n_nodes, a.ranked.top_items.tolist()) == (
            b.ranked.rank, b.ranked.n_nodes, b.ranked.top_items.tolist())


def test_sixteen_bit_scores_stay_within_a_twentieth_of_a_nat_per_token() -> None:
    lines = catalogue()
    whole, half = (random_model(vocab_size=VOCAB, dtype=d, spread=0.1) for d in (torch.float64, torch.bfloat16))
    n, trie = len(lines), build_trie(lines)
    arguments = ([prompt_of(9)] * n, range(n), np.ones((n, n), dtype=bool))
    pairs = zip(Ranker(whole, trie).rank(*arguments), Ranker(half, trie).rank(*arguments), strict=True)
    assert max(abs(a.log_prob - b.log_prob) / len(line) for (a, b), line in zip(pairs, lines, strict=True)) < 0.05


def test_a_sixteen_bit_rank_lies_between_the_brute_force_ranks_at_that_tolerance() -> None:
    lines = catalogue()
    model = random_model(vocab_size=VOCAB, dtype=torch.bfloat16, spread=0.1)
    plain = random_model(vocab_size=VOCAB, spread=0.1, attention=PLAIN)  # the same weights, unrounded, in float64
    n, prompt, wide = len(lines), prompt_of(9), []
    scores, lens = np.array(plain_scores(plain, prompt, lines)), np.array([len(line) for line in lines])
    found = Ranker(model, build_trie(lines)).rank([prompt] * n, range(n), np.ones((n, n), dtype=bool))
    for target, answer in enumerate(found):
        others = np.arange(n) != target
        apart = 0.05 * (lens + lens[target])  # nats: what both lines' scores may be off together
        best = 1 + (scores - scores[target] > apart)[others].sum()
        worst = 1 + (scores - scores[target] > -apart)[others].sum()
        assert answer.certified and best <= answer.ranked.rank <= worst
        wide.append(worst - best)
    assert np.median(wide) < n / 3  # a rank that means nothing would not lie in there


def test_the_null_scores_are_those_of_plain_forwards() -> None:
    lines = catalogue()
    model, plain = (random_model(vocab_size=VOCAB, attention=a) for a in ("cprec_tree", "sdpa"))
    trie = build_trie(lines)
    np.testing.assert_allclose(null_log_probs(model, trie, [5, 6])[trie.leaf_of], plain_scores(plain, [5, 6], lines),
                               atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k not in KINDS])
def test_other_families_of_models_are_ranked_exactly(kind: str) -> None:
    lines = catalogue()
    model, plain = (random_model(kind, vocab_size=VOCAB, attention=a) for a in ("cprec_tree", PLAIN))
    everything = np.ones((2, len(lines)), dtype=bool)
    prompts = [prompt_of(9), prompt_of(4)]
    found = Ranker(model, build_trie(lines)).rank(prompts, [20, 3], everything)
    for prompt, target, answer in zip(prompts, [20, 3], found, strict=True):
        assert_equals_brute_force(answer, plain_scores(plain, prompt, lines), target, everything[0])


def test_ranks_in_a_real_catalogue_equal_brute_force_in_float32(shared_data: Path) -> None:
    titles = pq.read_table(shared_data / "items" / "amazon_gift_cards.parquet")["title"].to_pylist()[:60]
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "mistral_tokenizer_v3_32768.model"))
    lines = tokenizer.encode_after("x\n", [f"{' '.join(t.split())}\n" for t in titles])
    # weights large enough that no two scores are within rounding of each other
    model, plain = (random_model("qwen2", vocab_size=32768, dtype=torch.float32, attention=a)
                    for a in ("cprec_tree", "sdpa"))
    targets = [3, 50]
    prompts = [tokenizer.encode_start("Chosen:\n") + lines[t - 1] + lines[t - 2] for t in targets]
    everything = np.ones((2, len(lines)), dtype=bool)
    found = Ranker(model, build_trie(lines)).rank(prompts, targets, everything)
    for prompt, target, answer in zip(prompts, targets, found, strict=True):
        scores = plain_scores(plain, prompt, lines)
        assert_equals_brute_force(answer, scores, target, everything[0], tolerance=1e-3)
