"""What the GPU benchmark measures on: two model shapes of random weights and packed rows, made here without a hub.

writes: below the work folder, `<model>/` (a Hugging Face folder with a byte tokenizer; the weights do not matter for
speed) and `<model>-<rows>/` (one packed corpus). Rows are `short` (documents of 150 tokens on average, log-normal) or
`full` (one document per row). Costs: 3 GB of disk for the larger model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from cprec.format import (
    ITEM_BITS,
    Manifest,
    PackedCorpus,
    PackedRows,
    Row,
    TokenizerInfo,
    list_corpora,
    read_manifest,
    row_cost,
    write_manifest,
    write_row_facts,
    write_shard,
)
from cprec.tokenizer import load_tokenizer

CORPUS = "rows"
SHORT, FULL = "short", "full"
MEAN_DOC_TOKENS, SIGMA = 150.0, 0.9


@dataclass(frozen=True)
class Model:
    """A model shape and the batch it is measured with."""

    config: PreTrainedConfig
    seq_len: int
    rows_per_forward: int
    rows_per_step: int

    @property
    def accumulation(self) -> int:
        return self.rows_per_step // self.rows_per_forward


def known_models(*, tiny: bool) -> dict[str, Model]:
    """By name. `tiny`: the same families, so small that a CPU runs everything in seconds."""
    if tiny:
        small: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                 "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
                                 "max_position_embeddings": 256}
        return {"1p5b": Model(Qwen2Config(**small), 256, 2, 4), "135m": Model(LlamaConfig(**small), 256, 4, 4)}
    qwen = Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                       num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
                       max_position_embeddings=32768)
    smol = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                       num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                       max_position_embeddings=8192)
    return {"1p5b": Model(qwen, 4096, 2, 8), "135m": Model(smol, 4096, 8, 8)}


def make_model(model: Model, folder: Path, *, device: torch.device) -> None:
    """Random weights and a tokenizer of bytes in `folder`, unless they are there."""
    if (folder / "tokenizer_config.json").is_file():  # written last
        return
    torch.manual_seed(0)
    with device:
        lm = AutoModelForCausalLM.from_config(model.config, dtype=_dtype(device))
    lm.save_pretrained(folder)
    del lm
    if device.type == "cuda":  # the measurements are other processes: they need the memory
        torch.cuda.empty_cache()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}))


def make_rows(model: Model, folder: Path, out: Path, *, kind: str, n_rows: int, packed: Path | None) -> None:
    """The training corpus `CORPUS` below `out`: generated rows of a kind, or `short` ones out of the folder `packed`,
    again from the start until there are enough."""
    if (out / CORPUS / "manifest.json").is_file():
        return
    rows = list(_taken(packed, n_rows) if packed and kind == SHORT else _generated(model, n_rows, kind))
    if any(int(r.input_ids.max()) >= model.config.vocab_size or len(r.input_ids) != model.seq_len for r in rows):
        raise ValueError(f"--packed {packed}: needs rows of {model.seq_len} tokens below {model.config.vocab_size}")
    block = PackedRows(
        np.stack([r.input_ids for r in rows]), np.concatenate([r.doc_lens for r in rows]),
        np.array([len(r.doc_lens) for r in rows], np.int64), np.concatenate([r.doc_ids for r in rows]),
        np.array([len(r.doc_ids) for r in rows], np.int64), np.array([r.n_pad for r in rows], np.int32))
    (out / CORPUS).mkdir(parents=True, exist_ok=True)
    shards = [write_shard(out / CORPUS / "shard-00000.arrow", block)]
    tokenizer, n_pad, n_docs = load_tokenizer(str(folder)), int(block.n_pad.sum()), len(block.doc_ids)
    write_manifest(out / CORPUS, Manifest(
        corpus=CORPUS, kind="train", seq_len=model.seq_len, dtype=block.input_ids.dtype.name, n_rows=n_rows,
        n_tokens=block.input_ids.size - n_pad, n_pad=n_pad, n_documents=n_docs, n_documents_by_domain={CORPUS: n_docs},
        sum_squared_doc_lens=row_cost(block.doc_lens), template=None, template_hash="", seed=0, split_hash="",
        max_timestamp_ms=0, sources={}, shards=shards, row_facts=write_row_facts(out / CORPUS, shards),
        tokenizer=TokenizerInfo(name=str(folder), fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                                eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)))


def _taken(packed: Path, n_rows: int) -> Iterator[Row]:
    names = [n for n in list_corpora(packed) if read_manifest(packed / n).kind == "train"]
    rows = [(corpus, i) for corpus in (PackedCorpus(packed / n) for n in names) for i in range(len(corpus))]
    order = np.random.default_rng(0).permutation(len(rows))
    for i in range(n_rows):
        corpus, at = rows[int(order[i % len(rows)])]
        row = corpus[at]
        yield row._replace(input_ids=row.input_ids.astype(np.uint32))


def _generated(model: Model, n_rows: int, kind: str) -> Iterator[Row]:
    rng, seq_len = np.random.default_rng(0), model.seq_len
    for number in range(n_rows):
        lens = [seq_len]
        if kind == SHORT:
            drawn = np.clip(rng.lognormal(np.log(MEAN_DOC_TOKENS) - SIGMA**2 / 2, SIGMA, seq_len // 8), 8, seq_len)
            ends = np.cumsum(drawn.astype(np.int64))
            ends = np.append(ends[ends < seq_len - 8], seq_len)  # the last document fills the row
            lens = np.diff(ends, prepend=0).tolist()
        ids = rng.integers(2, model.config.vocab_size, seq_len, dtype=np.uint32)
        docs = (number * seq_len + np.arange(len(lens), dtype=np.int64)) << ITEM_BITS
        yield Row(ids, np.array(lens, np.int32), docs, 0, seq_len - len(lens))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
