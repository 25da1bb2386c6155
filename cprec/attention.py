"""Attention that isolates the documents of a packed row, by backend name; never a silent fallback.

A micro-batch arrives flattened to one row of documents, (1, n_tokens), with `cu_seqlens`: document i spans
`cu_seqlens[i]:cu_seqlens[i + 1]`. Every backend attends causally inside each document and nowhere else, and honours a
layer's sliding window: position t sees the last `window` positions, itself included, as in transformers.

    name      runs on   cost                      capped  what it is
    doc_sdpa  CPU, GPU  sum of squared lengths    yes     one torch SDPA call per document; the default on a CPU
    sdpa      CPU, GPU  square of the row         yes     torch SDPA under a dense block mask; the reference
    flex      GPU       visible blocks of 128     yes     torch FlexAttention, compiled
    varlen    GPU       sum of squared lengths    no      torch.nn.attention.varlen: FlashAttention inside torch
    flash2    GPU       sum of squared lengths    yes     package flash-attn
    flash3    GPU       sum of squared lengths    no      package flash-attn-3 (Hopper)
    flash4    GPU       sum of squared lengths    no      package flash-attn-4 (Hopper, Blackwell)

`capped`: computes attention scores that the model caps, softcap * tanh(score / softcap), as Gemma 2 does. What follows
from the borders of a batch (lengths, masks) is computed once per batch, by the first layer that asks.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from cprec.errors import ConfigError, did_you_mean
from cprec.log import get_logger

log = get_logger(__name__)
FLEX_BLOCK = 128
Forward = Callable[..., tuple[Tensor, Tensor | None]]


class Documents:
    """The borders of a micro-batch's documents, and what backends derive from them, each computed once."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self._masks: dict[int | None, Tensor] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    @functools.cached_property
    def lens(self) -> list[int]:
        """Length of every document; on a GPU this waits for the batch."""
        return self.cu_seqlens.diff().tolist()

    @functools.cached_property
    def of_token(self) -> Tensor:
        """(n_tokens,) int64: number of each token's document, from 1."""
        n = int(self.cu_seqlens[-1])
        return torch.searchsorted(self.cu_seqlens, torch.arange(n, device=self.cu_seqlens.device), right=True)

    def mask(self, window: int | None) -> Tensor:
        """(n_tokens, n_tokens) bool: which positions a token sees."""
        if window not in self._masks:
            same = self.of_token[:, None] == self.of_token[None, :]
            self._masks[window] = same & _causal(len(self.of_token), window, same.device)
        return self._masks[window]

    def block_mask(self, window: int | None) -> BlockMask:
        """The same for FlexAttention, from the borders alone: nothing of n_tokens squared is made."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.of_token, self.cu_seqlens, window)
        return self._block_masks[window]


@dataclass(frozen=True)
class Scores:
    """How a layer computes its attention scores."""

    scale: float | None
    """Factor of the products of queries and keys; None: head_dim ** -0.5."""
    window: int | None
    """Positions that a token sees, itself included; None: all before it."""
    softcap: float | None


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, Scores], Tensor]
"""Query (1, n_heads, n, head_dim), key and value (1, n_kv_heads, n, head_dim) to output (1, n, n_heads, head_dim)."""


def register(name: str, forward: Forward) -> None:
    """Make `forward` a transformers attention implementation that gets no mask: it isolates by its own arguments.

    `forward(module, query, key, value, attention_mask, scaling=..., **kwargs)` gets query (1, n_heads, n, head_dim),
    key and value (1, n_kv_heads, n, head_dim) and every extra keyword given to the model; it returns the output as
    (1, n, n_heads, head_dim) and None.
    """
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Backend:
    """`implementation` is transformers' name for it; `missing(device)` says why it cannot run there, or is None."""

    implementation: str
    missing: Callable[[torch.device], str | None]
    only_16_bit: bool = False
    caps_scores: bool = False

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot compute in `dtype` on `device`, or None."""
        if self.only_16_bit and dtype.itemsize != 2:
            return f"it computes in 16 bits, model.dtype is {str(dtype).removeprefix('torch.')}"
        return self.missing(device)


def select(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend to use for `dtype` on `device`: `name`, or for `auto` the fastest that runs there.

    Raises ConfigError when the named backend is unknown or cannot run, saying what it lacks.
    """
    if name == "auto":
        order = ["flash3", "flash2", "varlen", "doc_sdpa"]
        return next(n for n in order if BACKENDS[n].obstacle(device, dtype) is None)
    if name not in BACKENDS:
        raise ConfigError(f"model.attention={name!r} is no backend; {did_you_mean(name, [*BACKENDS, 'auto'])}")
    if reason := BACKENDS[name].obstacle(device, dtype):
        raise ConfigError(f"model.attention={name!r} cannot run here: {reason}; or use model.attention=auto")
    return name


