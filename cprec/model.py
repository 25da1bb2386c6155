"""The language model: any decoder-only Hugging Face model, computing on packed rows and giving its loss in chunks.

reads: a local folder or a hub name. The one module that loads transformers models. Under ZeRO-3 the caller keeps an
`HfDeepSpeedConfig` alive, and `from_pretrained` then partitions every parameter while it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cprec import attention
from cprec.data.collate import Batch
from cprec.errors import ConfigError, raise_all
from cprec.log import get_logger
from cprec.loss import row_losses

log = get_logger(__name__)
UNSUPPORTED = {
    "final_logit_softcapping": "caps its logits, which the chunked loss does not do",
    "attn_logit_softcapping": "caps its attention scores, which the attention backends do not do",
    "logits_scaling": "scales its logits, which the chunked loss does not do",
    "logit_scale": "scales its logits, which the chunked loss does not do",
}
"""Config fields of models whose mathematics we would silently change."""


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a model follows from."""

    n_params: int
    n_embedding_params: int
    """Input embeddings: looked up, not multiplied (0 where they are tied to the output layer)."""
    n_layers: int
    hidden_size: int

    def flops(self, n_tokens: int, token_pairs: int) -> float:
        """Floating-point operations of forward and backward over `n_tokens` tokens whose documents' squared lengths sum
        to `token_pairs`: 6 per multiplied parameter and token, 6 * layers * hidden per causal pair of one document
        (12 * layers * hidden * length, halved by causality; Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return 6.0 * (self.n_params - self.n_embedding_params) * n_tokens \
            + 6.0 * self.n_layers * self.hidden_size * token_pairs


class LossHead(nn.Linear):
    """The output layer as a loss: it sees hidden states and labels, so that ZeRO-3 gathers its weight around both.

    An existing `lm_head` becomes one by changing its class, which keeps its (tied, partitioned) parameters.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Row losses (B,) of hidden states (B, T, H) under labels (B, T); plain logits without labels."""
        return super().forward(hidden) if labels is None else row_losses(hidden, self.weight, labels)


class TrainingModel(nn.Module):
    """A causal language model whose forward takes a `Batch` and gives each row's summed loss, (B,) float32 nats."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        head = lm.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise ConfigError(f"{type(lm).__name__} has no plain linear output layer without bias; it is not supported")
        head.__class__ = LossHead

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            **attention.kernel_arguments(batch.cu_seqlens, batch.max_seqlen),
        ).last_hidden_state
        rows = hidden.view(*batch.labels.shape, -1)  # (B, seq_len, H)
        losses: Tensor = self.lm.get_output_embeddings()(rows, batch.labels)
        return losses

    @property
    def shape(self) -> ModelShape:
        """Sizes for the FLOP count; right under ZeRO-3 too, where a parameter's own size is that of its partition."""
        embedding = self.lm.get_input_embeddings().weight
        tied = embedding is self.lm.get_output_embeddings().weight
        c = self.lm.config
        return ModelShape(
            n_params=sum(_numel(p) for p in self.lm.parameters()), n_embedding_params=0 if tied else _numel(embedding),
            n_layers=c.num_hidden_layers, hidden_size=c.hidden_size,
        )


def load_for_training(path: str, *, backend: str, dtype: torch.dtype, seq_len: int, vocab_size: int,
                      activation_checkpointing: bool, trust_remote_code: bool) -> TrainingModel:
    """The model at `path` (folder or hub name), ready for packed rows of `seq_len` tokens below `vocab_size`.

    Raises ConfigError listing all that makes the model unfit: too short a context, too small a vocabulary, sliding
    windows, capped logits.
    """
    config = _load_config(path, trust_remote_code)
    raise_all(_misfits(config, seq_len=seq_len, vocab_size=vocab_size), of=f"model.path={path!r}")
    lm = _load(path, config=config, dtype=dtype, attn_implementation=attention.BACKENDS[backend].implementation,
               trust_remote_code=trust_remote_code)
    lm.config.use_cache = False  # with a cache, transformers silently stops isolating documents
    _switch_off_dropout(lm)
    if activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        lm.enable_input_require_grads()
    lm.train()
    return TrainingModel(lm)


def load_for_inference(path: str, *, attention: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model at `path` in evaluation mode on `device`, under transformers' attention implementation `attention`."""
    config = _load_config(path, trust_remote_code=False)
    lm = _load(path, config=config, dtype=dtype, attn_implementation=attention)
    lm.config.use_cache = False
    return lm.to(device).eval()


def _load(path: str, **options: Any) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise ConfigError(f"the weights of model {path!r} cannot be loaded: {type(e).__name__}: {e}") from e


def _load_config(path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.path={path!r} is neither a model folder nor a reachable hub name: {e}") from None


def _misfits(config: Any, *, seq_len: int, vocab_size: int) -> list[str]:
    problems = [f"its {field}={value}: it {why}" for field, why in UNSUPPORTED.items()
                if (value := getattr(config, field, None)) not in (None, 1, 1.0)]
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < seq_len:
        problems.append(f"max_position_embeddings={context} is less than the packed rows' seq_len={seq_len}; "
                        f"pack shorter rows")
    if config.vocab_size < vocab_size:
        problems.append(f"vocab_size={config.vocab_size} is less than the {vocab_size} of the packed tokens' tokenizer")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < seq_len:
        problems.append(f"sliding_window={window} is shorter than seq_len={seq_len}, and the attention backends attend "
                        f"to whole documents; pack rows of at most {window} tokens")
    return problems


def _switch_off_dropout(lm: PreTrainedModel) -> None:
    """Continual pre-training sees nearly every row once: dropout costs and would be a random state to carry along."""
    if getattr(lm.config, "attention_dropout", 0.0):
        log.info("attention_dropout %s switched off", lm.config.attention_dropout)
        lm.config.attention_dropout = 0.0
    active = [m for m in lm.modules() if isinstance(m, nn.Dropout) and m.p]
    for module in active:
        module.p = 0.0
    if active:
        log.info("%d dropout layers switched off", len(active))


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
