"""One rank of a test, `python zero_world.py MODEL VOCAB_SIZE OUT`: loads a model under ZeRO-3, writes what it holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from transformers.integrations import HfDeepSpeedConfig

from cprec.model import load_for_training

if __name__ == "__main__":
    model_path, vocab_size, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    model = load_for_training(model_path, backend="doc_sdpa", dtype=torch.float32, seq_len=32, vocab_size=vocab_size,
                              activation_checkpointing=False, trust_remote_code=False)
    parted = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    held = sum(p.ds_tensor.numel() for p in parted) / sum(p.ds_numel for p in parted)
    with deepspeed.zero.GatheredParameters(parted):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    rank = torch.distributed.get_rank()
    torch.save(weights, out / f"{rank}.pt")
    (out / f"{rank}.json").write_text(json.dumps({
        "held": held, "n_parted": len(parted), "n_params": model.shape.n_params,
        "vocab_size": model.lm.config.vocab_size}))
