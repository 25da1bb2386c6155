"""What a waiting process has imported, and made once, before it forks: most of a start's seconds.

Imported by Python's fork server (see `lives.py`); reads and writes nothing.
"""

from __future__ import annotations

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

IMPORTED = ["benchmarks.faults.lives", "cprec.train.loop", "deepspeed.runtime.zero.stage3", "torch.utils.tensorboard",
            "deepspeed.runtime.zero.muon.muon_optimizer",  # brings torch's compiler, for a decorator
            "transformers.integrations", "transformers.models.llama.modeling_llama"]

for name in IMPORTED:
    importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, and keeps them
