"""Packed corpora at a URL: the bytes are the local ones, whatever is cut, killed, evicted or shared."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tiny
from cut_proxy import CutProxy

from cprec.data import remote
from cprec.data.corpora import open_manifests
from cprec.data.dataset import PackedDataset
from cprec.data.remote import ShardCache, list_remote_corpora, open_corpus, small_cache_warning
from cprec.data.sampler import Phase, Sampler, quotas_of
from cprec.errors import ConfigError, DataError
from cprec.format import (
    Manifest,
    PackedCorpus,
    PackedRows,
    TokenizerInfo,
    read_manifest,
    write_manifest,
    write_row_facts,
    write_shard,
)
from cprec.storage import is_lasting

REPO = Path(__file__).parents[2]
ROWS, SEQ_LEN = 40, 2048
ROOM = 10 << 20
NAMES = ["mixed", "specific/toys"]
has_server = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("moto", "s3fs", "flask"))),
                                reason="no S3 server or client: pip install 'moto[server]' s3fs")


def write_corpus(folder: Path, *, seed: int, n_shards: int = 4) -> None:
    """`n_shards` shards of 160 KB of seeded tokens, one document per row."""
    folder.mkdir(parents=True)
    rng, n = np.random.default_rng(seed), ROWS * n_shards
    shards = [write_shard(folder / f"shard-{i:05d}.arrow", PackedRows(
        rng.integers(2, 65_000, (ROWS, SEQ_LEN)).astype(np.uint16), np.full(ROWS, SEQ_LEN, np.int32),
        np.ones(ROWS, np.int64), np.arange(ROWS) + ROWS * i, np.ones(ROWS, np.int64), np.zeros(ROWS, np.int32)))
        for i in range(n_shards)]
    write_manifest(folder, Manifest(
        corpus="a", kind="train", seq_len=SEQ_LEN, dtype="uint16", n_rows=n, n_tokens=n * SEQ_LEN, n_pad=0,
        n_documents=n, n_documents_by_domain={"a": n}, sum_squared_doc_lens=n * SEQ_LEN**2, seed=0, split_hash="0",
        max_timestamp_ms=0, sources={}, template=tiny.TEMPLATE, template_hash=tiny.TEMPLATE.hash, shards=shards,
        row_facts=write_row_facts(folder, shards),
        tokenizer=TokenizerInfo(name="t", fingerprint="0", vocab_size=65_000, eos_id=1, pad_id=1)))


def upload(packed: Path, url: str) -> None:
    fs, inside = fsspec.core.url_to_fs(url)
    for file in packed.rglob("*.*"):
        fs.pipe_file(f"{inside}/{file.relative_to(packed)}", file.read_bytes())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "packed"
    for i, name in enumerate(NAMES):
        write_corpus(folder / name, seed=i)
    return folder


@pytest.fixture
def in_memory(packed: Path) -> str:
    """The corpora at a memory URL of their own."""
    url = f"memory://{uuid.uuid4().hex}/packed"
    upload(packed, url)
    return url


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture(scope="module")
def proxy(s3_port: int) -> Iterator[CutProxy]:
    """Between the client and the S3 server, which the environment names."""
    proxy = CutProxy(s3_port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(name, value)
        yield proxy
    proxy.close()


@pytest.fixture
def bucket(proxy: CutProxy, packed: Path) -> str:
    """The corpora in a bucket of their own."""
    import s3fs

    name = f"b{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    upload(packed, f"s3://{name}/prepared/packed")
    proxy.asked.clear()
    return f"s3://{name}/prepared/packed"


def assert_same(url: str, packed: Path, cache: ShardCache, names: list[str] = NAMES) -> None:
    for name in names:
        theirs, ours = open_corpus(f"{url}/{name}", cache), PackedCorpus(packed / name)
        assert len(theirs) == len(ours) == 4 * ROWS
        for i in np.random.default_rng(0).permutation(len(ours)):
            assert (theirs[i].input_ids == ours[i].input_ids).all(), (name, i)


def shard_files(cache: ShardCache) -> list[str]:
    return sorted(p.name.split(".")[0] for p in cache.root.rglob("*.arrow"))


def on_disk(root: Path) -> int:
    """Bytes of the files below `root`, which others may be removing, or giving another name: each counts once."""
    return sum({at.st_ino: at.st_size for p in root.rglob("*") if (at := remote._stat(p))}.values())


def child(script: str, *args: object) -> subprocess.Popen[str]:
    """A process that runs `script` with `cache = ShardCache(argv[1], ...)` at hand."""
    start = ("import sys\nfrom cprec.data import remote\nfrom cprec.data.remote import ShardCache, open_corpus\n"
             "remote.FIRST_WAIT_S = 0.001\ncache = ShardCache(sys.argv[1], 10 << 20)\n")
    return subprocess.Popen([sys.executable, "-c", start + script, *map(str, args)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(REPO)}, cwd=REPO)


# What a URL means, on a storage in memory


def test_a_remote_folder_reads_as_the_local_one(in_memory: str, packed: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    assert list_remote_corpora(in_memory) == list_remote_corpora(in_memory + "/") == NAMES
    assert open_manifests(in_memory, "train", cache) == open_manifests(packed, "train")
    assert_same(in_memory, packed, cache)
    assert len(shard_files(cache)) == 8 and not list(tmp_path.rglob("*.partial"))


def test_a_local_folder_goes_through_the_same_door(packed: Path) -> None:
    assert open_corpus(f"{packed}/mixed", None).folder == packed / "mixed"


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
    with pytest.raises(DataError, match=r"shard memory://.*/mixed/shard-00001.arrow has hash .*prepared anew"):
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
    total = sum(s.bytes for m in manifests for s in m.shards)
    assert small_cache_warning(ShardCache(tmp_path, total), manifests) is None
    text = small_cache_warning(ShardCache(tmp_path, total // 4), manifests)
    assert text and "all 8 shards" in text and "about 75% of them will wait" in text and "per 1,000 rows" in text


def test_threads_of_one_process_download_a_shard_once(
        in_memory: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[str] = []
    bring = ShardCache._bring
    monkeypatch.setattr(ShardCache, "_bring", lambda self, a, i, p: (brought.append(a), bring(self, a, i, p))[1])
    cache = ShardCache(tmp_path, ROOM)
    threads = [threading.Thread(target=assert_same, args=(in_memory, packed, cache)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
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


# Against an S3 server, with connections cut


READ_ALL = """
import hashlib
digest = hashlib.sha256()
for name in sys.argv[3:]:
    for row in open_corpus(f"{sys.argv[2]}/{name}", cache):
        digest.update(row.input_ids.tobytes())
