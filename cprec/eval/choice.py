"""Multiple choice: the options stand in the prompt with letters, and the letters' likelihoods order them.

reads: a model with tree attention. writes: nothing. costs: one prompt per query and order of the options, no trie.

Models prefer letters and places, so every query is asked in several seeded orders and an option's score is the mean
log-probability of its letter over them. The frame around the options is `FRAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cprec.errors import DataError
from cprec.eval.metrics import Ranked, best, mid_rank
from cprec.eval.protocols import LETTERS
from cprec.eval.queries import Catalogue, Ints
from cprec.eval.walk import TrieTensors, Walk
from cprec.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_ORDERS = 4
FRAME = "Which of these is next?\n{options}Answer:"


def letter_ids(tokenizer: Tokenizer, n: int) -> list[int]:
    """Token of each of the first `n` letters, with a space before it, behind the frame. Raises DataError."""
    encoded = tokenizer.encode_after("Answer:", [f" {letter}" for letter in LETTERS[:n]])
    if any(len(ids) != 1 for ids in encoded):
        raise DataError(f"tokenizer {tokenizer.name} has no single token for ' A' to ' {LETTERS[n - 1]}': multiple "
                        f"choice cannot be asked with it; use protocol=uniform-{n - 1}")
    return [ids[0] for ids in encoded]


def options_text(catalogue: Catalogue, options: Ints) -> str:
    """The end of a prompt that asks for one of the options, in this order."""
    lines = "".join(f"{LETTERS[place]}. {catalogue.titles[item]}\n" for place, item in enumerate(options))
    return FRAME.format(options=lines)


@torch.inference_mode()
def rank_choices(model: PreTrainedModel, trie: TrieTensors, prompts: Sequence[Sequence[int]], orders: Sequence[Ints],
                 target: int, letters: Sequence[int], *, top_k: int = 10) -> Ranked:
    """One query's options, by the mean log-probability of their letters over its prompts.

    `orders[i]` are the options, item numbers, as prompt i has them, the same in every prompt but for their order.
    """
    walk = Walk(model, trie, prompts)
    log_probs = walk.next_log_probs(torch.as_tensor(list(letters), device=walk.device)).cpu().numpy()
    items = np.sort(orders[0])
    scores = np.mean([own[np.argsort(order)] for own, order in zip(log_probs, orders, strict=True)], axis=0)
    score = float(scores[items == target][0])
    top_items, top_scores = best(items, scores, top_k)
    return Ranked(rank=mid_rank(int((scores > score).sum()), int((scores == score).sum()) - 1), score=score,
                  n_candidates=len(items), n_nodes=0, top_items=top_items, top_scores=top_scores, bound=-np.inf)
