"""The border between preparation and training: packed shards and their manifest. Writer and reader.

A corpus is a folder with `shard-00000-000.arrow`, ..., `rows.npy` and, written last by rename, `manifest.json`: without
that it is unfinished. `rows.npy` repeats cost, n_labels and n_pad of all rows (`FACTS`), so that a step is dealt to the
ranks without opening the shards of others. A shard is one uncompressed Arrow IPC file holding one record batch, so that
a row's tokens are found by arithmetic:

    input_ids  fixed_size_list<uint16|uint32>[seq_len]   tokens of the row's documents, then padding
    doc_lens   list<int32>    lengths of its documents in tokens, then of the padding iff n_pad > 0; sum is seq_len
    doc_ids    list<int64>    which document each is: its history and first item, see `ITEM_BITS`; none for padding
    n_pad      int32          tokens of padding at the row's end
    n_labels   int32          tokens to be predicted: those after a document's first, in the loss mask if there is one
    cost       int64          attention cost in token pairs: the sum of the squares of doc_lens
    loss_mask  fixed_size_list<bool>[seq_len]   which tokens are to be predicted; only where the template is supervised

Costs: the writer holds one shard; the reader holds none, it maps them and gives back the pages that it has read, or
reads the tokens of many rows into memory of its own (`read_rows`).
"""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import resource
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from cprec.errors import DataError
from cprec.template import Template

FORMAT_VERSION = 3
ITEM_BITS = 16
"""A document's id is the number of its history (its row in `histories/<corpus>.parquet`) and, in the lowest 16 bits,
the place of its first item there."""
MANIFEST = "manifest.json"
ROWS = "rows.npy"
FACTS = np.dtype([("cost", "<i8"), ("n_labels", "<i4"), ("n_pad", "<i4")])
"""What is known of a row without its tokens: 16 bytes."""
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerInfo(_Record):
    """Which tokenizer made the ids; `fingerprint` as in `cprec.tokenizer`."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_id: int
    pad_id: int


class ShardInfo(_Record):
    """One shard file: its rows, its size in bytes, its xxh3-128 hash."""

    file: str
    rows: int
    bytes: int
    xxh3_128: str


class Audit(_Record):
    """What the leak audit found over the finished artifacts: each check's name and its finding, and the verdict."""

    passed: bool
    checks: dict[str, str]


class Manifest(_Record):
    """What a packed corpus holds and where it came from. Counts are of documents and tokens in all its shards."""

    format_version: int = FORMAT_VERSION
    corpus: str
    kind: Literal["train", "valid"]
    seq_len: int
    dtype: Literal["uint16", "uint32"]
    n_rows: int
    n_tokens: int
    """Real tokens, padding not counted."""
    n_pad: int
    n_documents: int
    n_documents_by_domain: dict[str, int]
    sum_squared_doc_lens: int
    """Attention cost of the corpus in token pairs: the sum over documents of length squared."""
    tokenizer: TokenizerInfo
    template: Template | None
    """None for plain text."""
    template_hash: str
    has_loss_mask: bool = False
    """Whether the shards have the column `loss_mask`."""
    seed: int
    split_hash: str
    max_timestamp_ms: int
    """Latest event inside; a training corpus must end before the validation clock."""
    sources: dict[str, str]
    """Source file -> its hash."""
    shards: list[ShardInfo]
    row_facts: ShardInfo
    """`rows.npy`."""
    audit: Audit | None = None

    @property
    def files(self) -> list[ShardInfo]:
        """All files of the corpus but its manifest."""
        return [self.row_facts, *self.shards]

    @property
    def fill(self) -> float:
        """Share of the rows that is real tokens."""
        return self.n_tokens / max(self.n_rows * self.seq_len, 1)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Manifest of a packed corpus. Raises DataError when it is missing, unreadable or of another version."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it is not a packed corpus, or its preparation did not finish; "
                        f"run launch/prepare.py again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format_version={version}, this program reads {FORMAT_VERSION}; prepare again")
        return Manifest.model_validate(values)
    except (ValueError, ValidationError) as e:
        raise DataError(f"{path} is not a valid manifest: {e}; prepare the corpus again") from None


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write the manifest atomically; from here on the folder counts as finished."""
    write_atomically(Path(folder) / MANIFEST, manifest.model_dump_json(indent=1))


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, whenever the machine stops."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when all is written, and is removed when that fails (on a full disk its
    room is what the next attempt needs)."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        replace_durably(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_durably(partial: Path, path: Path) -> None:
    """Give a finished file its name so that, also after a power loss, the name never stands for less than the file."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the file or folder written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Xxh3-128 of a file's bytes, as 32 hex digits; reads in pieces of 8 MiB."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while piece := f.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_hash(path: str | os.PathLike[str], info: ShardInfo) -> None:
    """Compare the hash of a corpus's file with the one in its manifest. Raises DataError naming a file that is altered
    or missing."""
    try:
        found = file_hash(path)
    except FileNotFoundError:
        raise DataError(f"file {path} is missing; run launch/prepare.py again, which makes it anew") from None
    if found != info.xxh3_128:
        raise DataError(f"file {path} has hash {found}, its manifest says {info.xxh3_128}: its bytes were altered; "
                        f"delete it and run launch/prepare.py again, which makes it anew")


