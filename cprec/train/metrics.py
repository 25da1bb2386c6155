"""What a run says about itself: records in `metrics.jsonl` and in the trackers, and one aligned line per logged step.

writes: `run/metrics.jsonl` (one JSON object per logged step, validation or bad step), and what `trackers` writes. A
resumed run first cuts off what was logged after its checkpoint, so that the file reads as if the run had never stopped.
docs/watching.md explains every field.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from cprec.config import RunConfig
from cprec.format import write_atomically
from cprec.log import get_logger
from cprec.train.trackers import Tracker, open_trackers

log = get_logger(__name__)

PEAK_BF16_FLOPS = {
    # NVIDIA data sheets; where they give the number with sparsity, half of it
    r"NVIDIA A[18]00(-SXM4?|-PCIE)-(40|80)GB|NVIDIA A[18]00 80GB PCIe": 312e12,
    r"NVIDIA A30": 165e12,
    r"NVIDIA A40": 149.7e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA L40": 181.05e12,
    r"NVIDIA L40S": 362.05e12,
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H200": 989e12,  # SXM
    r"NVIDIA H200 NVL": 835e12,
    r"NVIDIA GH200 (120|144G|480)\w*( HBM3e)?": 989e12,
    r"AMD Instinct MI250X": 191.5e12,  # AMD data sheets; a device of torch is one of the MI250X's two dies
    r"AMD Instinct MI300X": 1307.4e12,
}
"""Dense bf16 matrix products per second, by the whole of the name that torch gives a device. A name that is not here,
such as a slice of a GPU (MIG), has no MFU: it never borrows another's."""


@dataclass(frozen=True)
class PartTimes:
    """Seconds per step, by what they went to; on a GPU `forward`, `backward` and `optimizer` are the device's own time
    and run beside the host's. `other`: what is in none of the parts."""

    data: float = 0.0
    """Waited for rows."""
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    """Gradient norm, update and gathering of weights; also what agrees over the ranks whether to update."""
    logging: float = 0.0
    validation: float = 0.0
    checkpoint: float = 0.0
    other: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Memory of rank 0 in GB (10^9 bytes)."""

    allocated_gb: float | None
    """Most that tensors took of the device so far; null on a CPU."""
    reserved_gb: float | None
    """Most that torch held of the device so far; null on a CPU."""
    rss_gb: float
    """Resident memory of the process."""


@dataclass(frozen=True)
class TrainRecord:
    """The optimizer steps since the last record, `n_steps` of them, the last of which is `step` (1-based). Means are
    over these, losses are nats per predicted token over all ranks; steps that were left out count only in `bad_steps`
    and in the times."""

    step: int
    n_steps: int
    phase: str
    lr: float
    loss: float | None
    """Summed loss over predicted tokens; null when every one of the steps was left out."""
    loss_by_corpus: dict[str, float]
    grad_norm: float | None
    """Mean over steps, before clipping."""
    grad_norm_max: float | None
    param_norm: float | None
    """2-norm of the trained parameters after `step`; null where they lie on NVMe or are not finite."""
    tokens_seen: int
    tokens_per_s: float
    """Tokens of rows (padding included) per second of training, that is without validation and checkpoints."""
    tokens_per_s_per_device: float
    mfu: float | None
    """Share of the device's peak, counting document-isolated attention only; null where the peak is not known."""
    pad_share: float
    step_s: float
    """Seconds of training per step."""
    time_s: PartTimes
    save_stall_s: float | None
    """Seconds in which training stood still for checkpoints; null when it did not."""
    memory: Memory
    eta_s: float
    """Seconds to the end of the run, with the validations and checkpoints that are to come."""
    bad_steps: int
    """Steps of the whole run, up to here, whose update was left out."""
    kind: str = field(default="train", init=False)

    def line(self, total_steps: int) -> str:
        """The aligned line of the log."""
        mfu = f"{self.mfu:6.1%}" if self.mfu is not None else "   n/a"
        norm = f"{self.grad_norm:7.3f}" if self.grad_norm is not None else "      -"
        loss = f"{self.loss:7.4f}" if self.loss is not None else "      -"
        memory = self.memory.rss_gb if self.memory.allocated_gb is None else self.memory.allocated_gb
        bad = f"  bad {self.bad_steps}" if self.bad_steps else ""
        return (f"step {self.step:>{len(str(total_steps))}}/{total_steps}  {self.phase:<6}  loss {loss}  "
                f"lr {self.lr:.3e}  norm {norm}  {self.tokens_per_s:>9,.0f} tok/s  mfu {mfu}  pad {self.pad_share:6.2%}"
                f"  wait {self.time_s.data:5.3f}s  mem {memory:6.2f}GB  left {duration(self.eta_s):>8}{bad}")


@dataclass(frozen=True)
class ValidationRecord:
    """Loss per validation corpus after `step` updates, in nats per predicted token; `loss` is over all of them."""

    step: int
    loss: float
    loss_by_corpus: dict[str, float]
    kind: str = field(default="valid", init=False)


@dataclass(frozen=True)
class BadStepRecord:
    """A step whose update was left out, and why; its rows, by corpus, are not read again. null: not finite."""

    step: int
    reason: str
    loss: float | None
    grad_norm: float | None
    rows: dict[str, list[int]]
    kind: str = field(default="bad_step", init=False)


class MetricsLog:
    """Writer of a run's records, on rank 0 only: the other ranks hold one that writes nothing."""

    def __init__(self, run_dir: Path, config: RunConfig, *, resume_step: int, active: bool) -> None:
        self._file = None
        self._trackers: dict[str, Tracker] = {}
        if not active:
            return
        path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(run_dir) if r["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._trackers = open_trackers(run_dir, config, resume_step=resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: TrainRecord | ValidationRecord | BadStepRecord) -> None:
        """Append a record; its line of metrics.jsonl is with the system when this returns. A tracker that fails is
        warned of, and the run goes on: the file has everything."""
        if self._file is None:
            return
        values = asdict(record)
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {f"{record.kind}/{name}": value for name, value in flat(values) if name != "step"}
        for name, tracker in self._trackers.items():
            try:
                tracker.write(record.step, numbers)
            except Exception as e:
                log.warning("%s did not take step %d: %s: %s", name, record.step, type(e).__name__, e)

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as e:
                log.warning("%s did not close: %s: %s", name, type(e).__name__, e)


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


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a nested record under names joined by slashes; what is null or text or a list is left out."""
    out: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            out.append((prefix + name, float(value)))
    return out


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where the table has no entry for its name."""
    return peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_by_name(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of the device that torch calls by this name, or None."""
    return next((peak for pattern, peak in PEAK_BF16_FLOPS.items() if re.fullmatch(pattern, name)), None)


def memory(device: torch.device) -> Memory:
    """What this process takes of a device and of the host."""
    rss = psutil.Process().memory_info().rss / 1e9
    if device.type != "cuda":
        return Memory(None, None, rss)
    return Memory(torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9, rss)


def duration(seconds: float) -> str:
    """`0:05:07`, `3d 04:05`: a stretch of time in eight characters."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02}:{m:02}" if days else f"{hours}:{m:02}:{s:02}"
