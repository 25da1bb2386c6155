"""Packed corpora at a URL, read through a local cache of bounded size that the processes of a machine share.

reads: `manifest.json` and shards of a corpus, by range reads through fsspec. writes: the cache folder:

    <corpus>-<hash of its URL>/<hash of the manifest>/manifest.json
    <corpus>-<hash of its URL>/<shard>.<its xxh3-128>.arrow    whole and hashed: a name is given when both are right
    <corpus>-<hash of its URL>/rows.<its xxh3-128>.npy
    ... .lock       held (flock, which goes with the process) by whoever brings or removes that file
    ... .partial    a download in progress, of its full size from the start, so that room is never given twice

Costs: one request per 32 MiB, which are held in memory; one sync per shard. `open_corpus` is the one way to a corpus,
local or remote.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import xxhash

from cprec.errors import ConfigError, DataError
from cprec.format import (
    MANIFEST,
    Manifest,
    PackedCorpus,
    ShardInfo,
    check_hash,
    file_hash,
    read_manifest,
    replace_durably,
    write_atomically,
)
from cprec.log import get_logger
from cprec.storage import filesystem, is_lasting, is_url, reaching

log = get_logger(__name__)
T = TypeVar("T")
TRIES = 6
"""Failures in a row, without a byte in between, after which a download is given up."""
FIRST_WAIT_S = 0.5
"""Wait after the first failure; it doubles with each further one, less a random part of up to a half."""
PIECE = 32 << 20
"""Bytes of one request. A connection that is cut loses the piece, so that it is then made smaller, down to:"""
SMALLEST_PIECE = 64 << 10
_OF_PARTIAL = re.compile(r"(\.arrow|\.npy)\..*\.partial$")
"""What a download in progress has behind the name of its shard, or of `rows.npy`."""
BUSY_WAIT_S = 0.1
"""Between two looks whether a download of another process, which takes all the room, has ended."""


class ShardCache:
    """Shards of remote corpora below `root`, at most `limit_bytes` on disk: the least recently opened go first.

    Any number of processes and threads may use one folder; each shard is downloaded once. To a process the manifest of
    a corpus stays what it was at its first look.
    """

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        self.root = Path(root).expanduser()
        self.limit_bytes = limit_bytes
        self._folders: dict[str, Path] = {}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"data.cache_dir={self.root} cannot be made: {e.strerror}; name a folder on a local "
                              f"disk where you may write") from None

    def manifest_folder(self, url: str) -> Path:
        """A local folder with the manifest that the corpus at `url` has now, for `PackedCorpus` with `fetch`.

        Raises DataError when there is none, it cannot be reached, or the cache's folder cannot be written.
        """
        if url not in self._folders:
            text = _read_whole(f"{url}/{MANIFEST}")
            folder = self._folder(url) / xxhash.xxh3_64_hexdigest(text)
            with self._writing(f"{url}/{MANIFEST}", len(text)), _locked(folder / ".lock"):
                if not (folder / MANIFEST).is_file():
                    write_atomically(folder / MANIFEST, text.decode("utf-8"))
            self._folders[url] = folder
        return self._folders[url]

    def fetch(self, url: str, info: ShardInfo) -> Path:
        """Where the file lies on this machine, downloaded first if need be.

        It may be evicted before it is opened: fetch it again then. Once it is open or mapped that does no harm, since
        Linux keeps a file's bytes for those who have them. Raises DataError naming the file's URL.
        """
        path, address = self._path(url, info), f"{url}/{info.file}"
        with self._writing(address, info.bytes):
            if self._is_there(path, info):
                return path
            with _locked(_lock_of(path)):
                if not self._is_there(path, info):  # another process may have brought it while this one waited
                    self._bring(address, info, path)
        return path

    def verify(self, url: str, info: ShardInfo) -> None:
        """Hash the cached copy, if there is one; a damaged one is removed, with a warning, to be downloaded again."""
        path = self._path(url, info)
        if not path.exists():
            return  # a download is hashed on its way
        with self._writing(f"{url}/{info.file}", info.bytes), _locked(_lock_of(path)):
            try:
                found = file_hash(path)
            except FileNotFoundError:
                return
            if found != info.xxh3_128:
                log.warning("%s was damaged on this disk (hash %s): it will be downloaded again", path, found)
                path.unlink()

    def _folder(self, url: str) -> Path:
        tail = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(url.rstrip("/").split("/")[-2:]))
        return self.root / f"{tail}-{xxhash.xxh3_64_hexdigest(url.encode())}"

    def _path(self, url: str, info: ShardInfo) -> Path:
        name = Path(info.file)
        return self._folder(url) / f"{name.stem}.{info.xxh3_128}{name.suffix}"

    def _is_there(self, path: Path, info: ShardInfo) -> bool:
        """Whether the file is in the cache; if so it now counts as just used."""
        try:
            if path.stat().st_size != info.bytes:
                return False
            _touch(path)
        except FileNotFoundError:
            return False
        return True

    def _bring(self, address: str, info: ShardInfo, path: Path) -> None:
        """Download a file whose lock is held. Whatever else is partial of it belongs to the dead."""
        for left in [path, *path.parent.glob(f"{path.name}.*.partial")]:
            left.unlink(missing_ok=True)  # `path` is here only when its size is wrong
        with reaching(address):
            fs, inside = filesystem(address)
            _check_size(fs, inside, address, info)
        partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
        try:
            self._make_room(address, info, partial)
            _download(address, info, partial)
            _touch(partial)
            replace_durably(partial, path)  # before a power loss the size would be right and the bytes zero
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, address: str, info: ShardInfo, partial: Path) -> None:
        """Evict until the file fits, then take its room on the disk."""
        if info.bytes > self.limit_bytes:
            raise DataError(f"{address} has {_gb(info.bytes)}, more than data.cache_gb={self.limit_bytes / 1e9:g}; "
                            f"raise it")
        while True:
            with _locked(self.root / ".lock"):
                short, busy = self._evict(info.bytes)
                if short <= 0:
                    with partial.open("wb") as f:
                        os.posix_fallocate(f.fileno(), 0, info.bytes)
                    return
            if not busy:
                raise DataError(f"{address}: no room in data.cache_dir={self.root}: {_gb(short)} more than "
                                f"data.cache_gb={self.limit_bytes / 1e9:g} are taken by other files there; raise it")
            time.sleep(BUSY_WAIT_S)

    def _evict(self, needed: int) -> tuple[int, bool]:
        """Remove what the dead left, then the least recently used shards until `needed` bytes fit below the limit.

        Gives the bytes that are still missing (<= 0: none), and whether others are at work here: look again then.
        """
        found = [(path, at) for path in self.root.rglob("*") if (at := _stat(path))]
        short = sum(at.st_size for _, at in found) + needed - self.limit_bytes
        partials = [(path, at) for path, at in found if _OF_PARTIAL.search(path.name)]
        shards = sorted(((path, at) for path, at in found if path.suffix in (".arrow", ".npy")),
                        key=lambda shard: (shard[1].st_mtime_ns, shard[0]))
        busy = False
        for path, at in [*partials, *shards]:
            if short <= 0 and path.suffix != ".partial":
                break
            shard = path.with_name(_OF_PARTIAL.sub(r"\1", path.name))
            with _locked_if_free(_lock_of(shard)) as free:
                busy |= not free
                if free:
                    try:
                        path.unlink()
                        short -= at.st_size
                    except FileNotFoundError:  # a download that has ended since: its room is taken, by another name
                        busy = True
                    _lock_of(shard).unlink(missing_ok=True)  # held by us: who waits for it sees that it is gone
        return short, busy

    @contextmanager
    def _writing(self, address: str, n_bytes: int) -> Iterator[None]:
        """Turn what the disk of the cache refuses into a DataError that names its folder."""
        try:
            yield
        except OSError as e:
            refused = DataError(f"data.cache_dir={self.root}: {self._refusal(address, n_bytes, e)}")
            refused.on_one_rank = True  # other machines have other disks
            raise refused from e

    def _refusal(self, address: str, n_bytes: int, e: OSError) -> str:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            return f"{address} cannot be kept there: {e}; name a folder on a local disk where you may write"
        free = shutil.disk_usage(self.root).free
        return (f"its disk is full: {address} has {_gb(n_bytes)}, {_gb(free)} are free, although data.cache_gb="
                f"{self.limit_bytes / 1e9:g} would allow it; free some, or set data.cache_gb to what the disk has")


def open_corpus(place: str | os.PathLike[str], cache: ShardCache | None = None, *, manifest: Manifest | None = None,
                at_random: bool = False) -> PackedCorpus:
    """The corpus in a folder, or at a URL, whose files then come through `cache` as they are first read.

    `manifest`: its manifest, if it has been read already (`manifest_at`). Raises DataError.
    """
    if not is_url(str(place)):
        return PackedCorpus(place, at_random=at_random, manifest=manifest)
    url, held = _address(place), _needed(cache)
    return PackedCorpus(held.manifest_folder(url), fetch=functools.partial(held.fetch, url), at_random=at_random,
                        manifest=manifest)


def manifest_at(place: str | os.PathLike[str], cache: ShardCache | None = None) -> Manifest:
    """Manifest of the corpus in a folder or at a URL. Raises DataError."""
    return read_manifest(_needed(cache).manifest_folder(_address(place)) if is_url(str(place)) else place)


def verify_file(place: str | os.PathLike[str], info: ShardInfo, cache: ShardCache | None) -> None:
    """Compare a file's hash with its manifest's: of a local one, DataError if it is another or the file is gone; of a
    remote one, what this machine has of it, which is removed if it is damaged."""
    if is_url(str(place)):
        _needed(cache).verify(_address(place), info)
    else:
        check_hash(Path(place) / info.file, info)


def _address(place: str | os.PathLike[str]) -> str:
    """The URL of a corpus as its files' addresses begin; to S3 `a//b` is another file than `a/b`."""
    return str(place).rstrip("/")


