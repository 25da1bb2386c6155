"""Several training runs in one set of real ranks: starting ranks takes far longer than a run of the tiny world.

Run as a script it is one rank: it trains every config of a JSON file in turn and writes what became of each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import tiny

from cprec import dist, launcher
from cprec.train.loop import train


def run_ranks(script: str, folder: Path, ranks: int) -> None:
    """Run `script FOLDER` as so many ranks on this machine, and wait until all have ended well."""
    env = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": launcher.free_port(), "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join([str(tiny.REPO), str(tiny.REPO / "tests/train")])}
    started = [subprocess.Popen([sys.executable, script, str(folder)], stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.STDOUT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
               for r in range(ranks)]
    try:
        said = [p.communicate(timeout=500)[0] for p in started]
    finally:
        for p in started:
            p.kill()  # no rank outlives a test that gave up waiting
    assert [p.returncode for p in started] == [0] * ranks, "\n".join(said)


def train_all(configs: dict[str, dict[str, Any]], folder: Path, *, ranks: int = 2,
              again_from: int | None = None) -> dict[str, str]:
    """Train each of `configs` (by name) on the same `ranks` ranks; the error of each, empty where it went well.

    `again_from`: then copy each run's folder to `RUN_DIR again`, without its checkpoints after that step, and go on.
    """
    (folder / "configs.json").write_text(json.dumps({"configs": configs, "again_from": again_from}))
    run_ranks(__file__, folder, ranks)
    return dict(json.loads((folder / "errors.json").read_text()))


def _rank(folder: Path) -> None:
    spec = json.loads((folder / "configs.json").read_text())
    errors = {}
    for name, values in spec["configs"].items():
        errors[name] = _train(values)
        if spec["again_from"] and not errors[name]:
            errors[name] = _train(_cut_short(values, spec["again_from"]))
    if dist.rank() == 0:
        (folder / "errors.json").write_text(json.dumps(errors))
    dist.shutdown()


def _train(values: dict[str, Any]) -> str:
    try:
        train(tiny.run_config(values))
    except Exception as e:
        traceback.print_exc()
        return f"{type(e).__name__}: {e}"
    return ""


def _cut_short(values: dict[str, Any], step: int) -> dict[str, Any]:
    """Config of the run's copy, which was stopped after `step`."""
    copy = Path(values["run_dir"] + " again")
    if dist.rank() == 0:
        shutil.copytree(values["run_dir"], copy)
        for checkpoint in (copy / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > step:
                shutil.rmtree(checkpoint)
    dist.barrier()
    return {**values, "run_dir": str(copy)}


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
