"""The exact rank of queries' targets in their full catalogue by likelihood, from a fraction of the forward passes.

reads: a model with tree attention, a trie, prompts. writes: nothing. costs: see `cprec.eval.walk`; the number of
expanded prefixes is that of prefixes whose bound reaches the threshold.

By default the score of an item is the log-probability of its whole line after the prompt, softmax over the full
vocabulary. It only falls with every token, so a prefix below the target's score has no completion above it. The lines
of the targets come first, in one pass, and give each user's threshold: the target's score, or the K-th best score found
so far where that is lower, since the top list has to be exact, too. Then the prefixes that reach their user's threshold
are put through the model, those of many users at a time, until none is left. Thresholds only rise, every score is
computed once, and what was cut away lies below the last threshold: that is the certificate of a result.

Prefixes that reach the target's score are needed in any case, and go deepest first, so that few keys and values are
kept at a time. Prefixes below it are only needed for a top list that the target is in: they go best first and a few at
a time, since every completed line may make the next one needless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cprec.errors import CheckpointError
from cprec.eval.metrics import Floats, Ranked, best, mid_rank
from cprec.eval.scoring import Scoring, SumScoring
from cprec.eval.trie import Bools, Trie
from cprec.eval.walk import Candidates, Prefixes, TrieTensors, Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSURE_PER_USER = 16
"""Prefixes below the target's score that a user adds to one forward pass: more are rarely needed in the end."""
DEEPER = 1e9
"""One level, against differences of scores."""


@dataclass(frozen=True)
class Answer:
    """A ranked query, the log-probability of its target's line, and the tokens that were put through the model.

    A rank that was not searched to its end (`rank_up_to`) is infinite; the top list is exact all the same.
    """

    ranked: Ranked
    log_prob: float
    n_tokens: int

    @property
    def certified(self) -> bool:
        """No candidate that was not scored can reach the target (if its rank was asked for) or the top list."""
        last = float(self.ranked.top_scores.min(initial=np.inf))
        return self.ranked.bound < (last if np.isinf(self.ranked.rank) else min(self.ranked.score, last))


class Ranker:
    """Ranks queries over one catalogue with one model."""

    def __init__(self, model: PreTrainedModel, trie: Trie, *, scoring: Scoring | None = None, top_k: int = 10,
                 rank_up_to: int | None = None, max_nodes: int | None = None) -> None:
        """`rank_up_to`: search ranks so far only; beyond, only the top list is made sure.

        `max_nodes` bounds the prefixes per forward pass (default: by the device).
        """
        self.model, self.trie, self.tensors = model, trie, TrieTensors.of(trie, model.device)
        self.scoring = scoring or SumScoring()
        self.top_k, self.rank_up_to, self.max_nodes = top_k, rank_up_to, max_nodes

    @torch.inference_mode()
    def rank(self, prompts: Sequence[Sequence[int]], targets: Sequence[int], candidates: Bools) -> list[Answer]:
        """Exact mid-rank of each query's target among its candidates (queries, items), and their exact best `top_k`.

        A target is a candidate whatever the mask says. Items with equal token sequences share a node and so tie.
        Raises CheckpointError when the model's log-probability of a target is not finite.
        """
        candidates = candidates.copy()
        candidates[np.arange(len(targets)), targets] = True
        walk = Walk(self.model, self.tensors, prompts, max_nodes=self.max_nodes)
        search = _Search(self, walk, targets, candidates)
        search.run()
        return [search.answer(u, candidates[u]) for u in range(len(prompts))]


@dataclass(frozen=True)
class _Done:
    """Completed nodes of users: their scores, and how many candidates each completes."""

    user: Tensor
    node: Tensor
    score: Tensor
    count: Tensor

    def __getitem__(self, which: Tensor) -> _Done:
        return _Done(self.user[which], self.node[which], self.score[which], self.count[which])