def _needed(cache: ShardCache | None) -> ShardCache:
    if cache is None:
        raise ConfigError("packed data at a URL are read through a cache: give a ShardCache(folder, limit_bytes)")
    return cache


def list_remote_corpora(url: str) -> list[str]:
    """Names of the finished corpora below the packed folder at `url`, sorted; none where there is no such place, and
    "." alone where `url` is a corpus itself.

    Costs: of a corpus one look at its manifest, its shards are not listed; of another folder one listing too. A web
    server must list its folders, as `python -m http.server` does. Raises DataError when it cannot be reached.
    """

    def names() -> list[str]:
        fs, inside = filesystem(url.rstrip("/"))
        fs.invalidate_cache()
        root = inside.rstrip("/")
        return sorted(folder.removeprefix(root).lstrip("/") or "." for folder in _corpora_below(fs, root))

    return _patiently(url, names)


def _corpora_below(fs: Any, folder: str) -> Iterator[str]:
    """`folder` if it has a manifest, else the folders below it that have one."""
    manifest = f"{folder}/{MANIFEST}"
    try:
        fs.info(manifest)
        yield folder
        return
    except FileNotFoundError:
        pass
    try:
        kinds = {str(entry["name"]).rstrip("/"): entry["type"] for entry in fs.ls(folder, detail=True)}
    except FileNotFoundError:
        return
    if manifest in kinds:  # a web server whose answer to the look was cut reads as if nothing were there
        yield folder
        return
    for name, kind in kinds.items():
        if kind == "directory" and name.startswith(f"{folder}/"):  # a web page may also link to what is above it
            yield from _corpora_below(fs, name)


