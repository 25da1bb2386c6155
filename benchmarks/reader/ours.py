"""Our side: packed shards through `PackedDataset`, and the cost of rows before and after it deals them.

reads and writes packed corpora. The only module of this benchmark that knows the reader's interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.reader.job import Job
from benchmarks.reader.records import Finished, stacked
from cprec.data.dataset import PackedDataset
from cprec.data.sampler import Phase, Sampler, quotas_of
from cprec.format import (
    Manifest,
    PackedCorpus,
    PackedRows,
    TokenizerInfo,
    read_manifest,
    row_cost,
    write_manifest,
    write_row_facts,
    write_shard,
)

CORPUS = "rows"
Costs = npt.NDArray[np.int64]


def write(folder: Path, blocks: Iterable[PackedRows], *, seed: int) -> Iterator[PackedRows]:
    """Write the blocks as the corpus `CORPUS` below `folder`, passing each on; the manifest when all are there."""
    (folder / CORPUS).mkdir(parents=True, exist_ok=True)
    shards, n_pad, n_docs, squares, last = [], 0, 0, 0, None
    for number, rows in enumerate(blocks):
        shards.append(write_shard(folder / CORPUS / f"shard-{number:05d}-000.arrow", rows))
        n_pad += int(rows.n_pad.sum())
        n_docs += len(rows.doc_ids)
        squares += row_cost(rows.doc_lens)
        last = rows
        yield rows
    assert last is not None
    n_rows, seq_len = sum(s.rows for s in shards), last.input_ids.shape[1]
    write_manifest(folder / CORPUS, Manifest(
        corpus=CORPUS, kind="train", seq_len=seq_len, dtype=last.input_ids.dtype.name, n_rows=n_rows,
        n_tokens=n_rows * seq_len - n_pad, n_pad=n_pad, n_documents=n_docs, n_documents_by_domain={CORPUS: n_docs},
        sum_squared_doc_lens=squares, template=None, template_hash="", seed=seed, split_hash="", max_timestamp_ms=0,
        tokenizer=TokenizerInfo(name="none", fingerprint="", vocab_size=np.iinfo(last.input_ids.dtype).max, eos_id=0,
                                pad_id=0), sources={}, shards=shards,
        row_facts=write_row_facts(folder / CORPUS, shards)))


def blocks(packed: Path) -> Iterator[PackedRows]:
    """The corpus's rows again, a shard at a time."""
    corpus = PackedCorpus(packed / CORPUS)
    first = 0
    for shard in corpus.manifest.shards:
        yield stacked([corpus[i] for i in range(first, first + shard.rows)])
        first += shard.rows


def batches(job: Job) -> Iterator[Finished]:
    """This rank's micro-batches from `job.first_row` on."""
    dataset = _dataset(job.at, [CORPUS], seed=job.seed, global_batch_size=job.global_batch_size,
                       micro_batch_size=job.micro_batch_size, rank=job.rank, world_size=job.world_size)
    last = job.shape.n_rows // job.global_batch_size
    for step in dataset.steps(job.first_row // job.global_batch_size, last):
        for b in step.batches:
            yield Finished(b.input_ids, b.labels, b.position_ids, b.cu_seqlens, b.max_seqlen)


def _dataset(packed: Path, names: list[str], *, seed: int, global_batch_size: int, micro_batch_size: int, rank: int,
             world_size: int) -> PackedDataset:
    sizes = tuple(read_manifest(packed / name).n_rows for name in names)
    sampler = Sampler(tuple(names), sizes, (Phase(0, quotas_of(sizes)),), seed)
    corpora = [PackedCorpus(packed / name, at_random=True) for name in names]
    return PackedDataset(corpora, sampler, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size,
                         rank=rank, world_size=world_size)


class Dealt:
    """The attention costs of a step's rows, as (micro-steps, ranks, rows of the micro-batch)."""

    def __init__(self, packed: Path, names: list[str], *, seed: int, world_size: int, grad_accum_steps: int,
                 micro_batch_size: int) -> None:
        self.shape = grad_accum_steps, world_size, micro_batch_size
        self._n = grad_accum_steps * world_size * micro_batch_size
        self._dataset = _dataset(packed, names, seed=seed, global_batch_size=self._n,
                                 micro_batch_size=micro_batch_size, rank=0, world_size=world_size)

    def drawn(self, step: int) -> Costs:
        """As drawn: the ranks take the rows in the sampler's order."""
        return self._dataset.step_rows(step).cost.reshape(self.shape)

    def dealt(self, step: int) -> Costs:
        """As the dataset deals them."""
        rows = self._dataset.step_rows(step)
        return rows.cost[rows.dealt].transpose(0, 2, 1)
