"""A tiny real set-up for training tests: byte-level tokenizer, random Llama, packed corpora, run config."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from cprec.config import RunConfig
from cprec.format import Audit, Manifest, PackedRows, TokenizerInfo, write_manifest, write_row_facts, write_shard
from cprec.settings import parse_settings
from cprec.template import Template
from cprec.tokenizer import load_tokenizer

REPO = Path(__file__).parents[2]
SEQ_LEN = 64
PASSED = Audit(passed=True, checks={})
TEMPLATE = Template(name="cprec", version=1, lead_in="Bought:\n", item="{title}\n")


def write_model(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer of 258 entries, as a Hugging Face folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}
    fast = FastTokenizer(models.BPE(vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    shape = {"vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
             "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).save_pretrained(folder)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast",
              "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_corpus(packed: Path, name: str, *, model: Path, n_rows: int, seed: int, kind: str = "train",
                 audit: Audit | None = PASSED, shard_rows: int = 16,
                 poison: dict[int, int] | None = None) -> None:
    """Rows of random documents of 5 to 30 tokens over a small, learnable alphabet, with up to 5 tokens of padding.

    `poison`: row -> token id, which is put at the row's start.
    """
    rng = np.random.default_rng(seed)
    tokenizer = load_tokenizer(str(model))
    ids, lens, doc_ids, n_lens, n_docs, n_pad = [], [], [], [], [], []
    for _ in range(n_rows):
        row: list[int] = []
        row_lens = []
        while len(row) < SEQ_LEN - 5:
            n = min(int(rng.integers(5, 30)), SEQ_LEN - len(row))
            row += [*rng.integers(2, 20, size=n - 1).tolist(), tokenizer.eos_id]
            row_lens.append(n)
        pad = SEQ_LEN - len(row)
        doc_ids += range(len(doc_ids), len(doc_ids) + len(row_lens))
        n_docs.append(len(row_lens))
        if pad:
            row, row_lens = row + [tokenizer.pad_id] * pad, [*row_lens, pad]
        ids.append(row)
        lens += row_lens
        n_lens.append(len(row_lens))
        n_pad.append(pad)
    for at, token in (poison or {}).items():
        ids[at][0] = token
    folder = packed / name
    folder.mkdir(parents=True)
    shards, lens_at, docs_at = [], 0, 0
    for i, first in enumerate(range(0, n_rows, shard_rows)):
        here = slice(first, min(first + shard_rows, n_rows))
        k, d = sum(n_lens[here]), sum(n_docs[here])
        shards.append(write_shard(folder / f"shard-{i:05d}.arrow", PackedRows(
            np.array(ids[here], dtype=np.uint16), np.array(lens[lens_at:lens_at + k], dtype=np.int32),
            np.array(n_lens[here]), np.array(doc_ids[docs_at:docs_at + d]), np.array(n_docs[here]),
            np.array(n_pad[here], dtype=np.int32))))
        lens_at, docs_at = lens_at + k, docs_at + d
    write_manifest(folder, Manifest(
        corpus=name, kind=kind, seq_len=SEQ_LEN, dtype="uint16", n_rows=n_rows, n_tokens=n_rows * SEQ_LEN - sum(n_pad),
        n_pad=sum(n_pad), n_documents=len(doc_ids), n_documents_by_domain={name: len(doc_ids)},
        sum_squared_doc_lens=int((np.array(lens) ** 2).sum()), seed=seed, split_hash="0", max_timestamp_ms=0,
        sources={}, template=TEMPLATE, template_hash=TEMPLATE.hash, shards=shards,
        row_facts=write_row_facts(folder, shards), audit=audit,
        tokenizer=TokenizerInfo(name=str(model), fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                                eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)))


def write_world(root: Path) -> dict[str, Any]:
    """Model, two training corpora and two validation corpora under `root`; the config of a 12-step run on them."""
    model = write_model(root / "model")
    packed = root / "packed"
    write_corpus(packed, "specific/toys", model=model, n_rows=40, seed=1)
    write_corpus(packed, "mixed", model=model, n_rows=25, seed=2)
    write_corpus(packed, "valid/toys", model=model, n_rows=5, seed=3, kind="valid")
    write_corpus(packed, "valid/games", model=model, n_rows=3, seed=4, kind="valid")
    return {
        "run_dir": str(root / "run"), "model": {"path": str(model)},
        "data": {"packed": str(packed), "mix": {"stable": {"specific/*": 2, "mixed": 1}}},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2}, "optimizer": {"peak_lr": 1e-2},
        "schedule": {"total": {"steps": 12}, "warmup": {"steps": 2}}, "deepspeed": str(REPO / "ds_configs/zero3.json"),
        "checkpoint": {"every": 4, "keep_last": 1, "keep_stable_every": 4},
        "validation": {"every": 6, "rows_per_corpus": 4}, "log_every": 1,
    }


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """While inside, no file of this process grows beyond so many bytes: as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def run_config(values: dict[str, Any]) -> RunConfig:
    """The values as a config."""
    return parse_settings(RunConfig, values, source="test")
