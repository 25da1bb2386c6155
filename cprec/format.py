"""The border between preparation and training: packed shards, their manifest, prompt templates. Writer and reader.

A corpus is a folder with `shard-00000-000.arrow`, ... and `manifest.json`, which is written last, by rename: a folder
without one is unfinished. A shard is one uncompressed Arrow IPC file holding one record batch, read by memory map
without a copy:

    input_ids  fixed_size_list<uint16|uint32>[seq_len]   tokens of the row's documents, then padding
    doc_lens   list<int32>    lengths of its documents in tokens, then of the padding iff n_pad > 0; sum is seq_len
    doc_ids    list<int64>    which document each is: its history and first item, see `ITEM_BITS`; none for padding
    n_pad      int32          tokens of padding at the row's end
    loss_mask  fixed_size_list<bool>[seq_len]   which tokens are to be predicted; only where the template is supervised

Costs: the writer holds one shard; the reader holds none, it maps them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from cprec.errors import DataError, did_you_mean

FORMAT_VERSION = 2
ITEM_BITS = 16
"""A document's id is the number of its history (its row in `histories/<corpus>.parquet`) and, in the lowest 16 bits,
the place of its first item there."""
MANIFEST = "manifest.json"
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
    audit: Audit | None = None

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
    }
    batch = pa.record_batch(columns if rows.loss_mask is None else columns | {"loss_mask": fixed(rows.loss_mask)})
    with replacing(path) as partial, partial.open("wb", buffering=0) as file, _Hashed(file) as sink:
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
        return ShardInfo(file=path.name, rows=n, bytes=file.tell(), xxh3_128=sink.digest.hexdigest())


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


@dataclass(frozen=True)
class Row:
    """One packed row, as views into the mapped shard (the mask: unpacked from its bits). `doc_lens` includes the
    padding entry iff `n_pad > 0`."""

    input_ids: Tokens
    doc_lens: npt.NDArray[np.int32]
    doc_ids: Ints
    n_pad: int
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

    @property
    def n_labels(self) -> int:
        """How many of its tokens are labels."""
        if self.loss_mask is None:
            return len(self.input_ids) - self.n_pad - len(self.real_doc_lens)
        return int(self.is_label.sum())


class _Shard:
    """A mapped shard's columns as numpy views."""

    def __init__(self, path: Path, info: ShardInfo, manifest: Manifest) -> None:
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (pa.ArrowInvalid, OSError) as e:
            raise DataError(f"shard {path} is not readable Arrow: {e}; prepare the corpus again") from None
        self.input_ids: Tokens = batch["input_ids"].flatten().to_numpy().reshape(info.rows, manifest.seq_len)
        self.doc_lens, self.len_offsets = self._ragged(batch["doc_lens"])
        self.doc_ids, self.id_offsets = self._ragged(batch["doc_ids"])
        self.n_pad = batch["n_pad"].to_numpy()
        if ("loss_mask" in batch.schema.names) != manifest.has_loss_mask:
            raise DataError(f"shard {path} and its manifest disagree: has_loss_mask={manifest.has_loss_mask}, columns "
                            f"{', '.join(batch.schema.names)}; prepare the corpus again")
        self.loss_mask = batch["loss_mask"] if manifest.has_loss_mask else None

    @staticmethod
    def _ragged(column: pa.ListArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        return column.values.to_numpy(), column.offsets.to_numpy()

    def row(self, i: int) -> Row:
        lens = self.doc_lens[self.len_offsets[i]:self.len_offsets[i + 1]]
        ids = self.doc_ids[self.id_offsets[i]:self.id_offsets[i + 1]]
        mask = None if self.loss_mask is None else self.loss_mask[i:i + 1].flatten().to_numpy(zero_copy_only=False)
        return Row(self.input_ids[i], lens, ids, int(self.n_pad[i]), mask)


class PackedCorpus:
    """Random access to the rows of one packed corpus. Opening checks the manifest and every shard's size."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._starts = np.concatenate([[0], np.cumsum([s.rows for s in self.manifest.shards])]).astype(np.int64)
        for info in self.manifest.shards:
            path = self.folder / info.file
            size = path.stat().st_size if path.is_file() else -1
            if size != info.bytes:
                found = f"has {size} bytes" if size >= 0 else "is missing"
                raise DataError(f"shard {path} {found}, its manifest says {info.bytes} bytes: the corpus was altered; "
                                f"prepare it again")

    @cached_property
    def _shards(self) -> list[_Shard]:
        return [_Shard(self.folder / info.file, info, self.manifest) for info in self.manifest.shards]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, i: int) -> tuple[str, int]:
        """Shard file and the row's place in it, for messages."""
        assert 0 <= i < len(self), f"row {i} of {len(self)}"
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.manifest.shards[shard].file, i - int(self._starts[shard])

    def __getitem__(self, i: int) -> Row:
        assert 0 <= i < len(self), f"row {i} of {len(self)}"
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[shard].row(i - int(self._starts[shard]))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def verify(self, shard: ShardInfo | None = None) -> None:
        """Compare the hash of every shard, or of one, with the manifest's. Raises DataError naming an altered one."""
        for info in [shard] if shard else self.manifest.shards:
            found = file_hash(self.folder / info.file)
            if found != info.xxh3_128:
                raise DataError(f"shard {self.folder / info.file} has hash {found}, its manifest says {info.xxh3_128}: "
                                f"its bytes were altered; delete it and run launch/prepare.py again")


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
