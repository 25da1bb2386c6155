"""Attention that isolates the documents of a packed row, by backend name; never a silent fallback.

A micro-batch arrives flattened to one row of documents, (1, n_tokens), with `cu_seqlens`: document i spans
`cu_seqlens[i]:cu_seqlens[i + 1]`. Every backend attends causally inside each document and nowhere else.

    name      runs on   cost                          what it is
    doc_sdpa  CPU, GPU  sum of squared lengths        one torch SDPA call per document; the default on a CPU
    sdpa      CPU, GPU  square of the row             torch SDPA under a dense block mask; the reference
    varlen    GPU       sum of squared lengths        torch.nn.attention.varlen: FlashAttention inside torch
    flash2    GPU       sum of squared lengths        package flash-attn
    flash3    GPU       sum of squared lengths        package flash-attn-3 (Hopper)
    flash4    GPU       sum of squared lengths        package flash-attn-4 (Hopper, Blackwell)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cprec.errors import ConfigError, did_you_mean

Forward = Callable[..., tuple[Tensor, Tensor | None]]


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
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen, "max_length_k": max_seqlen}


def _doc_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
              cu_seq_lens_q: Tensor, scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
    grouped = query.shape[1] != key.shape[1]
    lens = cu_seq_lens_q.diff().tolist()
    docs = zip(*(torch.split(x, lens, dim=2) for x in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
           for q, k, v in docs]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
          cu_seq_lens_q: Tensor, scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
    n = query.shape[2]
    position = torch.arange(n, device=query.device)
    doc = torch.searchsorted(cu_seq_lens_q, position, right=True)
    visible = (doc[:, None] == doc[None, :]) & (position[:, None] >= position[None, :])  # (n, n)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling,
                                         enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


def _varlen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
            cu_seq_lens_q: Tensor, max_length_q: int, scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))  # (n, heads, head_dim)
    if k.shape[1] != q.shape[1]:  # enable_gqa came after torch 2.11; repeating is what it saves
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                      window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.unsqueeze(0), None


def _anywhere(device: torch.device) -> str | None:
    return None


def _varlen_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "torch.nn.attention.varlen needs a CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "it needs torch >= 2.11"
    return None


def _flash(module: str, package: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{package} needs a CUDA device"
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package of a dotted name is absent
            found = False
        return None if found else f"the package is not installed: pip install {package}"

    return missing


register("cprec_doc_sdpa", _doc_sdpa)
register("cprec_sdpa", _sdpa)
register("cprec_varlen", _varlen)

BACKENDS: dict[str, Backend] = {
    "doc_sdpa": Backend("cprec_doc_sdpa", _anywhere),
    "sdpa": Backend("cprec_sdpa", _anywhere),
    "varlen": Backend("cprec_varlen", _varlen_missing, only_16_bit=True),
    "flash2": Backend("flash_attention_2", _flash("flash_attn", "flash-attn"), only_16_bit=True),
    "flash3": Backend("flash_attention_3", _flash("flash_attn_interface", "flash-attn-3"), only_16_bit=True),
    "flash4": Backend("flash_attention_4", _flash("flash_attn.cute", "flash-attn-4"), only_16_bit=True),
}
