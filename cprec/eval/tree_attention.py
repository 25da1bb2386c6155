"""Attention of trie prefixes of many users at once: each sees its user's prompt and its own ancestors, nothing else.

reads: nothing. writes: nothing. costs: keys and values of every prompt, padded to the longest, and of the prefixes that
are kept (`2 * layers * kv_heads * head_dim` numbers each), on the model's device.

The module registers itself with transformers under `TREE_ATTENTION`; a model loaded with that attention takes the
keyword `tree_state`, whose `call` says what the tokens of the call are:

    PromptCall   the users' prompts one after the other, each causal; keys and values are stored, padded
    NodesCall    prefixes in any order; each writes its key and value to a slot, and sees the slots on its path

A prefix and its ancestors may be in one call, since all slots are written before any is read. No prompt is copied per
prefix: prefixes of one user are put together in blocks, and a block meets its prompt in one matrix product. The two
parts, prompt and path, are joined by their log-sum-exp, as in cascade attention. Sliding windows and capped scores are
honoured, as in `cprec.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cprec.attention import Scores, causal_document, register, scores_of
from cprec.errors import ConfigError

TREE_ATTENTION = "cprec_tree"
BLOCK_ROWS = 64
"""Prefixes of one user that meet their prompt in one product; the last block of a user is padded."""
KV = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PromptCall:
    """Lengths of the prompts whose tokens stand one after the other."""

    lens: Sequence[int]


@dataclass(frozen=True)
class NodesCall:
    """Where each of n prefixes writes, what it sees, and how prefixes are put together by user.

    `slots` (n,); `paths` (n, depth): slots of itself and its ancestors, -1 where there is none; `positions` (n,) and
    the largest of them. `rows` (blocks, BLOCK_ROWS): prefixes of one user, padded with any; `block_user` (blocks,);
    `places` (n,): where a prefix stands in the flattened blocks.
    """

    slots: Tensor
    paths: Tensor
    positions: Tensor
    last_position: int
    rows: Tensor
    block_user: Tensor
    places: Tensor

    @staticmethod
    def of(users: Tensor, slots: Tensor, paths: Tensor, positions: Tensor, *, n_users: int) -> NodesCall:
        """The call of prefixes that are sorted by user."""
        counts = torch.bincount(users, minlength=n_users)
        n_blocks = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
        first_row, first_block = counts.cumsum(0) - counts, n_blocks.cumsum(0) - n_blocks
        device, n = users.device, len(users)
        block_user = torch.repeat_interleave(torch.arange(n_users, device=device), n_blocks)
        places = first_block[users] * BLOCK_ROWS + torch.arange(n, device=device) - first_row[users]
        rows = torch.zeros(len(block_user) * BLOCK_ROWS, dtype=torch.int64, device=device)
        rows[places] = torch.arange(n, device=device)
        return NodesCall(slots, paths, positions, int(positions.max()), rows.view(-1, BLOCK_ROWS), block_user, places)


@dataclass
class TreeState:
    """Keys and values by layer; `call` must say what the tokens of the next call of the model are.

    `prompts`: (users, n_kv_heads, longest prompt, head_dim) each; `slots`: (capacity, n_kv_heads, head_dim) each.
    """

    call: PromptCall | NodesCall
    prompts: dict[int, KV] = field(default_factory=dict)
    padding: Tensor | None = None
    """(users, longest prompt): True behind a prompt's end."""
    capacity: int = 0
    slots: dict[int, KV] = field(default_factory=dict)

    def keep(self, slots: Tensor) -> None:
        """Forget all slots but these, which become slots 0, 1, ... in this order."""
        self.slots = {layer: (k[slots], v[slots]) for layer, (k, v) in self.slots.items()}

    def grown(self, layer: int, like: Tensor) -> KV:
        """The layer's slots, at least `capacity` of them; `like` (n, n_kv_heads, head_dim) says their shape."""
        old = self.slots.get(layer)
        if old is None or len(old[0]) < self.capacity:
            new = tuple(like.new_zeros(self.capacity, *like.shape[1:]) for _ in range(2))
            for to, of in zip(new, old or (), strict=False):
                to[:len(of)] = of
            self.slots[layer] = (new[0], new[1])
        return self.slots[layer]


def tree_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                   *, tree_state: TreeState | None = None, **options: Any) -> tuple[Tensor, None]:
    """Attention of one call: query (1, n_heads, n, head_dim), key and value (1, n_kv_heads, n, head_dim).

    Returns (1, n, n_heads, head_dim). Raises ConfigError for a model whose attention has more to it than that.
    """
    if tree_state is None:
        raise ConfigError(f"attention {TREE_ATTENTION!r} only serves ranking; load the model with another attention")
    assert attention_mask is None and query.shape[0] == 1, "no batch, and no mask but the tree's own"
    layer, call, scores = int(module.layer_idx), tree_state.call, scores_of(module, **options)  # type: ignore[arg-type]
    if isinstance(call, PromptCall):
        out = _prompts(tree_state, layer, call.lens, query, key, value, scores)
    else:
        out = _nodes(tree_state, layer, call, query[0], key[0], value[0], scores)
    return out.unsqueeze(0), None


