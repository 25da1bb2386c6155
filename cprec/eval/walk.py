"""A walk down a catalogue's trie for many users at once: prefixes go through the model, their children get scores.

reads: a model with tree attention, a trie, prompts. writes: nothing. costs: every prompt once, then one token per
expanded prefix; logits of `LOGITS_PER_CHUNK` numbers at a time; keys and values of the prefixes that open ones descend
from. All on the model's device, without a Python loop over prefixes.

`cprec.eval.rank` decides which prefixes are worth it, `cprec.eval.beam` keeps the best of each level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cprec.errors import CheckpointError
from cprec.eval.tree_attention import NodesCall, PromptCall, TreeState
from cprec.eval.trie import Bools, Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 1 << 25
FIRST_SLOTS = 2048
NODES_ON_CPU, NODES_ON_GPU = 256, 4096
"""Prefixes per forward pass: where a CPU's matrix products are at their best; enough to fill a GPU."""


@dataclass(frozen=True)
class TrieTensors:
    """The arrays of a trie that a walk needs, on a device; see `cprec.eval.trie.Trie`."""

    token: Tensor
    depth: Tensor
    first_child: Tensor
    n_children: Tensor
    item_start: Tensor
    n_complete: Tensor
    item_stop: Tensor
    items: Tensor

    @staticmethod
    def of(trie: Trie, device: torch.device) -> TrieTensors:
        """The trie's arrays, copied to `device`."""
        return TrieTensors(*(torch.as_tensor(getattr(trie, f.name), device=device) for f in fields(TrieTensors)))

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """All children of `nodes`, in order, and for each the place of its parent within `nodes`."""
        counts = self.n_children[nodes]
        parents = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        within = torch.arange(len(parents), device=nodes.device) - (counts.cumsum(0) - counts)[parents]
        return self.first_child[nodes][parents] + within, parents


class Candidates:
    """Masks (users, items) of the items that count, as sums over the items in the trie's order."""

    def __init__(self, trie: TrieTensors, masks: Bools) -> None:
        self._trie = trie
        in_order = torch.as_tensor(masks, device=trie.items.device)[:, trie.items]
        self._up_to = torch.nn.functional.pad(in_order.cumsum(1, dtype=torch.int32), (1, 0))  # (users, items + 1)
        self.total = self._up_to[:, -1]

    def count(self, user: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """Of pairs of user and node: how many of the user's candidates the node completes, how many lie below it."""
        start = self._trie.item_start[node]
        own = self._up_to[user, start + self._trie.n_complete[node]]
        return own - self._up_to[user, start], self._up_to[user, self._trie.item_stop[node]] - own


@dataclass(frozen=True)
class Prefixes:
    """Trie nodes of users: entry i is node `node[i]` below the prompt of user `user[i]`.

    `score`: float64 log-probability of its tokens after the prompt. `parent`: the slot of its parent's key and value,
    -1 below the root.
    """

    user: Tensor
    node: Tensor
    score: Tensor
    parent: Tensor

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, which: Tensor) -> Prefixes:
        return Prefixes(self.user[which], self.node[which], self.score[which], self.parent[which])

    def __add__(self, other: Prefixes) -> Prefixes:
        return Prefixes(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(Prefixes)))


