"""The exact rank of a query's target in its full catalogue by likelihood, from a fraction of the forward passes.

reads: a model with tree attention, a trie, a prompt. writes: nothing. costs: the prompt once, then one token per
expanded prefix; the keys and values of one trie level; `max_nodes * vocabulary` logits.

The score of an item is the log-probability of its whole line after the prompt, softmax over the full vocabulary. It
only falls with every token, so a prefix below the target's score has no completion above it: level by level, only
prefixes at or above the threshold are put through the model. What was cut away is bounded by the best cut prefix, and
a result counts when that bound lies below the target and below the last of the top list. If rounding, or a top list
that needs items below the target, leaves this open, the search is repeated with a lower threshold, until it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cprec.errors import CheckpointError
from cprec.eval.metrics import Floats, Ranked, best, mid_rank
from cprec.eval.tree_attention import TreeState
from cprec.eval.trie import Bools, Ints, Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 1 << 26
SLACK_NATS = {torch.float64: 1e-7, torch.float32: 1e-3}
COARSE_SLACK_NATS = 0.1
"""For 16-bit models: about the noise of a line's score between two chunk shapes."""
BEAMS_PER_TOP_ITEM = 3


@torch.inference_mode()
def rank_query(model: PreTrainedModel, trie: Trie, prompt_ids: Sequence[int], target: int, candidates: Bools, *,
               top_k: int = 10, max_nodes: int | None = None) -> Ranked:
    """Exact mid-rank of item `target` among `candidates` (a mask over items), and their exact best `top_k`.

    The target is a candidate whatever the mask says. Items with equal token sequences share a node and so tie.
    `max_nodes` bounds the prefixes per forward pass (default: by the vocabulary). Raises CheckpointError when the
    model's log-probability of the target is not finite.
    """
    candidates = candidates.copy()
    candidates[target] = True
    user = _User(model, trie, prompt_ids, candidates, max_nodes=max_nodes)
    top_k = min(top_k, int(candidates.sum()))
    slack = SLACK_NATS.get(model.dtype, COARSE_SLACK_NATS)
    threshold, on_path = user.path_score(target) - slack, trie.path(target)
    rise = _Rise(top_k, slack, highest=threshold)
    while True:
        found = user.search(threshold, always=on_path, rise=rise)
        score = found.score_of(int(trie.leaf_of[target]))
        kth = found.kth_best(user.n_complete, top_k)
        if found.bound < min(score, kth):
            return _result(found, user, target, score, top_k)
        slack *= 2
        kth_at_least = kth if found.bound < kth else max(kth, user.beam_bound(top_k))
        threshold, rise = min(score, kth_at_least) - slack, _Rise(top_k, slack, highest=score - slack)


@dataclass(frozen=True)
class _Rise:
    """How a search may raise its threshold: to `slack` below the k-th best found so far, but not above `highest`."""

    k: int
    slack: float
    highest: float


@dataclass(frozen=True)
class _Found:
    """Completed nodes with their scores, and the score of the best prefix that was cut away (-inf: none was)."""

    nodes: Ints
    scores: Floats
    bound: float

    def score_of(self, node: int) -> float:
        return float(self.scores[self.nodes == node][0])

    def kth_best(self, n_complete: Ints, k: int) -> float:
        """Score of the k-th best candidate found; -inf when fewer were found."""
        return _kth_best(self.scores, n_complete[self.nodes], k)


