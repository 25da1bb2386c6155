"""Trains the runs of several config files one after another, in the processes that are there already: starting torch
and DeepSpeed takes longer than a tiny run. Prints what stops a run and goes on with the next."""

from __future__ import annotations

import sys

import torch

from cprec import dist
from cprec.config import RunConfig
from cprec.errors import CPRecError
from cprec.log import setup_logging
from cprec.settings import load_settings
from cprec.train.loop import train
from cprec.train.profile import parse_steps

if __name__ == "__main__":
    dist.init()
    torch.set_num_threads(1)  # threads that wait for each other over a tiny matrix are slow on a busy machine
    setup_logging(dist.rank())
    for path in (a for a in sys.argv[1:] if not a.startswith("--")):  # the deepspeed launcher adds --local_rank
        try:
            train(load_settings(RunConfig, path), traced=parse_steps("2:3" if "traced" in path else None))
        except CPRecError as e:
            print(f"{path}: exit code {e.exit_code}: {e}", flush=True)
    dist.shutdown()
