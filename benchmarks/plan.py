"""How far the memory model of launch/plan.py is from measured runs: resident memory by part, on a CPU, 1 and 2 ranks.

    python -m benchmarks.plan [--models small medium] [--steps 2]

Random models train a few steps through the engine, in fresh processes. Each rank samples its anonymous memory; what it
held before the engine does not count. What rests after the steps is the states (weights, optimizer, buckets; gradients
and gathered weights under ZeRO-3); the peak is everything. glibc is told to return freed tensors at once (MALLOC_*).
Prints one JSON object; an error is predicted over measured minus 1, on the rank that takes most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_world import CORPUS, SHORT, Model, make_model, make_rows
from benchmarks.train.zero_memory import Peak, resident_kb

REPO = Path(__file__).parents[1]
SHAPES = {"tiny": (128, 4, 4096), "small": (384, 6, 16000), "medium": (640, 12, 32000)}
"""Width, layers, vocabulary: 2, 17 and 79 million parameters."""
CASES = [("zero1", 1), ("zero1", 2), ("zero2", 2), ("zero3", 1), ("zero3", 2)]
SEQ_LEN, ROWS = 256, 2


def shape(name: str) -> Model:
    from transformers import LlamaConfig

    width, layers, vocabulary = SHAPES[name]
    return Model(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
        max_position_embeddings=SEQ_LEN), SEQ_LEN, ROWS, 2 * ROWS)


def run_config(root: Path, ds_config: str, *, again: bool) -> Any:
    from cprec.config import RunConfig
    from cprec.settings import parse_settings

    return parse_settings(RunConfig, {
        "run_dir": str(root / "run"), "data": {"packed": str(root / "rows"), "allow_unaudited": True},
        "model": {"path": str(root / "model"), "activation_checkpointing": 1 if again else None},
        "batch": {"global_batch_size": 2 * ROWS, "micro_batch_size": ROWS}, "optimizer": {"peak_lr": 1e-4},
        "schedule": {"total": {"steps": 10}}, "validation": {"every": None},
        "deepspeed": str(REPO / f"ds_configs/{ds_config}.json")}, source="benchmark")


def train(root: Path, ds_config: str, steps: int, again: bool) -> None:
    """One rank: prints what it took, in bytes."""
    import deepspeed  # noqa: F401  (its memory is not the run's)

    from cprec import dist
    from cprec.data.corpora import open_manifests
    from cprec.data.dataset import PackedDataset, open_corpora
    from cprec.train.engine import Engine
    from cprec.train.plan import build_plan

    open_manifests(str(root / "rows"), "train")
    dist.init()
    plan = build_plan(run_config(root, ds_config, again=again), dist.world_size())
    data = PackedDataset(open_corpora(plan.sampler, plan.places, plan.cache, plan.train), plan.sampler,
                         global_batch_size=2 * ROWS, micro_batch_size=ROWS, rank=dist.rank(),
                         world_size=dist.world_size())
    batches = list(data.steps(0, steps))
    before = resident_kb()["RssAnon"]
    with Peak() as peak:
        engine = Engine(plan)
        loaded = peak.kb["RssAnon"]
        for step in batches:
            engine.step(step, 1e-4)
        resting = resident_kb()["RssAnon"] - before
    print("TOOK", json.dumps({"resting": 1024 * resting, "peak": 1024 * peak.kb["RssAnon"], "loading": 1024 * loaded}))
    dist.shutdown()


def measure(root: Path, ds_config: str, n_ranks: int, steps: int, again: bool) -> dict[str, float]:
    """The most of any rank."""
    command = [sys.executable, "-m", "benchmarks.plan", "--train", str(root), "--ds-config", ds_config, "--steps",
               str(steps), *(["--again"] if again else [])]
    from cprec import dist

    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": dist.free_port(), "MALLOC_MMAP_THRESHOLD_": "65536",
           "MALLOC_ARENA_MAX": "1"}
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO,
                              env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(n_ranks)]
    took = [json.loads(line.removeprefix("TOOK ")) for p in ranks for line in p.communicate()[0].splitlines()
            if line.startswith("TOOK ")]
    assert len(took) == n_ranks, f"{ds_config} on {n_ranks} ranks: one failed"
    return {name: max(t[name] for t in took) for name in took[0]}


def predict(root: Path, ds_config: str, n_ranks: int, again: bool) -> Any:
    from cprec.cluster.memory import Model as Described
    from cprec.cluster.memory import Sharding, memory_of

    config = run_config(root, ds_config, again=again)
    model, n_tokens = Described(config.model, dtype=torch.float32), ROWS * SEQ_LEN
    return memory_of(model.sizes, model.activations(n_tokens), Sharding.read(config.deepspeed), n_ranks=n_ranks,
                     n_tokens=n_tokens, context=0, on_gpu=False).device


def compare(name: str, steps: int) -> list[dict[str, Any]]:
    """Every case of one model."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_model(shape(name), root / "model", device=torch.device("cpu"))
        make_rows(shape(name), root / "model", root / "rows", kind=SHORT, n_rows=20 * ROWS, packed=None)
        assert (root / "rows" / CORPUS).is_dir()
        for again in (False, True):
            for ds_config, n_ranks in CASES if not again else CASES[-1:]:
                took, part = measure(root, ds_config, n_ranks, steps, again), predict(root, ds_config, n_ranks, again)
                kept = part.gradients + part.gathered if ds_config == "zero3" else 0  # else freed after a step
                states = part.parameters + kept + part.optimizer + part.buffers
                found.append({
                    "model": name, "ds_config": ds_config, "ranks": n_ranks, "activation_checkpointing": again,
                    "states_error": round(states / took["resting"] - 1, 3),
                    "peak_error": round(part.total / took["peak"] - 1, 3),
                    "measured_mb": {k: round(v / 1e6, 1) for k, v in took.items()},
                    "predicted_mb": {k: round(v / 1e6, 1) for k, v in dataclasses.asdict(part).items()}})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["small", "medium"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--train", type=Path, help="used by the script itself, as are the next two")
    parser.add_argument("--ds-config")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if args.train:
        return train(args.train, args.ds_config, args.steps, args.again)
    found = [case for name in args.models for case in compare(name, args.steps)]
    print(json.dumps({"largest_peak_error": max(abs(c["peak_error"]) for c in found), "cases": found,
                      "torch": torch.__version__}))


if __name__ == "__main__":
    main()
