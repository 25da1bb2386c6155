"""Tree attention against a plain forward over prompt + line, and what it must refuse."""

from __future__ import annotations

import itertools

import pytest
import torch

from cprec.errors import ConfigError
from cprec.eval.tree_attention import NodesCall, PromptCall, TreeState, tree_attention
from tests.eval.models import CONFIGS, PLAIN, random_model

PROMPT = [3, 9, 4, 7, 12, 5]
OTHER = [8, 3, 3]
PATHS = [[6, 8, 2], [6, 8, 11], [6, 10, 2], [13, 8, 2]]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_nodes_see_the_prompt_and_their_own_ancestors_only(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    tree, plain = (random_model(kind, vocab_size=40, dtype=dtype, attention=a) for a in ("cprec_tree", PLAIN))
    state = TreeState(PromptCall([6, 3]))
    with torch.inference_mode():
        def logits(tokens: list[int], positions: list[int]) -> torch.Tensor:
            return tree(input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), use_cache=False,
                        tree_state=state).logits[0]

        state.capacity = 30
        first = logits([*PROMPT, *OTHER], [0, 1, 2, 3, 4, 5, 0, 1, 2])
        # every path is its own branch from depth 1 on, below both prompts: slots 8 * depth + 4 * user + path
        users = torch.arange(2).repeat_interleave(4)
        found = []
        for depth in range(3):
            slots = 8 * depth + torch.arange(8)
            paths = torch.stack([slots - 8 * up for up in range(4)], dim=1).masked_fill(
                torch.arange(4) > depth, -1)
            positions = [6 + depth] * 4 + [3 + depth] * 4
            state.call = NodesCall.of(users, slots, paths, torch.tensor(positions), n_users=2)
            found.append(logits([p[depth] for p in PATHS * 2], positions))
        worst = 0.0
        for i, (prompt, path) in enumerate(itertools.product((PROMPT, OTHER), PATHS)):
            expected = plain(input_ids=torch.tensor([prompt + path]), use_cache=False).logits[0, len(prompt) - 1:]
            here = [first[5 if i < 4 else 8], *(level[i] for level in found)]
            worst = max(worst, float((torch.stack(here) - expected).abs().max()))
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst < tolerance


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_path_may_go_through_the_model_in_one_call(kind: str) -> None:
    tree, plain = (random_model(kind, vocab_size=40, attention=a) for a in ("cprec_tree", PLAIN))
    state, path = TreeState(PromptCall([6]), capacity=3), PATHS[0]
    with torch.inference_mode():
        tree(input_ids=torch.tensor([PROMPT]), use_cache=False, tree_state=state)
        paths = torch.tensor([[0, -1, -1], [1, 0, -1], [2, 1, 0]])
        state.call = NodesCall.of(torch.zeros(3, dtype=torch.int64), torch.arange(3), paths, torch.tensor([6, 7, 8]),
                                  n_users=1)
        found = tree(input_ids=torch.tensor([path]), position_ids=torch.tensor([[6, 7, 8]]), use_cache=False,
                     tree_state=state).logits[0]
        expected = plain(input_ids=torch.tensor([PROMPT + path]), use_cache=False).logits[0, 6:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_attention_that_would_differ_is_refused() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="s_aux"):
        tree_attention(module, x, x, x, None, scaling=1.0, tree_state=TreeState(PromptCall([4])), s_aux=torch.zeros(2))


def test_a_prefix_deeper_than_the_window_sees_nothing_of_its_prompt() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    torch.manual_seed(0)
    state = TreeState(PromptCall([3]), capacity=4)
    prompt, path = torch.randn(3, 1, 2, 3, 8), torch.randn(3, 1, 2, 4, 8)
    tree_attention(module, *prompt, None, scaling=1.0, tree_state=state, sliding_window=2)
    slots = torch.tensor([[0, -1, -1, -1], [1, 0, -1, -1], [2, 1, 0, -1], [3, 2, 1, 0]])
    state.call = NodesCall.of(torch.zeros(4, dtype=torch.int64), torch.arange(4), slots, torch.arange(3, 7), n_users=1)
    out, _ = tree_attention(module, *path, None, scaling=1.0, tree_state=state, sliding_window=2)
    q, k, v = path[:, 0]
    weights = (q[:, 3:] @ k[:, 2:4].transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(out[0, 3], (weights @ v[:, 2:4])[:, 0])


def test_a_window_that_holds_the_whole_text_is_no_hindrance() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    x = torch.zeros(1, 2, 4, 8)
    out, _ = tree_attention(module, x, x, x, None, scaling=1.0, tree_state=TreeState(PromptCall([4])), sliding_window=4)
    assert out.shape == (1, 4, 2, 8)


def test_a_call_outside_ranking_is_refused() -> None:
    with pytest.raises(ConfigError, match="only serves ranking"):
        random_model(vocab_size=40)(input_ids=torch.tensor([PROMPT]), use_cache=False)