def small_cache_warning(cache: ShardCache, manifests: Iterable[Manifest]) -> str | None:
    """What to tell a user whose cache is smaller than the corpora that the run draws from; None if they fit."""
    known = list(manifests)
    shards = [s for m in known for s in m.shards]
    total = sum(f.bytes for m in known for f in m.files)
    if total <= cache.limit_bytes:
        return None
    missed = 1 - cache.limit_bytes / total
    mean = sum(s.bytes for s in shards) / len(shards)
    return (f"data.cache_gb={cache.limit_bytes / 1e9:g} holds less than the {_gb(total)} of the corpora: rows are "
            f"drawn from all {len(shards):,} shards in random order, so about {missed:.0%} of them will wait for a "
            f"shard of {_gb(mean)} to be downloaded again: {_gb(1000 * missed * mean)} per 1,000 rows; set it to "
            f"{total * 1.01 / 1e9:.3g} or more")


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.3g} GB"


def _stat(path: Path) -> os.stat_result | None:
    """Of a file that is there; others may be removing it."""
    try:
        return path.stat() if path.is_file() else None
    except FileNotFoundError:
        return None


def _touch(path: Path) -> None:
    """Note that it is used now, as its time of change: many disks are mounted so that reading leaves no trace. In ns,
    since the kernel's own notion of now moves in steps of milliseconds."""
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns))


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file while inside; waits for whoever holds it, as long as that lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _unlocking(lock):
                if _is_file_at(lock.fileno(), path):  # its last holder may have removed it
                    yield
                    return


