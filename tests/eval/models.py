"""Small models of random weights for ranking tests: plain attention heads, grouped ones, biases, other norms."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from cprec.eval.tree_attention import TREE_ATTENTION

KINDS = ("llama", "qwen2")
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig, "gemma": GemmaConfig}


def random_model(kind: str = "llama", *, vocab_size: int, dtype: torch.dtype = torch.float64, spread: float = 0.3,
                 attention: str = TREE_ATTENTION, seed: int = 0, max_position_embeddings: int = 256) -> PreTrainedModel:
    """A two-layer model; `spread` is the weights' standard deviation, and a larger one makes peaked predictions."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4 if kind == "llama" else 2, "initializer_range": spread,
        "max_position_embeddings": max_position_embeddings, "attn_implementation": attention}
    if kind in ("qwen3", "gemma"):
        shape["head_dim"] = 8
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
