"""Cross-entropy straight from the last hidden states, in chunks: the logits of a whole row never exist at once.

At a vocabulary of 150,000 and 16k tokens, full fp32 logits would be 10 GB. torch >= 2.13 does it in one call
(`linear_cross_entropy`); before that, and for 16-bit weights, whose loss that call rounds to 16 bits, the chunks are
recomputed in the backward pass and the loss is summed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024


def row_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token loss of each row, in nats, float32: (B,).

    `hidden`: (B, T, H); `weight`: (V, H); `labels`: (B, T), already shifted: position t holds the token to predict
    there, or IGNORE_INDEX. A row without labels has loss 0.
    """
    fused = hidden.dtype == torch.float32 and hasattr(F, "linear_cross_entropy")
    one_row = _fused if fused else _recomputed
    return torch.stack([one_row(h, weight, y) for h, y in zip(hidden, labels, strict=True)])


def _fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS)
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORE_INDEX, options=options)


def _recomputed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(torch.split(hidden, CHUNK_TOKENS), torch.split(labels, CHUNK_TOKENS), strict=True):
        chunk: Tensor = checkpoint(_chunk, h, weight, y, use_reentrant=False)
        total = total + chunk
    return total


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
