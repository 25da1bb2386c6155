"""Whether the machines of a job are fit for it, and which is not: a table of what every rank found, and the verdict.

reads: see `facts`. gives: the table, and a ClusterError (exit code 6) naming each bad rank, its host, and why.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cprec import dist
from cprec.cluster import facts
from cprec.cluster.facts import Facts
from cprec.config import RunConfig
from cprec.errors import ClusterError, raise_all
from cprec.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """From where on a machine is bad."""

    min_speed: float = 0.8
    """Of a matrix product, as a share of the median rank's."""
    min_free_memory: float = 0.9
    """Of a GPU, as a share of all: what is missing is another process's."""
    min_disk_gb: float = 10.0
    max_clock_s: float = 1.0
    """Ahead of or behind rank 0."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one rank's machine."""

    rank: int
    host: str
    check: str
    what: str

    def __str__(self) -> str:
        return f"{self.host} (rank {self.rank}): {self.check}: {self.what}"


def judge(found: Sequence[Facts], limits: Limits) -> list[Finding]:
    """Everything that is wrong, in the order of the ranks. `found`: by rank."""
    usual = {name: Counter(f.versions.get(name, "none") for f in found).most_common(1)[0][0]
             for name in sorted({name for f in found for name in f.versions})}  # of equally many: rank 0's
    speed = statistics.median_high([f.tflops for f in found])  # of two, one can be slow
    return [Finding(f.rank, f.host, check, what) for f in found for check, what in (
        *_wrong_versions(f, usual), *_wrong_numbers(f, speed, limits), *((p.check, p.what) for p in f.problems))]


def _wrong_versions(f: Facts, usual: dict[str, str]) -> list[tuple[str, str]]:
    return [("versions", f"{name} {version} here, {usual[name]} elsewhere") for name in usual
            if (version := f.versions.get(name, "none")) != usual[name]]


def _wrong_numbers(f: Facts, speed: float, limits: Limits) -> list[tuple[str, str]]:
    found = []
    if not f.sum_is_exact:
        found.append(("all-reduce", "its sum over the ranks is wrong"))
    if f.tflops < limits.min_speed * speed:
        found.append(("speed", f"{f.tflops:.3g} TFLOP/s in matrix products, {f.tflops / speed:.0%} of the median "
                               f"rank's"))
    if not f.device.startswith("CPU") and f.free_memory_gb < limits.min_free_memory * f.memory_gb:
        found.append(("memory", f"{f.free_memory_gb:.1f} of {f.memory_gb:.1f} GB are free: another process uses it"))
    found += [("disk", f"{folder} has {gb:.1f} GB left, less than {limits.min_disk_gb:g}")
              for folder, gb in f.free_disk_gb.items() if gb < limits.min_disk_gb]
    if abs(f.clock_s) > limits.max_clock_s:
        found.append(("clock", f"{abs(f.clock_s):.1f} s {'ahead of' if f.clock_s > 0 else 'behind'} rank 0's"))
    return found


def table(found: Sequence[Facts], findings: Sequence[Finding]) -> str:
    """One line per rank."""
    bad = {f.rank for f in findings}
    width = max(len("host"), *(len(f.host) for f in found))
    lines = [f" rank  {'host':<{width}}  fit  product TFLOP/s  bus GB/s  free memory GB  free disk GB  clock s  device"]
    for f in found:
        bus = "-" if f.bus_gb_s is None else f"{f.bus_gb_s:.2f}"
        lines.append(
            f"{f.rank:>5}  {f.host:<{width}}  {'no' if f.rank in bad else 'yes':>3}  {f.tflops:>15.3g}  {bus:>8}  "
            f"{f'{f.free_memory_gb:.1f}/{f.memory_gb:.1f}':>14}  {min(f.free_disk_gb.values()):>12.1f}  "
            f"{f.clock_s:>+7.3f}  {f.device}")
    return "\n".join(lines)


def require_fit(found: Sequence[Facts], findings: Sequence[Finding]) -> None:
    """Raise ClusterError with every finding, or return when there is none."""
    hosts = list(dict.fromkeys(f.host for f in findings))
    raise_all([str(f) for f in findings], of=f"{len(hosts)} of {len({f.host for f in found})} hosts unfit "
                                              f"({', '.join(hosts)})", error=ClusterError)


def examine(config: RunConfig) -> None:
    """What `preflight: true` does at the start of a run. Collective; raises ClusterError on every rank."""
    found = facts.gather(config)
    findings = judge(found, Limits())
    if dist.rank() == 0:
        for line in table(found, findings).splitlines():
            log.info("%s", line)
    require_fit(found, findings)
