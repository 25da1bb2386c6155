"""One rank of one side: `python -m benchmarks.train.worker JOB` trains, and prints its `Answer` as JSON."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable

from benchmarks.train.job import Answer, Job

OURS, PADDED, CONCAT, TRL = "ours", "trainer padded", "trainer concat", "trl packed"
SIDES = (OURS, PADDED, CONCAT, TRL)


def main() -> None:
    job = Job.model_validate_json(sys.argv[1])
    if job.side not in SIDES:
        sys.exit(f"there is no side {job.side}")
    os.environ |= {"RANK": str(job.rank), "LOCAL_RANK": str(job.rank), "WORLD_SIZE": str(job.world_size),
                   "LOCAL_WORLD_SIZE": str(job.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}
    if job.cores:
        os.sched_setaffinity(0, job.cores)
        os.environ["OMP_NUM_THREADS"] = str(len(job.cores))
    print(answer(job).model_dump_json(), flush=True)


def answer(job: Job) -> Answer:
    """Train as `job` says, and what was measured."""
    from deepspeed.ops import __compatible_ops__  # after the environment: torch counts its threads when it is loaded

    from benchmarks.train import ours, rivals
    from cprec import dist

    __compatible_ops__["deepspeed_shm_comm"] = False  # of every side: would be compiled, and serves inference only
    sides: dict[str, Callable[[Job], ours.Seen]] = {
        OURS: ours.train, PADDED: rivals.padded, CONCAT: rivals.concatenated, TRL: rivals.trl_packed}
    seen = sides[job.side](job)
    notes = {"inside_s": seen.inside_s} if seen.inside_s else {}
    dist.shutdown()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    if job.side == OURS and job.weights and job.rank == 0:
        ours.export_last(job)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Answer(step_ends_s=seen.ends_s, useful=seen.useful, slots=seen.slots, peak_mb=peak_kb * 1024 / 1e6,
                  notes=notes)


if __name__ == "__main__":
    main()
