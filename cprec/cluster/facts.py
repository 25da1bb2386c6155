"""What each rank finds out about its machine, before a run: device, links, clock, disks, files, versions, locks.

reads: the run's packed data, its newest checkpoint, TORCH_EXTENSIONS_DIR. writes: one small file into the run folder,
which is removed again. Costs: seconds; the data are opened, not read through.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from pydantic import Field
from torch.utils.cpp_extension import get_default_build_root

from cprec import dist
from cprec.cluster.probe import ProductProbe, all_reduce
from cprec.config import RunConfig
from cprec.data.corpora import cache_for, find_corpora, read_manifests
from cprec.data.remote import open_corpus
from cprec.errors import CPRecError
from cprec.settings import Settings
from cprec.train.checkpoint import list_checkpoints

PACKAGES = ("cprec", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "pydantic")
SEEN_WITHIN_S = 10.0
"""Network file systems may show a file late, by what they cache."""


class Problem(Settings):
    """Something that a rank found wrong by itself."""

    check: str
    what: str


class Facts(Settings):
    """One rank's machine."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    """Of packages, Python, CUDA, NCCL, the driver; what is not installed is missing."""
    tflops: float
    """10^12 operations per second of a matrix product."""
    sum_is_exact: bool
    bus_gb_s: float | None
    """See `probe.LinkSpeed`."""
    free_memory_gb: float
    memory_gb: float
    """Of the device; of the host where that is the device."""
    free_disk_gb: dict[str, float]
    """By folder: the run's, and that of temporary files."""
    clock_s: float
    """How far this machine's clock is ahead of rank 0's; 0.01 and less may be the network."""
    problems: list[Problem] = Field([])


def gather(config: RunConfig) -> list[Facts]:
    """The facts of every rank, by rank. Collective."""
    return [Facts.model_validate_json(text) for text in dist.gather_texts([_look(config).model_dump_json()])]


def _look(config: RunConfig) -> Facts:
    device, run_dir = dist.device(), Path(config.run_dir)
    on_gpu = device.type == "cuda"
    link = all_reduce(device, n_bytes=256_000_000 if on_gpu else 4_000_000)
    host = psutil.virtual_memory()
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (host.available, host.total)
    probe = ProductProbe(device, size=8192 if on_gpu else 512)
    return Facts(
        rank=dist.rank(), host=socket.gethostname(), versions=dict(_versions(on_gpu)),
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        tflops=probe.tflops(best_of=5), sum_is_exact=link.is_exact, bus_gb_s=link.bus_gb_s,
        free_memory_gb=free / 1e9, memory_gb=total / 1e9,
        free_disk_gb={str(folder): shutil.disk_usage(_there(folder)).free / 1e9
                      for folder in (run_dir, Path(os.environ.get("TMPDIR", "/tmp")))},
        clock_s=_clock_ahead_s(),
        problems=[*_shared_folder(run_dir), *_data(config), *_checkpoint(run_dir), *_locks()])


def _versions(on_gpu: bool) -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if on_gpu:
        yield "cuda", str(torch.version.cuda)
        yield "nccl", ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            yield "driver", subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0]


def _clock_ahead_s() -> float:
    """The smallest of three differences to rank 0's clock, each read when a barrier opens. Collective."""
    ahead = []
    for _ in range(3):
        dist.barrier()
        times = dist.gather_texts([repr(time.time())])
        ahead.append(float(times[dist.rank()]) - float(times[0]))
    return min(ahead, key=abs)


def _shared_folder(run_dir: Path) -> list[Problem]:
    """Whether this rank sees, with its content, what rank 0 writes into the run's folder. Collective."""
    said = [str(run_dir.absolute() / f".preflight-{secrets.token_hex(8)}")] if dist.rank() == 0 else []
    path = Path(dist.gather_texts(said)[0])
    own = run_dir.absolute() / path.name
    problem = None
    if dist.rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name, encoding="utf-8")
        except OSError as e:
            problem = f"cannot write into {run_dir.absolute()}: {e.strerror}"
    dist.barrier()
    if problem is None and not _shows(own, path.name):
        problem = (f"{own.parent} is not the folder that rank 0 writes to: its file is not there after "
                   f"{SEEN_WITHIN_S:.0f} s")
    dist.barrier()
    if dist.rank() == 0:
        path.unlink(missing_ok=True)
    return [Problem(check="run_dir", what=problem)] if problem else []


def _shows(path: Path, content: str) -> bool:
    until = time.monotonic() + SEEN_WITHIN_S
    while True:
        try:
            os.listdir(path.parent)  # has NFS look again
            if path.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def _data(config: RunConfig) -> list[Problem]:
    """Every corpus of the run can be found, and one row of it read."""
    data = config.data
    try:
        cache = cache_for(data.packed, folder=data.cache_dir, gb=data.cache_gb)
        places = find_corpora(data.packed, cache)
        manifests = read_manifests(places, cache)
        for name, manifest in manifests.items():
            corpus = open_corpus(places[name], cache, manifest=manifest, at_random=True)
            if len(corpus):
                corpus[dist.rank() % len(corpus)]
            corpus.release()
    except (CPRecError, OSError) as e:
        return [Problem(check="data", what=str(e))]
    return [] if manifests else [Problem(check="data", what=f"{data.packed}: no finished corpus")]


def _checkpoint(run_dir: Path) -> list[Problem]:
    """This rank's share of the newest checkpoint's files has the right sizes and can be read."""
    try:
        newest = list_checkpoints(run_dir)[-1:]
        for checkpoint in newest:
            for name, info in sorted(checkpoint.state.files.items())[dist.rank()::dist.world_size()]:
                path = checkpoint.folder / name
                with path.open("rb") as f:
                    f.read(1)
                if path.stat().st_size != info.bytes:
                    return [Problem(check="checkpoint", what=f"{path} has {path.stat().st_size:,} bytes, not "
                                                             f"{info.bytes:,}")]
    except (CPRecError, OSError) as e:
        return [Problem(check="checkpoint", what=str(e))]
    return []


def _locks() -> list[Problem]:
    """Locks of extensions that are being compiled, or of a job that was killed while it did: then all wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [Problem(check="lock", what=f"{lock} is {time.time() - lock.stat().st_mtime:,.0f} s old: if no job of yours "
                                       f"is compiling there, remove it, or every start waits for it; better, give "
                                       f"every job a TORCH_EXTENSIONS_DIR of its own")
            for lock in sorted(root.rglob("lock")) if lock.is_file()]


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
