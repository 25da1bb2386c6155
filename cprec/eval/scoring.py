"""What an item's score is made of: the log-probability of its line, its length, and its probability without a history.

reads: a trie. writes: nothing. A new way to score is one class; the search only asks it for two things.

`own` is the score of the items that a node completes; `bound` is at least the score of everything strictly below a
node. A search that cuts by the bound stays exact as long as that holds in floating point, too: both are monotone in the
log-probability, and rounding keeps an order that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cprec.eval.trie import Floats, Trie


class Scoring(Protocol):
    """Scores of nodes (n,) whose tokens have log-probabilities (n,) after the prompt; float64."""

    def own(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """Score of the items that each node completes."""

    def bound(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """At least the score of every item below each node."""


class SumScoring:
    """The log-probability of the whole line: the default, and what claims are made with."""

    def own(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """The log-probability."""
        return log_probs

    def bound(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """The log-probability: it only falls with every token."""
        return log_probs


@dataclass(frozen=True)
class MeanScoring:
    """Log-probability / length^power: of a line of L tokens below node q, S / L^a <= S(q) / longest(q)^a."""

    length: Tensor
    """(nodes,) length^power of the line that ends at the node."""
    longest: Tensor
    """(nodes,) the same of the longest line below it."""

    @staticmethod
    def of(trie: Trie, power: float, device: torch.device) -> MeanScoring:
        """The scoring of a catalogue."""
        depth = trie.depth.astype(np.float64)
        longest = trie.best_below(np.where(trie.n_complete > 0, depth, 0.0))
        return MeanScoring(*(torch.as_tensor(np.maximum(x, 1.0), device=device) ** power for x in (depth, longest)))

    def own(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """Log-probability per length^power."""
        return log_probs / self.length[nodes]

    def bound(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """As if all that is missing of the longest line were certain."""
        return log_probs / self.longest[nodes]


@dataclass(frozen=True)
class PmiScoring:
    """Log-probability - weight * log-probability without a history; below q: S(q) + weight * the largest -log p0."""

    surprise: Tensor
    """(nodes,) weight * -log p0 of the line that ends at the node."""
    most_surprise: Tensor
    """(nodes,) the largest of those below it."""

    @staticmethod
    def of(trie: Trie, null_log_probs: Floats, weight: float, device: torch.device) -> PmiScoring:
        """The scoring of a catalogue; `null_log_probs` (nodes,): of the line that ends at each node, -inf elsewhere."""
        surprise = np.where(trie.n_complete > 0, -weight * null_log_probs, -np.inf)
        return PmiScoring(*(torch.as_tensor(x, device=device) for x in (surprise, trie.best_below(surprise))))

    def own(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """How much more probable the history makes the item."""
        return log_probs + self.surprise[nodes]

    def bound(self, nodes: Tensor, log_probs: Tensor) -> Tensor:
        """As if the least probable line below came for certain."""
        return log_probs + self.most_surprise[nodes]