def _prompts(state: TreeState, layer: int, lens: Sequence[int], query: Tensor, key: Tensor, value: Tensor,
             scores: Scores) -> Tensor:
    """Each prompt on its own, causal: (n, n_heads, head_dim); keys and values are kept, padded."""
    shape = (len(lens), key.shape[1], max(lens), key.shape[3])
    kept_k, kept_v = key.new_zeros(shape), value.new_zeros(shape)
    outs = []
    for i, (q, k, v) in enumerate(zip(*(torch.split(x, list(lens), dim=2) for x in (query, key, value)), strict=True)):
        kept_k[i, :, :lens[i]], kept_v[i, :, :lens[i]] = k[0], v[0]
        outs.append(causal_document(q, k, v, scores))
    state.prompts[layer] = (kept_k, kept_v)
    if state.padding is None:
        ends = torch.tensor(list(lens), device=key.device)
        state.padding = torch.arange(max(lens), device=key.device) >= ends[:, None]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _nodes(state: TreeState, layer: int, call: NodesCall, query: Tensor, key: Tensor, value: Tensor,
           how: Scores) -> Tensor:
    """Prefixes against their prompts and their paths: (n, n_heads, head_dim)."""
    assert state.padding is not None, "prompts come first"
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    keys, values = state.grown(layer, key)
    keys[call.slots], values[call.slots] = key, value
    n, n_kv, head_dim = key.shape
    scale = head_dim ** -0.5 if how.scale is None else how.scale
    q = (query * scale).transpose(0, 1).reshape(n, n_kv, -1, head_dim)  # (n, n_kv, groups, head_dim)

    depth = call.paths.shape[1] if how.window is None else min(how.window, call.paths.shape[1])
    absent = (call.paths[:, :depth] < 0)[:, None, None]  # (n, 1, 1, depth)
    path = call.paths[:, :depth].clamp(min=0)
    scores = _capped(q @ keys[path].permute(0, 2, 3, 1), how.softcap).masked_fill(absent, -torch.inf)
    of_path = scores.softmax(-1).to(q.dtype) @ values[path].transpose(1, 2)
    lse_path = scores.logsumexp(-1)

    prompt_k, prompt_v = (x[call.block_user] for x in state.prompts[layer])  # (blocks, n_kv, prompt_len, head_dim)
    blocks, rows = call.rows.shape
    q = q[call.rows].transpose(1, 2).reshape(blocks, n_kv, -1, head_dim)  # (blocks, n_kv, rows * groups, head_dim)
    scores = _capped(q @ prompt_k.transpose(2, 3), how.softcap).view(blocks, n_kv, rows, -1, prompt_k.shape[2])
    scores = scores.masked_fill_(_unseen(state.padding, call, how.window)[:, None, :, None], -torch.inf).flatten(2, 3)
    of_prompt = scores.softmax(-1).to(q.dtype)
    if how.window is not None and how.window <= call.last_position:
        of_prompt = of_prompt.nan_to_num()  # of a prefix that sees nothing of its prompt any more; its share is 0
    of_prompt = of_prompt @ prompt_v

    def by_node(x: Tensor) -> Tensor:  # (blocks, n_kv, rows * groups, ...) -> (n, n_kv, groups, ...)
        split = x.reshape(blocks, n_kv, rows, -1, *x.shape[3:]).transpose(1, 2)
        return split.reshape(blocks * rows, *split.shape[2:])[call.places]

    share = torch.sigmoid(by_node(scores.logsumexp(-1)) - lse_path)[..., None].to(q.dtype)
    out = share * by_node(of_prompt) + (1 - share) * of_path
    joined: Tensor = out.reshape(n, -1, head_dim)
    return joined


def _unseen(padding: Tensor, call: NodesCall, window: int | None) -> Tensor:
    """Which tokens of its prompt a block's prefix does not see: (blocks, 1 or rows, prompt_len)."""
    unseen = padding[call.block_user][:, None]
    if window is None or window > call.last_position:
        return unseen
    earliest = call.positions[call.rows][..., None] - window + 1  # (blocks, rows, 1)
    return unseen | (torch.arange(padding.shape[1], device=padding.device) < earliest)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores in float32 or wider, capped."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


register(TREE_ATTENTION, tree_attention)