def list_corpora(packed: str | os.PathLike[str]) -> list[str]:
    """Names of the finished corpora below `packed`, sorted."""
    return sorted(str(p.parent.relative_to(packed)) for p in Path(packed).rglob(MANIFEST))


@dataclass(frozen=True)
class PackedRows:
    """A shard's worth of rows, ready to be written.

    `input_ids` and, of a supervised template, `loss_mask`: (rows, seq_len); `doc_lens` and `doc_ids` are flat, with
    `n_lens` and `n_docs` entries per row.
    """

    input_ids: Tokens
    doc_lens: npt.NDArray[np.int32]
    n_lens: Ints
    doc_ids: Ints
    n_docs: Ints
    n_pad: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None = None
    """True where the token is to be predicted; never in padding."""


def write_shard(path: Path, rows: PackedRows) -> ShardInfo:
    """Write one shard by rename and return its size and hash. The same rows give the same bytes."""
    n, seq_len = rows.input_ids.shape

    def fixed(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), seq_len)

    def ragged(values: npt.NDArray[Any], counts: Ints) -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    columns = {
        "input_ids": fixed(rows.input_ids),
        "doc_lens": ragged(rows.doc_lens, rows.n_lens),
        "doc_ids": ragged(rows.doc_ids, rows.n_docs),
        "n_pad": pa.array(rows.n_pad),
        "n_labels": pa.array(_count_labels(rows)),
        "cost": pa.array(_sum_by_row(rows.doc_lens.astype(np.int64) ** 2, rows.n_lens)),
    }
    batch = pa.record_batch(columns if rows.loss_mask is None else columns | {"loss_mask": fixed(rows.loss_mask)})
    with replacing(path) as partial, partial.open("wb", buffering=0) as file, _Hashed(file) as sink:
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
        return ShardInfo(file=path.name, rows=n, bytes=file.tell(), xxh3_128=sink.digest.hexdigest())


def write_row_facts(folder: str | os.PathLike[str], shards: Sequence[ShardInfo]) -> ShardInfo:
    """Gather what the shards of `folder` say of their rows into `rows.npy`, by rename; shard by shard."""
    path, n_rows = Path(folder) / ROWS, sum(s.rows for s in shards)
    with replacing(path) as partial, partial.open("wb", buffering=0) as file, _Hashed(file) as sink:
        np.lib.format.write_array_header_2_0(
            sink, {"descr": np.lib.format.dtype_to_descr(FACTS), "fortran_order": False, "shape": (n_rows,)})
        for info in shards:
            batch = _open_batch(pa.memory_map(str(Path(folder) / info.file)), Path(folder) / info.file)
            facts = np.empty(info.rows, dtype=FACTS)
            for name in FACTS.names or ():
                facts[name] = batch[name].to_numpy()
            sink.write(facts)
        return ShardInfo(file=ROWS, rows=n_rows, bytes=file.tell(), xxh3_128=sink.digest.hexdigest())


