"""What launch/plan.py computes: by hand where there is a formula, against torch's own count where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from cprec import loss
from cprec.cluster.cost import checkpoint_bytes, traffic_of
from cprec.cluster.memory import Activations, Model, ModelSizes, Sharding, memory_of
from cprec.config import ModelConfig
from cprec.model import ModelShape

SHAPE = ModelShape(n_params=1000, n_embedding_params=0, n_frozen_params=0, n_layers=2, hidden_size=10,
                   attention_size=10)
SIZES = ModelSizes(SHAPE, n_params=1000, n_trained=1000, n_block=300, n_outer=400, vocab_size=40, bytes_each=2)
NOTHING = Activations(blocks=0, recomputed=0, elsewhere=0, gradients=0)


def sharding(stage: int, **changes: Any) -> Sharding:
    return Sharding(**{"stage": stage, "optimizer_on_host": False, "parameters_on_host": False, "overlaps": True,
                       "reduce_bucket": 100, "prefetch_bucket": 50, "reuse_distance": 0, "max_live": 1000, **changes})


@pytest.mark.parametrize("stage, parameters, gathered, gradients, optimizer, buffers", [
    # bfloat16 on 4 ranks: 2, 4 and 12 bytes per parameter, as ds_configs/README.md has them
    (1, 2000, 0, 4000, 3000, 4 * 2 * 100),                 # two buckets of float32
    (2, 2000, 0, 1000, 3000, 2 * 2 * 100),                 # two buckets of bfloat16
    (3, 500, 2 * (400 + 50), 1000, 3000, 4 * 100),  # the largest layer and what is fetched ahead
])
def test_states_are_sharded_as_the_stage_says(stage: int, parameters: int, gathered: int, gradients: int,
                                              optimizer: int, buffers: int) -> None:
    part = memory_of(SIZES, NOTHING, sharding(stage), n_ranks=4, n_tokens=0, context=0, on_gpu=True).device
    assert (part.parameters, part.gathered, part.gradients, part.optimizer, part.buffers) == (
        parameters, gathered, gradients, optimizer, buffers)


def test_states_of_a_gpu_are_those_of_deepspeeds_own_estimator() -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    part = memory_of(SIZES, NOTHING, sharding(3), n_ranks=4, n_tokens=0, context=0, on_gpu=True).device
    _, theirs, _ = estimate_zero3_model_states_mem_needs(1000, 0, num_gpus_per_node=4, num_nodes=1, cpu_offload=False,
                                                         additional_buffer_factor=1)
    assert part.parameters + part.gradients + part.optimizer == theirs


def test_what_is_offloaded_is_the_hosts() -> None:
    away = memory_of(SIZES, NOTHING, sharding(3, optimizer_on_host=True, parameters_on_host=True), n_ranks=4,
                     n_tokens=0, context=0, on_gpu=True)
    assert (away.host, away.device.optimizer, away.device.gradients, away.device.parameters) == (4500, 0, 0, 0)


def test_logits_exist_a_chunk_at_a_time() -> None:
    few = memory_of(SIZES, NOTHING, sharding(3), n_ranks=1, n_tokens=8, context=0, on_gpu=True).device.logits
    assert few == 6 * 8 * 40 + 8 * 10 * 2 + 6 * 40 * 10  # all logits, hidden states' gradient, the weight's
    many = memory_of(SIZES, NOTHING, sharding(3), n_ranks=1, n_tokens=10**8, context=0, on_gpu=True).device.logits
    assert many == 6 * loss.CHUNK_LOGITS + 10**8 * 10 * 2 + 6 * 40 * 10


def test_a_rank_sends_weights_twice_per_micro_batch_and_float32_gradients_once() -> None:
    sent = traffic_of(SIZES, sharding(3), n_ranks=4, accum=5, bus_gb_s=1.0)
    assert (sent.weights, sent.gradients) == (0.75 * 2000 * 2 * 5, 0.75 * 4000 * 5)
    assert sent.seconds == pytest.approx((sent.weights + sent.gradients) / 1e9)
    assert traffic_of(SIZES, sharding(1), n_ranks=4, accum=5, bus_gb_s=1.0).gradients == 0.75 * 4000
    assert traffic_of(SIZES, sharding(3, reuse_distance=4000), n_ranks=4, accum=5, bus_gb_s=1.0).weights \
        == 0.75 * 2000 * 5  # nothing is given back between forward and backward


def test_a_checkpoint_has_14_bytes_per_parameter() -> None:
    assert checkpoint_bytes(SIZES, 3, 4) == (14_000, 3_500)
    assert checkpoint_bytes(SIZES, 1, 4) == (14_000, 3_000 + 2_000)


def test_activations_are_what_autograd_keeps_of_a_real_model(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)  # no weights there
    lm = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").train()
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in (*lm.parameters(), *lm.buffers())}
    held = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        held.append(t)
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = lm.model(input_ids=torch.zeros(1, 40, dtype=torch.int64), use_cache=False)
    assert out.last_hidden_state.requires_grad
    real = sum(n for pointer, n in kept.items() if pointer not in known)
    counted = Model(ModelConfig(path=str(tmp_path)), dtype=torch.float32).activations(40)
    assert counted.blocks + counted.elsewhere == pytest.approx(real, rel=0.02)
    again = Model(ModelConfig(path=str(tmp_path), activation_checkpointing=1), dtype=torch.float32).activations(40)
    assert again.blocks == 3 * 40 * 32 * 4  # each block's input
    assert again.recomputed == pytest.approx(counted.blocks / 3, rel=0.05)  # the first one has its input from outside


def test_a_plan_needs_no_weights_and_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(tiny.REPO / "launch"))
    LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2).save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "run_dir": "run", "model": {"path": str(tmp_path / "model")}, "data": {"packed": "not here"},
        "batch": {"global_batch_size": 64, "micro_batch_size": 2}, "optimizer": {"peak_lr": 1e-4},
        "schedule": {"total": {"tokens": 1e9}}, "deepspeed": str(tiny.REPO / "ds_configs/zero3.json")}))
    import plan

    command = ["plan.py", "--config", str(tmp_path / "run.yaml"), "--nodes", "2", "--seq-len", "512"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    plan.main()
    said = json.loads(capsys.readouterr().out)
    # 16 ranks: 64 / (2 x 16) = 2 micro-batches; 1e9 tokens / (64 x 512)
    assert (said["n_ranks"], said["grad_accum_steps"], said["steps"]) == (16, 2, 30518)
    assert said["days"] * 86400 == pytest.approx(30518 * 64 * 512 / said["tokens_per_s"])
    assert said["recommended"].endswith("zero1.json") and said["chosen"]["largest_micro_batch"] == 4
    monkeypatch.setattr(sys, "argv", command)
    plan.main()
    assert "take: " in capsys.readouterr().out
