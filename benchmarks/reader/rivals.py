"""The other sides: each library set up as its own documentation advises, on local files, shuffled.

Each gives `write` (records -> its files) and `batches` (its files -> finished batches); all finish through
`records.finish`. What was chosen for each is said in its docstring: where its documentation leaves a choice that costs
nothing on local files, the faster way was taken. With `workers`, the collation runs in the DataLoader's workers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.reader.job import Job
from benchmarks.reader.records import BLOCK_ROWS, Finished, Records, Shape, finish, mapped

OURS, MOSAIC, LITDATA, DATASETS, MEGATRON = "ours", "mosaicml-streaming", "litdata", "datasets", "megatron-core"
MEMMAP, COLLATE, COPY, COLD_COPY = "numpy memmap", "collate alone", "numpy copy", "numpy copy, from memory"
LIBRARIES = {MOSAIC: "streaming", LITDATA: "litdata", DATASETS: "datasets", MEGATRON: "megatron.core.datasets"}
"""Side -> the module that must be there."""
CHUNK_BYTES = 64 << 20
"""Of a shard or chunk, of libraries that want to know: their default or advice."""


_declared: Any = None


class Side(Protocol):
    """A way to store and read rows."""

    def imports(self) -> None:
        """Import what reading needs."""

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        """Make this side's files below `folder` from the records in a folder."""

    def batches(self, job: Job) -> Iterator[Finished]:
        """One rank's finished batches, from `job.first_row` to the end of the epoch."""


def installed(side: str) -> bool:
    """Whether the side's library is here."""
    module = LIBRARIES.get(side)
    if module is None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _blocks(records: Path, shape: Shape) -> Iterator[Records]:
    whole = mapped(records, shape)
    return (whole[i:i + BLOCK_ROWS] for i in range(0, shape.n_rows, BLOCK_ROWS))


def _finish_samples(samples: Sequence[Any], seq_len: int) -> Finished:
    """A DataLoader's collate function, of samples that are records."""
    return finish(np.stack(samples), seq_len)


def _finish_dicts(samples: Sequence[dict[str, Any]], seq_len: int) -> Finished:
    return finish(np.stack([sample["row"] for sample in samples]), seq_len)


class Mosaic:
    """`StreamingDataset` over local MDS shards with its default shuffle, `StreamingDataLoader`, its resumption.

    A row is one `ndarray` of static type and shape: nothing to decode but a view. `predownload` is raised: at its
    default of eight batches, its threads sleep more than they read when the files are local.
    """

    def imports(self) -> None:
        _import_torchvision()
        import streaming  # noqa: F401

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        self.imports()
        from streaming import MDSWriter

        columns = {"row": f"ndarray:{shape.dtype}:{shape.width}"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK_BYTES) as writer:
            for block in _blocks(records, shape):
                for record in np.array(block):
                    writer.write({"row": record})

    def batches(self, job: Job) -> Iterator[Finished]:
        os.environ |= {"WORLD_SIZE": f"{job.world_size}", "RANK": f"{job.rank}", "LOCAL_RANK": f"{job.rank}",
                       "LOCAL_WORLD_SIZE": f"{job.world_size}", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": f"{job.port}"}
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(local=str(job.at), shuffle=True, shuffle_seed=job.seed,
                                   batch_size=job.micro_batch_size, predownload=4096)
        loader = StreamingDataLoader(dataset, batch_size=job.micro_batch_size, num_workers=job.workers,
                                     collate_fn=partial(_finish_dicts, seq_len=job.shape.seq_len))
        loader._get_batch_size = lambda batch: job.micro_batch_size  # it knows dicts, tensors and lists
        if job.first_row:
            dataset.load_state_dict(dataset.state_dict(job.first_row, from_beginning=True) | {"epoch": 0})
        yield from loader


def _import_torchvision() -> None:
    """Have torchvision there, which `streaming` imports for images, also where its operators are built for another
    torch than this one (the CPU's): then they are declared, and never called."""
    import sys

    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        global _declared  # the declaration holds as long as the object
        _declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


class LitData:
    """`StreamingDataset` with `TokensLoader`, the item loader that it advises for language models, one record a
    block; written by `optimize`; `StreamingDataLoader`, its resumption."""

    def imports(self) -> None:
        import litdata  # noqa: F401

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        from litdata import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader(shape.width))
        number = 0
        for block in _blocks(records, shape):
            for record in np.array(block):
                writer[number] = record
                number += 1
        writer.done()
        writer.merge(1)

    def batches(self, job: Job) -> Iterator[Finished]:
        os.environ |= {"WORLD_SIZE": f"{job.world_size}", "GLOBAL_RANK": f"{job.rank}", "NNODES": "1"}
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        dataset = StreamingDataset(str(job.at), item_loader=TokensLoader(job.shape.width), shuffle=True,
                                   seed=job.seed, drop_last=job.world_size > 1)
        loader = StreamingDataLoader(dataset, batch_size=job.micro_batch_size, num_workers=job.workers,
                                     collate_fn=partial(_finish_samples, seq_len=job.shape.seq_len))
        if job.first_row:
            n = job.first_row // job.world_size
            known = dataset.state_dict(n, job.workers, job.micro_batch_size) | {"current_epoch": 1}
            loader.load_state_dict({"dataset": known, "current_epoch": 1, "num_samples_yielded": n,
                                    "latest_worker_idx": 0})
        yield from loader


