"""What a run says about itself: `metrics.jsonl` and TensorBoard always, and one aligned line per logged step.

writes: `run/metrics.jsonl` (one JSON object per logged step or validation), `run/tensorboard/`. A resumed run first
cuts off what was logged after its checkpoint, so that the file reads as if the run had never stopped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from cprec.log import get_logger

log = get_logger(__name__)

PEAK_BF16_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""Dense bf16 peak by part of the device's name (NVIDIA data sheets, without sparsity). Others have no MFU: `n/a`."""


@dataclass(frozen=True)
class TrainRecord:
    """One logged optimizer step. `step` counts updates done; losses are nats per predicted token over all ranks."""

    step: int
    phase: str
    lr: float
    loss: float
    loss_by_corpus: dict[str, float]
    grad_norm: float | None
    tokens_seen: int
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float | None
    """Share of the device's peak, counting document-isolated attention only; null where the peak is not known."""
    pad_share: float
    step_s: float
    data_wait_s: float
    memory_gb: float
    """Largest device memory of rank 0 so far; on a CPU, its resident memory."""
    bad_steps: int
    kind: str = field(default="train", init=False)

    def line(self, total_steps: int) -> str:
        """The aligned line of the log."""
        mfu = f"{self.mfu:6.1%}" if self.mfu is not None else "   n/a"
        norm = f"{self.grad_norm:7.3f}" if self.grad_norm is not None else "      -"
        left_s = (total_steps - self.step) * self.step_s
        return (f"step {self.step:>7}/{total_steps}  {self.phase:<6}  loss {self.loss:7.4f}  lr {self.lr:.3e}  "
                f"norm {norm}  {self.tokens_per_s:>9,.0f} tok/s  mfu {mfu}  pad {self.pad_share:5.2%}  "
                f"wait {self.data_wait_s:5.3f}s  mem {self.memory_gb:5.2f}GB  left {left_s / 60:6.1f}min")


@dataclass(frozen=True)
class ValidationRecord:
    """Loss per validation corpus after `step` updates, in nats per predicted token; `loss` is over all of them."""

    step: int
    loss: float
    loss_by_corpus: dict[str, float]
    kind: str = field(default="valid", init=False)


class MetricsLog:
    """Writer of a run's records, on rank 0 only: the other ranks hold one that writes nothing."""

    def __init__(self, run_dir: Path, *, resume_step: int, active: bool) -> None:
        self._file = None
        if not active:
            return
        path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(run_dir) if r["step"] <= resume_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, record: TrainRecord | ValidationRecord) -> None:
        """Append a record to both logs; the line is on disk when this returns."""
        if self._file is None:
            return
        values = asdict(record)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name, value in _flat(values):
            self._tensorboard.add_scalar(f"{record.kind}/{name}", value, record.step)

    def close(self) -> None:
        """Flush and close both logs."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a run in order; none where it has logged nothing yet; a line that a crash cut is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s/metrics.jsonl: dropped a line that a crash cut short: %.80s", run_dir, line)
    return records


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where the table has no entry for its name."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def memory_gb(device: torch.device) -> float:
    """Peak allocated memory of a GPU, or this process's resident memory on a CPU, in GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def _flat(values: dict[str, Any]) -> list[tuple[str, float]]:
    out = []
    for name, value in values.items():
        if isinstance(value, dict):
            out += [(f"{name}/{k}", float(v)) for k, v in value.items()]
        elif isinstance(value, int | float):
            out.append((name, float(value)))
    return out
