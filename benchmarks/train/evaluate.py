"""Held-out loss of every side's last weights, by plain transformers: `python -m benchmarks.train.evaluate ASKED`.

One document after the other stands alone in a row, right-padded to batches of like length, under the eager float32
mathematics of transformers: nothing of ours but the documents takes part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from benchmarks.train.data import held_out

REPO = Path(__file__).parents[2]
BATCH = 16


class Asked(BaseModel):
    """Folders of weights, and where the held-out documents are."""

    folders: list[Path]
    work: Path
    n_rows: int


def losses(folders: Sequence[Path], work: Path, n_rows: int) -> list[float]:
    """Nats per token of each folder's model on the documents of `n_rows` validation rows, in a process of its own."""
    asked = Asked(folders=list(folders), work=work, n_rows=n_rows)
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.train.evaluate", asked.model_dump_json()],
                          cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"evaluation ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def nats_per_token(folder: Path, docs: Sequence[Sequence[int]]) -> float:
    """Mean over all tokens but each document's first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, n = 0.0, 0
    ordered = sorted(docs, key=len)
    for first in range(0, len(ordered), BATCH):
        batch = [torch.tensor(d) for d in ordered[first:first + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lens = torch.tensor([len(d) for d in batch])
        real = torch.arange(ids.shape[1]) < lens[:, None]
        logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        targets = ids[:, 1:].masked_fill(~real[:, 1:], -100)
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(),
                                                         reduction="sum"))
        n += int(real[:, 1:].sum())
    return total / n


if __name__ == "__main__":
    told = Asked.model_validate_json(sys.argv[1])
    held = held_out(told.work, told.n_rows)
    print(json.dumps([nats_per_token(folder, held) for folder in told.folders]))