class _Search:
    """The state of one batch's search: what is open, what is found, and every user's threshold."""

    def __init__(self, ranker: Ranker, walk: Walk, targets: Sequence[int], candidates: Bools) -> None:
        self.ranker, self.walk, self.scoring, self.tensors = ranker, walk, ranker.scoring, ranker.tensors
        n, device = walk.n_users, walk.device
        self.candidates = Candidates(ranker.tensors, candidates)
        self.k = self.candidates.total.clamp(max=ranker.top_k)
        self.n_better, self.n_equal = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
        self.kth, self.cut = (torch.full((n,), -torch.inf, dtype=torch.float64, device=device) for _ in range(2))
        self.leaf = torch.as_tensor(ranker.trie.leaf_of[np.asarray(targets)], device=device)
        nobody = torch.empty(0, dtype=torch.int64, device=device)
        self.done = _Done(nobody, nobody, nobody.double(), nobody)
        found = self._targets(targets)
        self.pool = found[self._open(found)]
        self._complete(found)

    def run(self) -> None:
        """Expand whatever reaches its user's threshold."""
        while True:
            bound = self.scoring.bound(self.pool.node, self.pool.score)
            alive = bound >= self._threshold()[self.pool.user]
            self.cut.scatter_reduce_(0, self.pool.user[~alive], bound[~alive], "amax")
            self.pool, bound = self.pool[alive], bound[alive]
            if not len(self.pool):
                return
            self.pool = self.walk.make_room(self.pool)
            chosen = self._choose(bound)
            rest = torch.ones(len(self.pool), dtype=torch.bool, device=self.walk.device)
            rest[chosen] = False
            found = self.walk.expand(self.pool[chosen])
            self.pool = self.pool[rest] + found[self._open(found)]
            self._complete(found)

    def answer(self, user: int, candidates: Bools) -> Answer:
        """What was found for a user."""
        trie, done = self.ranker.trie, self.done[self.done.user == user]
        nodes, node_scores = done.node.cpu().numpy(), done.score.cpu().numpy()
        items = [trie.items[trie.item_start[n]:trie.item_start[n] + trie.n_complete[n]] for n in nodes]
        items = [own[candidates[own]] for own in items]
        scores: Floats = np.repeat(node_scores, [len(own) for own in items])
        top_items, top_scores = best(np.concatenate(items), scores, int(self.k[user]))
        rank = mid_rank(int(self.n_better[user]), int(self.n_equal[user]) - 1)
        ranked = Ranked(rank=np.inf if bool(self._stopped()[user]) else rank, score=float(self.target[user]),
                        n_candidates=int(self.candidates.total[user]), n_nodes=int(self.walk.n_forwarded[user]),
                        top_items=top_items, top_scores=top_scores, bound=float(self.cut[user]))
        return Answer(ranked, float(self.log_prob[user]), int(self.walk.lens[user]) + ranked.n_nodes)

    def _targets(self, targets: Sequence[int]) -> Prefixes:
        """Put the targets' lines through the model; sets the targets' scores, gives all children met on the way."""
        paths = [torch.as_tensor(self.ranker.trie.path(t)[:-1], device=self.walk.device) for t in targets]
        self.on_path = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1)
        found = self.walk.roots()
        if self.on_path.shape[1]:
            found = found + self.walk.expand_paths(found, paths)
        leaves = found[found.node == self.leaf[found.user]]
        self.log_prob = torch.zeros_like(self.kth)
        self.log_prob[leaves.user] = leaves.score
        self.target = self.scoring.own(self.leaf, self.log_prob)
        if not bool(self.target.isfinite().all()):
            raise CheckpointError(f"the model gives a target a log-probability of {float(self.log_prob.min())}; its "
                                  f"weights are broken")
        return found

    def _open(self, found: Prefixes) -> Tensor:
        """Which of the found nodes have candidates below them and were not put through the model with a target."""
        _, below = self.candidates.count(found.user, found.node)
        depth = self.tensors.depth[found.node] - 1
        inside = depth < self.on_path.shape[1]
        is_on_path = inside.clone()
        is_on_path[inside] = self.on_path[found.user[inside], depth[inside]] == found.node[inside]
        return (below > 0) & ~is_on_path

    def _complete(self, found: Prefixes) -> None:
        """Count the candidates that the found nodes complete, raise the users' K-th best, keep what may be listed."""
        count, _ = self.candidates.count(found.user, found.node)
        new = _Done(found.user, found.node, self.scoring.own(found.node, found.score), count.long())[count > 0]
        target = self.target[new.user]
        self.n_better.index_add_(0, new.user, new.count * (new.score > target))
        self.n_equal.index_add_(0, new.user, new.count * (new.score == target))
        new = new[new.score >= self.kth[new.user]]
        done = _Done(*(torch.cat([getattr(self.done, f), getattr(new, f)]) for f in ("user", "node", "score", "count")))
        done = done[torch.argsort(done.score, descending=True, stable=True)]
        done = done[torch.argsort(done.user, stable=True)]
        total = torch.zeros_like(self.n_better).index_add_(0, done.user, done.count)
        so_far = done.count.cumsum(0) - (total.cumsum(0) - total)[done.user]
        reached = so_far >= self.k[done.user]
        self.kth.scatter_reduce_(0, done.user[reached], done.score[reached], "amax")
        self.done = done[done.score >= self.kth[done.user]]

    def _stopped(self) -> Tensor:
        """Whose rank is known to be beyond what was asked for."""
        up_to = self.ranker.rank_up_to
        return torch.zeros_like(self.n_better, dtype=torch.bool) if up_to is None else self.n_better >= up_to

    def _goal(self) -> Tensor:
        return self.target.masked_fill(self._stopped(), torch.inf)

    def _threshold(self) -> Tensor:
        return torch.minimum(self._goal(), self.kth)

    def _choose(self, bound: Tensor) -> Tensor:
        """Places in the pool of the prefixes to expand next."""
        user, most = self.pool.user, self.walk.max_nodes
        sure = bound >= self._goal()[user]
        chosen = sure.nonzero()[:, 0]
        if len(chosen) >= most:
            key = self.tensors.depth[self.pool.node[chosen]] * DEEPER + bound[chosen]
            return chosen[key.topk(most).indices]
        waits = torch.zeros(self.walk.n_users, dtype=torch.bool, device=self.walk.device)
        waits[user[chosen]] = True
        unsure = (~sure & ~waits[user]).nonzero()[:, 0]
        unsure = unsure[torch.argsort(bound[unsure], descending=True, stable=True)]
        unsure = unsure[torch.argsort(user[unsure], stable=True)]
        counts = torch.bincount(user[unsure], minlength=self.walk.n_users)
        place = torch.arange(len(unsure), device=unsure.device) - (counts.cumsum(0) - counts)[user[unsure]]
        few = unsure[place < UNSURE_PER_USER]
        return torch.cat([chosen, few[:most - len(chosen)]])


@torch.inference_mode()
def null_log_probs(model: PreTrainedModel, trie: Trie, prompt: Sequence[int]) -> Floats:
    """Log-probability of the line that ends at each node after one prompt, by expanding the whole trie, deepest first.

    (nodes,); -inf where no line ends. Takes one token per inner node.
    """
    walk = Walk(model, TrieTensors.of(trie, model.device), [prompt])
    scores = torch.zeros(trie.n_nodes, dtype=torch.float64, device=walk.device)
    found, waiting = walk.roots(), None
    while True:
        scores[found.node] = found.score
        found = found[walk.trie.n_children[found.node] > 0]
        waiting = found if waiting is None else waiting + found  # the deepest last
        if not len(waiting):
            break
        waiting = walk.make_room(waiting)
        at = torch.arange(len(waiting), device=walk.device)
        found = walk.expand(waiting[at[-walk.max_nodes:]])
        waiting = waiting[at[:-walk.max_nodes]]
    values: Floats = np.where(trie.n_complete > 0, scores.cpu().numpy(), -np.inf)
    return values
