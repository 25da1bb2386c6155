"""Attention of trie nodes: each sees one shared prompt and its own ancestors, and the prompt is never copied.

reads: nothing. writes: nothing. costs: keys and values of the prompt and of one level of the trie, on the model's
device; the scores of one chunk of nodes, `n_nodes * n_heads * (prompt + depth)` numbers.

The module registers itself with transformers under `TREE_ATTENTION`; a model loaded with that attention takes the
keyword `tree_state`, which says what the tokens of the call are:

    prompt   one text, causal; its keys and values are stored
    path     the next tokens after the prompt, causal among themselves; nothing is stored
    nodes    nodes of one depth that do not see each other, only the prompt, their ancestors and themselves
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cprec.attention import register
from cprec.errors import ConfigError

TREE_ATTENTION = "cprec_tree"
KV = tuple[Tensor, Tensor]


@dataclass
class TreeState:
    """One user's keys and values, by layer; every call of the model with it must say first what its tokens are.

    `prompt`: (n_kv_heads, prompt_len, head_dim) each. `level`: (nodes, n_kv_heads, depth, head_dim) each, of the last
    finished level. `grown`: the same of the level under way, chunk by chunk.
    """

    mode: Literal["prompt", "path", "nodes"] = "prompt"
    prompt: dict[int, KV] = field(default_factory=dict)
    level: dict[int, KV] = field(default_factory=dict)
    grown: dict[int, list[KV]] = field(default_factory=dict)
    parents: Tensor | None = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return self.prompt[min(self.prompt)][0].shape[1]

    def enter_path(self) -> None:
        """The next call's tokens follow the prompt, one after the other."""
        self.mode = "path"

    def enter_nodes(self, parents: Tensor) -> None:
        """The next call's tokens are nodes; `parents` say where theirs are in the finished level (at depth 1: any)."""
        self.mode, self.parents = "nodes", parents

    def finish_level(self) -> None:
        """The nodes of the calls since the last finish become the level that the next ones descend from."""
        self.level = {layer: (torch.cat([k for k, _ in chunks]), torch.cat([v for _, v in chunks]))
                      for layer, chunks in self.grown.items()}
        self.grown = {}

    def restart(self) -> None:
        """Back to the root: forget every level, keep the prompt."""
        self.level, self.grown, self.parents = {}, {}, None


def tree_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                   *, scaling: float, tree_state: TreeState | None = None, **options: Any) -> tuple[Tensor, None]:
    """Attention of one call: query (1, n_heads, n, head_dim), key and value (1, n_kv_heads, n, head_dim).

    Returns (1, n, n_heads, head_dim). Raises ConfigError for a model whose attention has more to it than that.
    """
    if tree_state is None:
        raise ConfigError(f"attention {TREE_ATTENTION!r} only serves ranking; load the model with another attention")
    assert attention_mask is None and query.shape[0] == 1, "one user at a time, and no mask but the tree's own"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if tree_state.mode == "prompt":
        tree_state.prompt[layer] = (key[0], value[0])
        n_seen, out = key.shape[2], _causal(query[0], key[0], value[0], scaling)
    elif tree_state.mode == "path":
        prompt_k, prompt_v = tree_state.prompt[layer]
        k, v = torch.cat([prompt_k, key[0]], dim=1), torch.cat([prompt_v, value[0]], dim=1)
        n_seen, out = k.shape[1], _causal(query[0], k, v, scaling)
    else:
        path_k, path_v = _descend(tree_state, layer, key[0], value[0])
        n_seen = tree_state.prompt_len + path_k.shape[2]
        out = _joint(query[0], tree_state.prompt[layer], (path_k, path_v), scaling)
    _refuse_other_attention(options, n_seen)
    return out.unsqueeze(0), None


def _descend(state: TreeState, layer: int, key: Tensor, value: Tensor) -> KV:
    """Keys and values of each node's path, itself last: (nodes, n_kv_heads, depth, head_dim); kept for its children."""
    k, v = key.transpose(0, 1).unsqueeze(2), value.transpose(0, 1).unsqueeze(2)
    if layer in state.level:
        above_k, above_v = state.level[layer]
        k = torch.cat([above_k[state.parents], k], dim=2)
        v = torch.cat([above_v[state.parents], v], dim=2)
    state.grown.setdefault(layer, []).append((k, v))
    return k, v


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The last n of the keys' positions look back causally: query (n_heads, n, d), key (n_kv, m >= n, d)."""
    n, m = query.shape[1], key.shape[1]
    groups = query.shape[0] // key.shape[0]
    k, v = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    if n == m:
        out = F.scaled_dot_product_attention(query[None], k[None], v[None], is_causal=True, scale=scaling)
    else:
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        out = F.scaled_dot_product_attention(query[None], k[None], v[None], attn_mask=mask, scale=scaling)
    return out[0].transpose(0, 1)


def _joint(query: Tensor, prompt: KV, path: KV, scaling: float) -> Tensor:
    """One softmax over the shared prompt's keys and each node's own path: (nodes, n_heads, head_dim)."""
    n_heads, n, head_dim = query.shape
    n_kv, prompt_len, _ = prompt[0].shape
    groups, query = n_heads // n_kv, query * scaling
    # (n_kv, groups * n, d) against the one prompt, (n, n_kv, groups, d) against n paths
    on_prompt = query.reshape(n_kv, groups * n, head_dim) @ prompt[0].transpose(1, 2)
    on_prompt = on_prompt.view(n_kv, groups, n, prompt_len).permute(2, 0, 1, 3)
    on_path = query.view(n_kv, groups, n, head_dim).permute(2, 0, 1, 3) @ path[0].transpose(2, 3)
    scores = torch.cat([on_prompt, on_path], dim=-1)
    at_least_float32 = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=at_least_float32).to(query.dtype)
    w_prompt, w_path = weights[..., :prompt_len], weights[..., prompt_len:]
    from_prompt = w_prompt.permute(1, 2, 0, 3).reshape(n_kv, groups * n, prompt_len) @ prompt[1]
    out: Tensor = from_prompt.view(n_kv, groups, n, head_dim).permute(2, 0, 1, 3) + w_path @ path[1]
    return out.reshape(n, n_heads, head_dim)


def _refuse_other_attention(options: dict[str, Any], n_seen: int) -> None:
    """Raise for what would change the result: a window shorter than the text, a soft cap, attention sinks."""
    window = options.get("sliding_window")
    problems = [f"{name}={options[name]!r}" for name in ("softcap", "s_aux") if options.get(name) is not None]
    if window is not None and n_seen > int(window):
        problems.append(f"sliding_window={window} with a text of {n_seen} tokens")
    if problems:
        raise ConfigError(f"exact ranking does not know this model's attention ({', '.join(problems)}); "
                          f"rank a model with plain causal attention, or with histories inside its window")


register(TREE_ATTENTION, tree_attention)
