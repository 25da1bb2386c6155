"""Two packed corpora to be put at a URL, readers that compare them with the local folder, and processes that read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import tiny

from cprec.data import remote
from cprec.data.remote import ShardCache, open_corpus
from cprec.format import (
    Manifest,
    PackedCorpus,
    PackedRows,
    TokenizerInfo,
    write_manifest,
    write_row_facts,
    write_shard,
)

REPO = Path(__file__).parents[2]
ROWS, SEQ_LEN = 40, 2048
ROOM = 10 << 20
NAMES = ["mixed", "specific/toys"]


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


def write_corpora(packed: Path) -> Path:
    """Both corpora below `packed`."""
    for i, name in enumerate(NAMES):
        write_corpus(packed / name, seed=i)
    return packed


def assert_same(url: str, packed: Path, cache: ShardCache, names: list[str] = NAMES) -> None:
    for name in names:
        assert_same_rows(open_corpus(f"{url}/{name}", cache), packed / name)


def assert_same_rows(theirs: PackedCorpus, folder: Path, seed: int = 0) -> None:
    ours = PackedCorpus(folder)
    assert len(theirs) == len(ours) == 4 * ROWS
    for i in np.random.default_rng(seed).permutation(len(ours)):
        assert (theirs[i].input_ids == ours[i].input_ids).all(), (folder, i)


def shard_files(cache: ShardCache) -> list[str]:
    return sorted(p.name.split(".")[0] for p in cache.root.rglob("*.arrow"))


def on_disk(root: Path) -> int:
    """Bytes of the files below `root` at one moment: others may be adding, removing or renaming some while it looks, so
    it looks until it has seen the same twice."""
    before = None
    while True:
        now = {at.st_ino: at.st_size for p in root.rglob("*") if (at := remote._stat(p))}
        if now == before:
            return sum(now.values())
        before = now


def child(script: str, *args: object) -> subprocess.Popen[str]:
    """A process that runs `script` with `cache = ShardCache(argv[1], ...)` at hand."""
    start = ("import sys\nfrom cprec.data import remote\nfrom cprec.data.remote import ShardCache, open_corpus\n"
             "remote.FIRST_WAIT_S = 0.001\ncache = ShardCache(sys.argv[1], 10 << 20)\n")
    return subprocess.Popen([sys.executable, "-c", start + script, *map(str, args)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(REPO)}, cwd=REPO)
