"""Peak memory of loading a model under ZeRO-3, which partitions while it loads, on 1 and on 2 ranks.

    python -m benchmarks.train.zero_memory [--layers 10] [--hidden 1024] [--vocabulary 4000]

Writes a random Llama (about 130 million parameters, float32) as a folder of several files and loads it by
`load_for_training` in fresh processes. A rank holds its share, and for a moment whole copies of the parameter that it
is at: of the embeddings, where the vocabulary is large (and of an output layer, until it is tied to them). Every rank
samples its resident memory while it loads: anonymous memory is its own, mapped pages of the files are the kernel's page
cache, given back under pressure. glibc is told to return freed tensors at once (MALLOC_*): left alone it keeps the
holes between them for later, which says nothing of what is needed. Prints one JSON object, in megabytes above what a
rank held before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

N_RANKS = (1, 2)


def resident_kb() -> dict[str, int]:
    """Resident memory of this process by kind, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {name: int(line.split()[1]) for line in lines for name in ("RssAnon", "RssFile") if line.startswith(name)}


class Peak:
    """The most that a block of code holds above what was held when it began, sampled every 2 ms."""

    def __enter__(self) -> Peak:
        self._before = resident_kb()
        self.kb = dict.fromkeys(self._before, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.kb = {k: max(self.kb[k], v - self._before[k]) for k, v in resident_kb().items()}


def load(folder: Path, vocabulary: int) -> None:
    """One rank: prints its peak."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from transformers.integrations import HfDeepSpeedConfig

    from cprec.model import load_for_training

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    options = {"backend": "doc_sdpa", "dtype": torch.float32, "seq_len": 128, "activation_checkpointing": False,
               "trust_remote_code": False}
    tiny = folder.with_name("tiny")
    load_for_training(str(tiny), vocab_size=64, **options)  # what is imported and allocated once does not count
    with Peak() as peak:
        model = load_for_training(str(folder), vocab_size=vocabulary, **options)
    largest = max(p.ds_numel for p in model.parameters())
    print("PEAK", json.dumps({**peak.kb, "n_params": model.shape.n_params, "largest": largest}), flush=True)
    del keep


def measure(folder: Path, n_ranks: int, vocabulary: int, port: int) -> list[dict[str, int]]:
    """What every rank printed."""
    command = [sys.executable, "-m", "benchmarks.train.zero_memory", "--load", str(folder), "--vocabulary",
               str(vocabulary)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}) for r in range(n_ranks)]
    outputs = [p.communicate()[0] for p in ranks]
    assert all(p.returncode == 0 for p in ranks), f"{n_ranks} ranks: one failed"
    return [json.loads(line.removeprefix("PEAK ")) for out in outputs for line in out.splitlines()
            if line.startswith("PEAK ")]


def write_models(root: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """The model, and a tiny one beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, h, n, v in (("tiny", 16, 1, 64), ("model", hidden, layers, vocabulary)):
        LlamaForCausalLM(LlamaConfig(
            vocab_size=v, hidden_size=h, intermediate_size=h * 8 // 3, num_hidden_layers=n,
            num_attention_heads=max(1, h // 64), num_key_value_heads=max(1, h // 64), max_position_embeddings=128,
            tie_word_embeddings=True)).save_pretrained(root / name, max_shard_size="100MB")
    return root / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--port", type=int, default=29671)
    parser.add_argument("--load", type=Path, help="used by the script itself")
    args = parser.parse_args()
    if args.load:
        load(args.load, args.vocabulary)
        return
    with tempfile.TemporaryDirectory() as root:
        folder = write_models(Path(root), args.hidden, args.layers, args.vocabulary)
        found = {n: measure(folder, n, args.vocabulary, args.port) for n in N_RANKS}
    n_params = found[2][0]["n_params"]
    worst = max(rank["RssAnon"] for rank in found[2]) * 1024
    print(json.dumps({
        "own_peak_of_a_rank_of_2_vs_half_the_model": round(worst / (4 * n_params / 2), 3),
        "model_mb": round(4e-6 * n_params), "largest_parameter_mb": round(4e-6 * found[2][0]["largest"]),
        "own_mb_by_rank": {n: [round(r["RssAnon"] / 1e3) for r in ranks] for n, ranks in found.items()},
        "mapped_file_mb_by_rank": {n: [round(r["RssFile"] / 1e3) for r in ranks] for n, ranks in found.items()},
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