def _open_batch(source: Any, path: Path) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(source).get_batch(0)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"shard {path} is not readable Arrow: {e}; prepare the corpus again") from None


def _count_labels(rows: PackedRows) -> npt.NDArray[np.int32]:
    """Labels of each row: real tokens in the loss mask, but the first of each document."""
    seq_len = rows.input_ids.shape[1]
    if rows.loss_mask is None:
        return np.asarray(seq_len - rows.n_pad - rows.n_docs, dtype=np.int32)
    first = np.cumsum(rows.doc_lens.astype(np.int64)) - rows.doc_lens
    in_mask = rows.loss_mask.reshape(-1)[first].astype(np.int64)
    return np.asarray(rows.loss_mask.sum(axis=1) - _sum_by_row(in_mask, rows.n_lens), dtype=np.int32)


def _sum_by_row(values: Ints, counts: Ints) -> Ints:
    """Sums of consecutive values, `counts` of them for each row."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts)
    return np.asarray(sums[ends] - sums[ends - counts], dtype=np.int64)


class _Hashed(io.RawIOBase):
    """A file that is written and hashed in one pass."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`: a single call may write less, at most 2 GiB on Linux."""
        whole = memoryview(data).cast("B")
        self.digest.update(whole)
        done = 0
        while done < len(whole):
            done += self._file.write(whole[done:])
        return done


class Row(NamedTuple):
    """One packed row, as views into the mapped shard (the mask: unpacked from its bits). `doc_lens` includes the
    padding entry iff `n_pad > 0`."""

    input_ids: Tokens
    doc_lens: npt.NDArray[np.int32]
    doc_ids: Ints
    n_pad: int
    n_labels: int
    """How many of its tokens are labels, see `is_label`."""
    loss_mask: npt.NDArray[np.bool_] | None = None
    """(seq_len,), None where every real token is to be predicted."""

    @property
    def real_doc_lens(self) -> npt.NDArray[np.int32]:
        """Lengths of the documents, padding left out."""
        return self.doc_lens[:-1] if self.n_pad else self.doc_lens

    @property
    def is_label(self) -> npt.NDArray[np.bool_]:
        """(seq_len,), true where the token is predicted from those before it: neither a document's first nor padding,
        and set in the loss mask if there is one."""
        mask = np.ones(len(self.input_ids), dtype=np.bool_) if self.loss_mask is None else self.loss_mask.copy()
        mask[len(mask) - self.n_pad:] = False
        lens = self.real_doc_lens
        mask[np.cumsum(lens) - lens] = False
        return mask


def _values(array: pa.Array, dtype: str) -> npt.NDArray[Any]:
    """A column without nulls as a view. Arrow's own `to_numpy` would import pandas, which takes half a second."""
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def _bits(array: pa.Array) -> npt.NDArray[np.uint8]:
    """A column of booleans without nulls, eight to a byte, lowest first, as a view."""
    assert array.offset == 0
    return np.frombuffer(array.buffers()[1], np.uint8)


