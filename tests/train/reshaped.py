"""One rank that loads checkpoints into engines of its own world size and stage, and has DeepSpeed say what is in them.

What it writes comes from DeepSpeed's public calls for debugging, which know nothing of our files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from in_ranks import run_ranks

from cprec import dist
from cprec.train.checkpoint import newest_sound
from cprec.train.engine import Engine
from cprec.train.partitions import SavedState
from cprec.train.plan import build_plan


def load_on(ranks: int, configs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint of each config's run on `ranks` ranks: by name, the full tensors of every parameter
    and, of every rank and parameter group, the count of updates and the hyperparameters."""
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps(configs))
    run_ranks(__file__, folder, ranks)
    loaded = [torch.load(folder / f"{r}.pt") for r in range(ranks)]
    return {name: {"tensors": loaded[0][name]["tensors"], "groups": [of[name]["groups"] for of in loaded]}
            for name in configs}


def _rank(folder: Path) -> None:
    dist.init()
    torch.set_num_threads(1)
    found = {}
    for name, values in json.loads((folder / "configs.json").read_text()).items():
        engine = Engine(build_plan(tiny.run_config(values), dist.world_size()))
        checkpoint = newest_sound(Path(values["run_dir"]))
        assert checkpoint is not None
        engine.load(SavedState(checkpoint.folder))
        found[name] = {"tensors": _tensors(engine), "groups": _groups(engine)}
        engine.close()
    torch.save(found, folder / f"{dist.rank()}.pt")
    dist.shutdown()


def _tensors(engine: Engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine._engine.optimizer
    if engine.zero_stage < 3:
        zero._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, p in engine._engine.module.named_parameters():
        found[f"weight/{name}"] = safe_get_full_fp32_param(p).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{name}"] = safe_get_full_optimizer_state(p, kind).clone()
    return found


def _groups(engine: Engine) -> list[dict[str, Any]]:
    """Of every flat tensor: its group's settings, its count of updates, and where that count lies in memory."""
    zero = engine._engine.optimizer
    if engine.zero_stage == 3:
        pairs = [(flat, zero.optimizer.param_groups[zero.sub_group_to_group_id[i]])
                 for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
    else:
        pairs = list(zip(zero.single_partition_of_fp32_groups, zero.optimizer.param_groups, strict=True))
    states = [zero.optimizer.state[flat] for flat, _ in pairs]
    return [{"name": g["name"], "weight_decay": g["weight_decay"], "betas": tuple(g["betas"]), "eps": g["eps"],
             "step": float(s["step"]), "at": s["step"].data_ptr()} for s, (_, g) in zip(states, pairs, strict=True)]


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
