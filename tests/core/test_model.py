"""A packed row computes what its documents compute alone, in every backend, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cprec.attention import BACKENDS
from cprec.data.collate import Batch, collate
from cprec.errors import ConfigError
from cprec.format import PackedCorpus
from cprec.loss import IGNORE_INDEX
from cprec.model import TrainingModel, load_config, load_for_training, load_transformers_tokenizer
from cprec.tokenizer import load_tokenizer

RUNNABLE = [name for name, backend in BACKENDS.items() if backend.missing(torch.device("cpu")) is None]
SEQ_LEN = 32
ROWS = [(17, 1, 14), (30, 2)]
"""Lengths of the documents of two packed rows."""
SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {**SHAPE, "head_dim": 16}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "smollm2": lambda: LlamaForCausalLM(LlamaConfig(**{
        **SHAPE, "hidden_size": 48, "num_attention_heads": 6}, tie_word_embeddings=True, rope_theta=100000.0)),
    "qwen2.5": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen2, sliding in its upper layers": lambda: Qwen2ForCausalLM(Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GEMMA)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(
        **GEMMA, sliding_window=6, query_pre_attn_scalar=9, attn_logit_softcapping=0.5, final_logit_softcapping=0.8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        **GEMMA, sliding_window=6, query_pre_attn_scalar=9,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"])),
}


def documents(row: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Token ids from 3 on: the configs' pad tokens are below, whose embeddings plain transformers does not train."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=generator) for n in row]


def packed(rows: list[list[torch.Tensor]]) -> Batch:
    """The rows as the collator would lay them out."""
    docs = [d for row in rows for d in row]
    lens = torch.tensor([len(d) for d in docs])
    labels = torch.cat([torch.cat([d[1:], torch.tensor([IGNORE_INDEX])]) for d in docs]).view(len(rows), SEQ_LEN)
    n_valid = (labels != IGNORE_INDEX).sum(1)
    return Batch(
        input_ids=torch.cat(docs)[None], labels=labels, position_ids=torch.cat([torch.arange(n) for n in lens])[None],
        cu_seqlens=torch.cat([torch.zeros(1), lens.cumsum(0)]).int(), max_seqlen=int(lens.max()),
        corpus=torch.zeros(len(rows), dtype=torch.int64), doc_ids=torch.arange(len(docs)), n_pad=0,
        doc_corpus=torch.zeros(len(docs), dtype=torch.int64), n_valid=int(n_valid.sum()), n_valid_by_row=n_valid)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the family as a folder, its norms and biases moved from where they start."""
    torch.manual_seed(0)
    lm = FAMILIES[request.param]()
    with torch.no_grad():
        for p in lm.parameters():
            p += 0.1 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("family")
    lm.save_pretrained(path)
    return path


