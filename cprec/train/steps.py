"""What a step of a run reads, as lines for a person: rows, their documents, and the documents' domains.

reads: the run's `config.yaml` and `data.json`, its packed corpora and, for the domains of all-domain documents,
`histories/<corpus>.parquet` of the preparation, where it stands beside the packed folder. writes: nothing. Costs: the
rows of one step, and one row group of histories per document whose domains are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.config import check_batch
from cprec.data.corpora import DATA, cache_for, find_corpora, manifests_of, read_data_record, record_of, shown
from cprec.data.dataset import PackedDataset, open_corpora
from cprec.errors import ConfigError, DataError, raise_all
from cprec.format import ITEM_BITS, PackedCorpus, Row, row_cost
from cprec.train.checkpoint import list_checkpoints, read_run_config
from cprec.train.order import build_order

SPECIFIC = "specific/"


def open_run(run_dir: Path, *, step: int, world_size: int | None = None) -> PackedDataset:
    """The rows of the run in `run_dir`, in its order, for a look at `step`; the model is not needed.

    `world_size` defaults to that of the first checkpoint from `step` on, which the step was most likely read with, else
    of the newest, else to 1. Raises CheckpointError without a config.yaml,
    ConfigError for a step or a world size that the run cannot have, DataError when the data are not the run's.
    """
    config = read_run_config(run_dir)
    begun = (run_dir / DATA).is_file()
    cache = cache_for(config.data.packed, folder=config.data.cache_dir, gb=config.data.cache_gb)
    places = find_corpora(config.data.packed, cache)
    manifests = manifests_of(places, "train", config.data.packed, cache)
    found = record_of(manifests)
    data = read_data_record(run_dir) if begun else found
    other = [name for name, c in found.corpora.items()
             if name in data.corpora and data.corpora[name].rows_hash != c.rows_hash]
    if other:
        raise DataError(f"{', '.join(other)} below data.packed={shown(config.data.packed)} are not what {run_dir} was "
                        f"trained on; give data.packed in its config.yaml the folder where they are now")
    order = build_order(config, data)
    if not 1 <= step <= order.schedule.total_steps:
        raise ConfigError(f"--step {step}: {run_dir} has steps 1 to {order.schedule.total_steps:,}")
    saved = list_checkpoints(run_dir)
    nearest = next((c for c in saved if c.state.step >= step), saved[-1] if saved else None)
    ranks = world_size if world_size is not None else nearest.state.world_size if nearest else 1
    if ranks < 1:
        raise ConfigError(f"--world-size {ranks}: give at least one rank")
    raise_all(check_batch(config.batch, ranks), of=f"{run_dir} on {ranks} ranks (--world-size)")
    return PackedDataset(
        open_corpora(order.sampler, places, cache, manifests), order.sampler, world_size=ranks,
        global_batch_size=config.batch.global_batch_size, micro_batch_size=config.batch.micro_batch_size)


def show_step(dataset: PackedDataset, step: int, *, rank: int | None = None) -> Iterator[str]:
    """The rows that make a run's step count `step`, by micro-step and rank, with their documents; of one rank if given.

    Raises ConfigError when there is no such rank, DataError when the folder of a corpus is gone.
    """
    if rank is not None and not 0 <= rank < dataset.world_size:
        raise ConfigError(f"--rank {rank}: there are ranks 0 to {dataset.world_size - 1}; see --world-size")
    batch = dataset.global_batch_size
    first = (step - 1) * batch
    rows = dataset.step_rows(step - 1)
    yield (f"step {step:,}: {batch:,} rows (positions {first:,} to {first + batch - 1:,}), {len(rows.dealt)} "
           f"micro-steps, assuming world size {dataset.world_size} and micro batch {dataset.micro_batch_size}; if the "
           f"run had others then, they dealt the same rows otherwise")
    unknown: set[str] = set()
    for m, r in product(range(len(rows.dealt)), range(dataset.world_size)):
        if rank in (None, r):
            mine = rows.dealt[m, :, r]
            yield f"micro-step {m}, rank {r}: {len(mine)} rows, cost {int(rows.cost[mine].sum()):,} token pairs"
            for i in mine.tolist():
                yield from _show_row(dataset, int(rows.corpus[i]), int(rows.row[i]), unknown)
    yield from sorted(unknown)
    some = int(rows.dealt[0, 0, rank or 0])
    yield (f"a row as text: python launch/peek.py {dataset.corpus(int(rows.corpus[some])).folder} "
           f"--row {rows.row[some]}")


def _show_row(dataset: PackedDataset, number: int, at: int, unknown: set[str]) -> Iterator[str]:
    corpus = dataset.corpus(number)
    row = corpus[at]
    shard, place = corpus.locate(at)
    yield (f"  {dataset.sampler.names[number]} row {at} ({shard}:{place}): {len(row.real_doc_lens)} documents, "
           f"{int(row.real_doc_lens.sum()):,} tokens, {row.n_pad} of padding, cost {row_cost(row.doc_lens):,}")
    yield from (f"    {line}" for line in _documents(corpus, row, unknown))


def _documents(corpus: PackedCorpus, row: Row, unknown: set[str]) -> Iterator[str]:
    """Each document's id in words, its tokens and its domains; what hinders telling them is added to `unknown`."""
    name = corpus.manifest.corpus
    for doc_id, n_tokens in zip(row.doc_ids, row.real_doc_lens, strict=True):
        number, first = divmod(int(doc_id), 1 << ITEM_BITS)
        if corpus.manifest.template is None:
            yield f"text {number}, piece {first}: {n_tokens} tokens, plain text"
            continue
        domains = [name.removeprefix(SPECIFIC)]
        if not name.startswith(SPECIFIC):
            path = _histories(corpus)
            domains = _domains(path, number) if path else []
            if not domains:
                unknown.add(f"domains of the documents of {name} are not told: " + (
                    f"{path} has no domains for them; it is not of this preparation" if path else
                    f"no histories/{name}.parquet in a folder above {corpus.folder}"))
        yield f"history {number} from item {first}: {n_tokens} tokens, {_named(domains)}"


def _named(domains: list[str]) -> str:
    if not domains:
        return "domains unknown"
    # a history too long for a row is cut into documents: these are the domains of all of it
    return f"domain {domains[0]}" if len(domains) == 1 else f"history of domains {', '.join(domains)}"


def _histories(corpus: PackedCorpus) -> Path | None:
    """The histories that the corpus was packed from, where a folder above it has them."""
    places = (p / "histories" / f"{corpus.manifest.corpus}.parquet" for p in corpus.folder.resolve().parents)
    return next((p for p in places if p.is_file()), None)


def _domains(path: Path, history: int) -> list[str]:
    """The different domains of a history, sorted; none when the file has no such history or says nothing of domains."""
    starts = _row_groups(path)
    group = int(np.searchsorted(starts, history, side="right")) - 1
    if history >= starts[-1] or "domains" not in pq.read_schema(path).names:
        return []
    return [str(d) for d in _read_domains(path, group)[history - starts[group]].as_py()]


@lru_cache(maxsize=8)
def _row_groups(path: Path) -> list[int]:
    """First history of each row group, and how many histories there are."""
    metadata = pq.read_metadata(path)
    counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    return [0, *np.cumsum(counts, dtype=np.int64).tolist()]


@lru_cache(maxsize=16)
def _read_domains(path: Path, group: int) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=["domains"])["domains"]
