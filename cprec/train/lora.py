"""LoRA adapters through peft, and the only module that knows it: put into a model, merged away, or written alone.

reads: the model's linear layers; a checkpoint's weights. A layer `q_proj` becomes `q_proj.base_layer` with
`q_proj.lora_A.default` (r, in) and `q_proj.lora_B.default` (out, r). Costs of merging: one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cprec.config import LoraConfig
from cprec.errors import ConfigError

BASE, A, B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(lm: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze `lm` and give its target layers adapters, which at first change nothing (B is zero).

    Raises ConfigError when peft is not installed, or when a target is no linear layer or does not exist.
    """
    peft = _import_peft()
    try:
        peft.inject_adapter_in_model(peft_config(config), lm)
    except ValueError as e:
        raise ConfigError(f"model.lora.target_modules={config.target_modules!r} of {type(lm).__name__}: {e}") from None
    adapted = {n: m.get_base_layer() for n, m in lm.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    other = sorted(n for n, base in adapted.items() if not isinstance(base, nn.Linear))
    if other:
        raise ConfigError(f"model.lora.target_modules={config.target_modules!r}: {', '.join(other)} are no linear "
                          f"layers; name linear layers, or all-linear")
    for name, p in lm.named_parameters():
        if p.requires_grad:
            p.data = p.data.to(lm.dtype)  # peft makes float32 ones; the optimizer holds float32 master weights anyway
            assert "lora_" in name, name


def peft_config(config: LoraConfig, *, base_model: str | None = None) -> Any:
    """The config in peft's terms."""
    return _import_peft().LoraConfig(
        r=config.r, lora_alpha=config.alpha, target_modules=config.target_modules, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=base_model, inference_mode=base_model is not None)


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model without adapters: W + alpha/r * B A, computed in float32."""
    scale = config.alpha / config.r
    for name in weights:
        if name.endswith(BASE):
            layer = name.removesuffix(BASE)
            change = weights[layer + B].float() @ weights[layer + A].float()
            yield layer + ".weight", weights[name].float() + scale * change
        elif not name.endswith((A, B)):
            yield name.replace(".base_layer.", "."), weights[name]


def adapter_tensors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names, as `PeftModel.from_pretrained` looks for them, and tensors of the adapters alone."""
    for name in weights:
        if name.endswith((A, B)):
            yield f"base_model.model.{name.replace('.default.', '.')}", weights[name]


def write_adapter_config(folder: Path, config: LoraConfig, *, base_model: str) -> None:
    """Write peft's `adapter_config.json`, which names the model that the adapter belongs to."""
    peft_config(config, base_model=base_model).save_pretrained(str(folder))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("model.lora needs the package peft: pip install 'cprec[lora]'") from None
    return peft