@contextmanager
def _locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock file while inside, or give False when somebody else does."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        with _unlocking(lock):
            yield _is_file_at(lock.fileno(), path)


@contextmanager
def _unlocking(lock: IO[str]) -> Iterator[None]:
    """Unlock at the end. Closing alone would not: a process forked meanwhile (a DataLoader's worker) has the file open
    too, and with it the lock."""
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def _is_file_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


class _Patience:
    """Waits after failures that may pass, longer each time, until there were too many in a row."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    def failed(self, e: Exception, n_reached: int) -> None:
        """Wait before the next try. Raises `e` if it will last, DataError after the last try."""
        if is_lasting(e):
            raise e
        self._failures += 1
        if self._failures >= TRIES:
            given_up = DataError(f"{self.address}: cut off after {n_reached:,} bytes, {TRIES} times in a row: "
                                 f"{type(e).__name__}: {e}; check the network and start again, what was downloaded "
                                 f"whole is kept")
            given_up.on_one_rank = True
            raise given_up from e
        wait_s = FIRST_WAIT_S * 2 ** (self._failures - 1) * random.uniform(0.5, 1)
        log.info("%s: %s: %s; going on from byte %d in %.1f s", self.address, type(e).__name__, e, n_reached, wait_s)
        time.sleep(wait_s)


def _patiently(address: str, action: Callable[[], T]) -> T:
    """What `action` gives, tried again while its failures may pass. Raises DataError."""
    patience = _Patience(address)
    with reaching(address):
        while True:
            try:
                return action()
            except Exception as e:
                patience.failed(e, 0)


def _read_whole(address: str) -> bytes:
    def read() -> bytes:
        fs, inside = filesystem(address)
        return bytes(fs.cat_file(inside))

    return _patiently(address, read)


def _check_size(fs: Any, inside: str, address: str, info: ShardInfo) -> None:
    """Raise DataError when the file is not there, or is another than its manifest says; so before room is made."""
    fs.invalidate_cache()
    size = _patiently(address, lambda: fs.info(inside).get("size"))
    if size is not None and size != info.bytes:  # a web server may not tell
        raise DataError(f"file {address} has {size:,} bytes, its manifest says {info.bytes:,}: {_ALTERED}")


_ALTERED = ("it was altered, or the corpus prepared anew since this run read its manifest; upload the corpus again, "
            "its manifest last, and start again")


def _download(address: str, info: ShardInfo, partial: Path) -> None:
    """Write the file's bytes into `partial` and check their hash. Raises DataError."""
    digest = xxhash.xxh3_128()
    with partial.open("r+b", buffering=0) as out:
        for piece in _pieces(address, info.bytes):
            digest.update(piece)
            _write(out, piece)
    if digest.hexdigest() != info.xxh3_128:
        raise DataError(f"file {address} has hash {digest.hexdigest()}, its manifest says {info.xxh3_128}: {_ALTERED}")


def _write(out: Any, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[out.write(rest):]


def _pieces(address: str, n_bytes: int) -> Iterator[bytes]:
    """Yield the `n_bytes` at `address` in order; after a cut it goes on from the byte reached."""
    patience, at, size = _Patience(address), 0, PIECE
    while at < n_bytes:
        with reaching(address):
            try:
                piece = _read_range(address, at, min(at + size, n_bytes), n_bytes)
            except Exception as e:
                patience.failed(e, at)
                size = max(size // 4, SMALLEST_PIECE)
                continue
        yield piece
        patience.progressed()
        at += len(piece)
        size = min(size * 2, PIECE)


def _read_range(address: str, start: int, end: int, n_bytes: int) -> bytes:
    """Bytes `start` to before `end` of `n_bytes`, or the first of them. From a web server that knows no ranges it takes
    the whole file, and gives all that is left of it."""
    fs, inside = filesystem(address)
    found = bytes(fs.cat_file(inside, start=start, end=end))
    if len(found) == n_bytes:
        return found[start:]
    if not 0 < len(found) <= end - start:
        raise OSError(f"{len(found):,} bytes came for the range {start:,} to {end:,}")
    return found
