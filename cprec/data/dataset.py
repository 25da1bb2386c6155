"""From packed corpora to the micro-batches of a step, for one rank: deal, read, collate, ahead of who asks.

reads: packed corpora; those at a URL through a cache. State: the step (and the micro-step, between two batches);
`step(n)` is a pure function of n, so a run resumes at any step, on any world size that divides the global batch, with
the same rows in each step. Training reads `steps`; `PackedDataset` alone is an iterable dataset of torch:

    dataset = PackedDataset.open("prepared/shop/packed", global_batch_size=64, micro_batch_size=8)
    for batch in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2): ...

Small steps are made several at once: one, two, four, ... up to some 130,000 tokens of a rank, so that the first batch
is there at once. Costs: one prefetch thread; three times as many batches as are made at once (in use, ready, in the
making); resident memory does not grow with the corpora.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cprec.data.collate import Batch, Memory, assemble
from cprec.data.corpora import Packed, check_alike, find_corpora, manifests_of
from cprec.data.remote import ShardCache, open_corpus
from cprec.data.sampler import PERIOD, Phase, Position, Sampler, badly_rounded, quotas_of, resolve_mix
from cprec.errors import ConfigError, DataError
from cprec.format import FACTS, Manifest, PackedCorpus, PackedRows, TokenBuffer, read_rows
from cprec.log import get_logger

log = get_logger(__name__)

Ints = npt.NDArray[np.int64]
_BLOCK_ROWS = 4096
"""The sampler is asked for so many positions at a time."""
_DEALT_ROWS = 1 << 14
"""So many rows of all ranks are dealt at once, or one step."""
_CHUNK_TOKENS, _CHUNK_ROWS = 1 << 17, 128
"""So many of a rank's tokens, or rows, are read and collated at once: enough that what a call of numpy or torch costs
no longer counts, few enough that the batches come from the processor's cache."""
_RELEASE_ROWS, _RELEASE_BYTES = 256, 64 << 20
"""After so many rows the pages that were read beside the tokens are given back where they may be so many bytes; the
kernel maps up to 256 KB of them for each row."""


