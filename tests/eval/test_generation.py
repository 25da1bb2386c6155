"""Generated lists and multiple choice: beams, grounded text, letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cprec.errors import DataError
from cprec.eval.beam import OpenGeneration, beam_lists, list_rank
from cprec.eval.choice import letter_ids, options_text, rank_choices
from cprec.eval.queries import Catalogue
from cprec.eval.rank import Ranker
from cprec.eval.trie import build_trie
from cprec.eval.walk import TrieTensors
from cprec.tokenizer import load_tokenizer
from tests.eval.folders import TOKENIZER_VOCAB, write_tokenizer
from tests.eval.models import plain_scores, random_model
from tests.eval.test_rank import VOCAB, catalogue, prompt_of


def shop(titles: list[str]) -> Catalogue:
    n = len(titles)
    return Catalogue([f"i{i}" for i in range(n)], titles, [f"{t}\n" for t in titles], np.ones(n, np.int64),
                     np.zeros(n, np.int64))


def test_a_beam_as_wide_as_the_trie_lists_what_the_exact_search_lists() -> None:
    lines = catalogue()
    model, trie, n = random_model(vocab_size=VOCAB), build_trie(lines), 60
    candidates = np.random.default_rng(0).random((3, n)) < 0.6
    prompts, targets = [prompt_of(k) for k in (2, 5, 30)], [1, 2, 3]
    candidates[range(3), targets] = True
    exact = [a.ranked for a in Ranker(model, trie).rank(prompts, targets, candidates)]
    beams = beam_lists(model, trie, prompts, targets, candidates, width=1000)
    for a, b in zip(exact, beams, strict=True):
        assert a.top_items.tolist() == b.top_items.tolist()
        assert b.rank == (a.rank if a.rank <= 10 else np.inf)
        assert not b.certified


def test_a_beam_of_one_follows_the_best_child_and_lists_candidates_only() -> None:
    lines = [[2, 4, 1], [2, 5, 1], [3, 4, 1], [3, 5, 1]]
    model, plain = random_model(vocab_size=8, spread=0.5), random_model(vocab_size=8, spread=0.5, attention="sdpa")
    for allowed in ([0, 1, 2, 3], [1, 2]):
        candidates = np.isin(np.arange(4), allowed)[None]
        found = beam_lists(model, build_trie(lines), [[6, 7]], [allowed[0]], candidates, width=1)[0]
        first = max({lines[i][0] for i in allowed}, key=lambda t: plain_scores(plain, [6, 7], [[t]])[0])
        below = [i for i in allowed if lines[i][0] == first]
        second = max({lines[i][1] for i in below}, key=lambda t: plain_scores(plain, [6, 7, first], [[t]])[0])
        assert found.top_items.tolist() == [i for i in below if lines[i][1] == second]
        assert found.n_nodes == 2


def test_a_target_that_is_not_listed_has_an_infinite_rank_and_ties_share_their_middle() -> None:
    items, scores = np.array([7, 3, 5], np.int32), np.array([-1.0, -2.0, -2.0])
    ranks = {target: list_rank(items, scores, target, n_candidates=9).rank for target in (7, 3, 5, 1)}
    assert ranks == {7: 1, 3: 2.5, 5: 2.5, 1: np.inf}


def test_open_text_is_grounded_to_the_same_line_or_the_nearest_candidate(tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed: pip install 'cprec[open]'")
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path)))
    model = random_model(vocab_size=TOKENIZER_VOCAB, attention="sdpa", dtype=torch.float32)
    goods = shop(["Milk", "Bread", "milk", "Oat milk"])
    generation = OpenGeneration(model, tokenizer, goods, tokenizer.encode(goods.lines), width=2)
    assert generation._grounded("milk") == [0, 2]
    assert generation._grounded("oat mlik") == [3]
    ranked, valid = generation.answer([77, 105], 1, np.array([False, True, False, True]), top_k=10)
    assert set(ranked.top_items.tolist()) <= {1, 3}
    assert valid in (0.0, 0.5, 1.0)


def test_options_are_ordered_by_the_mean_log_probability_of_their_letters(tmp_path: Path) -> None:
    model, plain = (random_model(vocab_size=VOCAB, attention=a) for a in ("cprec_tree", "sdpa"))
    orders, prompts, letters = [np.array([9, 4, 6]), np.array([6, 9, 4])], [[3, 4, 5], [8, 9]], [11, 12, 13]
    found = rank_choices(model, TrieTensors.of(build_trie([[1]]), torch.device("cpu")), prompts, orders, 4, letters)
    own = [dict(zip(order.tolist(), plain_scores(plain, prompt, [[t] for t in letters]), strict=True))
           for prompt, order in zip(prompts, orders, strict=True)]
    means = {item: (own[0][item] + own[1][item]) / 2 for item in (9, 4, 6)}
    assert found.top_items.tolist() == sorted(means, key=lambda item: -means[item])
    assert found.score == pytest.approx(means[4], abs=1e-9)
    assert found.rank == 1 + sum(m > means[4] for m in means.values())


def test_options_stand_in_the_prompt_with_their_letters() -> None:
    assert options_text(shop(["Milk", "Bread"]), np.array([1, 0])) == \
        "Which of these is next?\nA. Bread\nB. Milk\nAnswer:"


def test_a_tokenizer_without_a_token_per_letter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no single token for ' A' to ' C'.*use protocol=uniform-2"):
        letter_ids(load_tokenizer(str(write_tokenizer(tmp_path))), 3)