class Datasets:
    """A `Dataset` on disk, `shuffle(seed)` (its indices), read by batches of rows in Arrow format, which makes no
    Python objects of the numbers; with workers as its documentation has it: a BatchSampler as the sampler."""

    def imports(self) -> None:
        import datasets  # noqa: F401

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        import datasets
        import pyarrow as pa

        def tables() -> Iterator[pa.Table]:
            for block in _blocks(records, shape):
                values = pa.array(np.array(block).reshape(-1))
                yield pa.table({"row": pa.FixedSizeListArray.from_arrays(values, shape.width)})

        folder.mkdir(parents=True, exist_ok=True)
        for number, table in enumerate(tables()):
            path = folder / f"part-{number:05d}.arrow"
            with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
                writer.write_table(table)
                writer.finalize()

    def batches(self, job: Job) -> Iterator[Finished]:
        import datasets
        from torch.utils.data import BatchSampler, DataLoader

        datasets.disable_progress_bars()
        whole = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path))
                                               for path in sorted(job.at.glob("part-*.arrow"))])
        rows = whole.shuffle(seed=job.seed, keep_in_memory=True).with_format("arrow")
        mine = range(job.first_row + job.rank, job.shape.n_rows, job.world_size)
        sampler = BatchSampler(mine, job.micro_batch_size, drop_last=False)
        loader = DataLoader(rows, sampler=sampler, batch_size=None, num_workers=job.workers,
                            collate_fn=partial(_finish_table, shape=job.shape))
        yield from loader


def _finish_table(table: Any, shape: Shape) -> Finished:
    column = table.column("row").combine_chunks()
    return finish(column.flatten().to_numpy().reshape(-1, shape.width), shape.seq_len)


class Megatron:
    """`IndexedDataset`, memory-mapped, one record a sequence; the shuffled order is a file, mapped, as its
    `GPTDataset` keeps it; batches by a sampler that knows the samples consumed, as its pre-training does."""

    def imports(self) -> None:
        from megatron.core.datasets import indexed_dataset  # noqa: F401

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        folder.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(folder / "rows.bin"), dtype=np.dtype(shape.dtype).type)
        for block in _blocks(records, shape):
            for record in np.array(block):
                builder.add_item(torch.from_numpy(record))
                builder.end_document()
        builder.finalize(str(folder / "rows.idx"))
        np.save(folder / "order.npy", _order(shape, seed))

    def batches(self, job: Job) -> Iterator[Finished]:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from torch.utils.data import DataLoader

        dataset = _Shuffled(IndexedDataset(str(job.at / "rows"), mmap=True), job.at / "order.npy")
        sampler = _Consumed(job)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=job.workers,
                            collate_fn=partial(_finish_samples, seq_len=job.shape.seq_len))
        yield from loader


