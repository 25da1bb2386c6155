"""Which rank is slower than the others, and in what: its device, or its waiting for rows.

Under ZeRO every rank waits for every other one in every layer, so forward and backward take equally long on all of
them, on the slow one too. Hence each rank times what it does alone: a product of matrices on its own device, at each
record, and its waiting for rows. Costs: about a millisecond per record and one collective of two numbers per rank.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cprec import dist
from cprec.cluster.probe import ProductProbe
from cprec.log import get_logger

log = get_logger(__name__)
SLOW = 1.5
"""A device is slow whose products take so many times as long as the median rank's."""
WAITS = 0.1
"""A rank waits for rows if it does so longer than the median rank by this share of a step."""
PATIENCE = 3
"""Records in a row in which a rank must be slow: one may be chance."""


@dataclass(frozen=True)
class Slow:
    """A rank that holds up the others, and why."""

    rank: int
    why: str


def find_slow(product_s: Sequence[float], data_s: Sequence[float], *, step_s: float) -> list[Slow]:
    """The slow among ranks whose products took `product_s` seconds and who waited `data_s` seconds per step for rows,
    both by rank. Of an even number of ranks the median is the lower one: of two, one can be slow."""
    product, data = statistics.median_low(product_s), statistics.median_low(data_s)
    found = [Slow(rank, f"its matrix products take {s / product:.1f} times as long as the median rank's")
             for rank, s in enumerate(product_s) if s > SLOW * product]
    return found + [Slow(rank, f"it waits {s:.2f} s per step of {step_s:.2f} s for its rows, the median rank "
                               f"{data:.2f} s")
                    for rank, s in enumerate(data_s) if s > data + WAITS * step_s]


class Stragglers:
    """Looks for slow ranks at every record, and names the persistently slow once, until they are well again."""

    def __init__(self, device: torch.device) -> None:
        self._hosts = dist.gather_texts([socket.gethostname()])
        self._probe = ProductProbe(device)
        self._probe.seconds()  # the first one compiles or allocates
        self._strikes: dict[int, int] = {}

    def look(self, step: int, *, step_s: float, data_s: float) -> list[Slow]:
        """Those that are slow for the PATIENCE-th time in a row after `step`; rank 0 warns of them. Collective."""
        n = dist.world_size()
        if n == 1:
            return []
        mine = [0.0] * (2 * n)
        mine[2 * dist.rank():2 * dist.rank() + 2] = [self._probe.seconds(), data_s]
        both = dist.sum_over_ranks(mine)
        slow = {s.rank: s for s in find_slow(both[0::2], both[1::2], step_s=step_s)}
        self._strikes = {rank: self._strikes.get(rank, 0) + 1 for rank in slow}
        named = [slow[rank] for rank, times in self._strikes.items() if times == PATIENCE]
        for s in named if dist.rank() == 0 else ():
            log.warning("step %d: rank %d on %s holds up the others: %s", step, s.rank, self._hosts[s.rank], s.why)
        return named
