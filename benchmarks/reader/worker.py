"""One process that reads with one side and measures itself: `python -m benchmarks.reader.worker JOB`.

Imports the side's library, says "ready" on standard output, waits for a line, reads, and prints its `Answer` as JSON.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BEGIN_S = time.perf_counter()  # importing torch and numpy counts as importing

import psutil  # noqa: E402

from benchmarks.reader.job import Answer, Job  # noqa: E402
from benchmarks.reader.records import Finished, checksum  # noqa: E402
from benchmarks.reader.rivals import SIDES  # noqa: E402


def main() -> None:
    job = Job.model_validate_json(sys.argv[1])
    side = SIDES[job.side]
    side.imports()
    imports_s = time.perf_counter() - BEGIN_S
    before, _ = resident_mb()
    print("ready", flush=True)
    sys.stdin.readline()
    begin_s = time.perf_counter()
    batches = side.batches(job)
    first = next(batches)
    first_batch_s = time.perf_counter() - begin_s
    n, seconds, total = read(job, first, batches)
    anon, file = resident_mb()
    print(Answer(imports_s=imports_s, first_batch_s=first_batch_s, rows=n, seconds=seconds, anon_mb=anon, file_mb=file,
                 anon_before_mb=before, checksum=total[1], checked_rows=total[0]).model_dump_json(), flush=True)


def read(job: Job, first: Finished, batches: Iterator[Finished]) -> tuple[int, float, tuple[int, int]]:
    """Read on to the limits of the job: (rows after the first batch, seconds, (rows, checksum) of all)."""
    most = job.most_rows if job.most_rows is not None else job.shape.n_rows
    total = checksum(first, job.shape.seq_len) if job.check else (0, 0)
    n = 0
    begin_s = time.perf_counter()
    for batch in batches:
        n += len(batch.labels)
        if job.check:
            one = checksum(batch, job.shape.seq_len)
            total = total[0] + one[0], (total[1] + one[1]) % 2**64
        if n >= most or time.perf_counter() - begin_s >= job.seconds:
            break
    return n, time.perf_counter() - begin_s, total


def resident_mb() -> tuple[float, float]:
    """RssAnon and RssFile of this process and its children, in 10^6 bytes."""
    me = psutil.Process()
    kb = [0, 0]
    for pid in [me.pid, *(child.pid for child in me.children(recursive=True))]:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for place, field in enumerate(("RssAnon", "RssFile")):
            found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
            kb[place] += int(found[1]) if found else 0
    return kb[0] * 1024 / 1e6, kb[1] * 1024 / 1e6


if __name__ == "__main__":
    main()
