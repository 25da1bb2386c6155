"""The sides of the encode-and-pack race that are not ours: resident processes with their documents in memory.

Each gives: a process that loads once, untimed, then works whenever it is told to. reads: rendered documents, shards.
writes: rows below the folder that it is given. Each process keeps its documents in memory.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.prep.documents import BETWEEN, Part, RowSettings, write_rows

ROWS_PER_WRITE = 1000
"""Documents of one `datasets.map` batch: the library's default."""


class Side(Protocol):
    """What one process does."""

    def load(self) -> Any:
        """Everything that is in memory before the clock starts."""

    def work(self, loaded: Any, folder: Path) -> int:
        """Work once, writing below `folder`; returns the tokens."""


class Residents:
    """Processes that have loaded their side and wait."""

    def __init__(self, sides: Sequence[Side]) -> None:
        context = multiprocessing.get_context("spawn")
        self._running: list[tuple[Any, Connection]] = []
        for side in sides:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(side, there))  # no daemon: it may have processes of its own
            process.start()
            there.close()
            self._running.append((process, here))
        try:
            for _, pipe in self._running:
                _answer(pipe)
        except BaseException:
            self.close()
            raise

    def run(self, folder: Path) -> tuple[float, int]:
        """Let all work once, together; (wall seconds until the last is done, tokens)."""
        begin_s = time.perf_counter()
        for _, pipe in self._running:
            pipe.send(folder)
        tokens = sum(_answer(pipe) for _, pipe in self._running)
        return time.perf_counter() - begin_s, tokens

    def close(self) -> None:
        for process, pipe in self._running:
            pipe.close()  # which ends it
            process.join()


def _answer(pipe: Connection) -> int:
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(f"a process of the benchmark failed:\n{answer}")
    return int(answer)


def _serve(side: Side, pipe: Connection) -> None:
    try:
        loaded = side.load()
        pipe.send(0)
        while True:
            pipe.send(side.work(loaded, pipe.recv()))
    except EOFError:  # the parent closed its end
        return
    except BaseException:
        pipe.send(traceback.format_exc())


@dataclass(frozen=True)
class HuggingFace:
    """`tokenizers.encode_batch_fast` over lists of texts, all threads of its own pool; every `stride`-th document."""

    tokenizer: Path
    parts: tuple[Part, ...]
    settings: RowSettings
    threads: int
    stride: int

    def load(self) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))
        texts = [_texts(part)[::self.stride] for part in self.parts]
        fast.encode_batch_fast(texts[0][:100], add_special_tokens=False)
        known = [(part.ids()[::self.stride], part.n_tokens()[::self.stride]) for part in self.parts]
        return fast, texts, known

    def work(self, loaded: Any, folder: Path) -> int:
        fast, texts, known = loaded
        tokens = 0
        for part, mine, (doc_ids, expected) in zip(self.parts, texts, known, strict=True):
            encoded = [e.ids for e in fast.encode_batch_fast(mine, add_special_tokens=False)]
            lens = np.fromiter(map(len, encoded), np.int64, len(encoded))
            flat = np.fromiter(chain.from_iterable(encoded), np.uint32, int(lens.sum()))
            tokens += write_rows(part, flat, lens, doc_ids, expected, settings=self.settings,
                                 folder=_made(folder, part))
        return tokens


@dataclass(frozen=True)
class Gigatoken:
    """`gigatoken`'s own batch call over bytes in memory, split by it at the zero bytes; warmed by a whole pass."""

    tokenizer: Path
    parts: tuple[Part, ...]
    settings: RowSettings
    threads: int

    def load(self) -> Any:
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)
        import gigatoken

        fast = gigatoken.Tokenizer(str(self.tokenizer / "tokenizer.json"))
        texts = [gigatoken.BytesSource(part.text(), separator=BETWEEN) for part in self.parts]
        for text in texts:
            fast.encode_batch(text, parallel=self.threads > 1)
        return fast, texts, [(part.ids(), part.n_tokens()) for part in self.parts]

    def work(self, loaded: Any, folder: Path) -> int:
        fast, texts, known = loaded
        tokens = 0
        for part, text, (doc_ids, expected) in zip(self.parts, texts, known, strict=True):
            lists = fast.encode_batch(text, parallel=self.threads > 1).layout
            flat, lens = np.asarray(lists.content.data), np.diff(np.asarray(lists.offsets.data))
            tokens += write_rows(part, flat, lens, doc_ids, expected, settings=self.settings,
                                 folder=_made(folder, part))
        return tokens


