"""What every launch script does around its work: logging, errors as one clear message, exit codes.

Exit codes: 0 done, 1 other error, 2 bad config, 3 bad data, 4 bad checkpoint, 5 diverged, 75 stopped when asked, start
again to go on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from cprec.errors import CPRecError
from cprec.log import setup_logging
from cprec.process import end_with, stop_with_launcher

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Environment variables in which torchrun and deepspeed, mpirun (Open MPI, MPICH) and srun tell a process its rank."""
END_WITH = "CPREC_END_WITH"
"""Environment variable: a process id; whatever was started with it, however indirectly, ends when that process does."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with what it returns (None is 0); a CPRecError becomes its message and its exit code."""
    rank = int(next((os.environ[name] for name in RANKS if name in os.environ), "0"))
    setup_logging(rank)
    if "LOCAL_RANK" in os.environ:  # a launcher that is killed would leave its ranks behind: they save and stop
        stop_with_launcher()
    if END_WITH in os.environ:
        end_with(int(os.environ[END_WITH]))
    try:
        code = main() or 0
    except CPRecError as e:
        if rank == 0 or e.on_one_rank:
            print(f"\n{type(e).__name__}: {e}", file=sys.stderr)
        code = e.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
