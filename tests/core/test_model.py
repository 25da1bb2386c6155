"""A packed row computes what its documents compute alone, in every backend, forward and backward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cprec import attention
from cprec.attention import BACKENDS, kernel_arguments, select
from cprec.data.collate import Batch, collate
from cprec.errors import ConfigError
from cprec.format import PackedCorpus
from cprec.loss import IGNORE_INDEX, _fused, _recomputed, row_losses
from cprec.model import load_for_training

CPU = torch.device("cpu")
RUNNABLE = [name for name, backend in BACKENDS.items() if backend.missing(CPU) is None]
SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
}


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (n,), generator=generator) for n in (17, 1, 30, 2, 14)]


def packed_inputs(docs: list[torch.Tensor]) -> dict[str, object]:
    lens = torch.tensor([len(d) for d in docs])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)]).int()
    return {"input_ids": torch.cat(docs)[None], "position_ids": torch.cat([torch.arange(len(d)) for d in docs])[None],
            "use_cache": False, **kernel_arguments(cu_seqlens, int(lens.max()))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_packed_row_gives_the_logits_and_gradients_of_its_documents_alone(name: str, family: str) -> None:
    torch.manual_seed(0)
    lm = FAMILIES[family]().double().eval()
    docs = documents()
    lm.set_attn_implementation("sdpa")  # transformers' own, one document at a time ("eager" rounds to float32 inside)
    alone = torch.cat([lm(d[None], use_cache=False).logits[0] for d in docs])
    alone.sin().sum().backward()
    expected = {n: p.grad.clone() for n, p in lm.named_parameters()}
    lm.zero_grad()
    lm.set_attn_implementation(BACKENDS[name].implementation)
    packed = lm(**packed_inputs(docs)).logits[0]
    packed.sin().sum().backward()
    print("largest difference of a logit:", float((packed - alone).detach().abs().max()))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    for n, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RUNNABLE)
def test_no_document_sees_another(name: str) -> None:
    torch.manual_seed(0)
    lm = FAMILIES["llama"]().eval()
    lm.set_attn_implementation(BACKENDS[name].implementation)
    docs = documents()
    before = lm(**packed_inputs(docs)).logits[0]
    docs[0] = (docs[0] + 1) % 60
    after = lm(**packed_inputs(docs)).logits[0]
    assert not torch.equal(before[:17], after[:17])
    assert torch.equal(before[17:], after[17:])


@pytest.mark.parametrize("one_row", [_fused, _recomputed])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(one_row: object) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    labels = torch.randint(0, 300, (2500,))
    labels[::7] = IGNORE_INDEX
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected = torch.autograd.grad(plain, (hidden, weight))
    chunked = one_row(hidden, weight, labels)  # type: ignore[operator]
    found = torch.autograd.grad(chunked, (hidden, weight))
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_row_without_labels_has_no_loss_and_bfloat16_keeps_a_float32_sum() -> None:
    hidden, weight = torch.randn(2, 2000, 16), torch.randn(300, 16)
    labels = torch.full((2, 2000), IGNORE_INDEX)
    labels[1] = 3
    found = row_losses(hidden.bfloat16(), weight.bfloat16(), labels)
    assert found[0] == 0 and found.dtype == torch.float32
    plain = torch.nn.functional.cross_entropy(
        hidden[1].bfloat16().float() @ weight.bfloat16().float().T, labels[1], reduction="sum")
    assert float(found[1]) == pytest.approx(float(plain), rel=3e-3)


def load(path: Path, **overrides: object) -> object:
    options = {"backend": "doc_sdpa", "dtype": torch.float32, "seq_len": tiny.SEQ_LEN, "vocab_size": 258,
               "activation_checkpointing": False, "trust_remote_code": False}
    return load_for_training(str(path), **{**options, **overrides})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny.write_model(root / "model")
    tiny.write_corpus(root / "packed", "a", model=root / "model", n_rows=4, seed=1)
    return root


def batch_of(folder: Path) -> Batch:
    return collate(list(PackedCorpus(folder / "packed/a")), [0, 0, 0, 0])


def test_the_training_models_row_losses_are_the_summed_losses_of_the_documents(folder: Path) -> None:
    found = load(folder / "model")(batch_of(folder))  # type: ignore[operator]
    lm = AutoModelForCausalLM.from_pretrained(folder / "model")
    for row, loss in zip(PackedCorpus(folder / "packed/a"), found, strict=True):
        docs = torch.split(torch.from_numpy(row.input_ids[:tiny.SEQ_LEN - row.n_pad].astype("int64")),
                           row.real_doc_lens.tolist())
        expected = sum(float(lm(d[None], labels=d[None]).loss.detach()) * (len(d) - 1) for d in docs if len(d) > 1)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_masked_row_is_that_of_its_masked_tokens(folder: Path) -> None:
    rng = np.random.default_rng(5)
    rows = [row._replace(loss_mask=rng.random(tiny.SEQ_LEN) < 0.3) for row in PackedCorpus(folder / "packed/a")]
    found = load(folder / "model")(collate(rows, [0, 0, 0, 0]))  # type: ignore[operator]
    lm = AutoModelForCausalLM.from_pretrained(folder / "model")
    for row, loss in zip(rows, found, strict=True):
        expected = 0.0
        for end, n in zip(np.cumsum(row.real_doc_lens), row.real_doc_lens, strict=True):
            ids = torch.from_numpy(row.input_ids[end - n:end].astype("int64"))
            log_probs = lm(ids[None]).logits[0].detach().log_softmax(-1)
            expected -= sum(float(log_probs[t - 1, ids[t]]) for t in range(1, n) if row.loss_mask[end - n + t])
        assert float(loss) == pytest.approx(expected, rel=1e-5) and expected > 0


def test_activation_checkpointing_changes_no_gradient(folder: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        model = load(folder / "model", activation_checkpointing=checkpointing)
        model(batch_of(folder)).sum().backward()  # type: ignore[operator]
        grads.append({n: p.grad for n, p in model.named_parameters()})  # type: ignore[attr-defined]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_all_that_makes_a_model_unfit_is_told_at_once(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", max_position_embeddings=32)
    with pytest.raises(ConfigError, match=r"(?s)max_position_embeddings=32 .*vocab_size=258 is less than the 300"):
        load(tmp_path / "model", vocab_size=300)
    with pytest.raises(ConfigError, match="neither a model folder nor a reachable hub name"):
        load(tmp_path / "nowhere")


def test_a_backend_that_cannot_run_here_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"flash2.* cannot run here: flash-attn needs a CUDA device"):
        select("flash2", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"varlen.* cannot run here: it computes in 16 bits, model.dtype is float32"):
        select("varlen", torch.device("cuda"), torch.float32)
    with pytest.raises(ConfigError, match="did you mean 'flash"):
        select("flash5", CPU, torch.float32)
    assert select("auto", CPU, torch.float32) == "doc_sdpa"
    assert {b.implementation for b in attention.BACKENDS.values()} >= {"cprec_doc_sdpa", "flash_attention_2"}
