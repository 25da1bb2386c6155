"""The other sides: every title scored in full, behind a prompt that is read once, or that is read for every title.

reads: a model with torch's own attention. writes: nothing. Both score the titles that they are given, in batches of
titles of similar length, with the softmax over the full vocabulary, as our search does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def shared_prompt(model: PreTrainedModel, prompt: Sequence[int], lines: Sequence[Sequence[int]], *,
                  batch: int = 32) -> np.ndarray:
    """Log-probability of each line; the prompt's keys and values are computed once and repeated for a batch."""
    cache = DynamicCache(config=model.config)
    last = model(input_ids=torch.tensor([list(prompt)]), past_key_values=cache, use_cache=True,
                 logits_to_keep=1).logits[0, -1].log_softmax(-1)
    scores = np.zeros(len(lines))
    for rows, ids, lens in _batches(lines, batch):
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(len(rows))
        after = model(input_ids=ids, past_key_values=repeated, use_cache=True).logits.log_softmax(-1)
        picked = after[:, :-1].gather(2, ids[:, 1:, None])[..., 0].double()
        inside = torch.arange(1, ids.shape[1]) < lens[:, None]
        scores[rows] = (last[ids[:, 0]].double() + (picked * inside).sum(1)).numpy()
    return scores


@torch.inference_mode()
def per_candidate(model: PreTrainedModel, prompt: Sequence[int], lines: Sequence[Sequence[int]], *,
                  batch: int = 8) -> np.ndarray:
    """Log-probability of each line; prompt and line go through the model together, for every line."""
    scores, n = np.zeros(len(lines)), len(prompt)
    for rows, ids, lens in _batches(lines, batch):
        whole = torch.cat([torch.tensor([list(prompt)]).expand(len(rows), -1), ids], dim=1)
        logits = model(input_ids=whole, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits
        picked = logits[:, :-1].log_softmax(-1).gather(2, whole[:, n:, None])[..., 0].double()
        scores[rows] = (picked * (torch.arange(ids.shape[1]) < lens[:, None])).sum(1).numpy()
    return scores


def _batches(lines: Sequence[Sequence[int]], batch: int) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Numbers, padded ids and lengths of lines of similar length."""
    order = np.argsort([len(line) for line in lines], kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        lens = torch.tensor([len(lines[i]) for i in rows])
        yield rows, torch.nn.utils.rnn.pad_sequence([torch.tensor(list(lines[i])) for i in rows],
                                                    batch_first=True), lens
