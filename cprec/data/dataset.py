"""From packed corpora to the micro-batches of a step, for one rank: read, deal, collate, one step ahead.

reads: packed corpora, by memory map; those at a URL through a cache. State: the step (and the micro-step, between two
batches); `step(n)` is a pure function of n, so a run resumes at any step, on any world size that divides the global
batch, with the same rows in each step. Training reads `steps`; `PackedDataset` alone is an iterable dataset of torch:

    dataset = PackedDataset.open("prepared/shop/packed", global_batch_size=64, micro_batch_size=8)
    for batch in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2): ...

Costs: one prefetch thread, the batches of three steps (one in use, one ready, one in the making); resident memory
does not grow with the corpora.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cprec.data.collate import Batch, Memory, collate
from cprec.data.corpora import Packed, check_alike, find_corpora, manifests_of
from cprec.data.remote import ShardCache, open_corpus
from cprec.data.sampler import Phase, Position, Sampler, quotas_of, resolve_mix
from cprec.errors import ConfigError, DataError
from cprec.format import FACTS, Manifest, PackedCorpus

Ints = npt.NDArray[np.int64]
_BLOCK_ROWS = 4096
"""The sampler is asked for about so many positions at a time."""
_RELEASE_ROWS = 256
"""After so many rows the pages that were read are given back; the kernel maps some 200 KB around each."""


@dataclass(frozen=True)
class StepRows:
    """The n rows of a step, in the order of the sampler, and who gets which. (n,) each."""

    corpus: Ints
    row: Ints
    cost: Ints
    """Attention cost in token pairs: the sum of squared document lengths."""
    n_labels: Ints
    n_pad: Ints
    dealt: Ints
    """(grad_accum, micro_batch_size, world_size): which of the n stands where."""


@dataclass(frozen=True)
class Step:
    """One optimizer step for one rank: its own micro-batches, and the totals over all ranks."""

    batches: list[Batch]
    n_valid: int
    n_pad: int
    cost: int


def deal(cost: Ints, *, world_size: int, micro_batch_size: int) -> Ints:
    """Which row of a step goes where: places in `cost` (n,) as (grad_accum, micro_batch_size, world_size).

    Rows are sorted by attention cost and dealt back and forth, so that the ranks of a micro-step, which wait for each
    other in every layer, get rows of nearly equal cost. The set of rows, and so the gradient, is unchanged.
    """
    dealt = np.argsort(-cost, kind="stable").reshape(-1, micro_batch_size, world_size)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1]  # back and forth, as cards are dealt
    return dealt


class PackedDataset(IterableDataset[Batch]):
    """Rows of several packed corpora in the order of a `Sampler`, dealt to the ranks of a run step by step.

    Iterating gives this rank's micro-batches without end, from where `load_state_dict` put it; in a DataLoader with
    workers each takes its turn, so that the order is the same with any number of them. A corpus may be None: a branch
    counts on from corpora of its trunk that it no longer reads.
    """

    def __init__(self, corpora: Sequence[PackedCorpus | None], sampler: Sampler, *, global_batch_size: int,
                 micro_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}: with world_size={world_size} there are ranks 0 to {world_size - 1}")
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(f"global_batch_size={global_batch_size} does not divide by micro_batch_size="
                              f"{micro_batch_size} x world_size={world_size}; choose a multiple")
        assert all(c is None or len(c) == size for c, size in zip(corpora, sampler.sizes, strict=True))
        self.corpora = list(corpora)
        self.sampler = sampler
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._memory = Memory(pin=torch.cuda.is_available())
        self._asked: tuple[int, StepRows] | None = None  # the step whose rows were asked for last
        self._n_unreleased = 0
        self._next = 0  # of this rank's micro-batches since the beginning

    @classmethod
    def open(cls, packed: Packed, *, global_batch_size: int, micro_batch_size: int | None = None,
             mix: Mapping[str, float] | None = None, seed: int = 0, rank: int = 0,
             world_size: int = 1, cache: ShardCache | None = None, allow_unaudited: bool = False) -> PackedDataset:
        """The training corpora below `packed` under one mixture (`resolve_mix`; default: in proportion to size).

        `micro_batch_size` defaults to all of a rank's rows; a URL needs a `cache`. Raises ConfigError or DataError.
        """
        places = find_corpora(packed, cache)
        manifests = manifests_of(places, "train", packed, cache)
        check_alike(manifests, packed, allow_unaudited=allow_unaudited)
        weights = resolve_mix(mix, {name: m.n_tokens for name, m in manifests.items()}, field="mix")
        sampler = Sampler(tuple(manifests), tuple(m.n_rows for m in manifests.values()),
                          (Phase(0, quotas_of(list(weights.values()))),), int(seed))
        return cls(open_corpora(sampler, places, cache, manifests), sampler, global_batch_size=global_batch_size,
                   micro_batch_size=micro_batch_size or max(global_batch_size // world_size, 1),
                   rank=rank, world_size=world_size)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches that each rank runs per step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step_rows(self, step: int) -> StepRows:
        """The step's rows over all ranks: the same set for every world size."""
        asked = self._asked
        if asked is None or asked[0] != step:
            asked = self._asked = (step, self._deal(step))
        return asked[1]

    def _deal(self, step: int) -> StepRows:
        at = _positions(self.sampler, step, self.global_batch_size)
        facts = np.empty(self.global_batch_size, dtype=FACTS)
        for c in np.flatnonzero(np.bincount(at.corpus)).tolist():
            here = at.corpus == c
            facts[here] = self.corpus(c).facts(at.row[here])
        dealt = deal(facts["cost"], world_size=self.world_size, micro_batch_size=self.micro_batch_size)
        cost, n_labels, n_pad = (facts[name].astype(np.int64) for name in ("cost", "n_labels", "n_pad"))
        return StepRows(at.corpus, at.row, cost, n_labels, n_pad, dealt)

    def step(self, step: int) -> Step:
        """This rank's part of a step, ready for the device."""
        rows = self.step_rows(step)
        batches = [self._collate(rows, micro_step) for micro_step in range(self.grad_accum_steps)]
        return Step(batches, int(rows.n_labels.sum()), int(rows.n_pad.sum()), int(rows.cost.sum()))

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Every step from `first` to before `last`, prepared one ahead by a thread, which then has the rows of the step
        after that brought from the disk."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="cprec-reader") as reader:
            ahead: Future[Step] | None = reader.submit(self.step, first) if first < last else None
            for step in range(first, last):
                assert ahead is not None
                ready = ahead.result()
                if step + 1 < last:
                    ahead = reader.submit(self.step, step + 1)
                if step + 2 < last:
                    reader.submit(self._ask_for, step + 2)  # what is wrong there will be told when it is read
                yield ready

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self._next + (turn - self._next) % stride
        step, rows = -1, None
        while True:
            if first // self.grad_accum_steps != step or rows is None:
                step = first // self.grad_accum_steps
                rows = self.step_rows(step)
            batch = self._collate(rows, first % self.grad_accum_steps)
            first += stride
            self._next = first
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as torchdata's StatefulDataLoader wants it: the next micro-batch and the order it is of."""
        step, micro_step = divmod(self._next, self.grad_accum_steps)
        return {"step": step, "micro_step": micro_step, "grad_accum_steps": self.grad_accum_steps,
                "global_batch_size": self.global_batch_size, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, at a step's border on any world size. Raises ConfigError when the state is of another order
        of rows, or within a step that is dealt otherwise now."""
        if state["order"] != self._order() or state["global_batch_size"] != self.global_batch_size:
            raise ConfigError("the state is of other corpora, weights, seed or global_batch_size; open the dataset as "
                              "it was when the state was taken")
        if state["micro_step"] and state["grad_accum_steps"] != self.grad_accum_steps:
            raise ConfigError(f"the state lies within step {state['step']}, which had {state['grad_accum_steps']} "
                              f"micro-batches per rank and now has {self.grad_accum_steps}; go on with the old sizes "
                              f"to the step's end")
        self._next = state["step"] * self.grad_accum_steps + state["micro_step"]

    def describe(self, step: int) -> list[str]:
        """The step's rows as `corpus row n (shard, place)`, for messages that must name them."""
        rows = self.step_rows(step)
        named = []
        for c, r in zip(rows.corpus.tolist(), rows.row.tolist(), strict=True):
            shard, place = self.corpus(c).locate(r)
            named.append(f"{self.sampler.names[c]} row {r} ({shard}:{place})")
        return sorted(named)

    def _ask_for(self, step: int) -> None:
        """Have the kernel read this rank's rows of a step, all at once, while others are worked on."""
        rows = self.step_rows(step)
        mine = rows.dealt[:, :, self.rank].reshape(-1)
        for c, r in zip(rows.corpus[mine].tolist(), rows.row[mine].tolist(), strict=True):
            self.corpus(c).will_need(r)

    def _collate(self, rows: StepRows, micro_step: int) -> Batch:
        mine = rows.dealt[micro_step, :, self.rank]
        corpus = rows.corpus[mine].tolist()
        read = [self.corpus(c)[r] for c, r in zip(corpus, rows.row[mine].tolist(), strict=True)]
        batch = collate(read, corpus, self._memory if get_worker_info() is None else None)
        self._release(len(read))
        return batch

    def _release(self, n_read: int) -> None:
        self._n_unreleased += n_read
        if self._n_unreleased >= _RELEASE_ROWS:
            self._n_unreleased = 0
            for corpus in self.corpora:
                if corpus is not None:
                    corpus.release()

    def corpus(self, number: int) -> PackedCorpus:
        """The corpus of that number in the sampler. Raises DataError when a branch has it no more."""
        corpus = self.corpora[number]
        if corpus is None:
            raise DataError(f"rows of corpus {self.sampler.names[number]} are to be read, and no folder of data.packed "
                            f"has that corpus; add its folder, or give it no weight")
        return corpus

    def _order(self) -> str:
        return hashlib.blake2b(repr(self.sampler).encode(), digest_size=16).hexdigest()


def open_corpora(sampler: Sampler, places: Mapping[str, str], cache: ShardCache | None,
                 manifests: Mapping[str, Manifest]) -> list[PackedCorpus | None]:
    """The sampler's corpora, opened for reading in its order, with the manifests that have been read; None for one that
    has no place."""
    return [open_corpus(places[name], cache, manifest=manifests[name], at_random=True) if name in manifests else None
            for name in sampler.names]


def _positions(sampler: Sampler, step: int, global_batch_size: int) -> Position:
    """The sampler's positions of a step, out of a block of them that is computed at once."""
    steps = max(_BLOCK_ROWS // global_batch_size, 1)
    block = _block(sampler, step // steps * steps * global_batch_size, steps * global_batch_size)
    here = slice(step % steps * global_batch_size, (step % steps + 1) * global_batch_size)
    return Position(block.corpus[here], block.row[here], block.epoch[here])


@lru_cache(maxsize=4)
def _block(sampler: Sampler, start: int, n: int) -> Position:
    return sampler.rows(start, n)
