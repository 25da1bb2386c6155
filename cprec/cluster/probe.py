"""How fast this rank's device multiplies and its links carry, measured without the rest of the run.

reads, writes: nothing. Costs: a few milliseconds and two small matrices; `all_reduce` some seconds on a slow network.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from cprec import dist


class ProductProbe:
    """Products of two (size, size) matrices, of the kind that training consists of: bfloat16 on a GPU, else float32."""

    def __init__(self, device: torch.device, *, size: int | None = None, n_products: int = 4) -> None:
        on_gpu = device.type == "cuda"
        self._size, self._n = size or (2048 if on_gpu else 256), n_products
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self._a = torch.ones(self._size, self._size, dtype=dtype, device=device)  # no random state is touched
        self._out = torch.empty_like(self._a)
        self._device = device

    def seconds(self) -> float:
        """Wall time of the products on an idle device, waiting for it before and after."""
        self._wait()
        started = time.perf_counter()
        for _ in range(self._n):
            torch.mm(self._a, self._a, out=self._out)
        self._wait()
        return time.perf_counter() - started

    def tflops(self, *, best_of: int) -> float:
        """10^12 floating-point operations per second, in the fastest of so many goes after one that does not count."""
        self.seconds()
        return 2e-12 * self._n * self._size ** 3 / min(self.seconds() for _ in range(best_of))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class LinkSpeed:
    """One all-reduce over all ranks."""

    is_exact: bool
    """Every element of the sum, on this rank, is the number that it must be."""
    bus_gb_s: float | None
    """Bus bandwidth, 10^9 bytes/s: 2 (n - 1) / n times the tensor's bytes over the time, as nccl-tests gives it. It is
    the speed of the slowest link, whatever the number of ranks. None for one rank, which sends nothing."""


def all_reduce(device: torch.device, *, n_bytes: int, best_of: int = 3) -> LinkSpeed:
    """Sum a float32 tensor over all ranks and check every element. Collective."""
    n, count = dist.world_size(), n_bytes // 4
    pattern = torch.arange(count, device=device, dtype=torch.int32).remainder_(1024).float()
    times, is_exact = [], True
    for _ in range(best_of):
        values = pattern + dist.rank()  # whole numbers: sums below 2^24 are exact in any order
        dist.barrier()
        _synchronize(device)
        started = time.perf_counter()
        if n > 1:
            torch_dist.all_reduce(values)
        _synchronize(device)
        times.append(time.perf_counter() - started)
        is_exact &= torch.equal(values, pattern * n + n * (n - 1) / 2)
    return LinkSpeed(is_exact, 2e-9 * (n - 1) / n * 4 * count / min(times) if n > 1 else None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