@dataclass(frozen=True)
class StepRows:
    """The n rows of a step, or of several, in the order of the sampler, and who gets which. (n,) each."""

    corpus: Ints
    row: Ints
    cost: Ints
    """Attention cost in token pairs: the sum of squared document lengths."""
    n_labels: Ints
    n_pad: Ints
    left_out: npt.NDArray[np.bool_]
    """Read as padding without labels, see `PackedDataset.leave_out`."""
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
    """Which row of a step goes where: places in `cost` (n_steps, n), all counted on, as (n_steps * grad_accum,
    micro_batch_size, world_size).

    Rows are sorted by attention cost and dealt back and forth, so that the ranks of a micro-step, which wait for each
    other in every layer, get rows of nearly equal cost. The set of rows, and so the gradient, is unchanged.
    """
    first = np.arange(len(cost))[:, None] * cost.shape[1]
    dealt: Ints = (np.argsort(-cost, axis=1, kind="stable") + first).reshape(-1, micro_batch_size, world_size)
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
        self._buffers: deque[TokenBuffer] = deque()  # that no thread reads into
        self._left_out: dict[int, Ints] = {}  # replaced as a whole: whether rows are of it is asked by identity
        self._asked: tuple[range, dict[int, Ints], StepRows] | None = None  # the steps whose rows were asked for last
        self._n_unreleased = 0
        self._next = 0  # of this rank's micro-batches since the beginning

    @classmethod
    def open(cls, packed: Packed, *, global_batch_size: int, micro_batch_size: int | None = None,
             mix: Mapping[str, float] | None = None, seed: int = 0, rank: int = 0,
             world_size: int = 1, cache: ShardCache | None = None, allow_unaudited: bool = False) -> PackedDataset:
        """The training corpora below `packed` under one mixture (`resolve_mix`; default: in proportion to size).

        `micro_batch_size` defaults to all of a rank's rows; a URL needs a `cache`. Warns of weights that whole rows do
        not hold. Raises ConfigError or DataError.
        """
        places = find_corpora(packed, cache)
        manifests = manifests_of(places, "train", packed, cache)
        check_alike(manifests, packed, allow_unaudited=allow_unaudited)
        weights = resolve_mix(mix, {name: m.n_tokens for name, m in manifests.items()}, field="mix")
        sampler = Sampler(tuple(manifests), tuple(m.n_rows for m in manifests.values()),
                          (Phase(0, quotas_of(list(weights.values()))),), int(seed))
        for r in badly_rounded(list(weights.values())):
            log.warning("mix: %s wants %.3g of %d rows and gets %d; give it a larger weight, or none",
                        sampler.names[r.corpus], r.share * PERIOD, PERIOD, r.quota)
        return cls(open_corpora(sampler, places, cache, manifests), sampler, global_batch_size=global_batch_size,
                   micro_batch_size=micro_batch_size or max(global_batch_size // world_size, 1),
                   rank=rank, world_size=world_size)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches that each rank runs per step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step_rows(self, step: int) -> StepRows:
        """The step's rows over all ranks: the same set for every world size."""
        return self._rows(range(step, step + 1))

    def _rows(self, steps: range) -> StepRows:
        asked, left_out = self._asked, self._left_out
        if asked is None or asked[0] != steps or asked[1] is not left_out:
            asked = self._asked = (steps, left_out, self._deal(steps, left_out))
        return asked[2]

    def leave_out(self, rows: Mapping[str, Iterable[int]]) -> None:
        """From now on read these rows, by corpus, as padding: they keep their places in the order and in the deal, so
        that positions stay arithmetic, but hold no text and no labels. Corpora that the sampler lacks are passed over.
        """
        numbers = {name: number for number, name in enumerate(self.sampler.names)}
        self._left_out = {numbers[name]: np.array(sorted(of), dtype=np.int64)
                          for name, of in rows.items() if name in numbers}

    def _deal(self, steps: range, left_out: dict[int, Ints]) -> StepRows:
        n = len(steps) * self.global_batch_size
        at = _positions(self.sampler, steps.start * self.global_batch_size, n)
        facts = np.empty(n, dtype=FACTS)
        for c, here in _by_corpus(at.corpus):
            facts[here] = self.corpus(c).facts(at.row[here])
        cost, n_labels, n_pad = (facts[name].astype(np.int64) for name in ("cost", "n_labels", "n_pad"))
        dealt = deal(cost.reshape(len(steps), -1), world_size=self.world_size, micro_batch_size=self.micro_batch_size)
        out = np.zeros(n, dtype=np.bool_)
        for c, rows in left_out.items():
            out |= (at.corpus == c) & np.isin(at.row, rows)
        n_labels[out] = 0
        return StepRows(at.corpus, at.row, cost, n_labels, n_pad, out, dealt)

    def step(self, step: int) -> Step:
        """This rank's part of a step, ready for the device."""
        return self._make(range(step, step + 1))[0]

    def _make(self, steps: range) -> list[Step]:
        rows, most = self._rows(steps), self._batches_at_once
        n_pad = np.where(rows.left_out, self._row_form[0], rows.n_pad)
        batches = [batch for first in range(0, len(rows.dealt), most)
                   for batch in self._read(rows, slice(first, first + most))]
        n_valid, padding, cost = (values.reshape(len(steps), -1).sum(axis=1).tolist()
                                  for values in (rows.n_labels, n_pad, rows.cost))
        n = self.grad_accum_steps
        return [Step(batches[i * n:(i + 1) * n], n_valid[i], padding[i], cost[i]) for i in range(len(steps))]

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Every step from `first` to before `last`. A thread makes the next ones while these are in use, and then has
        the shards of those after them brought here."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="cprec-reader") as reader:
            while first < last:
                known = self._left_out
                for step in self._made_ahead(reader, first, last):
                    yield step
                    first += 1
                    if known is not self._left_out:  # what was made ahead may hold rows that were left out since
                        break

    def _made_ahead(self, reader: ThreadPoolExecutor, first: int, last: int) -> Iterator[Step]:
        most = min(self._batches_at_once // self.grad_accum_steps, _DEALT_ROWS // self.global_batch_size)
        parts = _growing(first, last, most)
        part, after = next(parts, None), next(parts, None)
        making = reader.submit(self._make, part) if part else None
        while making:
            ready = making.result()
            making = reader.submit(self._make, after) if after else None
            after = next(parts, None)
            if after:
                reader.submit(self._ask_for, after)  # what is wrong there will be told when it is read
            yield from ready

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        accum = self.grad_accum_steps
        most = min(self._batches_at_once, max(_DEALT_ROWS // self.global_batch_size, 1) * accum // stride)
        first = self._next + (turn - self._next) % stride
        for part in _growing(first // stride, None, most):  # of this worker's turns
            numbers = np.array(part) * stride + turn
            begin = int(numbers[0]) // accum
            rows = self._rows(range(begin, int(numbers[-1]) // accum + 1))
            for number, batch in zip(numbers.tolist(), self._read(rows, numbers - begin * accum), strict=True):
                self._next = number + stride
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

    def rows_by_corpus(self, step: int) -> dict[str, list[int]]:
        """The step's rows, sorted, by the name of their corpus."""
        rows = self.step_rows(step)
        return {self.sampler.names[c]: sorted({int(r) for r in rows.row[here]}) for c, here in _by_corpus(rows.corpus)}

    def name_row(self, step: int, micro_step: int, place: int) -> str:
        """The row that this rank had there, as `corpus row n (shard:place)`, for messages."""
        rows = self.step_rows(step)
        i = int(rows.dealt[micro_step, place, self.rank])
        c, r = int(rows.corpus[i]), int(rows.row[i])
        shard, place_in_shard = self.corpus(c).locate(r)
        return f"{self.sampler.names[c]} row {r} ({shard}:{place_in_shard})"

    def _ask_for(self, steps: range) -> None:
        """Have the shards of this rank's rows here, while others are worked on."""
        rows = self._rows(steps)
        mine = rows.dealt[:, :, self.rank].reshape(-1)
        for c, here in _by_corpus(rows.corpus[mine]):
            if (corpus := self.corpus(c)).is_fetched:
                corpus.find(rows.row[mine][here])

    def _read(self, rows: StepRows, micro_steps: slice | Ints) -> list[Batch]:
        """This rank's batches of some micro-steps of `rows`."""
        mine = rows.dealt[micro_steps, :, self.rank].reshape(-1)
        corpus = rows.corpus[mine]
        places: list[Any] = [None] * len(mine)
        for c, here in _by_corpus(corpus):
            for i, place in zip(here.tolist(), self.corpus(c).find(rows.row[mine[here]]), strict=True):
                places[i] = place
        buffer = self._take_buffer(len(mine))
        read = read_rows(places, rows.n_pad[mine].astype(np.int32), buffer)
        for i in np.flatnonzero(rows.left_out[mine]).tolist():
            read = _blank(read, i, self.corpus(int(corpus[i])).manifest.tokenizer.pad_id)
        batches = assemble(
            read, corpus, rows.n_labels[mine],
            micro_batch_size=self.micro_batch_size, memory=self._memory if get_worker_info() is None else None)
        self._buffers.append(buffer)
        self._release(len(places))
        return batches

    def _take_buffer(self, n_rows: int) -> TokenBuffer:
        """A buffer for so many rows, which is no other thread's until it is put back."""
        with suppress(IndexError):
            buffer = self._buffers.popleft()
            if len(buffer.rows) >= n_rows:
                return buffer
        return TokenBuffer(n_rows, *self._row_form)

    @cached_property
    def _row_form(self) -> tuple[int, str]:
        """The tokens of a row and their type, which all corpora share. Raises DataError where they do not."""
        forms = {(c.manifest.seq_len, c.manifest.dtype) for c in self.corpora if c is not None}
        if len(forms) != 1:
            raise DataError(f"the corpora differ in (seq_len, dtype): {sorted(forms)}; prepare them alike")
        return forms.pop()

    @cached_property
    def _batches_at_once(self) -> int:
        return max(min(_CHUNK_ROWS, _CHUNK_TOKENS // self._row_form[0]) // self.micro_batch_size, 1)

    def _release(self, n_read: int) -> None:
        self._n_unreleased += n_read
        if self._n_unreleased >= _RELEASE_ROWS:
            self._n_unreleased = 0
            corpora = [corpus for corpus in self.corpora if corpus is not None]
            is_much = sum(corpus.mapped_bytes for corpus in corpora) > _RELEASE_BYTES
            for corpus in corpora:
                if is_much or corpus.is_fetched:  # an evicted shard would keep its room on the disk
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


def _blank(rows: PackedRows, i: int, pad_id: int) -> PackedRows:
    """The rows with row `i`, which is written over, as padding in documents of the same lengths: it costs what was
    counted on, and nothing is learned."""
    rows.input_ids[i] = pad_id
    doc_ids, mask = rows.doc_ids.copy(), rows.loss_mask
    last = int(rows.n_docs[:i + 1].sum())
    doc_ids[last - int(rows.n_docs[i]):last] = -1
    if mask is None:
        mask = np.ones(rows.input_ids.shape, dtype=np.bool_)
    mask[i] = False
    return replace(rows, doc_ids=doc_ids, loss_mask=mask)


def _by_corpus(corpus: Ints) -> Iterator[tuple[int, Ints]]:
    """Each corpus that there is in `corpus`, and where."""
    for c in np.flatnonzero(np.bincount(corpus)).tolist():
        yield c, np.flatnonzero(corpus == c)


def _growing(first: int, last: int | None, most: int) -> Iterator[range]:
    """`first` to before `last` (None: without end) in parts of 1, 2, 4, ... and then always `most`."""
    n = 1
    while last is None or first < last:
        end = first + n if last is None else min(first + n, last)
        yield range(first, end)
        first, n = end, max(min(2 * n, most), 1)


def _positions(sampler: Sampler, start: int, n: int) -> Position:
    """The sampler's positions `start` to `start + n`, out of blocks of them that are computed at once."""
    if n > _BLOCK_ROWS:
        return sampler.rows(start, n)
    first = start // _BLOCK_ROWS
    blocks = [_block(sampler, number) for number in range(first, (start + n - 1) // _BLOCK_ROWS + 1)]
    here = slice(start - first * _BLOCK_ROWS, start - first * _BLOCK_ROWS + n)
    return Position(*(np.concatenate([getattr(block, name) for block in blocks])[here]
                      for name in ("corpus", "row", "epoch")))


@lru_cache(maxsize=4)
def _block(sampler: Sampler, number: int) -> Position:
    return sampler.rows(number * _BLOCK_ROWS, _BLOCK_ROWS)