class Walk:
    """The prompts of several users, put through the model once, and the prefixes below them.

    `n_forwarded` (users,) counts the trie prefixes put through the model, `n_prompt_tokens` the prompts' tokens.
    """

    def __init__(self, model: PreTrainedModel, trie: TrieTensors, prompts: Sequence[Sequence[int]], *,
                 max_nodes: int | None = None) -> None:
        self.model, self.trie, self.device = model, trie, model.device
        self.max_nodes = max_nodes or (NODES_ON_GPU if self.device.type == "cuda" else NODES_ON_CPU)
        self.lens = torch.tensor([len(p) for p in prompts], device=self.device)
        self.n_prompt_tokens = sum(map(len, prompts))
        self.n_forwarded = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        self._state = TreeState(PromptCall([len(p) for p in prompts]))
        self._slot_parent = torch.empty(0, dtype=torch.int64, device=self.device)
        ids = torch.tensor([t for p in prompts for t in p], device=self.device)
        positions = torch.cat([torch.arange(len(p), device=self.device) for p in prompts])
        self._after_prompt = self._hidden(ids, positions)[self.lens.cumsum(0) - 1]

    @property
    def n_users(self) -> int:
        """How many prompts there are."""
        return len(self.lens)

    def roots(self) -> Prefixes:
        """The root's children of every user, scored."""
        users = torch.arange(self.n_users, device=self.device)
        children, parents, log_probs = self._children(self._after_prompt, torch.zeros_like(users))
        return Prefixes(users[parents], children, log_probs, torch.full_like(children, -1))

    def next_log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probability of each of `tokens` right after each prompt: (users, tokens)."""
        logits = self._logits(self._after_prompt)
        return (logits[:, tokens].double() - logits.logsumexp(-1, keepdim=True).double())

    def expand(self, prefixes: Prefixes) -> Prefixes:
        """Put at most `max_nodes` prefixes through the model and give their children, scored."""
        order = torch.argsort(prefixes.user, stable=True)
        prefixes = prefixes[order]
        hidden, slots = self._forward(prefixes.user, prefixes.node, prefixes.parent)
        children, parents, log_probs = self._children(hidden, prefixes.node)
        return Prefixes(prefixes.user[parents], children, prefixes.score[parents] + log_probs, slots[parents])

    def expand_paths(self, roots: Prefixes, paths: Sequence[Tensor]) -> Prefixes:
        """Put whole paths through the model in one pass: `paths[u]` holds user u's nodes from the root's child down.

        Gives the children of all of them, scored. `roots` are the root's children.
        """
        lens = torch.tensor([len(p) for p in paths], device=self.device)
        users = torch.repeat_interleave(torch.arange(self.n_users, device=self.device), lens)
        nodes, starts = torch.cat(list(paths)), lens.cumsum(0) - lens
        is_first = torch.zeros(len(nodes), dtype=torch.bool, device=self.device)
        is_first[starts[lens > 0]] = True
        first = len(self._slot_parent)
        above = torch.arange(first - 1, first + len(nodes) - 1, device=self.device).masked_fill(is_first, -1)
        hidden, slots = self._forward(users, nodes, above)
        children, parents, log_probs = self._children(hidden, nodes)
        # a row's score: that of the root's child its path starts with, then what is added from row to row
        gain = torch.zeros(len(nodes), dtype=torch.float64, device=self.device)
        follows = (parents < len(nodes) - 1) & (children == nodes.roll(-1)[parents]) & ~is_first.roll(-1)[parents]
        gain[parents[follows] + 1] = log_probs[follows]
        by_child = roots.score.view(self.n_users, -1)  # the root's children are nodes 1, 2, ..., user by user
        gain[is_first] = by_child[users[is_first], nodes[is_first] - 1]
        total = gain.cumsum(0)
        score = total - (total - gain)[starts.clamp(max=len(nodes) - 1)][users]
        return Prefixes(users[parents], children, score[parents] + log_probs, slots[parents])

    def make_room(self, prefixes: Prefixes) -> Prefixes:
        """Forget keys and values that none of `prefixes`, the only ones still open, descends from, if slots are short.

        Gives the same prefixes with their parents' new slots.
        """
        n_used = len(self._slot_parent)
        if n_used + self.max_nodes <= max(self._state.capacity, FIRST_SLOTS):
            return prefixes
        alive = torch.zeros(n_used + 1, dtype=torch.bool, device=self.device)  # the last place takes the -1
        at = prefixes.parent
        while len(at := torch.unique(at[at >= 0])):
            alive[at] = True
            at = self._slot_parent[at]
        kept = alive[:-1].nonzero()[:, 0]
        new = torch.full((n_used + 1,), -1, dtype=torch.int64, device=self.device)
        new[kept] = torch.arange(len(kept), device=self.device)
        self._state.keep(kept)
        if 2 * len(kept) > self._state.capacity:  # else the next passes would have to do this again
            self._state.capacity *= 2
        self._slot_parent = new[self._slot_parent[kept]]
        return Prefixes(prefixes.user, prefixes.node, prefixes.score, new[prefixes.parent])

    def _make_slots(self, n: int) -> None:
        """Capacity for `n` more slots, doubled where there is too little."""
        wanted = len(self._slot_parent) + n
        while self._state.capacity < wanted:
            self._state.capacity = max(FIRST_SLOTS, 2 * self._state.capacity)

    def _forward(self, users: Tensor, nodes: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states of prefixes sorted by user, and the slots that they wrote."""
        self._make_slots(len(nodes))
        first = len(self._slot_parent)
        slots = torch.arange(first, first + len(nodes), device=self.device)
        self._slot_parent = torch.cat([self._slot_parent, parents])
        depth = self.trie.depth[nodes]
        path = [slots]
        for _ in range(int(depth.max()) - 1):
            path.append(torch.where(path[-1] >= 0, self._slot_parent[path[-1]], -1))
        positions = self.lens[users] + depth - 1
        self._state.call = NodesCall.of(users, slots, torch.stack(path, dim=1), positions, n_users=self.n_users)
        self.n_forwarded += torch.bincount(users, minlength=self.n_users)
        return self._hidden(self.trie.token[nodes], positions), slots

    def _hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states: (n, hidden_size)."""
        hidden: Tensor = self.model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False,
                                               tree_state=self._state).last_hidden_state[0]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _children(self, hidden: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of `nodes`, each one's place of its parent among them, and its log-probability there.

        The softmax is over the full vocabulary; of a chunk of logits only the children's are kept. Rounding may put a
        log-probability above 0; the bound needs that no score ever rises.
        """
        children, parents = self.trie.children(nodes)
        rows = max(1, LOGITS_PER_CHUNK // int(self.model.config.vocab_size))
        log_probs = []
        for start in range(0, len(nodes), rows):
            logits = self._logits(hidden[start:start + rows])
            of_chunk = (parents >= start) & (parents < start + rows)
            row = parents[of_chunk] - start
            at = logits[row, self.trie.token[children[of_chunk]]].double()
            log_probs.append(at - logits.logsumexp(-1).double()[row])
        found = torch.cat(log_probs)
        if bool(found.isnan().any()):
            raise CheckpointError("the model gives a log-probability of nan; its weights are broken")
        return children, parents, found.clamp(max=0.0)