print(digest.hexdigest())
"""


def digest_of(packed: Path, names: list[str] = NAMES) -> str:
    digest = hashlib.sha256()
    for name in names:
        for row in PackedCorpus(packed / name):
            digest.update(row.input_ids.tobytes())
    return digest.hexdigest()


@has_server
def test_an_s3_bucket_reads_as_the_local_folder(bucket: str, packed: Path, proxy: CutProxy, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    assert open_manifests(bucket, "train", cache) == open_manifests(packed, "train")
    assert_same(bucket, packed, cache)
    assert_same(bucket, packed, cache)
    gets = {path: n for path, n in proxy.asked.items() if path.endswith(".arrow")}
    assert len(gets) == 8 and set(gets.values()) == {1}


@has_server
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_bytes_are_the_local_ones_through_cut_connections(
        scheme: str, bucket: str, packed: Path, proxy: CutProxy, tmp_path: Path) -> None:
    import s3fs

    url = bucket
    if scheme == "http":  # whose client, other than that of s3, tries nothing again by itself
        s3fs.S3FileSystem().chmod(bucket.removeprefix("s3://").split("/")[0], "public-read")
        for file in s3fs.S3FileSystem().find(bucket):
            s3fs.S3FileSystem().chmod(file, "public-read")
        url = f"{proxy.url}/{bucket.removeprefix('s3://')}"
    cache = ShardCache(tmp_path, ROOM)
    for name in NAMES:
        cache.manifest_folder(f"{url}/{name}")
    proxy.cut(100_000, times=20)
    assert_same(url, packed, cache)
    assert proxy.n_cut == 20


@has_server
def test_four_processes_download_each_shard_once(bucket: str, packed: Path, proxy: CutProxy, tmp_path: Path) -> None:
    readers = [child(READ_ALL, tmp_path, bucket, *NAMES) for _ in range(4)]
    assert {r.communicate()[0].strip() for r in readers} == {digest_of(packed)}
    gets = {path: n for path, n in proxy.asked.items() if path.endswith(".arrow")}
    assert len(gets) == 8 and set(gets.values()) == {1}


@has_server
def test_a_process_killed_in_a_download_leaves_nothing_that_others_trip_over(
        bucket: str, packed: Path, proxy: CutProxy, tmp_path: Path) -> None:
    proxy.hold.set()
    first = child("open_corpus(f'{sys.argv[2]}/specific/toys', cache)[0]", tmp_path, bucket)
    while not (left := list(tmp_path.rglob("*.partial"))):
        assert first.poll() is None
        threading.Event().wait(0.02)
    second = child(READ_ALL, tmp_path, bucket, *reversed(NAMES))  # waits for the shard that the first is at
    while not any(n > 1 for path, n in proxy.asked.items() if path.endswith("toys/manifest.json")):
        threading.Event().wait(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    proxy.hold.clear()
    assert second.communicate()[0].strip() == digest_of(packed, NAMES[::-1])
    assert not list(tmp_path.rglob("*.partial")) and not left[0].exists()


@has_server
def test_a_dead_process_s_partial_of_a_shard_that_nobody_reads_gives_its_room_back(
        bucket: str, packed: Path, proxy: CutProxy, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, ROOM)
    folder = cache.manifest_folder(f"{bucket}/mixed").parent
    dead = folder / "shard-00009.00.arrow.some-1.partial"
    dead.write_bytes(bytes(100_000))
    open_corpus(f"{bucket}/mixed", cache)[0]
    assert not dead.exists()


@has_server
def test_refused_access_and_a_missing_bucket_are_told_at_once(
        bucket: str, proxy: CutProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, ROOM)
    monkeypatch.setattr(remote, "TRIES", 1000)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1e6)
    with pytest.raises(DataError, match=r"s3://no-such-bucket/packed/a/manifest.json does not exist"):
        open_corpus("s3://no-such-bucket/packed/a", cache)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"access is refused: .*AWS_\* variables"):
        open_corpus(f"{bucket}/specific/toys", cache)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
