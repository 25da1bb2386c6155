"""The files of a checkpoint: for every rank one safetensors file with its share of the weights and moments, by name.

    share            of what                                            who has how much of it
    weight/NAME      float32 master weights of what is trained          as ZeRO has dealt it out
    exp_avg/NAME, exp_avg_sq/NAME   AdamW's moments, once there are any     the same
    frozen/NAME      other weights, and buffers; as the model computes  an equal stretch on each rank

A share is a stretch of a tensor laid flat; the header says where it starts, what shape the tensor has, and how often
each parameter group has been updated. So the files say nothing of ranks or ZeRO stages, and any number of ranks reads
them under any stage. Costs of reading: what is asked for, out of memory-mapped files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cprec.errors import CheckpointError
from cprec.format import sync
from cprec.settings import Settings

PREFIX = "lm."
"""Of every name: the language model is a part of the `TrainingModel` that was trained."""
WEIGHT, FROZEN, MOMENTS = "weight", "frozen", ("exp_avg", "exp_avg_sq")
CHUNK = 16 << 20
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
           torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}
"""As safetensors names them."""


class FileInfo(Settings):
    """One file of a checkpoint."""

    bytes: int
    xxh3_128: str


class Place(Settings):
    """Where in its tensor a share lies."""

    start: int
    shape: list[int]


@dataclass(frozen=True)
class Share:
    """A stretch of one of a checkpoint's tensors, as this rank has it in memory: flat, on its device."""

    kind: str
    name: str
    place: Place
    data: Tensor

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


class Header(Settings):
    """What a rank's file says beside its tensors."""

    places: dict[str, Place]
    """By key, `weight/lm.model.norm.weight`."""
    updates: dict[str, int] = Field({})
    """How often each parameter group has been updated, by its name; without those that never were."""


class Layout:
    """How a rank's shares lie in its file: the header's bytes, then the shares end to end, wide types first."""

    def __init__(self, shares: Iterable[Share], updates: Mapping[str, int]) -> None:
        self.shares = sorted(shares, key=lambda s: (-s.data.element_size(), s.key))
        self.offsets: list[int] = []
        at, header = 0, dict[str, Any]()
        for s in self.shares:
            self.offsets.append(at)
            header[s.key] = {"dtype": DTYPES[s.data.dtype], "shape": [s.data.numel()],
                             "data_offsets": [at, at + s.data.nbytes]}
            at += s.data.nbytes
        self.n_bytes = at
        facts = Header(places={s.key: s.place for s in self.shares}, updates=dict(updates))
        header["__metadata__"] = {"format": "pt", "cprec": facts.model_dump_json()}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text

    def copy_to(self, buffer: Tensor) -> None:
        """Copy the shares, as they are now, into `buffer`, (n_bytes,) uint8 on the host; pinned, it is one wait."""
        for share, at in zip(self.shares, self.offsets, strict=True):
            part = buffer[at:at + share.data.nbytes].view(share.data.dtype)
            part.copy_(share.data, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def stream(self) -> Iterator[Tensor]:
        """The shares' bytes in order, on the host, a bounded part at a time; they must not change meanwhile."""
        for share in self.shares:
            for part in torch.split(share.data, CHUNK // share.data.element_size()):
                yield part.cpu().view(torch.uint8)


def write_file(path: Path, head: bytes, body: Iterable[Tensor], is_cancelled: Callable[[], bool]) -> FileInfo:
    """Write a file and have it on the disk itself; its size, and its hash as it was in memory.

    Lets other threads run: all of its work is done outside of the interpreter's lock. Raises OSError, also when it is
    cancelled.
    """
    digest, n_bytes = xxhash.xxh3_128(head), len(head)
    with path.open("wb", buffering=0) as f:
        f.write(head)
        for tensor in body:
            for part in torch.split(tensor, CHUNK):
                if is_cancelled():
                    raise InterruptedError("cancelled")
                array: Any = part.numpy()
                view = memoryview(array)
                digest.update(view)
                done = 0
                while done < len(view):
                    done += f.write(view[done:])
                n_bytes += done
    sync(path)
    return FileInfo(bytes=n_bytes, xxh3_128=digest.hexdigest())


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


class SavedState:
    """All ranks' files of a checkpoint, open: any stretch of any tensor, and how often each group was updated.

    Raises CheckpointError when there are none, or they are of another make.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("rank_*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} holds no rank_*.safetensors; give a complete checkpoint")
        self._files: list[Any] = []
        self._parts: dict[str, list[tuple[int, int]]] = {}
        """By key: where each part starts in its tensor, and the number of its file."""
        self.shapes: dict[str, torch.Size] = {}
        self.updates: dict[str, int] = {}
        for number, path in enumerate(paths):
            header = self._open(path)
            self.updates |= header.updates
            for key, place in header.places.items():
                self._parts.setdefault(key, []).append((place.start, number))
                self.shapes[key] = torch.Size(place.shape)
        for parts in self._parts.values():
            parts.sort()

    def _open(self, path: Path) -> Header:
        try:
            file: Any = safe_open(path, framework="pt")
            header = Header.model_validate_json((file.metadata() or {})["cprec"])
        except (SafetensorError, OSError, KeyError, ValueError) as e:
            raise CheckpointError(f"{path} is no file of a checkpoint: {type(e).__name__}: {e}") from None
        self._files.append(file)
        return header

    def read(self, key: str, start: int = 0, n: int | None = None) -> Tensor:
        """Elements `start` to `start + n` (to the end without `n`) of the tensor `key` laid flat."""
        total = self.shapes[key].numel()
        stop = total if n is None else start + n
        found = []
        for first, number in self._parts[key]:
            part = self._files[number].get_slice(key)
            (size,) = part.get_shape()
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                found.append(part[low:high])
        whole = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)
        if whole.numel() != stop - start:
            raise CheckpointError(f"{self.folder} does not hold the whole of {key}: {whole.numel():,} of "
                                  f"{stop - start:,} numbers")
        return whole

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind, in the files' order."""
        return [key.partition("/")[2] for key in self._parts if key.startswith(kind + "/")]


class SavedWeights(Mapping[str, Tensor]):
    """Parameters and buffers of a checkpoint by the names that transformers (and peft) give them; each is read when
    asked for.

    Trained ones are the float32 master weights; frozen ones have the precision that the model computed in. Tied
    parameters are there once, under their first name.
    """

    def __init__(self, folder: Path) -> None:
        self._state = SavedState(folder)
        self._keys = {name.removeprefix(PREFIX): f"{kind}/{name}"
                      for kind in (WEIGHT, FROZEN) for name in self._state.names(kind)}

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        return self._state.read(key).view(self._state.shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def equal_share(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of a rank's stretch of `n` numbers that all have: none is written twice."""
    each = math.ceil(n / world_size)
    start = min(rank * each, n)
    return start, min(each, n - start)

