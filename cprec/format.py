"""The border between preparation and training: packed shards, their manifest, prompt templates. Writer and reader.

A corpus is a folder with `shard-00000-000.arrow`, ..., `rows.npy` and, written last by rename, `manifest.json`: without
that it is unfinished. `rows.npy` repeats cost, n_labels and n_pad of all rows (`FACTS`), so that a step is dealt to the
ranks without opening the shards of others. A shard is one uncompressed Arrow IPC file holding one record batch, read by
memory map without a copy:

    input_ids  fixed_size_list<uint16|uint32>[seq_len]   tokens of the row's documents, then padding
    doc_lens   list<int32>    lengths of its documents in tokens, then of the padding iff n_pad > 0; sum is seq_len
    doc_ids    list<int64>    which document each is: its history and first item, see `ITEM_BITS`; none for padding
    n_pad      int32          tokens of padding at the row's end
    n_labels   int32          tokens to be predicted: those after a document's first, in the loss mask if there is one
    cost       int64          attention cost in token pairs: the sum of the squares of doc_lens
    loss_mask  fixed_size_list<bool>[seq_len]   which tokens are to be predicted; only where the template is supervised

Costs: the writer holds one shard; the reader holds none, it maps them and gives back the pages that it has read.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import mmap
import os
import re
import resource
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from cprec.errors import DataError, did_you_mean

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


ITEM_FIELDS = ("title", "domain", "brand", "category")
_PART = re.compile(rf"\{{([^{{}}]*)\b({'|'.join(ITEM_FIELDS)})\b([^{{}}]*)\}}")


class Template(_Record):
    """How a history becomes text: `lead_in`, then one `item` per item, then `tail` and the end-of-sequence token.

    An item's text may hold `{title}`, `{domain}`, `{brand}` and `{category}`. Only the title is always there; what
    else stands between the braces vanishes with an empty field: `{title}{ by brand}` is "Lamp by Ikea" or "Lamp" (the
    last field name between the braces is the field). Fields are put on one line. Two things would not be text to every
    tokenizer and are written otherwise: "▁", which SentencePiece takes for a space, as "_"; and a text that would start
    with "/" gets a "." before it, because the likes of Mistral's tekken join the slash with a line break before it.

    With `before_target` the template is supervised: the text stands before the last item, and only that item, the tail
    and the end-of-sequence token carry loss.

    Wherever two parts meet, the first ends in a line break and the second starts with no white space, or the second
    starts with one space: tokenizers do not merge across such borders. Preparation proves it for the one at hand.
    """

    name: str
    version: int = 1
    lead_in: str
    item: str
    before_target: str | None = None
    tail: str = ""

    @field_validator("item")
    @classmethod
    def _holds_known_fields(cls, value: str) -> str:
        odd = re.search(r"\{[^{}]*\}|[{}]", _PART.sub("", value))
        if odd:
            word = re.sub(r"\W", "", odd[0])
            raise ValueError(f"{odd[0]!r} names no field; {did_you_mean(word, ITEM_FIELDS)} (one field name between "
                             f"braces, with text around it that vanishes where the field is empty: '{{ by brand}}')")
        if "title" not in [part[1] for part in _PART.findall(value)]:
            raise ValueError("no {title} in it: items could not be told apart")
        return value

    @model_validator(mode="after")
    def _has_exact_borders(self) -> Template:
        if not self.lead_in:
            raise ValueError("lead_in is empty: the first item would start the text, where tokenizers treat it in "
                             "another way; give at least a line break or a word")
        wrong = [f"{a!r} and {b!r}" for a, b in self._borders() if not _is_exact_border(a, b)]
        if wrong:
            raise ValueError(f"tokenizers merge where these parts of the text meet: {'; '.join(dict.fromkeys(wrong))}; "
                             f"end the first in a line break and start the second with neither white space nor '/', or "
                             f"start the second with one space and end the first without")
        return self

    def _borders(self) -> Iterator[tuple[str, str]]:
        """Every two parts that can meet in a document; "x" stands for the value of a field."""
        items = [self.line({"title": "x"} | dict.fromkeys(there, "x"))
                 for n in range(len(ITEM_FIELDS)) for there in itertools.combinations(ITEM_FIELDS[1:], n)]
        before_items = [self.lead_in, *items]
        if self.before_target:
            yield from ((a, self.before_target) for a in before_items)
            before_items.append(self.before_target)
        yield from itertools.product(before_items, items)
        if self.tail:
            yield from ((a, self.tail) for a in items)

    @property
    def is_supervised(self) -> bool:
        """Whether only the last item and what follows it carry loss."""
        return self.before_target is not None

    @property
    def hash(self) -> str:
        """Sha256 of what decides the text."""
        parts = [self.lead_in, self.item, self.before_target, self.tail]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def any_line(self) -> str:
        """Text of an item of which nothing is known: what stands before another part while that is encoded."""
        return self.line(dict.fromkeys(ITEM_FIELDS, "x"))

    def line(self, fields: Mapping[str, str]) -> str:
        """The item's whole text. Braces inside a field's value stay text: substitution is done once."""
        text = self._filled(fields).replace("▁", "_")
        return f".{text}" if text.startswith("/") else text

    def escapes(self, fields: Mapping[str, str]) -> bool:
        """Whether the item's text holds what is written otherwise."""
        text = self._filled(fields)
        return "▁" in text or text.startswith("/")

    def _filled(self, fields: Mapping[str, str]) -> str:
        def filled(part: re.Match[str]) -> str:
            value = " ".join(fields.get(part[2], "").split())
            return f"{part[1]}{value}{part[3]}" if value else ""

        return _PART.sub(filled, self.item)

    def render(self, lines: Sequence[str]) -> str:
        """A document's whole text but its end-of-sequence token, from its items' texts; of a supervised template
        the last is the target."""
        return "".join([self.lead_in, *lines[:-1], self.before_target or "", *lines[-1:], self.tail])