class _Shuffled:
    """A map-style dataset: sample i is the row at place i of the order."""

    def __init__(self, rows: Any, order: Path) -> None:
        self._rows, self._order = rows, np.load(order, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> Any:
        return self._rows.get(int(self._order[i]))


class _Consumed:
    """This rank's places of each global batch, from the first that is not consumed."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __iter__(self) -> Iterator[list[int]]:
        n, rank = self._job.micro_batch_size, self._job.rank
        for first in range(self._job.first_row, self._job.shape.n_rows, n * self._job.world_size):
            yield [*range(first + rank * n, first + (rank + 1) * n)]


class Memmap:
    """No library: a file of records, mapped, gathered by numpy in a shuffled order that is a file too."""

    def imports(self) -> None: ...

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "order.npy", _order(shape, seed))

    def batches(self, job: Job) -> Iterator[Finished]:
        rows, order = mapped(job.folder, job.shape), np.load(job.at / "order.npy", mmap_mode="r")
        for places in _Consumed(job):
            yield finish(rows[order[places]], job.shape.seq_len)


class Collate:
    """No reading: `finish` over records that are in memory, what no side that uses it can exceed."""

    def imports(self) -> None: ...

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None: ...

    def batches(self, job: Job) -> Iterator[Finished]:
        rows = np.array(mapped(job.folder, job.shape)[:BLOCK_ROWS])
        while True:
            for first in range(0, len(rows) - job.micro_batch_size, job.micro_batch_size):
                yield finish(rows[first:first + job.micro_batch_size], job.shape.seq_len)


class Copy:
    """No reading, no collation: numpy copying a finished batch's arrays into buffers that are there.

    `n_batches` different ones in turn: one stays in the processor's cache, many come from memory.
    """

    def __init__(self, n_batches: int) -> None:
        self._n = n_batches

    def imports(self) -> None: ...

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None: ...

    def batches(self, job: Job) -> Iterator[Finished]:
        n = job.micro_batch_size
        rows = np.array(mapped(job.folder, job.shape)[:n * self._n])
        made = [finish(rows[i * n:(i + 1) * n], job.shape.seq_len) for i in range(len(rows) // n)]
        longest = max((b.cu_seqlens for b in made), key=len)
        buffers = [np.empty_like(a) for a in (*made[0].arrays()[:3], longest.numpy())]
        while True:
            for batch in made:
                for buffer, array in zip(buffers, batch.arrays(), strict=True):
                    np.copyto(buffer[:len(array)], array)
                yield batch


class Ours:
    """`PackedDataset` over packed shards."""

    def imports(self) -> None:
        import benchmarks.reader.ours  # noqa: F401

    def write(self, records: Path, shape: Shape, folder: Path, seed: int) -> None:
        assert (folder / "rows").is_dir(), "ours is written together with the records"

    def batches(self, job: Job) -> Iterator[Finished]:
        from benchmarks.reader.ours import batches

        return batches(job)


def _order(shape: Shape, seed: int) -> Any:
    return np.random.default_rng(seed).permutation(shape.n_rows).astype(np.uint32)


SIDES: dict[str, Side] = {
    OURS: Ours(), MOSAIC: Mosaic(), LITDATA: LitData(), DATASETS: Datasets(), MEGATRON: Megatron(), MEMMAP: Memmap(),
    COLLATE: Collate(), COPY: Copy(1), COLD_COPY: Copy(256),
}
"""By the name that tables show."""
READERS = (OURS, *LIBRARIES, MEMMAP)
REFERENCES = (COLLATE, COPY, COLD_COPY)