def kernel_arguments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """Keyword arguments that every backend finds its documents in, for a call of the model.

    `cu_seqlens`: (n_docs + 1,) int32 on the batch's device, first 0, last the number of tokens. The `cu_seq_lens_*`
    names are those that transformers hands on to the flash-attn packages.
    """
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max_seqlen,
            "max_length_k": max_seqlen, "documents": Documents(cu_seqlens, max_seqlen)}


HARMLESS = {*kernel_arguments(torch.zeros(1), 0), "attention_mask", "position_ids", "cache_position", "use_cache",
            "output_attentions", "output_hidden_states", "return_dict", "dropout", "is_causal", "num_items_in_batch"}
"""Keywords that change nothing of what a layer computes here: dropout is switched off, is_causal looked at apart."""


def _forward(kernel: Kernel) -> Forward:
    """The transformers attention implementation that computes by `kernel`, and refuses what kernels do not know."""

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                documents: Documents | None = None, **options: Any) -> tuple[Tensor, None]:
        scores = scores_of(module, **options)
        if documents is None:
            raise _unsupported(module, "is not told the documents' borders")
        if scores.window is not None and scores.window >= documents.max_seqlen:
            scores = replace(scores, window=None)
        return kernel(query, key, value, documents, scores), None

    return forward


def scores_of(module: nn.Module, *, scaling: float | None = None, sliding_window: int | None = None,
              softcap: float | None = None, **others: Any) -> Scores:
    """What the keywords that transformers gives to a layer's attention say of its scores.

    Raises ConfigError for what would change the result and is not known here.
    """
    unknown = sorted(k for k, v in others.items() if v is not None and k not in HARMLESS)
    if unknown:
        raise _unsupported(module, f"uses {unknown}, which no backend computes")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise _unsupported(module, "is not causal")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if sliding_window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        raise _unsupported(module, "slides, but does not tell its window")
    return Scores(scaling, sliding_window or None, softcap)


def _unsupported(module: nn.Module, why: str) -> ConfigError:
    return ConfigError(f"{type(module).__name__}: this model's attention {why}; it is not supported")


