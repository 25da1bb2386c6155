"""The language model: any decoder-only Hugging Face model, computing on packed rows and giving its loss in chunks.

reads: a local folder, a hub name, or a GGUF file. The one module that loads transformers models. Under ZeRO-3 the
caller keeps an `HfDeepSpeedConfig` alive, and `from_pretrained` then partitions every parameter while it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cprec import attention
from cprec.data.collate import Batch
from cprec.errors import ConfigError, raise_all
from cprec.log import bars_only_on_a_terminal, get_logger
from cprec.loss import row_losses

log = get_logger(__name__)
UNSUPPORTED = {
    "logits_scaling": "scales its logits, which neither the chunked loss nor ranking does",
    "logit_scale": "scales its logits, which neither the chunked loss nor ranking does",
}
"""Config fields of models whose mathematics we would silently change."""
LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Layers whose backends isolate documents, and prefixes of a search; convolutions, linear attention and chunks would
carry state across them."""


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a model follows from."""

    n_params: int
    n_embedding_params: int
    """Input embeddings: looked up, not multiplied (0 where they are tied to the output layer)."""
    n_frozen_params: int
    """Multiplied, but not trained: those under LoRA adapters."""
    n_layers: int
    hidden_size: int
    attention_size: int
    """Query heads times the size of a head; not the hidden size in every family (Qwen3, Gemma)."""

    def flops(self, n_tokens: int, token_pairs: int) -> float:
        """Floating-point operations of forward and backward over `n_tokens` tokens whose documents' squared lengths sum
        to `token_pairs`: 6 per multiplied parameter and token (4 where it is frozen: no gradient of its own), 6 *
        layers * attention size per causal pair of one document (12 * layers * heads * head size * length, halved by
        causality; Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return (6.0 * (self.n_params - self.n_embedding_params) - 2.0 * self.n_frozen_params) * n_tokens \
            + 6.0 * self.n_layers * self.attention_size * token_pairs


class LossHead(nn.Linear):
    """The output layer as a loss: it sees hidden states and labels, so that ZeRO-3 gathers its weight around both.

    An existing `lm_head` becomes one by changing its class, which keeps its (tied, partitioned) parameters.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, *, softcap: float | None = None) -> Tensor:
        """Row losses (B,) of hidden states (B, T, H) under labels (B, T); plain logits without labels."""
        return super().forward(hidden) if labels is None else row_losses(hidden, self.weight, labels, softcap=softcap)


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
        softcap = getattr(self.lm.config, "final_logit_softcapping", None)
        losses: Tensor = self.lm.get_output_embeddings()(rows, batch.labels, softcap=softcap)
        return losses

    @property
    def shape(self) -> ModelShape:
        """Sizes for the FLOP count; right under ZeRO-3 too, where a parameter's own size is that of its partition."""
        embedding = self.lm.get_input_embeddings().weight
        tied = embedding is self.lm.get_output_embeddings().weight
        c = self.lm.config
        head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        frozen = [p for p in self.lm.parameters() if not p.requires_grad and (tied or p is not embedding)]
        return ModelShape(
            n_params=sum(_numel(p) for p in self.lm.parameters()), n_embedding_params=0 if tied else _numel(embedding),
            n_frozen_params=sum(map(_numel, frozen)), n_layers=c.num_hidden_layers, hidden_size=c.hidden_size,
            attention_size=c.num_attention_heads * head_size)


def load_for_training(path: str, *, backend: str, dtype: torch.dtype, seq_len: int, vocab_size: int,
                      activation_checkpointing: int | None, trust_remote_code: bool) -> TrainingModel:
    """The model at `path` (folder, hub name, GGUF file), ready for packed rows of `seq_len` tokens below `vocab_size`.

    A model with fewer tokens gets rows for the rest, tied embeddings stay tied. Raises ConfigError listing all that
    makes the model unfit: too short a context, mathematics or layers that are not supported.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    raise_all(_misfits(config, seq_len=seq_len, backend=backend), of=f"model.path={path!r}")
    config.pad_token_id = None  # its embedding would get no gradient, though it may be a token of the text (bos, eos)
    lm = _load(path, config=config, dtype=dtype, attn_implementation=attention.BACKENDS[backend].implementation,
               trust_remote_code=trust_remote_code)
    refuse_own_attention(lm, f"model.path={path!r}")
    _enlarge_vocabulary(lm, vocab_size)
    lm.config.use_cache = False  # with a cache, transformers silently stops isolating documents
    _switch_off_dropout(lm)
    if activation_checkpointing:
        _recompute_every(lm, activation_checkpointing)
    lm.train()
    return TrainingModel(lm)


def describe(path: str, *, dtype: torch.dtype, implementation: str, trust_remote_code: bool,
             vocab_size: int | None) -> PreTrainedModel:
    """The model at `path` in training mode, from its config alone: on the meta device, where tensors have no content.

    `vocab_size`: of the tokenizer, where it may have more tokens than the model.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    config.vocab_size = max(config.vocab_size, vocab_size or 0)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation,
                                              trust_remote_code=trust_remote_code)
    _switch_off_dropout(lm)
    return lm.train()