class _User:
    """One query's prompt, put through the model once, and searches in the trie below it."""

    def __init__(self, model: PreTrainedModel, trie: Trie, prompt_ids: Sequence[int], candidates: Bools, *,
                 max_nodes: int | None) -> None:
        self.model, self.trie, self.candidates = model, trie, candidates
        self.n_complete, self.n_below = trie.count(candidates)
        self.max_nodes = max_nodes or max(1, min(1024, LOGITS_PER_CHUNK // model.config.vocab_size))
        self.n_forwarded = 0
        self.state = TreeState()
        self._root = self._logits(prompt_ids, np.arange(len(prompt_ids)), last_only=True)

    def path_score(self, item: int) -> float:
        """Log-probability of the item's line, by teacher forcing."""
        nodes = self.trie.path(item)
        tokens = self.trie.token[nodes]
        logits = self._root
        if len(nodes) > 1:
            self.state.enter_path()
            self.n_forwarded += len(nodes) - 1
            after = self._logits(tokens[:-1], self.state.prompt_len + np.arange(len(nodes) - 1))
            logits = torch.cat([logits, after])
        score = float(_log_probs(logits, np.arange(len(nodes)), tokens).sum())
        if not np.isfinite(score):
            raise CheckpointError(f"the model gives item {item} a log-probability of {score}; its weights are broken")
        return score

    def search(self, threshold: float, *, always: Ints | None = None, rise: _Rise | None = None,
               width: int | None = None) -> _Found:
        """Every completed node whose prefixes all score at least `threshold` or lie in `always`.

        `width` cuts each level to its best (a beam: what is found is then only part of it).
        """
        self.state.restart()
        nodes, scores, rows = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)
        done_nodes, done_scores, bound = np.zeros(0, np.int64), np.zeros(0), -np.inf
        while len(nodes):
            children, parents, child_scores = self._expand(nodes, scores, rows)
            complete = self.n_complete[children] > 0
            done_nodes = np.concatenate([done_nodes, children[complete]])
            done_scores = np.concatenate([done_scores, child_scores[complete]])
            if rise is not None and rise.highest > threshold:
                kth = _kth_best(done_scores, self.n_complete[done_nodes], rise.k)
                threshold = max(threshold, min(rise.highest, kth - rise.slack))
            open_ = self.n_below[children] > 0
            keep = open_ & (child_scores >= threshold)
            if always is not None:
                keep |= np.isin(children, always) & open_
            if width is not None and keep.sum() > width:
                keep &= child_scores >= np.partition(child_scores[keep], -width)[-width]
            bound = max(bound, float(child_scores[open_ & ~keep].max(initial=-np.inf)))
            nodes, scores, rows = children[keep], child_scores[keep], parents[keep]
        return _Found(done_nodes, done_scores, bound)

    def beam_bound(self, k: int) -> float:
        """A score that the k-th best candidate reaches at least: the k-th best that a beam search finds."""
        found = self.search(-np.inf, width=BEAMS_PER_TOP_ITEM * k)
        return found.kth_best(self.n_complete, k)

    def _expand(self, nodes: Ints, scores: Floats, rows: Ints) -> tuple[Ints, Ints, Floats]:
        """Children of the nodes of one level, the place of each one's parent among them, and their scores.

        `rows`: for each node, the place of its own parent in the level before.
        """
        children, parents = self.trie.children(nodes)
        tokens, depth = self.trie.token[children], int(self.trie.depth[nodes[0]])
        log_probs = np.empty(len(children))
        if depth == 0:
            log_probs[:] = _log_probs(self._root, parents, tokens)
        else:
            for start in range(0, len(nodes), self.max_nodes):
                chunk = slice(start, start + self.max_nodes)
                its = slice(*np.searchsorted(parents, [start, start + self.max_nodes]))
                self.state.enter_nodes(torch.as_tensor(rows[chunk], device=self.model.device))
                position = np.full(len(nodes[chunk]), self.state.prompt_len + depth - 1)
                after = self._logits(self.trie.token[nodes[chunk]], position)
                log_probs[its] = _log_probs(after, parents[its] - start, tokens[its])
            self.state.finish_level()
            self.n_forwarded += len(nodes)
        # rounding may put a log-probability above 0; the bound needs that no score ever rises
        return children, parents, scores[parents] + np.minimum(log_probs, 0.0)

    def _logits(self, tokens: Sequence[int] | Ints, positions: Ints, *, last_only: bool = False) -> torch.Tensor:
        """Logits of the next token after each token (or after the last): (n, vocabulary), float32 or better."""
        device = self.model.device
        logits: torch.Tensor = self.model(
            input_ids=torch.as_tensor(np.asarray(tokens), device=device)[None],
            position_ids=torch.as_tensor(positions, device=device)[None],
            use_cache=False, logits_to_keep=1 if last_only else 0, tree_state=self.state).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_probs(logits: torch.Tensor, rows: Ints, tokens: Ints) -> Floats:
    """Log-probability of `tokens[i]` in row `rows[i]`, softmax over the full vocabulary; the rest never leaves."""
    at, token = (torch.as_tensor(x, device=logits.device) for x in (rows, tokens))
    picked = logits[at, token].double() - logits.logsumexp(dim=-1).double()[at]
    values: Floats = picked.cpu().numpy()
    return values


def _kth_best(scores: Floats, counts: Ints, k: int) -> float:
    """Score of the k-th best of items, `counts` of which have each score; -inf when there are fewer than k."""
    order = np.argsort(-scores, kind="stable")
    place = int(np.searchsorted(np.cumsum(counts[order]), k))
    return float(scores[order[place]]) if place < len(order) else -np.inf


def _result(found: _Found, user: _User, target: int, score: float, top_k: int) -> Ranked:
    """The rank and the top list of a search that proved both."""
    counts = user.n_complete[found.nodes]
    n_better = int(counts[found.scores > score].sum())
    n_equal = int(counts[found.scores == score].sum()) - 1
    kth = _kth_best(found.scores, counts, top_k)
    listed = found.nodes[found.scores >= kth]
    trie = user.trie
    items = [trie.items[trie.item_start[n]:trie.item_start[n] + trie.n_complete[n]] for n in listed]
    items = [own[user.candidates[own]] for own in items]
    item_scores = np.repeat(found.scores[found.scores >= kth], [len(own) for own in items])
    top_items, top_scores = best(np.concatenate(items), item_scores, top_k)
    return Ranked(rank=mid_rank(n_better, n_equal), score=score, n_candidates=int(user.candidates.sum()),
                  n_nodes=user.n_forwarded, top_items=top_items, top_scores=top_scores, bound=found.bound)
