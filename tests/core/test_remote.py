"""Packed corpora at a URL: the bytes are the local ones, whatever is altered, evicted or shared."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from remote_world import (
    NAMES,
    ROOM,
    ROWS,
    SEQ_LEN,
    assert_same,
    assert_same_rows,
    child,
    on_disk,
    shard_files,
    upload,
    write_corpora,
    write_corpus,
)

from cprec.data import remote
from cprec.data.corpora import find_corpora, open_manifests
from cprec.data.dataset import PackedDataset
from cprec.data.remote import ShardCache, list_remote_corpora, open_corpus, small_cache_warning
from cprec.data.sampler import Phase, Sampler, quotas_of
from cprec.errors import ConfigError, DataError
from cprec.format import PackedCorpus, read_manifest
from cprec.storage import is_lasting


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("local") / "packed")


@pytest.fixture
def in_memory(packed: Path) -> str:
    """The corpora at a memory URL of their own."""
    url = f"memory://{uuid.uuid4().hex}/packed"
    upload(packed, url)
    return url


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


# What a URL means, on a storage in memory


def test_a_remote_folder_reads_as_the_local_one(in_memory: str, packed: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    assert list_remote_corpora(in_memory) == list_remote_corpora(in_memory + "/") == NAMES
    assert open_manifests(in_memory, "train", cache) == open_manifests(packed, "train")
    assert_same(in_memory, packed, cache)
    assert len(shard_files(cache)) == 8 and not list(tmp_path.rglob("*.partial"))


def test_a_local_folder_goes_through_the_same_door(packed: Path) -> None:
    assert open_corpus(f"{packed}/mixed", None).folder == packed / "mixed"


def test_a_url_that_is_a_corpus_itself_is_found_by_its_own_name(in_memory: str, packed: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    for url in (f"{in_memory}/mixed", f"{in_memory}/mixed/"):
        assert list_remote_corpora(url) == ["."]
        assert find_corpora(url, cache) == {"a": url} and list(open_manifests(url, "train", cache)) == ["a"]
        assert_same_rows(open_corpus(url, cache), packed / "mixed")


def test_looking_for_corpora_lists_no_shards(in_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, listed = fsspec.get_filesystem_class("memory"), []
    ls = memory.ls
    monkeypatch.setattr(memory, "ls", lambda self, path, **kw: (listed.append(path), ls(self, path, **kw))[1])
    # info of the memory storage does not list; its find and walk would
    assert list_remote_corpora(in_memory) == NAMES
    below = in_memory.removeprefix("memory:/")
    assert listed == [below, f"{below}/specific"]


def test_a_server_that_hides_a_manifest_from_a_look_but_lists_it_has_the_corpus(
        in_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(self: object, path: str, **_: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", hidden)
    assert list_remote_corpora(f"{in_memory}/mixed") == ["."]


def test_a_manifest_that_is_at_hand_is_not_read_again(in_memory: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, ROOM)
    manifest = remote.manifest_at(f"{in_memory}/mixed", cache)
    monkeypatch.delattr("cprec.format.read_manifest")
    assert len(open_corpus(f"{in_memory}/mixed", cache, manifest=manifest)[7].input_ids) == SEQ_LEN


def test_shards_are_downloaded_when_they_are_read(in_memory: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    corpus = open_corpus(f"{in_memory}/mixed", cache)
    assert shard_files(cache) == []
    corpus[2 * ROWS + 1]
    assert shard_files(cache) == ["shard-00002"]


def test_a_dataset_over_a_url_gives_the_same_batches(in_memory: str, packed: Path, tmp_path: Path) -> None:
    sampler = Sampler(tuple(NAMES), (4 * ROWS, 4 * ROWS), (Phase(0, quotas_of([2, 1])),), seed=3)

    def batches(place: str | Path, cache: ShardCache | None) -> list[list[int]]:
        corpora = [open_corpus(f"{place}/{name}", cache, at_random=True) for name in NAMES]
        reader = PackedDataset(corpora, sampler, global_batch_size=8, micro_batch_size=2, rank=1, world_size=2)
        return [b.input_ids.flatten().tolist() for step in reader.steps(5, 9) for b in step.batches]

    assert batches(in_memory, ShardCache(tmp_path, ROOM)) == batches(packed, None)


def test_eviction_takes_the_least_recently_opened_and_keeps_the_limit(in_memory: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    url = f"{in_memory}/mixed"
    shards = read_manifest(cache.manifest_folder(url)).shards
    cache.limit_bytes = on_disk(tmp_path) + sum(s.bytes for s in shards[:3])
    for i in (0, 1, 2, 0):  # now 1 was not opened for the longest time
        cache.fetch(url, shards[i])
    cache.fetch(url, shards[3])
    assert shard_files(cache) == ["shard-00000", "shard-00002", "shard-00003"]
    cache.fetch(url, shards[1])
    assert shard_files(cache) == ["shard-00000", "shard-00001", "shard-00003"]


def test_with_room_for_two_shards_of_eight_everything_reads_right(in_memory: str, packed: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    for name in NAMES:
        cache.manifest_folder(f"{in_memory}/{name}")
    cache.limit_bytes = on_disk(tmp_path) + 2 * max(s.bytes for s in read_manifest(packed / "mixed").shards)
    theirs, ours = ([open_corpus(f"{p}/{n}", cache) for n in NAMES] for p in (in_memory, packed))
    for i in np.random.default_rng(1).integers(0, 4 * ROWS, 60):
        for a, b in zip(theirs, ours, strict=True):
            assert (a[int(i)].input_ids == b[int(i)].input_ids).all()
            assert on_disk(tmp_path) <= cache.limit_bytes
    # a mapped shard that was evicted would still take room: it is let go of
    assert sum(len(c._shards) for c in theirs) <= 4 and len(shard_files(cache)) == 2


def test_pages_given_back_let_go_of_what_was_evicted(in_memory: str, tmp_path: Path) -> None:
    corpus = open_corpus(f"{in_memory}/mixed", ShardCache(tmp_path, ROOM))
    corpus[0], corpus[ROWS]
    next(tmp_path.rglob("shard-00000.*.arrow")).unlink()
    corpus.release()
    assert list(corpus._shards) == [1]


def test_a_shard_evicted_before_it_is_opened_is_fetched_again(in_memory: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    url, n = f"{in_memory}/mixed", 0

    def fetch_and_lose(info: remote.ShardInfo) -> Path:
        nonlocal n
        n += 1
        path = cache.fetch(url, info)
        if n == 1:
            path.unlink()
        return path

    PackedCorpus(cache.manifest_folder(url), fetch=fetch_and_lose)[0]
    assert n == 2


def test_a_mapped_shard_stays_readable_when_it_is_evicted(in_memory: str, packed: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    row = open_corpus(f"{in_memory}/mixed", cache)[0]
    for path in tmp_path.rglob("*.arrow"):
        path.unlink()
    assert (row.input_ids == PackedCorpus(packed / "mixed")[0].input_ids).all()


def test_a_shard_larger_than_the_limit_names_the_setting(in_memory: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100_000)
    with pytest.raises(DataError, match=r"shard-00000.arrow has 0.000167 GB, more than data.cache_gb=0.0001; raise it"):
        open_corpus(f"{in_memory}/mixed", cache)[0]


def test_foreign_files_that_fill_the_limit_are_told_and_not_removed(in_memory: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(bytes(180_000))
    with pytest.raises(DataError, match=r"no room in data.cache_dir=.*other files there; raise it"):
        open_corpus(f"{in_memory}/mixed", ShardCache(tmp_path, 200_000))[0]
    assert (tmp_path / "notes.txt").exists()


def test_a_full_disk_names_the_folder_and_what_is_free(
        in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"data.cache_dir=.*disk is full: .*GB are free, although data.cache_gb=0.01"):
        open_corpus(f"{in_memory}/mixed", ShardCache(tmp_path, 10_000_000))[0]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("errno", "said"), [
    (37, r"No locks available; name a folder on a local disk where you may write"),
    (30, r"Read-only file system; name a folder on a local disk where you may write"),
    (28, r"its disk is full: .* are free")])
def test_a_disk_that_refuses_locks_or_writes_names_the_folder(
        in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errno: int, said: str) -> None:
    cache = ShardCache(tmp_path, ROOM)
    known, info = cache.manifest_folder(f"{in_memory}/mixed"), remote.manifest_at(f"{in_memory}/mixed", cache).shards[0]
    assert cache.fetch(f"{in_memory}/mixed", info).parent == known.parent

    def refuse(*_: object) -> None:
        raise OSError(errno, os.strerror(errno))

    monkeypatch.setattr(remote.fcntl, "flock", refuse)
    attempts: list[Any] = [lambda: cache.manifest_folder(f"{in_memory}/specific/toys"),
                           lambda: cache.fetch(f"{in_memory}/mixed", read_manifest(known).shards[1]),
                           lambda: cache.verify(f"{in_memory}/mixed", info)]
    for attempt in attempts:
        with pytest.raises(DataError, match=rf"data.cache_dir={tmp_path}: .*{said}") as e:
            attempt()
        assert e.value.on_one_rank
    monkeypatch.undo()
    monkeypatch.setattr(remote, "write_atomically", refuse)
    with pytest.raises(DataError, match=rf"data.cache_dir={tmp_path}: .*{said}"):
        cache.manifest_folder(f"{in_memory}/specific/toys")


def test_a_lock_is_free_when_its_holder_lets_go_whatever_was_forked_meanwhile(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    done = fork.Event()
    for held in (remote._locked, remote._locked_if_free):
        path = tmp_path / f"{held.__name__}.lock"
        with held(path) as is_held:
            worker = fork.Process(target=done.wait, daemon=True)  # inherits the open lock file, as DataLoader's do
            worker.start()
            assert is_held is not False
        with remote._locked_if_free(path) as free:
            assert free and worker.is_alive()
        done.set()
        worker.join()
        done.clear()


def test_a_download_that_ends_while_room_is_made_still_counts(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    old, ending = folder / "shard-0.00.arrow", folder / "shard-1.11.arrow.host-1.partial"
    old.write_bytes(bytes(130_000))
    ending.write_bytes(bytes(120_000))
    if_free = remote._locked_if_free

    @contextmanager
    def when_it_has_ended(path: Path) -> Iterator[bool]:
        if ending.exists():
            ending.rename(folder / "shard-1.11.arrow")
        with if_free(path) as free:
            yield free

    monkeypatch.setattr(remote, "_locked_if_free", when_it_has_ended)
    # 250,000 bytes are there and 167,000 more wanted: the old shard has to go, and with it enough has gone
    assert ShardCache(tmp_path, 300_000)._evict(167_000) == (-13_000, True)
    assert [p.name for p in folder.iterdir() if p.suffix == ".arrow"] == ["shard-1.11.arrow"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*file/cache cannot be made: .*"):
        ShardCache(tmp_path / "file/cache", ROOM)


def test_corpora_of_different_urls_do_not_collide(packed: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other/packed/mixed", seed=9)
    here, there = (f"memory://{uuid.uuid4().hex}/prepared/packed" for _ in range(2))
    upload(packed, here)
    upload(tmp_path / "other/packed", there)
    cache = ShardCache(tmp_path / "cache", ROOM)
    assert_same(here, packed, cache, ["mixed"])
    assert_same(there, tmp_path / "other/packed", cache, ["mixed"])


def test_a_corpus_prepared_anew_is_read_anew_and_the_old_never_mixed_with_it(
        in_memory: str, packed: Path, tmp_path: Path) -> None:
    old = ShardCache(tmp_path / "cache", ROOM)
    open_corpus(f"{in_memory}/mixed", old)[0]
    write_corpus(tmp_path / "packed/mixed", seed=9)
    upload(tmp_path / "packed", in_memory)
    assert_same(in_memory, tmp_path / "packed", ShardCache(tmp_path / "cache", ROOM), ["mixed"])
    began_before = open_corpus(f"{in_memory}/mixed", old)  # a process keeps to the manifest it has seen
    assert (began_before[0].input_ids == PackedCorpus(packed / "mixed")[0].input_ids).all()
    with pytest.raises(DataError, match=r"file memory://.*/mixed/shard-00001.arrow has hash .*prepared anew"):
        began_before[ROWS]


def test_an_altered_a_cut_and_a_missing_shard_are_named(in_memory: str, packed: Path, tmp_path: Path) -> None:
    fs, inside = fsspec.core.url_to_fs(f"{in_memory}/mixed")
    whole = (packed / "mixed/shard-00001.arrow").read_bytes()
    fs.pipe_file(f"{inside}/shard-00001.arrow", whole[:900] + b"?" + whole[901:])
    fs.pipe_file(f"{inside}/shard-00002.arrow", whole[:-8])
    fs.rm(f"{inside}/shard-00003.arrow")
    corpus = open_corpus(f"{in_memory}/mixed", ShardCache(tmp_path, ROOM))
    with pytest.raises(DataError, match=r"/mixed/shard-00001.arrow has hash .*, its manifest says .*altered"):
        corpus[ROWS]
    with pytest.raises(DataError, match=r"/mixed/shard-00002.arrow has [\d,]+ bytes, its manifest says [\d,]+: .*"):
        corpus[2 * ROWS]
    with pytest.raises(DataError, match=r"/mixed/shard-00003.arrow does not exist"):
        corpus[3 * ROWS]
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("shard*.arrow"))


def test_a_cached_copy_of_another_size_or_a_damaged_one_is_downloaded_again(
        in_memory: str, packed: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    assert_same(in_memory, packed, cache)
    short, damaged, *_ = sorted(tmp_path.rglob("*mixed*/shard*.arrow"))
    short.write_bytes(short.read_bytes()[:-1])
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-900] + b"?" + whole[-899:])
    for info in read_manifest(packed / "mixed").shards:  # what `verify: full` does
        remote.verify_file(f"{in_memory}/mixed", info, cache)
    assert len(list(tmp_path.rglob("*mixed*/shard*.arrow"))) == 2
    assert_same(in_memory, packed, cache)


def test_a_local_file_is_hashed_without_opening_its_corpus(packed: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", seed=1)
    manifest = read_manifest(tmp_path / "a")
    (tmp_path / "a/manifest.json").unlink()
    for info in manifest.files:
        remote.verify_file(tmp_path / "a", info, None)
    whole = (tmp_path / "a/rows.npy").read_bytes()
    (tmp_path / "a/rows.npy").write_bytes(whole[:-1] + b"?")
    (tmp_path / "a/shard-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"a/rows.npy has hash .*, its manifest says .*altered"):
        remote.verify_file(tmp_path / "a", manifest.row_facts, None)
    with pytest.raises(DataError, match=r"a/shard-00001.arrow is missing"):
        remote.verify_file(tmp_path / "a", manifest.shards[1], None)


def test_a_folder_without_corpora_and_an_unknown_storage_are_told(in_memory: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    with pytest.raises(DataError, match="no finished train corpus below it"):
        open_manifests(f"{in_memory}/nothing", "train", cache)
    with pytest.raises(DataError, match=r"no storage is called s3x://; did you mean 's3a?'"):
        open_manifests("s3x://b/packed", "train", cache)
    with pytest.raises(DataError, match=r"/absent/manifest.json does not exist"):
        open_corpus(f"{in_memory}/absent", cache)


def test_a_missing_client_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # loaded by another test
    with pytest.raises(DataError, match=r"pip install 'cprec\[s3\]'"):
        open_manifests("s3://b/packed", "train", ShardCache(tmp_path, ROOM))


def test_only_failures_that_may_pass_are_tried_again() -> None:
    class Status(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    lasting = [FileNotFoundError(), PermissionError(), ImportError(), ValueError(), Status(401), Status(404)]
    passing = [ConnectionResetError(), TimeoutError(), OSError(5, "?"), Status(429), Status(500), Status(503)]
    assert all(map(is_lasting, lasting)) and not any(map(is_lasting, passing))


def test_the_last_try_tells_the_byte_reached_and_the_cause(
        in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cat_file, n = fsspec.get_filesystem_class("memory").cat_file, 0

    def cut_after_two(self: object, path: str, start: int | None = None, end: int | None = None) -> bytes:
        nonlocal n
        n += path.endswith(".arrow")
        if n > 2:
            raise ConnectionResetError("reset by peer")
        return bytes(cat_file(self, path, start, end))

    monkeypatch.setattr(remote, "PIECE", 50_000)
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", cut_after_two)
    with pytest.raises(DataError, match=r"mixed/shard-00000.arrow: cut off after 100,000 bytes, 6 times in a row: "
                                        r"ConnectionResetError: reset by peer; check the network"):
        open_corpus(f"{in_memory}/mixed", ShardCache(tmp_path, ROOM))[0]
    assert n == 2 + 6 and not list(tmp_path.rglob("*.partial"))


def test_a_cache_smaller_than_the_corpora_is_warned_of_with_numbers(packed: Path, tmp_path: Path) -> None:
    manifests = list(open_manifests(packed, "train").values())
    total = sum(s.bytes for m in manifests for s in [*m.shards, m.row_facts])
    assert small_cache_warning(ShardCache(tmp_path, total), manifests) is None
    assert small_cache_warning(ShardCache(tmp_path, total - 1), manifests)  # too small by rows.npy alone
    text = small_cache_warning(ShardCache(tmp_path, total // 4), manifests)
    assert text and "all 8 shards" in text and "about 75% of them will wait" in text and "per 1,000 rows" in text


def test_threads_of_one_process_download_a_shard_once(
        in_memory: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[str] = []
    bring = ShardCache._bring
    monkeypatch.setattr(ShardCache, "_bring", lambda self, a, i, p: (brought.append(a), bring(self, a, i, p))[1])
    cache = ShardCache(tmp_path, ROOM)
    corpora = {name: open_corpus(f"{in_memory}/{name}", cache) for name in NAMES}
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(assert_same_rows, corpora[name], packed / name, seed)
                 for seed in range(4) for name in NAMES]
    for read in reads:
        read.result()
    assert len(brought) == len(set(brought)) == 8


READ_AT_RANDOM = """
import hashlib, random
cache.limit_bytes = int(sys.argv[3])
digest, corpora = hashlib.sha256(), [open_corpus(f"{sys.argv[2]}/{name}", cache) for name in sys.argv[4:]]
for n in range(80):
    digest.update(corpora[n % 2][random.Random(n).randrange(160)].input_ids.tobytes())
print(digest.hexdigest())
"""


def test_processes_that_need_more_than_the_limit_share_it_and_read_right(packed: Path, tmp_path: Path) -> None:
    shard = max(s.bytes for s in read_manifest(packed / "mixed").shards)
    limit = 3 * shard + 10_000  # the manifests are some kilobytes
    digest, corpora = hashlib.sha256(), [PackedCorpus(packed / name) for name in NAMES]
    for n in range(80):
        digest.update(corpora[n % 2][random.Random(n).randrange(160)].input_ids.tobytes())
    readers = [child(READ_AT_RANDOM, tmp_path, f"file://{packed}", limit, *NAMES) for _ in range(3)]
    most = 0
    while any(r.poll() is None for r in readers):
        most = max(most, on_disk(tmp_path))
        threading.Event().wait(0.01)
    assert {r.communicate()[0].strip() for r in readers} == {digest.hexdigest()}
    assert 2 * shard < most <= limit