def _is_exact_border(before: str, after: str) -> bool:
    """Whether no tokenizer's rules that we know join characters of two texts that meet."""
    if after.startswith(" "):
        return not before[-1:].isspace() and after[1:2] != "" and not after[1:2].isspace()
    return before.endswith("\n") and after[:1] != "/" and not after[:1].isspace()


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


class Shard:
    """A mapped shard: its rows by their place in it."""

    def __init__(self, path: Path, info: ShardInfo, manifest: Manifest, *, at_random: bool) -> None:
        self.path = path
        self._map = _map(path)
        batch = _open_batch(pa.py_buffer(self._map), path)
        _check_columns(batch, path, info, manifest)
        ids = _values(batch["input_ids"].values, manifest.dtype)
        self.input_ids: Tokens = ids.reshape(info.rows, manifest.seq_len)
        self._doc_lens, self._len_offsets = self._ragged(batch["doc_lens"], "int32")
        self._doc_ids, self._id_offsets = self._ragged(batch["doc_ids"], "int64")
        self._n_pad, self._n_labels = (_values(batch[name], "int32").data for name in ("n_pad", "n_labels"))
        self._loss_mask = batch["loss_mask"] if manifest.has_loss_mask else None
        self._tokens_at = self.input_ids.ctypes.data - np.frombuffer(self._map, dtype=np.uint8, count=1).ctypes.data
        self._row_bytes = self.input_ids.itemsize * manifest.seq_len
        if at_random:  # or the kernel reads 32 pages around each that is wanted
            self._advise(mmap.MADV_RANDOM, self._tokens_at, ids.nbytes)

    @staticmethod
    def _ragged(column: pa.ListArray, dtype: str) -> tuple[npt.NDArray[Any], memoryview]:
        return _values(column.values, dtype), _values(column.offsets, "int32").data

    def _advise(self, what: int, start: int, n_bytes: int) -> None:
        first = start & -mmap.PAGESIZE
        self._map.madvise(what, first, start + n_bytes - first)

    def row(self, i: int) -> Row:
        """Its row i, as views."""
        lens = self._doc_lens[self._len_offsets[i]:self._len_offsets[i + 1]]
        ids = self._doc_ids[self._id_offsets[i]:self._id_offsets[i + 1]]
        mask = None if self._loss_mask is None else self._loss_mask[i:i + 1].flatten().to_numpy(zero_copy_only=False)
        return Row(self.input_ids[i], lens, ids, self._n_pad[i], self._n_labels[i], mask)

    def will_need(self, i: int) -> None:
        """Have the kernel start to read row i's tokens."""
        self._advise(mmap.MADV_WILLNEED, self._tokens_at + i * self._row_bytes, self._row_bytes)

    def release(self) -> None:
        """Give back the pages that were read: they leave this process, not the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


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
"""Shards that a process has open at most: some 10 KB each, a file descriptor and a mapping, of which Linux allows a
process 65,530."""
_open_shards: deque[tuple[weakref.ref[PackedCorpus], int]] = deque()
"""Of all corpora of this process, oldest first."""
_opening = threading.Lock()


@cache
def _most_open() -> int:
    """`_MOST_OPEN`, or half of the file descriptors that this process may have. Of those it first takes what it may:
    most systems begin with 1,024 and allow many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else min(_MOST_OPEN, soft // 2)


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
        self._ends = list(itertools.accumulate(s.rows for s in self.manifest.shards))
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

    def _place(self, i: int) -> tuple[int, int]:
        """Number of row i's shard, and its place there."""
        assert 0 <= i < len(self), f"row {i} of {len(self)}"
        number = bisect_right(self._ends, i)
        return number, i - self._ends[number - 1] if number else i

    def _find(self, i: int) -> tuple[Shard, int]:
        number, place = self._place(i)
        return self._shards.get(number) or self._open(number), place

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, i: int) -> tuple[str, int]:
        """Shard file and the row's place in it, for messages."""
        number, place = self._place(i)
        return self.manifest.shards[number].file, place

    def __getitem__(self, i: int) -> Row:
        self._n_read += 1
        if self._n_read > self.RELEASE_ROWS:
            self.release()
        shard, place = self._find(i)
        self._touched.add(shard)
        return shard.row(place)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def facts(self, rows: Ints) -> npt.NDArray[np.void]:
        """`FACTS` of the rows, (n,): cost, labels, padding. Reads neither tokens nor shards."""
        if self._facts is None:
            self._facts = self._open_file(self.manifest.row_facts, lambda path: _Facts(path, len(self)))
        return self._facts.of[rows]

    def will_need(self, i: int) -> None:
        """Have the kernel start to read row i from the disk; waits only for a shard that has to be fetched."""
        shard, place = self._find(i)
        shard.will_need(place)

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
    target: Literal["first", "last"]
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
