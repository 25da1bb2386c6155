"""Which models are ranked at all: an exact search is wrong for those whose prefixes cannot be kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3NextConfig,
)

from cprec.errors import ConfigError
from cprec.eval.rank import Ranker
from cprec.eval.rankers import load_model
from cprec.eval.trie import build_trie
from tests.eval.folders import TOKENIZER_VOCAB, write_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": TOKENIZER_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
STEADY = 48
"""Tokens up to which the LongRoPE of `PHI3` is that of short texts."""
PHI3 = Phi3Config(**SHAPE, pad_token_id=0, initializer_range=0.3, original_max_position_embeddings=STEADY,
                  rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                   "long_factor": [2.0] * 4})


@pytest.mark.parametrize("protocol", ["full", "uniform-3", "beam-5", "choice-3", "open-5"])
@pytest.mark.parametrize(("config", "says"), [
    (CohereConfig(**SHAPE, logit_scale=0.5), r"its logit_scale=0\.5: it scales its logits"),
    (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"]), "layers of type conv would not .* prefixes"),
    (MambaConfig(**SHAPE), "layers of type linear_attention would not"),
    (Qwen3NextConfig(**SHAPE), "layers of type linear_attention would not"),
    (Llama4TextConfig(**SHAPE), "layers of type chunked_attention would not"),
    (Gemma3Config(), "is a model of more than text"),
    (Gemma3TextConfig(**SHAPE, use_bidirectional_attention=True), "no causal language model"),
], ids=lambda x: type(x).__name__ if isinstance(x, PretrainedConfig) else "")
def test_models_that_a_search_would_rank_wrong_are_refused_by_their_config(
        config: PretrainedConfig, says: str, protocol: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=says):
        load_model(tmp_path, protocol, "float32")


def save(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return write_tokenizer(folder)


def test_a_model_whose_attention_is_its_own_is_refused(tmp_path: Path) -> None:
    folder = save(BloomConfig(vocab_size=TOKENIZER_VOCAB, hidden_size=16, n_layer=1, n_head=2), tmp_path)
    with pytest.raises(ConfigError, match="BloomForCausalLM keeps a state or an attention of its own"):
        load_model(folder, "full", "float32")


def test_longrope_is_ranked_within_the_length_where_its_positions_are_those_of_any_batch(tmp_path: Path) -> None:
    model = load_model(save(PHI3, tmp_path), "full", "float64")
    assert model.context == STEADY
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    rng = np.random.default_rng(0)
    lines = [[*rng.integers(2, 9, 5).tolist(), 1] for _ in range(20)]
    prompts = [rng.integers(2, 200, n).tolist() for n in (5, STEADY - 6)]
    found = Ranker(model.lm, build_trie(lines)).rank(prompts, [3, 7], np.ones((2, 20), dtype=bool))
    for prompt, target, answer in zip(prompts, [3, 7], found, strict=True):
        scores = []
        for line in lines:
            logits = plain(torch.tensor([prompt + line])).logits[0, len(prompt) - 1:-1].detach()
            scores.append(float(logits.log_softmax(-1)[range(6), line].sum()))
        assert answer.ranked.rank == 1 + sum(s > scores[target] + 1e-4 for s in scores)
        assert answer.ranked.score == pytest.approx(scores[target], abs=1e-4)
