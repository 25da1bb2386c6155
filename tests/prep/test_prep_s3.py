"""Sources in an S3 store: a server of its interface on this machine, read through s3fs as a user's bucket is."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from data_prep.pipeline import prepare
from data_prep.sources import find, find_one


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """An empty store with the bucket `shops`, known to this process and its workers by their environment."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'cprec[s3]'")
    server = pytest.importorskip(
        "moto.server", reason="moto, or what its server needs, is absent: pip install 'moto[s3]' flask flask-cors")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port())),
                            ("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any"), ("DEFAULT_REGION", "us-east-1")):
            environment.setenv(f"AWS_{name}", value)
        store = s3fs.S3FileSystem()
        store.mkdir("shops")
        yield store
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture(scope="module")
def parted(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shops' events as two packed files of JSON lines each, their items as Parquet."""
    folder = tmp_path_factory.mktemp("parted")
    for shop in shops.SHOPS:
        (folder / shop).mkdir()
        events = pq.read_table(raw / f"{shop}.parquet").to_pylist()
        for part in (0, 1):
            lines = "".join(f"{json.dumps(event)}\n" for event in events[part::2])
            (folder / shop / f"part-{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        (folder / f"{shop}.items.parquet").write_bytes((raw / f"{shop}.items.parquet").read_bytes())
    return folder


def config_values(where: str, out: Path) -> dict[str, Any]:
    values = shops.config_values(Path(where), out) | {"workers": 2}
    for dataset in values["datasets"]:
        shop = dataset["domain"]
        dataset |= {"path": f"{where}/{shop}/part-*.gz", "items": f"{where}/{shop}.items.parquet"}
    return values


def test_shops_in_a_bucket_are_prepared_to_the_bytes_of_shops_on_disk(s3: Any, parted: Path, tmp_path: Path) -> None:
    s3.put(str(parted), "shops/raw", recursive=True)
    for name, where in (("local", str(parted)), ("s3", "s3://shops/raw")):
        prepare(shops.config(config_values(where, tmp_path / name)))
    made = {name: {file: content for file, content in shops.bytes_below(tmp_path / name).items()
                   if file.endswith((".arrow", ".parquet")) and not file.startswith("staged")}
            for name in ("local", "s3")}
    assert made["local"].keys() == made["s3"].keys() and len(made["s3"]) > 30
    assert [file for file, content in made["s3"].items() if content != made["local"][file]] == []


def test_an_object_is_known_by_its_entity_tag(s3: Any) -> None:
    versions = []
    for content in (b"one", b"two", b"two"):
        s3.pipe("shops/tagged.csv", content)
        versions.append(find_one("s3://shops/tagged.csv").version)
    assert versions[0] != versions[1] == versions[2]


@pytest.mark.parametrize("url", ["s3://shops/raw/nothing.parquet", "s3://shops/nothing-*.csv", "s3://no-bucket/x.csv"])
def test_an_object_that_is_not_there_is_one_clear_error(s3: Any, url: str) -> None:
    with pytest.raises(DataError, match=r"is no file, nor a folder or glob of \.csv files; check the address"):
        find(url, (".csv",))
