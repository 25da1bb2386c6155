"""Benchmark 1: encoding and packing, all the way to rows on disk, against tokenizers that read the rendered text.

reads: a finished preparation (its catalogue and histories). writes: below the work folder, removed after every
repeat. Every side has its processes started, its tokenizer loaded and its input in memory (ours: histories in the
page cache) when its clock starts, uses the same cores, and ends with shards that are written, hashed and flushed as
ours are; Hugging Face and gigatoken get the project's own planner and writer, and their shards are compared with ours
byte by byte where they take all documents. Sides take turns; ratios are of medians. Keeps the documents in memory.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.prep.documents import Part, RowSettings, render_documents
from benchmarks.prep.ours import Packed, encode_and_pack, warm
from benchmarks.prep.sides import Copy, DatasetsMap, Gigatoken, HuggingFace, Residents, Side, balanced
from cprec.format import file_hash
from data_prep.config import PackSettings
from data_prep.ragged import dtype_for, map_ragged
from data_prep.workers import Workers, cached_tokenizer

OURS, HF, GIGATOKEN, DATASETS = "ours", "tokenizers", "gigatoken", "datasets.map"
COPY, COPY_IN_MEMORY = "numpy copy to a new file", "numpy copy in memory"


@dataclass(frozen=True)
class Timed:
    """One side: its tokens in one run, seconds of every run. A copy's tokens are ours, whose bytes it copies."""

    name: str
    setup: str
    tokens: int
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Tokens per second, of the median run."""
        return self.tokens / statistics.median(self.seconds)


@dataclass
class EncodePack:
    """All sides with one vocabulary."""

    vocabulary: str
    n_documents: int
    catalogue_tokens: int
    """What ours tokenizes; all others tokenize `tokens` of the documents."""
    output_bytes: int
    encode_s: list[float] = field(default_factory=list)
    pack_s: list[float] = field(default_factory=list)
    sides: list[Timed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    same_rows: dict[str, bool] = field(default_factory=dict)
    """Side that takes all documents -> whether its shards are ours byte by byte."""

    def ratio(self, name: str) -> float | None:
        """Our rate over the fastest of the sides called `name`; None where it did not run."""
        rates = {s.name: 0.0 for s in self.sides}
        for side in self.sides:
            rates[side.name] = max(rates[side.name], side.rate)
        return rates[OURS] / rates[name] if name in rates else None


@dataclass(frozen=True)
class Race:
    """What is measured: of which preparation, where, how."""

    prepared: Path
    work: Path
    cores: int
    repeats: int
    stride: int
    """Sides as slow as Hugging Face take every `stride`-th document; their rate does not depend on how many."""
    seq_len: int

    @property
    def settings(self) -> PackSettings:
        return PackSettings(seq_len=self.seq_len)


@dataclass(frozen=True)
class Rival:
    """A side that is not ours, and its waiting processes."""

    name: str
    setup: str
    residents: Residents


def measure(race: Race, tokenizer: Path) -> EncodePack:
    """Run all sides that are installed, `repeats` times in turn."""
    shutil.rmtree(race.work, ignore_errors=True)
    workers = Workers(race.cores)
    warm(workers, race.cores, tokenizer)
    ours = partial(encode_and_pack, race.prepared, tokenizer=tokenizer, settings=race.settings, workers=workers)
    first = ours(race.work / "first")
    parts = render_documents(first, race.settings, race.work / "documents")
    found = EncodePack(
        tokenizer.name, sum(p.n_documents for p in parts), len(map_ragged(first.layout.segments).ids),
        sum(path.stat().st_size for path in first.shards))
    times: dict[tuple[str, str], Timed] = {}
    with ExitStack() as waiting:
        waiting.callback(workers.close)
        rivals = [*_rivals(race, tokenizer, first, parts, found, waiting)]
        for number in range(race.repeats):
            _ours_once(race, ours, first, found, times)
            for rival in rivals:
                _rival_once(race, rival, first, found, times, compare=number == 0)
    found.sides = [*times.values()]
    shutil.rmtree(race.work)
    return found


def _ours_once(race: Race, ours: Callable[[Path], Packed], first: Packed, found: EncodePack,
               times: dict[tuple[str, str], Timed]) -> None:
    os.sync()  # what earlier runs left to be written is not this one's
    packed = ours(race.work / "now")
    assert packed.hashes == first.hashes, "two runs of ours differ"
    found.encode_s.append(packed.encode_s)
    found.pack_s.append(packed.pack_s)
    _add(times, OURS, f"{race.cores} processes", first.n_tokens, packed.encode_s + packed.pack_s)
    shutil.rmtree(race.work / "now")


def _rival_once(race: Race, rival: Rival, first: Packed, found: EncodePack, times: dict[tuple[str, str], Timed], *,
                compare: bool) -> None:
    folder = race.work / "now"
    os.sync()
    seconds, tokens = rival.residents.run(folder)
    _add(times, rival.name, rival.setup, tokens or first.n_tokens, seconds)
    if compare and (rival.name == GIGATOKEN or (rival.name == HF and race.stride == 1)):
        same = first.hashes == {str(p.relative_to(folder)): file_hash(p) for p in folder.rglob("*.arrow")}
        found.same_rows[rival.name] = same and found.same_rows.get(rival.name, True)
    shutil.rmtree(folder, ignore_errors=True)


def _add(times: dict[tuple[str, str], Timed], name: str, setup: str, tokens: int, seconds: float) -> None:
    known = times.setdefault((name, setup), Timed(name, setup, tokens, []))
    assert known.tokens == tokens, f"{name} made {known.tokens} tokens, then {tokens}"
    known.seconds.append(seconds)


def _rivals(race: Race, tokenizer: Path, first: Packed, parts: list[Part], found: EncodePack,
            waiting: ExitStack) -> Iterator[Rival]:
    """Every side that is installed, loaded; `waiting` ends its processes."""

    def rival(name: str, setup: str, sides: Sequence[Side]) -> Rival:
        residents = Residents(sides)
        waiting.callback(residents.close)
        return Rival(name, setup, residents)

    known = cached_tokenizer(str(tokenizer))
    rows = RowSettings(race.seq_len, race.settings.shard_rows, dtype_for(known.vocab_size), known.bos_id, known.eos_id,
                       known.pad_id)
    n, every = race.cores, f"one document in {race.stride}" if race.stride > 1 else "all documents"
    yield rival(HF, f"1 process, {n} threads, {every}", [HuggingFace(tokenizer, tuple(parts), rows, n, race.stride)])
    if importlib.util.find_spec("gigatoken"):
        shares = [tuple(parts[i] for i in group) for group in balanced([p.n_bytes for p in parts], n)]
        yield rival(GIGATOKEN, f"{len(shares)} processes, 1 thread each",
                    [Gigatoken(tokenizer, share, rows, 1) for share in shares])
        yield rival(GIGATOKEN, f"1 process, {n} threads", [Gigatoken(tokenizer, tuple(parts), rows, n)])
    else:
        found.skipped[GIGATOKEN] = "not installed"
    if importlib.util.find_spec("datasets"):
        yield rival(DATASETS, f"num_proc={n}, {every}", [DatasetsMap(tokenizer, tuple(parts), rows, n, race.stride)])
    else:
        found.skipped[DATASETS] = "not installed"
    groups = [tuple(first.shards[i] for i in group)
              for group in balanced([p.stat().st_size for p in first.shards], n)]
    for name, to_disk in ((COPY, True), (COPY_IN_MEMORY, False)):
        yield rival(name, f"{len(groups)} processes", [Copy(group, to_disk) for group in groups])
