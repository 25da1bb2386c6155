"""Stages 5 and 6 of a finished preparation once more, into another folder, with another vocabulary or row length.

reads: `catalogue.parquet` and `histories/` of the preparation. writes: `segments.arrow` and `packed/` below the other
folder. The pool is the one that a preparation keeps over all its stages: started, with the tokenizer loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cprec.format import Manifest, list_corpora, read_manifest
from data_prep.config import PackSettings
from data_prep.encode import encode_catalogue, tokenizer_info
from data_prep.pack import Corpus, pack
from data_prep.records import Counts, Layout
from data_prep.templates import TEMPLATES
from data_prep.workers import Workers, cached_tokenizer

TEMPLATE = TEMPLATES["cprec"]


@dataclass(frozen=True)
class Packed:
    """What one run left, and its wall seconds: encoding the catalogue, packing all corpora."""

    layout: Layout
    corpora: tuple[Corpus, ...]
    encode_s: float
    pack_s: float

    @property
    def manifests(self) -> dict[str, Manifest]:
        return {name: read_manifest(self.layout.packed / name) for name in list_corpora(self.layout.packed)}

    @property
    def shards(self) -> list[Path]:
        return [self.layout.packed / name / s.file for name, m in self.manifests.items() for s in m.shards]

    @property
    def hashes(self) -> dict[str, str]:
        """Shard, by corpus and file name -> its hash."""
        return {f"{name}/{s.file}": s.xxh3_128 for name, m in self.manifests.items() for s in m.shards}

    @property
    def n_tokens(self) -> int:
        return sum(m.n_tokens for m in self.manifests.values())


def encode_and_pack(prepared: Path, folder: Path, *, tokenizer: Path, settings: PackSettings,
                    workers: Workers) -> Packed:
    """Encode the catalogue of `prepared` and pack all its histories below `folder`, which must be new or empty."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(folder.absolute())
    for name in ("catalogue.parquet", "histories"):
        (layout.out / name).symlink_to((prepared / name).absolute())
    begin_s = time.perf_counter()
    info = tokenizer_info(str(tokenizer), tokenizer.name)
    encode_catalogue(layout, tokenizer=str(tokenizer), info=info, template=TEMPLATE, workers=workers)
    encoded_s = time.perf_counter()
    corpora = tuple(
        Corpus(name=name, kind="valid" if name.startswith("valid/") else "train", domain=name.rpartition("/")[2],
               folder=layout.packed / name, histories=layout.histories(name), segments=layout.segments,
               catalogue=layout.catalogue, tokenizer_name=str(tokenizer), tokenizer=info, template=TEMPLATE, seed=17,
               split_hash="", sources={}, inputs_key=f"{layout.out} {info.fingerprint}")
        for name in corpus_names(prepared))
    pack(corpora, settings, workers=workers, counts=Counts("pack"))
    return Packed(layout, corpora, encoded_s - begin_s, time.perf_counter() - encoded_s)


def corpus_names(prepared: Path) -> list[str]:
    """Corpora of a preparation that have a history."""
    histories = prepared / "histories"
    found = [p for p in sorted(histories.rglob("*.parquet")) if pq.ParquetFile(p).metadata.num_rows]
    return [str(p.relative_to(histories).with_suffix("")) for p in found]


def warm(workers: Workers, n: int, tokenizer: Path) -> None:
    """Have all `n` processes started and the tokenizer loaded there and here, as in the middle of a preparation."""
    cached_tokenizer(str(tokenizer))
    for _ in workers.run(_load, [str(tokenizer)] * 4 * n, n_tasks=4 * n, label="warm"):
        pass


def _load(tokenizer: str) -> None:
    cached_tokenizer(tokenizer)
    time.sleep(0.1)  # long enough that every process gets one
