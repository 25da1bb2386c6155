"""Measures checkpoints on this machine: for how long training stands still, and what an export takes of memory.

    python -m benchmarks.checkpoint [--hidden 512] [--layers 8] [--saves 7] [--out docs]

One rank trains a random Llama on random rows. In turn: a save that training waits for, the same save in the background
(training goes on meanwhile), and DeepSpeed's own `save_checkpoint` with the hashing and fsync that a verified one
needs. `save_stall_vs_blocking`: median time that training stands still, over the median of a blocking save of the same
process. The export runs in a process of its own; its memory is what it has of its own (anonymous, not mapped files),
above what it had when everything was imported, over the size of the exported model. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.gpu_world import SHORT, Model, make_model, make_rows
from cprec import dist
from cprec.config import CheckpointConfig, RunConfig
from cprec.data.dataset import PackedDataset, Step, open_corpora
from cprec.format import file_hash, sync
from cprec.log import setup_logging
from cprec.settings import parse_settings
from cprec.train.checkpoint import State, list_checkpoints
from cprec.train.engine import Engine
from cprec.train.plan import Plan, build_plan
from cprec.train.run_folder import claim_run_folder
from cprec.train.saving import Saver

REPO = Path(__file__).parents[1]


def main() -> None:
    """Measure, print a table and the JSON line; keep both if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=7, help="of each kind")
    parser.add_argument("--out", type=Path, help="folder for checkpoint_bench.json")
    parser.add_argument("--export-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export_of:
        print(json.dumps(_export(args.export_of)))
        return
    setup_logging(1)  # as a rank that says nothing
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(Path(folder), args)
    if args.out:
        (args.out / "checkpoint_bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def _measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    plan = _plan(folder, hidden=args.hidden, layers=args.layers)
    run_dir = Path(plan.config.run_dir)
    claim_run_folder(run_dir, plan)
    engine, steps = Engine(plan), _steps(plan)
    engine.step(next(steps), 1e-4)  # from here on there are moments
    kinds = {"blocking": False, "asynchronous": True}
    savers = {name: Saver(engine, run_dir, CheckpointConfig(keep_last=2, asynchronous=a)) for name, a in kinds.items()}
    stalls: dict[str, list[float]] = {"blocking": [], "asynchronous": [], "deepspeed": []}
    quiet: list[float] = []
    beside: list[float] = []
    number = itertools.count(1)
    for _ in range(args.saves):
        for name, saver in savers.items():
            saver.save(_state(plan, next(number)))
            while saver.is_under_way:
                beside.append(_timed_step(engine, steps))
                saver.poll()
            stalls[name].append(saver.stall_s)
            quiet.append(_timed_step(engine, steps))
        stalls["deepspeed"].append(_deepspeed_save(engine, folder / "deepspeed"))
    newest = list_checkpoints(run_dir)[-1]
    export = subprocess.run([sys.executable, "-m", "benchmarks.checkpoint", "--export-of", str(newest.folder)],
                            capture_output=True, text=True, check=True)
    blocking = median(stalls["blocking"])
    return {
        **_machine(), "parameters_m": round(engine.model_shape.n_params / 1e6, 1),
        "checkpoint_mb": round(sum(f.bytes for f in newest.state.files.values()) / 1e6, 1), "saves": args.saves,
        "blocking_s": round(blocking, 4), "deepspeed_s": round(median(stalls["deepspeed"]), 4),
        "first_stall_s": round(stalls["asynchronous"][0], 4), "stall_s": round(median(stalls["asynchronous"]), 4),
        "step_quiet_s": round(median(quiet), 4), "step_beside_s": round(median(beside), 4) if beside else None,
        **json.loads(export.stdout.splitlines()[-1]),
        "save_stall_vs_blocking": round(median(stalls["asynchronous"]) / blocking, 4)}


def _plan(folder: Path, *, hidden: int, layers: int) -> Plan:
    shape = LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    model = Model(shape, 64, 1, 1)
    make_model(model, folder / "model", device=torch.device("cpu"))
    make_rows(model, folder / "model", folder / "rows", kind=SHORT, n_rows=64, packed=None)
    dist.init()
    return build_plan(parse_settings(RunConfig, {
        "run_dir": str(folder / "run"), "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"packed": str(folder / "rows"), "allow_unaudited": True}, "optimizer": {"peak_lr": 1e-4},
        "batch": {"global_batch_size": 1, "micro_batch_size": 1}, "validation": {"every": None},
        "schedule": {"total": {"steps": 10**6}, "warmup": {"steps": 1}},
        "deepspeed": str(REPO / "ds_configs/zero3.json"),
    }, source="benchmark"), dist.world_size())


def _steps(plan: Plan) -> Iterator[Step]:
    corpora = open_corpora(plan.sampler, plan.places, plan.cache, plan.train)
    return PackedDataset(corpora, plan.sampler, global_batch_size=1, micro_batch_size=1, rank=0,
                         world_size=1).steps(0, 10**6)


def _timed_step(engine: Engine, steps: Iterator[Step]) -> float:
    step, began = next(steps), time.perf_counter()
    engine.step(step, 1e-4)
    return time.perf_counter() - began


def _state(plan: Plan, step: int) -> State:
    return State(step=step, tokens_seen=step * 64, rows_seen=step, lr=1e-4, phase="stable", bad_steps=0,
                 valid_loss=None, config_hash="", data_hashes={}, tokenizer_fingerprint="", world_size=1, zero_stage=3,
                 parent=None, files={})


def _deepspeed_save(engine: Engine, folder: Path) -> float:
    """DeepSpeed's files, hashed and on the disk, as a checkpoint has to be that is verified at load."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    engine._engine.save_checkpoint(str(folder), tag="t", save_latest=False)
    for path in (folder / "t").iterdir():
        sync(path)
        file_hash(path)
    return time.perf_counter() - began


def _export(checkpoint: Path) -> dict[str, float]:
    """Peak of the export's own memory over the size of the exported weights."""
    from cprec.train.checkpoint import read_checkpoint
    from cprec.train.export import export

    found = read_checkpoint(checkpoint)
    out = checkpoint.parent.parent / "hf"
    peak, ended, before = [0], threading.Event(), _own_bytes()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    export(found, out, dtype=torch.float32)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    size = (out / "model.safetensors").stat().st_size
    return {"export_s": round(seconds, 3), "export_peak_vs_model": round((peak[0] - before) / size, 3)}


def _own_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) * 1024


def _machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return {"cpu": cpu.group(1) if cpu else "unknown", "cores": os.cpu_count(), "torch": torch.__version__,
            "load_1min": round(os.getloadavg()[0], 1),
            "commit": commit.stdout.strip()}


if __name__ == "__main__":
    main()
