"""Logging and progress, configured once in `launch/`.

writes: standard error, one line per event; progress bars only on a terminal (plain lines elsewhere, so that
SLURM logs stay readable). Only rank 0 speaks, except for warnings and errors.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")
PLAIN_LINE_EVERY_S = 10.0


def get_logger(name: str) -> logging.Logger:
    """Logger of a module; silent until `setup_logging` was called by a launch script."""
    return logging.getLogger(name)


def setup_logging(rank: int = 0) -> None:
    """Send log lines to standard error: everything from rank 0, warnings and errors from the other ranks."""
    tag = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {tag}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for noisy in ("httpx", "matplotlib", "fsspec", "DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def bars_only_on_a_terminal() -> None:
    """Keep transformers' own progress bars out of logs. For who is about to load or save a model by it."""
    from transformers.utils import logging as theirs

    if not sys.stderr.isatty():
        theirs.disable_progress_bar()


def progress(items: Iterable[T], *, total: int, label: str, unit: str = "it", lines: bool = True) -> Iterator[T]:
    """Yield `items` while showing rate and time left: a bar on a terminal, a line every 10 s elsewhere.

    Log lines are printed above the bar. `lines=False` is for loops that log their own: elsewhere nothing is added.
    """
    if sys.stderr.isatty():
        with logging_redirect_tqdm():
            yield from tqdm(items, total=total, desc=label, unit=unit, leave=False, file=sys.stderr)
        return
    if not lines:
        yield from items
        return
    log = get_logger(__name__)
    start_s = last_s = time.monotonic()
    for n_done, item in enumerate(items, 1):
        yield item
        now_s = time.monotonic()
        if now_s - last_s >= PLAIN_LINE_EVERY_S:
            last_s = now_s
            rate = n_done / (now_s - start_s)
            left_s = max(total - n_done, 0) / rate
            log.info("%s: %d/%d %s, %.1f %s/s, about %.0f s left", label, n_done, total, unit, rate, unit, left_s)
