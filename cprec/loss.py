"""Cross-entropy straight from the last hidden states, in chunks: the logits of a whole batch never exist at once.

At a vocabulary of 150,000 and 16k tokens, full float32 logits would be 10 GB. Here a chunk's logits are turned into its
losses and, in the same buffer, into its gradient, so that backward has nothing left to compute. Positions without a
label cost nothing. Logits and sums are float32 whatever the inputs are (float64 stays).

Costs, beside the inputs: one chunk of logits, the gradient of the hidden states, and that of the weight in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_LOGITS = 1 << 25
"""Logits that exist at once: 134 MB in float32."""


def row_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None) -> Tensor:
    """Summed next-token loss of each row, in nats, float32: (B,).

    `hidden`: (B, T, H); `weight`: (V, H); `labels`: (B, T), already shifted: position t holds the token to predict
    there, or IGNORE_INDEX. A row without labels has loss 0. `softcap`: logits are softcap * tanh(logit / softcap), as
    Gemma 2 has them. Gradients can be taken once; weighting the rows alike, as a mean does, is what they are made for:
    rows that are weighted differently have their logits computed a second time.
    """
    losses: Tensor = _RowLosses.apply(hidden, weight, labels, softcap)  # type: ignore[no-untyped-call]
    return losses


class _RowLosses(torch.autograd.Function):
    """Losses of rows whose gradients are computed with them, as if each row weighed 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        ctx.softcap = softcap
        ctx.wanted = ctx.needs_input_grad[:2]
        losses, ctx.grads = _losses_and_gradients(hidden, weight, labels, None, softcap=softcap, wanted=ctx.wanted)
        ctx.save_for_backward(hidden, weight, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        of_rows = weights[0]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of row_losses can be taken only once")
        if bool((of_rows == of_rows[0]).all()):
            return *(None if g is None else g.mul_(of_rows[0]) for g in grads), None, None
        del grads
        hidden, weight, labels = ctx.saved_tensors
        _, grads = _losses_and_gradients(hidden, weight, labels, of_rows, softcap=ctx.softcap, wanted=ctx.wanted)
        return *grads, None, None


def _losses_and_gradients(
        hidden: Tensor, weight: Tensor, labels: Tensor, row_weights: Tensor | None, *, softcap: float | None,
        wanted: tuple[bool, bool]) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Row losses, and the gradients of their sum, weighted by `row_weights`, for hidden states and weight as wanted."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    token_loss = torch.zeros(len(y), dtype=wide, device=x.device)
    grad_x = torch.zeros_like(x) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    wide_weight = weight if x.is_cuda else weight.to(wide)  # a CPU is slow in 16 bits, and rounds the logits to them
    for at in _chunks(y, len(weight)):
        logits = _wide_product(x[at], wide_weight)
        slope = _cap(logits, softcap)
        token_loss[at] = _loss_and_gradient(logits, y[at])  # `logits` now holds the gradient by them
        if slope is not None:
            logits.mul_(slope)
        if row_weights is not None:
            logits.mul_(row_weights[at // labels.shape[1], None])
        grad_logits = logits.to(x.dtype)
        if grad_x is not None:
            grad_x[at] = grad_logits @ weight
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits.t(), x[at])
        del logits, slope, grad_logits  # before the next chunk's exist
    grads = (None if grad_x is None else grad_x.view(hidden.shape),
             None if grad_weight is None else grad_weight.to(weight.dtype))
    return token_loss.view(labels.shape).sum(1), grads


def _chunks(labels: Tensor, vocab_size: int) -> Sequence[Tensor]:
    """Positions that have a label, as many at a time as CHUNK_LOGITS allows."""
    return torch.split((labels != IGNORE_INDEX).nonzero()[:, 0], max(1, CHUNK_LOGITS // vocab_size))


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in at least float32: no 16-bit rounding of the sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and x.dtype != wide:
        return torch.mm(x, weight.t(), out_dtype=wide)
    return x.to(wide) @ weight.t()


def _cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Caps the logits in place and gives the slope of the cap at each; None without a cap."""
    if softcap is None:
        return None
    torch.tanh(logits.div_(softcap), out=logits)
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each position (n,); turns `logits` (n, V) into the gradient of the losses' sum by them, in place."""
    target = labels[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    of_target = logits.gather(1, target)
    total = logits.exp_().sum(1, keepdim=True)
    logits.div_(total)
    logits.scatter_add_(1, target, torch.full_like(of_target, -1.0))
    return (total.log() - of_target)[:, 0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the product may have fewer bits than the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
