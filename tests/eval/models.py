"""Small models of random weights for ranking tests: plain and grouped attention heads, biases, norms, windows, caps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from cprec.attention import register
from cprec.eval.tree_attention import TREE_ATTENTION

KINDS = ("llama", "qwen2")
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig, "gemma": GemmaConfig,
    "sliding mistral": MistralConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
WINDOW = 4
"""Positions that layers of the last three see, shorter than the tests' prompts."""


PLAIN = "plain"


def plain_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
                    scaling: float, sliding_window: int | None = None, softcap: float | None = None,
                    **_: Any) -> tuple[Tensor, None]:
    """One text under a mask, in its own precision: transformers' eager attention rounds float64 to float32."""
    n = query.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((distance < 0) | (distance >= (sliding_window or n)), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


register(PLAIN, plain_attention)


def random_model(kind: str = "llama", *, vocab_size: int, dtype: torch.dtype = torch.float64, spread: float = 0.3,
                 attention: str = TREE_ATTENTION, seed: int = 0, max_position_embeddings: int = 256) -> PreTrainedModel:
    """A two-layer model; `spread` is the weights' standard deviation, and a larger one makes peaked predictions."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4 if kind == "llama" else 2, "initializer_range": spread,
        "max_position_embeddings": max_position_embeddings, "attn_implementation": attention}
    if kind.startswith(("qwen3", "gemma")):
        shape["head_dim"] = 8
    if kind in ("sliding mistral", "gemma2", "gemma3"):
        shape["sliding_window"] = WINDOW
    if kind in ("gemma2", "gemma3"):  # the second layer sees everything
        shape["layer_types"] = ["sliding_attention", "full_attention"]
        shape["query_pre_attn_scalar"] = 4
    if kind == "gemma2":  # low enough to bend every score
        shape |= {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind](**shape))
    with torch.no_grad():  # transformers starts biases at 0, which would hide a forgotten one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=spread)
    return model.to(dtype).eval()


def plain_scores(model: PreTrainedModel, prompt: list[int], lines: list[list[int]]) -> list[float]:
    """Log-probability of each line after the prompt, by one plain forward over the whole text per line."""
    scores = []
    with torch.inference_mode():
        for line in lines:
            ids = torch.tensor([prompt + line])
            log_probs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            rows = torch.arange(len(prompt) - 1, len(prompt) + len(line) - 1)
            scores.append(float(log_probs[rows, torch.tensor(line)].sum()))
    return scores