def load_for_inference(path: str, *, attention: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model at `path` in evaluation mode on `device`, under transformers' attention implementation `attention`."""
    config = load_config(path, trust_remote_code=False)
    lm = _load(path, config=config, dtype=dtype, attn_implementation=attention)
    lm.config.use_cache = False
    return lm.to(device).eval()


def load_config(path: str, *, trust_remote_code: bool) -> Any:
    """The transformers config of the model at `path` (folder, hub name or GGUF file). Raises ConfigError."""
    name, options = _source(path)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as e:
        if "trust_remote_code" in str(e):
            raise ConfigError(f"model.path={path!r} brings Python code of its own, which is not run unless you ask for "
                              f"it: read it, then set model.trust_remote_code=true") from None
        raise ConfigError(f"model.path={path!r} is neither a model folder nor a reachable hub name: {e}") from None
    if hasattr(config, "quantization_config") and options:
        del config.quantization_config  # from a GGUF file weights come as floats
    return config


def load_transformers_tokenizer(path: str) -> Any:
    """The transformers tokenizer of the model at `path` (folder, hub name or GGUF file), to be saved with an export."""
    name, options = _source(path)
    return AutoTokenizer.from_pretrained(name, **options)


def _source(path: str) -> tuple[str, dict[str, str]]:
    """What transformers calls the model at `path`: a folder or hub name, and `gguf_file` where it is a GGUF file.

    A folder without config.json that holds one GGUF file stands for it.
    """
    here = Path(path)
    if here.suffix == ".gguf":
        return str(here.parent), {"gguf_file": here.name}
    found = [] if (here / "config.json").is_file() else sorted(p.name for p in here.glob("*.gguf"))
    if len(found) > 1:
        raise ConfigError(f"model.path={path!r} holds several GGUF files; name one of them: {', '.join(found)}")
    return path, {"gguf_file": found[0]} if found else {}


def _load(path: str, **options: Any) -> PreTrainedModel:
    name, of_file = _source(path)
    bars_only_on_a_terminal()
    try:
        return AutoModelForCausalLM.from_pretrained(name, **of_file, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as e:
        raise ConfigError(f"the weights of model {path!r} cannot be loaded: {type(e).__name__}: {e}") from e


def misfits(config: Any) -> list[str]:
    """What makes the model of a transformers config one whose tokens attention cannot be told to keep apart, or whose
    mathematics is not ours: neither training on packed rows nor exact ranking would be right with it."""
    if config.get_text_config() is not config:
        return [f"{type(config).__name__} is a model of more than text; give its language model alone"]
    problems = [f"its {field}={value}: it {why}" for field, why in UNSUPPORTED.items()
                if (value := getattr(config, field, None)) not in (None, 1, 1.0)]
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES):
        problems.append(f"its layers of type {', '.join(others)} would not stop at a document's end, nor keep the "
                        f"prefixes of a search apart")
    if getattr(config, "use_bidirectional_attention", None):
        problems.append("use_bidirectional_attention is set: it is no causal language model")
    return problems


def refuse_own_attention(lm: PreTrainedModel, of: str) -> None:
    """Raise ConfigError for a loaded model that computes attention itself, or carries a state beside it."""
    if not lm._supports_attention_backend or lm._is_stateful:
        raise ConfigError(f"{of}: {type(lm).__name__} keeps a state or an attention of its own, which "
                          f"would not stop at a document's end, nor keep the prefixes of a search apart; it is not "
                          f"supported")


def longrope_limit(config: Any) -> int | None:
    """Tokens up to which positions mean the same in every batch; None: all. Beyond, LongRoPE turns all of a batch's
    positions otherwise where one of its texts is longer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def _misfits(config: Any, *, seq_len: int, backend: str) -> list[str]:
    problems = misfits(config)
    if config.get_text_config() is not config:
        return problems
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < seq_len:
        problems.append(f"max_position_embeddings={context} is less than the packed rows' seq_len={seq_len}; "
                        f"pack shorter rows")
    if getattr(config, "attn_logit_softcapping", None) and not attention.BACKENDS[backend].caps_scores:
        able = ", ".join(name for name, b in attention.BACKENDS.items() if b.caps_scores)
        problems.append(f"its attn_logit_softcapping={config.attn_logit_softcapping}: the attention backend {backend} "
                        f"does not cap scores; set model.attention to one that does: {able}")
    if (short := longrope_limit(config)) is not None and seq_len > short:
        problems.append(f"its rotary positions change for the whole batch where one document is longer than {short} "
                        f"tokens; pack rows of at most {short}")
    return problems


def _enlarge_vocabulary(lm: PreTrainedModel, vocab_size: int) -> None:
    """Rows for tokens that the tokenizer has and the model has not, as one that was given a pad token.

    Under ZeRO-3 an enlarged layer is whole on every rank until `deepspeed.initialize` partitions it too.
    They start near the mean of all others (Hewitt 2021, "Initializing New Word Embeddings"): a row drawn at random may
    have the largest logit everywhere. Every rank and every start draws the same.
    """
    there = lm.config.vocab_size
    if vocab_size <= there:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm.resize_token_embeddings(vocab_size, mean_resizing=True)
    log.warning("the tokenizer has %d tokens, the model knew %d: %d rows were added to its embeddings, near the mean "
                "of the others", vocab_size, there, vocab_size - there)


def decoder_blocks(lm: nn.Module) -> list[GradientCheckpointingLayer]:
    """The repeated blocks of a model, first to last."""
    return [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]


def compile_blocks(lm: PreTrainedModel) -> None:
    """Compile every decoder block but its attention: that is one kernel, or Python over documents whose lengths would
    be compiled anew for every batch."""
    name = lm.config._attn_implementation
    left_out = torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name])  # type: ignore[no-untyped-call]
    AttentionInterface.register(name, left_out)
    for block in decoder_blocks(lm):
        block.compile()


def _recompute_every(lm: PreTrainedModel, k: int) -> None:
    """Activation checkpointing of every `k`-th decoder block. Reentrant: under ZeRO-3 the other way finds, in the
    backward pass, weights of another shape (partitioned) than it noted in the forward pass, and raises."""
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for i, block in enumerate(decoder_blocks(lm)):
        block.gradient_checkpointing = i % k == 0
    lm.enable_input_require_grads()


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
