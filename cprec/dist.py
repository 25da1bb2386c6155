"""Who this process is among the ranks of a run, and the few collectives we use ourselves. torch.distributed only.

reads: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, as cprec.launcher leaves them under every launcher; without them,
one process is a world of one. Under pure data parallelism (ZeRO) the data-parallel rank is the rank.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from cprec import launcher
from cprec.errors import ConfigError, LostRankError
from cprec.launcher import free_port as free_port
from cprec.log import get_logger

log = get_logger(__name__)
_LOST = re.compile(r"(Connection (closed|reset) by peer|Broken pipe|remote process exit)[^\n]*")
"""How gloo and NCCL say that the process at the other end is no more."""


def rank() -> int:
    """Number of this process among all, 0-based."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, 0-based."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def init(*, timeout: timedelta | None = None) -> None:
    """Join the run's process group (NCCL on GPUs, gloo on CPUs) and take this rank's share of the machine's cores.

    `timeout`: how long a collective waits for the others; None: torch's own (10 minutes on GPUs, 30 on CPUs). Raises
    ConfigError where ranks do not see a GPU each, or do not know where to meet.
    """
    if torch_dist.is_initialized():
        return
    place = launcher.adopt()
    where = launcher.agree_on_address(place)
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    log.info("started by %s: rank %d of %d, %d on %s; they meet at %s", place.launcher, place.rank, place.world_size,
             place.local_world_size, socket.gethostname(), where)
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"rank {place.rank} is number {place.local_rank} on {socket.gethostname()} and sees "
                              f"{torch.cuda.device_count()} GPU; start one rank per GPU, and let each see all of its "
                              f"node's GPUs (srun: --gpus-per-node, not --gpus-per-task)")
        torch.cuda.set_device(device())
        torch_dist.init_process_group("nccl", device_id=device(), timeout=timeout)
    else:
        torch_dist.init_process_group("gloo", timeout=timeout)
        _take_cores()


def shutdown() -> None:
    """Leave the process group; without it NCCL complains at exit, and a rank that failed keeps the others waiting."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


@contextmanager
def name_lost_ranks() -> Iterator[None]:
    """Turn what a collective says whose other ranks are no more into LostRankError; its stack would be this rank's,
    which has only waited. Also a decorator."""
    try:
        yield
    except RuntimeError as e:
        seen = _LOST.search(str(e))
        if not seen:
            raise
        raise LostRankError(f"rank {rank()} on {socket.gethostname()} has lost another rank ({seen.group()}): it was "
                            f"killed, has failed, or its machine is gone; look for its last lines, or in that "
                            f"machine's log (out of memory?); the same command goes on from what is "
                            f"complete") from e


def barrier() -> None:
    """Wait for every rank; nothing to wait for outside a process group."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    add_over_ranks(tensor)
    return [float(v) for v in tensor.tolist()]


def add_over_ranks(tensor: torch.Tensor) -> None:
    """Replace `tensor`, on this rank's device, by its sum over all ranks; on a GPU the host does not wait for it."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.all_reduce(tensor)


def gather_texts(texts: Sequence[str]) -> list[str]:
    """The texts of every rank, in the order of the ranks: how all ranks come to raise one error."""
    if not torch_dist.is_initialized() or world_size() == 1:
        return list(texts)
    gathered: list[list[str]] = [[]] * world_size()
    torch_dist.all_gather_object(gathered, list(texts))
    return [text for of_rank in gathered for text in of_rank]


def _take_cores() -> None:
    """Give each rank of a CPU machine its slice of the cores that it shares: ranks on one core slow each other down.

    Ranks that their launcher has bound to cores of their own keep them. Collective.
    """
    cores = sorted(os.sched_getaffinity(0))
    places = gather_texts([f"{socket.gethostname()} {cores}"])
    sharing = [r for r, theirs in enumerate(places) if theirs == places[rank()]]
    share = max(1, len(cores) // len(sharing))
    torch.set_num_threads(share)
    first = sharing.index(rank()) * share
    if len(sharing) > 1 and first + share <= len(cores):
        os.sched_setaffinity(0, cores[first:first + share])
