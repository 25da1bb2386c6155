"""Packed corpora on an S3 server that runs here: its bytes are the local ones through cuts, kills and many readers."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from cut_proxy import CutProxy
from remote_world import NAMES, ROOM, assert_same, child, upload, write_corpora

from cprec.data import remote
from cprec.data.corpora import open_manifests
from cprec.data.remote import ShardCache, open_corpus
from cprec.errors import DataError
from cprec.format import PackedCorpus

has_server = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("moto", "s3fs", "flask"))),
                                reason="no S3 server or client: pip install 'moto[server]' s3fs")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("local") / "packed")


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