@pytest.mark.parametrize("backend", RUNNABLE)
def test_packed_rows_give_the_losses_and_gradients_of_their_documents_alone(family: Path, backend: str) -> None:
    rows = [documents(row, seed) for seed, row in enumerate(ROWS)]
    plain = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float64, attn_implementation="eager")
    expected = torch.stack([
        sum((torch.nn.functional.cross_entropy(plain(d[None], use_cache=False).logits[0, :-1], d[1:], reduction="sum")
             for d in row if len(d) > 1), torch.zeros((), dtype=torch.float64)) for row in rows])
    model = load(family, backend=backend, dtype=torch.float64, seq_len=SEQ_LEN, vocab_size=60)
    found = model(packed(rows))
    print("largest difference of a row's loss:", float((found - expected).detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)  # "eager" has its softmax in float32
    expected.sum().backward()
    found.sum().backward()
    grads = {n: p.grad for n, p in plain.named_parameters()}
    for n, p in model.lm.named_parameters():
        torch.testing.assert_close(p.grad, grads.pop(n), rtol=0, atol=1e-5)
    assert not grads


def test_no_document_of_a_family_sees_another(family: Path) -> None:
    model = load(family, seq_len=SEQ_LEN, vocab_size=60)
    rows = [documents(row, seed) for seed, row in enumerate(ROWS)]
    before = model(packed(rows))
    rows[0][0] = 3 + (rows[0][0] - 2) % 57
    after = model(packed(rows))
    assert before[0] != after[0] and before[1] == after[1]


def load(path: Path, **overrides: Any) -> TrainingModel:
    options: dict[str, Any] = {"backend": "doc_sdpa", "dtype": torch.float32, "seq_len": tiny.SEQ_LEN,
                               "vocab_size": 258, "activation_checkpointing": False, "trust_remote_code": False}
    return load_for_training(str(path), **{**options, **overrides})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny.write_model(root / "model")
    tiny.write_corpus(root / "packed", "a", model=root / "model", n_rows=4, seed=1)
    return root


def batch_of(folder: Path) -> Batch:
    return collate(list(PackedCorpus(folder / "packed/a")), [0, 0, 0, 0])


def test_the_training_models_row_losses_are_the_summed_losses_of_the_documents(folder: Path) -> None:
    found = load(folder / "model")(batch_of(folder))
    lm = AutoModelForCausalLM.from_pretrained(folder / "model")
    for row, loss in zip(PackedCorpus(folder / "packed/a"), found, strict=True):
        docs = torch.split(torch.from_numpy(row.input_ids[:tiny.SEQ_LEN - row.n_pad].astype("int64")),
                           row.real_doc_lens.tolist())
        expected = sum(float(lm(d[None], labels=d[None]).loss.detach()) * (len(d) - 1) for d in docs if len(d) > 1)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_masked_row_is_that_of_its_masked_tokens(folder: Path) -> None:
    rng = np.random.default_rng(5)
    rows = [row._replace(loss_mask=rng.random(tiny.SEQ_LEN) < 0.3) for row in PackedCorpus(folder / "packed/a")]
    found = load(folder / "model")(collate(rows, [0, 0, 0, 0]))
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
        model(batch_of(folder)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_all_that_makes_a_model_unfit_is_told_at_once(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", max_position_embeddings=32)
    edit_config(tmp_path / "model", logit_scale=0.5)
    with pytest.raises(ConfigError, match=r"(?s)logit_scale=0.5.*max_position_embeddings=32 "):
        load(tmp_path / "model")
    with pytest.raises(ConfigError, match="neither a model folder nor a reachable hub name"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(("config", "says"), [
    (Gemma2Config(**GEMMA), "varlen does not cap scores; .* to one that does: doc_sdpa, sdpa, flex, flash2"),
    (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"]), "layers of type conv would not stop"),
    (MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1), "layers of type linear_attention would not stop"),
    (Gemma3Config(), "is a model of more than text"),
    (Phi3Config(**SHAPE, pad_token_id=0, original_max_position_embeddings=16, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
     "one document is longer than 16 tokens"),
])
def test_what_would_be_silently_wrong_is_refused(config: PretrainedConfig, says: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, backend="varlen", seq_len=SEQ_LEN, vocab_size=60)


def test_a_model_whose_attention_is_not_ours_to_choose_is_refused(tmp_path: Path) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="BloomForCausalLM keeps a state or an attention of its own"):
        load(tmp_path)


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text("raise AssertionError('this code must not run')\n")
    edit_config(tmp_path / "model", model_type="of_its_own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(ConfigError, match="own, which is not run unless you ask for it"):
        load(tmp_path / "model")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_the_model_lacks_get_mean_embeddings_and_change_nothing_else(
        folder: Path, tmp_path: Path, tied: bool) -> None:
    tiny.write_model(tmp_path / "model", tie_word_embeddings=tied)
    small, large = load(tmp_path / "model").lm, load(tmp_path / "model", vocab_size=261).lm
    again = load(tmp_path / "model", vocab_size=261).lm
    for part in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(small, part)().weight, getattr(large, part)().weight
        assert new.shape[0] == large.config.vocab_size == 261
        assert torch.equal(new[:258], old)
        torch.testing.assert_close(new[258:], old.mean(0).expand(3, -1), rtol=0, atol=1e-4)
        assert torch.equal(new, getattr(again, part)().weight)  # every rank and every start has the same
    assert (large.get_input_embeddings().weight is large.get_output_embeddings().weight) is tied
    model = load(tmp_path / "model", vocab_size=261)
    model(batch_of(folder)).sum().backward()


def test_ranks_that_partition_while_they_load_hold_the_same_enlarged_model_in_halves(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    tiny.write_model(tmp_path / "model")
    expected = load(tmp_path / "model", vocab_size=261)
    ranks = [subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zero_world.py")), str(tmp_path / "model"), "261", str(tmp_path)],
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29673", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.REPO)}) for rank in range(2)]
    assert [p.wait() for p in ranks] == [0, 0]
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts["n_params"] == expected.shape.n_params and facts["vocab_size"] == 261
        assert 0.5 <= facts["held"] < 0.51  # an odd parameter is padded
        assert facts["n_parted"] >= len(list(expected.parameters())) - 1  # DeepSpeed parts an enlarged embedding later
        weights = torch.load(tmp_path / f"{rank}.pt")
        assert weights.keys() == dict(expected.named_parameters()).keys()
        for name, p in expected.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=1e-6)


def test_a_pad_token_of_the_config_is_trained_where_the_text_uses_it(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", pad_token_id=5, tie_word_embeddings=False)
    model = load(tmp_path / "model", seq_len=SEQ_LEN)
    rows = [documents(row, seed) for seed, row in enumerate(ROWS)]
    rows[0][0][3] = 5
    model(packed(rows)).sum().backward()
    grad = model.lm.get_input_embeddings().weight.grad
    assert grad is not None and grad[5].abs().sum() > 0


def test_a_pad_token_beyond_the_vocabulary_is_no_obstacle(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    edit_config(tmp_path / "model", pad_token_id=258)
    assert load(tmp_path / "model", vocab_size=259).lm.get_input_embeddings().weight.shape[0] == 259


def write_gguf(path: Path) -> None:
    """A random Llama of one layer in float32 with a byte-level tokenizer, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf", reason="the package gguf reads GGUF files")
    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(1)
    out.add_context_length(128)
    out.add_embedding_length(32)
    out.add_feed_forward_length(48)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(8)
    out.add_vocab_size(259)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "af"])
    out.add_token_types([3, 3, *[1] * 257])
    out.add_token_merges(["a f"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    shapes = {"token_embd": (259, 32), "output_norm": (32,), "output": (259, 32), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
              "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
              "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        out.add_tensor(f"{name}.weight", (0.1 * rng.standard_normal(shape)).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_file_is_a_model_by_its_own_name_or_its_folders(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    rows = [documents(row, seed) for seed, row in enumerate(ROWS)]
    expected = [sum(float(plain(d[None], labels=d[None]).loss.detach()) * (len(d) - 1) for d in row if len(d) > 1)
                for row in rows]
    for path in (tmp_path / "small.gguf", tmp_path):
        model = load(path, seq_len=SEQ_LEN)
        assert model(packed(rows)).tolist() == pytest.approx(expected, rel=1e-5)
        assert model.lm.get_input_embeddings().weight.requires_grad
    load_config(str(tmp_path), trust_remote_code=False).save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    tokenizer = load_transformers_tokenizer(str(tmp_path))
    assert tokenizer.eos_token == "</s>"
    ours = load_tokenizer(str(tmp_path / "small.gguf"))
    assert ours.eos_id == 1 and ours.encode(["A-1 café"]) == [tokenizer("A-1 café", add_special_tokens=False).input_ids]
    tokenizer.save_pretrained(tmp_path / "floats")
    assert load_tokenizer(str(tmp_path / "floats")).fingerprint == ours.fingerprint == load_tokenizer(
        str(tmp_path)).fingerprint
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"several GGUF files; name one of them: other.gguf, small.gguf"):
        load(tmp_path)


def test_flops_count_the_heads_as_they_are_and_frozen_weights_without_their_gradient() -> None:
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16, "tie_word_embeddings": False}))
    for p in lm.model.layers.parameters():
        p.requires_grad_(False)
    n_layers_params = sum(p.numel() for p in lm.model.layers.parameters())
    shape = TrainingModel(lm).shape
    multiplied = n_layers_params + 60 * 32 + 32  # the blocks, the output layer, the last norm
    assert shape.flops(1000, 0) == 1000 * (6 * multiplied - 2 * n_layers_params)
    assert shape.flops(0, 50) == 6 * 3 * (4 * 16) * 50  # 3 layers, 4 heads of 16 though hidden_size / 4 is 8