class Shard:
    """A mapped shard: its rows by their place in it."""

    def __init__(self, path: Path, info: ShardInfo, manifest: Manifest, *, at_random: bool) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        batch = _open_batch(pa.py_buffer(self._map), path)
        _check_columns(batch, path, info, manifest)
        ids = _values(batch["input_ids"].values, manifest.dtype)
        self.input_ids: Tokens = ids.reshape(info.rows, manifest.seq_len)
        self._doc_lens, self._len_offsets = self._ragged(batch["doc_lens"], "int32")
        self._doc_ids, self._id_offsets = self._ragged(batch["doc_ids"], "int64")
        self._n_pad, self._n_labels = (_values(batch[name], "int32").data for name in ("n_pad", "n_labels"))
        self.has_loss_mask = manifest.has_loss_mask
        self._mask_bits = _bits(batch["loss_mask"].values) if manifest.has_loss_mask else None
        self.tokens_at = self.input_ids.ctypes.data - np.frombuffer(self._map, dtype=np.uint8, count=1).ctypes.data
        self.row_bytes = self.input_ids.itemsize * manifest.seq_len
        self.other_bytes = len(self._map) - ids.nbytes
        """Of all but the tokens."""
        if at_random:  # or the kernel reads 32 pages around each that is wanted
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._advise(mmap.MADV_RANDOM, self.tokens_at, ids.nbytes)
            after = self.tokens_at + ids.nbytes  # small, and soon wanted all over: at once, not page by page
            self._advise(mmap.MADV_WILLNEED, after, len(self._map) - after)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the interpreter's end there is no `os`
        if hasattr(self, "fd"):
            close(self.fd)

    @staticmethod
    def _ragged(column: pa.ListArray, dtype: str) -> tuple[memoryview, memoryview]:
        return _values(column.values, dtype).view(np.uint8).data, _values(column.offsets, "int32").data

    def _advise(self, what: int, start: int, n_bytes: int) -> None:
        first = start & -mmap.PAGESIZE
        self._map.madvise(what, first, start + n_bytes - first)

    def documents(self, i: int) -> tuple[memoryview, memoryview]:
        """Row i's `doc_lens` and `doc_ids`, as views of their bytes: arrays of a few numbers cost more."""
        lens, ids = self._len_offsets, self._id_offsets
        return self._doc_lens[4 * lens[i]:4 * lens[i + 1]], self._doc_ids[8 * ids[i]:8 * ids[i + 1]]

    def loss_mask(self, i: int) -> npt.NDArray[np.bool_] | None:
        """Row i's, unpacked from its bits."""
        if self._mask_bits is None:
            return None
        n = self.input_ids.shape[1]
        first = i * n
        bits = np.unpackbits(self._mask_bits[first // 8:(first + n + 7) // 8], bitorder="little")
        return bits[first % 8:first % 8 + n].view(np.bool_)

    def row(self, i: int) -> Row:
        """Its row i, as views."""
        lens, ids = self.documents(i)
        return Row(self.input_ids[i], np.frombuffer(lens, np.int32), np.frombuffer(ids, np.int64), self._n_pad[i],
                   self._n_labels[i], self.loss_mask(i))

    def release(self) -> None:
        """Give back the pages that were read: they leave this process, not the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _check_columns(batch: pa.RecordBatch, path: Path, info: ShardInfo, manifest: Manifest) -> None:
    """Raise DataError when the shard does not hold what its manifest says."""
    if ("loss_mask" in batch.schema.names) != manifest.has_loss_mask:
        raise DataError(f"shard {path} and its manifest disagree: has_loss_mask={manifest.has_loss_mask}, columns "
                        f"{', '.join(batch.schema.names)}; prepare the corpus again")
    tokens = batch.schema.field("input_ids").type
    found = f"{batch.num_rows} rows of {tokens.list_size} {tokens.value_type}"
    if found != f"{info.rows} rows of {manifest.seq_len} {manifest.dtype}":
        raise DataError(f"shard {path} has {found}, its manifest says {info.rows} rows of {manifest.seq_len} "
                        f"{manifest.dtype}; prepare the corpus again")


class TokenBuffer:
    """Memory for the tokens of `n_rows` rows, to be read into again and again."""

    def __init__(self, n_rows: int, seq_len: int, dtype: str) -> None:
        self.tokens: Tokens = np.empty((n_rows, seq_len), dtype)
        self.rows = [[row.data] for row in self.tokens]  # as `os.preadv` takes them

    def __reduce__(self) -> tuple[Any, ...]:  # to another process without what was read
        return TokenBuffer, (*self.tokens.shape, self.tokens.dtype.name)


def read_rows(places: Sequence[tuple[Shard, int]], n_pad: npt.NDArray[np.int32], buffer: TokenBuffer) -> PackedRows:
    """Rows at some places of shards, in that order, their tokens read into `buffer`. Raises DataError when a shard is
    shorter than it was.

    Tokens are read, not mapped: a few KB at random cost more as page faults than as a copy, and what was mapped would
    have to be given back. `n_pad`: (n,), of each row.
    """
    _read_tokens(places, buffer.rows)
    lens, ids = zip(*[shard.documents(i) for shard, i in places], strict=True)
    n, tokens = len(places), buffer.tokens[:len(places)]
    mask = None
    if any(shard.has_loss_mask for shard, _ in places):
        mask = np.empty(tokens.shape, dtype=np.bool_)
        for out, (shard, i) in zip(mask, places, strict=True):
            out[:] = True if (known := shard.loss_mask(i)) is None else known
    return PackedRows(
        tokens, np.frombuffer(b"".join(lens), np.int32), np.fromiter(map(len, lens), np.int64, n) // 4,
        np.frombuffer(b"".join(ids), np.int64), np.fromiter(map(len, ids), np.int64, n) // 8, n_pad, mask)


_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""Read only what is in memory (Linux)."""


def _read_tokens(places: Sequence[tuple[Shard, int]], rows: Sequence[list[memoryview]]) -> None:
    """Read the tokens at `places` into `rows`: first what is in memory, then what has to come from the disk, for all
    of which the kernel is asked at once."""
    preadv, cold = os.preadv, []
    for row, (shard, i) in zip(rows, places, strict=False):
        try:
            if preadv(shard.fd, row, shard.tokens_at + i * shard.row_bytes, _NO_WAIT) == shard.row_bytes:
                continue
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):  # not there, not known of this file
                raise
        cold.append((row, shard, shard.tokens_at + i * shard.row_bytes))
    for _, shard, at in cold:
        os.posix_fadvise(shard.fd, at, shard.row_bytes, os.POSIX_FADV_WILLNEED)
    for buffers, shard, at in cold:
        whole, done = buffers[0].cast("B"), 0
        while done < shard.row_bytes:
            n_read = preadv(shard.fd, [whole[done:]], at + done)
            if n_read == 0:
                raise DataError(f"shard {shard.path} has become shorter: nothing at byte {at + done:,}, where it had a "
                                f"row; run launch/prepare.py again, which makes it anew")
            done += n_read


class _Facts:
    """The mapped `rows.npy` of a corpus."""

    def __init__(self, path: Path, n_rows: int) -> None:
        with path.open("rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            except ValueError as e:
                raise DataError(f"{path} is not readable: {e}; run launch/prepare.py again") from None
            if (shape, dtype) != ((n_rows,), FACTS):
                raise DataError(f"{path} holds {shape} x {dtype}, its manifest says {n_rows} rows of {FACTS}; prepare "
                                f"the corpus again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.of = np.frombuffer(self._map, FACTS, n_rows, file.tell())
        self._map.madvise(mmap.MADV_RANDOM)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)


Fetch = Callable[[ShardInfo], Path]
T = TypeVar("T")
_MOST_FILES = 65_536
_MOST_OPEN = 4096
"""Shards that a process has open at most: some 10 KB each, two file descriptors (one is the mapping's own) and a
mapping, of which Linux allows a process 65,530."""
_open_shards: deque[tuple[weakref.ref[PackedCorpus], int]] = deque()
"""Of all corpora of this process, oldest first."""
_opening = threading.Lock()


@cache
def _most_open() -> int:
    """`_MOST_OPEN`, or as many as take half of the file descriptors that this process may have. Of those it first
    takes what it may: most systems begin with 1,024 and allow many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else min(_MOST_OPEN, soft // 4)


class PackedCorpus:
    """Random access to the rows of one packed corpus. Opening checks the manifest and every file's size.

    `fetch` gives the local path of a file when it is first read, from any thread; `folder` then needs only the
    manifest, and who fetches answers for the bytes. A fetched shard may be evicted at any time: before it is opened it
    is fetched again, and a mapped one is let go of when the next is opened or pages are given back, since until then it
    takes room. `manifest`: that of the folder, if it has been read already.
    `at_random`: rows are read in no order, so that nothing around them is worth reading ahead.
    Resident memory is bounded: shards are opened when they are read, the oldest is closed when there are too many, and
    pages are given back after every `RELEASE_ROWS` (the kernel maps more around each row than the row).
    """

    RELEASE_ROWS = 1024

    def __init__(self, folder: str | os.PathLike[str], *, fetch: Fetch | None = None, at_random: bool = False,
                 manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder) if manifest is None else manifest
        self._fetch, self._at_random = fetch, at_random
        self._ends = np.cumsum([s.rows for s in self.manifest.shards], dtype=np.int64)
        self._n_rows = sum(s.rows for s in self.manifest.shards)
        self._shards: dict[int, Shard] = {}
        self._touched: set[Shard] = set()
        self._facts: _Facts | None = None
        self._n_read = 0
        if fetch is None:
            self._check_sizes()

    def _check_sizes(self) -> None:
        for info in self.manifest.files:
            path = self.folder / info.file
            size = path.stat().st_size if path.is_file() else -1
            if size != info.bytes:
                found = f"has {size} bytes" if size >= 0 else "is missing"
                raise DataError(f"file {path} {found}, its manifest says {info.bytes} bytes: the corpus was altered; "
                                f"run launch/prepare.py again, which makes this file anew")

    def __getstate__(self) -> dict[str, Any]:  # maps do not travel to another process
        return self.__dict__ | {"_shards": {}, "_touched": set(), "_facts": None}

    def _open_file(self, info: ShardInfo, opener: Callable[[Path], T]) -> T:
        """What `opener` makes of a file: again, if it is evicted between being fetched and being opened."""
        while self._fetch:
            with suppress(FileNotFoundError):
                return opener(self._fetch(info))
        return opener(self.folder / info.file)

    def _open(self, number: int) -> Shard:
        info = self.manifest.shards[number]
        self._let_go_of_evicted()
        shard = self._open_file(info, lambda path: Shard(path, info, self.manifest, at_random=self._at_random))
        with _opening:
            self._shards[number] = shard
            _open_shards.append((weakref.ref(self), number))
            while len(_open_shards) > _most_open():
                owner, oldest = _open_shards.popleft()
                if corpus := owner():
                    corpus._close(oldest)
        return shard

    def _close(self, number: int) -> None:
        """Forget a shard; it is unmapped when the last view of its rows is gone."""
        shard = self._shards.pop(number, None)
        if shard is not None:
            self._touched.discard(shard)

    def _let_go_of_evicted(self) -> None:
        """Unmap shards that have left the cache: the map would keep their room on the disk."""
        if self._fetch:
            for number in [n for n, shard in list(self._shards.items()) if not shard.path.exists()]:
                self._close(number)

    @property
    def is_fetched(self) -> bool:
        """Whether its files have to be brought here first, and may be evicted."""
        return self._fetch is not None

    def _place(self, i: int) -> tuple[int, int]:
        """Number of row i's shard, and its place there."""
        assert 0 <= i < len(self), f"row {i} of {len(self)}"
        number = int(np.searchsorted(self._ends, i, side="right"))
        return number, i - int(self._ends[number - 1]) if number else i

    def find(self, rows: Ints) -> list[tuple[Shard, int]]:
        """Each row's shard, opened, and its place there; waits only for shards that have to be fetched."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        places = (rows - np.where(numbers > 0, self._ends[numbers - 1], 0)).tolist()
        shards = self._shards
        found = [(shards.get(n) or self._open(n), i) for n, i in zip(numbers.tolist(), places, strict=True)]
        self._touched.update([shard for shard, _ in found])
        return found

    def __len__(self) -> int:
        return self._n_rows

    def locate(self, i: int) -> tuple[str, int]:
        """Shard file and the row's place in it, for messages."""
        number, place = self._place(i)
        return self.manifest.shards[number].file, place

    def __getitem__(self, i: int) -> Row:
        self._n_read += 1
        if self._n_read > self.RELEASE_ROWS:
            self.release()
        number, place = self._place(i)
        shard = self._shards.get(number) or self._open(number)
        self._touched.add(shard)
        return shard.row(place)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def facts(self, rows: Ints) -> npt.NDArray[np.void]:
        """`FACTS` of the rows, (n,): cost, labels, padding. Reads neither tokens nor shards."""
        if self._facts is None:
            self._facts = self._open_file(self.manifest.row_facts, lambda path: _Facts(path, len(self)))
        return self._facts.of[rows]

    @property
    def mapped_bytes(self) -> int:
        """At most so many are in memory of what was read beside the tokens."""
        return sum(shard.other_bytes for shard in list(self._touched)) + (self._facts.of.nbytes if self._facts else 0)

    def release(self) -> None:
        """Give back the pages of all rows that were read; arrays that are views of them stay valid."""
        self._n_read = 0
        self._let_go_of_evicted()
        touched, self._touched = self._touched, set()
        for shard in touched:
            shard.release()
        if self._facts:
            self._facts.release()

    def verify(self) -> None:
        """Compare the hash of every file with the manifest's. Raises DataError naming an altered one."""
        for info in self.manifest.files:
            check_hash(self._fetch(info) if self._fetch else self.folder / info.file, info)


def row_cost(doc_lens: Sequence[int] | npt.NDArray[np.int32]) -> int:
    """Attention cost of a row in token pairs: the sum of its documents' squared lengths."""
    lens = np.asarray(doc_lens, dtype=np.int64)
    return int((lens * lens).sum())


Target = Literal["first", "last", "successive", "leave_one_out"]
"""Which events are asked for: of every user the first or the last from `t_test` on, each of them with all before it as
its history, or, in `leave_one_out`, the last of all. That one leaks: it asks of users who were quiet after `t_valid`
what the training corpora hold."""


class QueriesManifest(_Record):
    """Frozen ranking queries: `queries/<domain>.parquet` (one row per query) and `queries/<domain>.items.parquet`.

    Titles are text, so that models with different tokenizers answer the same queries.

    queries: user_id str, history list<int32> (item numbers, oldest first, the last `max_history` before the target),
             seen list<int32> (all different items before the target, oldest first), target int32, query_ts int64
             (ms), is_repeat bool (the target is in `seen`), is_cold bool (the target was first seen after the training
             window)
    items:   item int32 (its number), item_id str, title str, line str (its whole text by the template), n_train int64
             (events in the training window), first_ts int64 (ms, its first event in the data)
    """

    format_version: int = FORMAT_VERSION
    domains: dict[str, Literal["pretrain", "unseen"]]
    n_queries: dict[str, int]
    n_items: dict[str, int]
    template: Template
    split: dict[str, int]
    """`t_valid` and `t_test`, in ms."""
    split_hash: str
    regime: Literal["overlap", "disjoint"]
    """Whether the users of the queries may occur in the training corpora (before the clock) or not."""
    target: Target
    seen: Literal["exclude", "include"]
    """`exclude`: items of the history are no candidates, and the target is one that is not in the history."""
    max_history: int
    seed: int
    files: dict[str, str]
    """File -> xxh3-128."""


def read_queries_manifest(folder: str | os.PathLike[str]) -> QueriesManifest:
    """Manifest of a queries folder, its files checked against their hashes. Raises DataError."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: no finished ranking queries there; run launch/prepare.py again")
    try:
        manifest = QueriesManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as e:
        raise DataError(f"{path} is not a valid queries manifest: {e}; prepare again") from None
    for name, known in manifest.files.items():
        file = Path(folder) / name
        if not file.is_file() or file_hash(file) != known:
            raise DataError(f"{file} is missing or altered (its hash is not the manifest's); delete it and run "
                            f"launch/prepare.py again")
    return manifest