@dataclass(frozen=True)
class DatasetsMap:
    """`datasets.map` as users write it: tokenize in batches, then join each batch and cut it into rows, as Arrow."""

    tokenizer: Path
    parts: tuple[Part, ...]
    settings: RowSettings
    processes: int
    stride: int

    def load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        texts = [text for part in self.parts for text in _texts(part)[::self.stride]]
        return datasets.Dataset.from_dict({"text": texts})

    def work(self, loaded: Any, folder: Path) -> int:
        return tokenize_and_group(loaded, self.tokenizer, self.settings, folder, processes=self.processes)


def tokenize_and_group(dataset: Any, tokenizer: Path, settings: RowSettings, folder: Path, *, processes: int) -> int:
    """Rows of `seq_len` ids as Arrow below `folder`; returns the tokens in them. The rest of a batch is dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    several = {"num_proc": processes} if processes > 1 else {}
    tokens = dataset.map(
        _Tokenize(tokenizer, settings.bos_id, settings.eos_id), batched=True, batch_size=ROWS_PER_WRITE,
        remove_columns=dataset.column_names, cache_file_name=str(folder / "tokens.arrow"), load_from_cache_file=False,
        **several)
    rows = tokens.map(_Group(settings.seq_len), batched=True, batch_size=ROWS_PER_WRITE,
                      cache_file_name=str(folder / "rows.arrow"), load_from_cache_file=False, **several)
    return len(rows) * settings.seq_len


class _Tokenize:
    """Texts of a batch -> their ids."""

    def __init__(self, tokenizer: Path, bos_id: int | None, eos_id: int) -> None:
        self._path, self._bos, self._eos = tokenizer, [] if bos_id is None else [bos_id], eos_id
        self._fast: Any = None

    def __call__(self, batch: Any) -> dict[str, list[list[int]]]:
        if self._fast is None:
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_file(str(self._path / "tokenizer.json"))
        encoded = self._fast.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*self._bos, *e.ids, self._eos] for e in encoded]}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fast": None}


class _Group:
    """Ids of a batch -> rows of `seq_len` of them."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len

    def __call__(self, batch: Any) -> dict[str, list[list[int]]]:
        joined = list(chain.from_iterable(batch["input_ids"]))
        n = self._seq_len
        return {"input_ids": [joined[i:i + n] for i in range(0, len(joined) - n + 1, n)]}


@dataclass(frozen=True)
class Copy:
    """Numpy copying the bytes of our shards: into new files, mapped, copied and flushed, or into fresh memory."""

    shards: tuple[Path, ...]
    to_disk: bool

    def load(self) -> Any:
        return [np.fromfile(path, np.uint8) for path in self.shards]

    def work(self, loaded: Any, folder: Path) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in zip(self.shards, loaded, strict=True):
            if self.to_disk:
                name = f"{path.parent.parent.name}-{path.parent.name}-{path.name}"
                new = np.memmap(folder / name, np.uint8, "w+", shape=data.shape)
                np.copyto(new, data)
                new.flush()
            else:
                np.copyto(np.empty_like(data), data)
        return 0


def _texts(part: Part) -> list[str]:
    return part.text().decode().removesuffix(BETWEEN.decode()).split(BETWEEN.decode())


def _made(folder: Path, part: Part) -> Path:
    made = folder / part.corpus
    made.mkdir(parents=True, exist_ok=True)
    return made


def balanced(sizes: Sequence[int], n: int) -> Iterator[list[int]]:
    """Places of `sizes` in `n` groups of nearly equal sum, the largest first; empty groups are left out."""
    groups: list[list[int]] = [[] for _ in range(n)]
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(groups, key=lambda g: sum(sizes[i] for i in g)).append(place)
    return (g for g in groups if g)