def _doc_sdpa(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    docs = zip(*(torch.split(x, documents.lens, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([causal_document(q, k, v, scores) for q, k, v in docs], dim=2).transpose(1, 2)


def causal_document(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Attention of one document: query (1, n_heads, n, head_dim), key and value (1, n_kv_heads, n, head_dim)."""
    n = query.shape[2]
    if scores.softcap is not None or (scores.window is not None and scores.window < n):
        return _masked(query, key, value, _causal(n, scores.window, query.device), scores)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scale,
                                          enable_gqa=query.shape[1] != key.shape[1])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    return _masked(query, key, value, documents.mask(scores.window), scores).transpose(1, 2)


def _masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scores: Scores) -> Tensor:
    """Attention under a mask `visible` (n, n); SDPA where scores are not capped, which it does not know."""
    if scores.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scores.scale,
                                              enable_gqa=query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    capped = scores.softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / scores.softcap))
    wide = torch.promote_types(query.dtype, torch.float32)
    return capped.masked_fill(~visible, -torch.inf).softmax(-1, dtype=wide).to(query.dtype) @ value


def _causal(n: int, window: int | None, device: torch.device) -> Tensor:
    """(n, n) bool: position q sees k where 0 <= q - k < window."""
    visible = torch.ones((n, n), dtype=torch.bool, device=device).tril_()
    return visible if window is None else visible.triu_(1 - window)


def _flex(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    compute = _compiled_flex() if query.is_cuda else cast(Forward, flex_attention)  # a CPU has no gradients of it
    out = compute(query, key, value, score_mod=None if scores.softcap is None else _cap(scores.softcap),
                  block_mask=documents.block_mask(scores.window), scale=scores.scale,
                  enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Forward:
    return cast(Forward, torch.compile(flex_attention))


@functools.cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    """One function per value, so that it is compiled once."""
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


def _block_mask(doc: Tensor, cu_seqlens: Tensor, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries sees in part, and which wholly."""
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (doc[q] == doc[k]) & (q >= k)
        return seen if window is None else seen & (q - k < window)

    n = len(doc)
    block = torch.arange(-(-n // FLEX_BLOCK), device=doc.device)
    first = block * FLEX_BLOCK
    last = (first + FLEX_BLOCK - 1).clamp(max=n - 1)
    earliest = cu_seqlens[doc[first] - 1]  # start of the document that the block's first query is in
    if window is not None:
        earliest = torch.maximum(earliest, first - window + 1)
    some = (block[None] <= block[:, None]) & (block[None] >= earliest[:, None] // FLEX_BLOCK)  # (queries, keys)
    whole = some & (block[None] < block[:, None]) & (doc[first][None] == doc[last][:, None])
    whole &= first[:, None] + FLEX_BLOCK <= n
    if window is not None:
        whole &= last[:, None] - first[None] < window
    return BlockMask.from_kv_blocks(*_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible,
                                    seq_lengths=(n, n))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, (1, 1, rows), and their numbers first in it, (1, 1, rows, columns)."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], numbers.int()[None, None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))  # (n, heads, head_dim)
    options: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options = {"enable_gqa": True}
        else:
            _warn_of_repeated_heads()
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    before = -1 if scores.window is None else scores.window - 1
    out = varlen_attn(q, k, v, documents.cu_seqlens, documents.cu_seqlens, documents.max_seqlen, documents.max_seqlen,
                      scale=scores.scale, window_size=(before, 0), **options)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


@functools.cache
def _warn_of_repeated_heads() -> None:
    log.warning("attention varlen: torch %s cannot share keys and values between heads, so they are copied for every "
                "head, which takes memory and time; install torch >= 2.12, or flash-attn", torch.__version__)


def _anywhere(device: torch.device) -> str | None:
    return None


def _flex_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "FlexAttention has no gradients without a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention compiles with triton, which is not installed: pip install triton"
    return None


def _varlen_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "torch.nn.attention.varlen needs a CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "it needs torch >= 2.11"
    return None


def _flash(package: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{package} needs a CUDA device"
        try:
            importlib.metadata.distribution(package)  # flash-attn and flash-attn-4 share the name of a module
        except importlib.metadata.PackageNotFoundError:
            return f"the package is not installed: pip install {package}"
        return None

    return missing


register("cprec_documents", _forward(_doc_sdpa))
register("cprec_dense", _forward(_sdpa))
register("cprec_flex", _forward(_flex))
register("cprec_varlen", _forward(_varlen))

BACKENDS: dict[str, Backend] = {
    "doc_sdpa": Backend("cprec_documents", _anywhere, caps_scores=True),
    "sdpa": Backend("cprec_dense", _anywhere, caps_scores=True),
    "flex": Backend("cprec_flex", _flex_missing, caps_scores=True),
    "varlen": Backend("cprec_varlen", _varlen_missing, only_16_bit=True),
    "flash2": Backend("flash_attention_2", _flash("flash-attn"), only_16_bit=True, caps_scores=True),
    "flash3": Backend("flash_attention_3", _flash("flash-attn-3"), only_16_bit=True),
    "flash4": Backend("flash_attention_4", _flash("flash-attn-4"), only_16_bit=True),
}
