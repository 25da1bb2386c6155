"""Ranks every query of a folder with one model or baseline: restartable, over any number of processes.

reads: a Hugging Face folder (or a baseline's name), a queries folder. writes, below `out`:

    inputs.json                          what is evaluated, first: asking for something else here is an error
    parts/<domain>.<rank>of<n>.parquet   each process's share of a domain, finished by a rename
    <domain>.tuning.json                 of a tuned baseline: the settings tried on validation, best first
    <domain>.parquet                     all results of a domain, in the order of its queries
    manifest.json                        last: `out` is finished

costs: see `cprec.eval.rank`; a kill loses at most one domain's part per process. Process r takes queries r, r + n, ...
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter, ValidationError

from cprec import dist
from cprec.errors import ConfigError, DataError, did_you_mean, raise_all
from cprec.eval.baselines import BASELINES, Trial, baseline_hash, fit_baseline, rank_by_baseline
from cprec.eval.controls import CONTROLS
from cprec.eval.metrics import Ranked
from cprec.eval.queries import DomainQueries, Prompts, encode_lines, load_queries
from cprec.eval.rank import rank_query
from cprec.eval.results import INPUTS, RESULT_SCHEMA, DomainSummary, EvalInputs, EvalManifest, read_evaluation
from cprec.eval.stats import power_line
from cprec.eval.tree_attention import TREE_ATTENTION
from cprec.eval.trie import build_trie
from cprec.format import MANIFEST, QueriesManifest, file_hash, read_queries_manifest, write_atomically
from cprec.log import get_logger, progress
from cprec.model import load_for_inference
from cprec.template import Template
from cprec.tokenizer import Tokenizer, load_tokenizer

log = get_logger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SECONDS = b"cprec.seconds"
WEIGHTS = ("config.json", "tokenizer.json", "tokenizer.model", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate: exactly one of `model` (folder or hub name) and `baseline`; `domains` None means all."""

    queries: str
    out: str
    model: str | None = None
    baseline: str | None = None
    domains: Sequence[str] | None = None
    limit: int | None = None
    """Only the first so many queries of each domain."""
    dtype: str = "float32"
    top_k: int = 10
    control: str | None = None
    """Name of what to do to the queries first, see `cprec.eval.controls`."""
    seed: int = 0
    """Of a baseline that is trained."""


def evaluate(options: EvalOptions) -> EvalManifest:
    """Rank what `options` name and return the manifest; a finished evaluation of the same inputs is only read.

    Every process of a `torchrun` calls it. Raises ConfigError for options that cannot be, DataError when `out` holds
    an evaluation of other inputs.
    """
    queries = read_queries_manifest(options.queries)
    raise_all(_problems(options, queries), of="ranking")
    model_folder = _local_folder(options.model) if options.model is not None else None
    inputs = _inputs(options, queries, model_folder)
    out = Path(options.out)
    _refuse_other_inputs(out, inputs)
    if (out / MANIFEST).is_file():
        log.info("%s already holds this evaluation, finished; nothing to do", out)
        return read_evaluation(out)
    dist.barrier()  # nobody writes before everybody has looked
    (out / "parts").mkdir(parents=True, exist_ok=True)
    if dist.rank() == 0:
        write_atomically(out / INPUTS, inputs.model_dump_json(indent=1))
        for domain in inputs.domains:
            n = queries.n_queries[domain]
            log.info("%s: %s", domain, power_line(n if options.limit is None else min(n, options.limit)))
    _rank_missing_parts(options, inputs, queries.template, model_folder, out)
    dist.barrier()
    if dist.rank() == 0:
        _merge(out, inputs, queries)
    dist.barrier()
    return read_evaluation(out)


def _problems(options: EvalOptions, queries: QueriesManifest) -> list[str]:
    problems = []
    if (options.model is None) == (options.baseline is None):
        problems.append(f"model={options.model!r}, baseline={options.baseline!r}: give exactly one of the two")
    if options.baseline is not None and options.baseline not in BASELINES:
        problems.append(f"baseline={options.baseline!r} is none; {did_you_mean(options.baseline, BASELINES)}")
    if options.control is not None and options.control not in CONTROLS:
        problems.append(f"control={options.control!r} is none; {did_you_mean(options.control, CONTROLS)}")
    if options.dtype not in DTYPES:
        problems.append(f"dtype={options.dtype!r} is none; {did_you_mean(options.dtype, DTYPES)}")
    if options.limit is not None and options.limit < 1:
        problems.append(f"limit={options.limit}: give at least 1 query per domain")
    if options.top_k < 1:
        problems.append(f"top_k={options.top_k}: give at least 1")
    problems += [f"domain {d!r} is not among the queries; {did_you_mean(d, queries.domains)}"
                 for d in options.domains or [] if d not in queries.domains]
    return problems


def _local_folder(model: str) -> Path:
    """The model's folder; a hub name is fetched once."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ConfigError(f"model {model!r}: there is no such folder; launch/export.py makes one of a checkpoint")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise ConfigError(f"model {model!r} is no folder and could not be fetched from the hub: {e}") from None


def _inputs(options: EvalOptions, queries: QueriesManifest, model_folder: Path | None) -> EvalInputs:
    return EvalInputs(
        model=f"baseline:{options.baseline}" if model_folder is None else str(options.model),
        model_hash=(baseline_hash(str(options.baseline), options.queries, seed=options.seed) if model_folder is None
                    else _model_hash(model_folder)),
        tokenizer_fingerprint="" if model_folder is None else load_tokenizer(str(model_folder)).fingerprint,
        queries=options.queries, queries_hash=file_hash(Path(options.queries) / MANIFEST),
        domains=[d for d in queries.domains if options.domains is None or d in options.domains], limit=options.limit,
        dtype="" if model_folder is None else options.dtype, top_k=options.top_k,
        control=options.control)


def _model_hash(folder: Path) -> str:
    """One hash over the files that decide what a model says: two checkpoints of one shape differ only in weights."""
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(f"{folder} holds no *.safetensors; export the checkpoint first (launch/export.py)")
    listed = json.dumps({path.name: file_hash(path) for path in files})
    return hashlib.sha256(listed.encode()).hexdigest()


def _refuse_other_inputs(out: Path, inputs: EvalInputs) -> None:
    path = out / INPUTS
    if not path.is_file():
        if (out / MANIFEST).is_file():
            raise DataError(f"{out} holds something else than an evaluation; give another --out")
        return
    try:
        there = EvalInputs.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as e:
        raise DataError(f"{path} is not readable: {e}; give another --out") from None
    different = there.differs(inputs)
    if different:
        raise DataError(f"{out} holds the evaluation of {there.model} on {there.queries}, not of {inputs.model} on "
                        f"{inputs.queries} (there / asked for: {'; '.join(different)}); give another --out")


Answer = tuple[Ranked, int]
"""A ranked query, and how many of its history's items its prompt left out."""
Ranker = Callable[[DomainQueries], Callable[[int], Answer]]
"""Prepares for a domain and gives what answers its query i."""


def _model_ranker(folder: Path, template: Template, options: EvalOptions) -> Ranker:
    device = dist.device()
    model = load_for_inference(str(folder), attention=TREE_ATTENTION, dtype=DTYPES[options.dtype], device=device)
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, the model knows "
                          f"{model.config.vocab_size}; they do not belong together")

    def for_domain(queries: DomainQueries) -> Callable[[int], Answer]:
        prompts, lines = _prompts(queries, template, tokenizer, int(model.config.max_position_embeddings))
        trie = build_trie(lines)

        def answer(i: int) -> Answer:
            prompt = prompts.prompt(queries.histories[i])
            ranked = rank_query(model, trie, prompt.ids, int(queries.targets[i]), queries.candidates(i),
                                top_k=options.top_k)
            return ranked, prompt.n_dropped
        return answer
    return for_domain


def _prompts(queries: DomainQueries, template: Template, tokenizer: Tokenizer,
             context: int) -> tuple[Prompts, list[list[int]]]:
    """Prompts that leave room for the longest line of the catalogue, and the lines."""
    lines = encode_lines(template, tokenizer, queries.catalogue.lines)
    return Prompts(template, tokenizer, lines, max_tokens=context - max(len(line) for line in lines)), lines


def _baseline_ranker(name: str, options: EvalOptions) -> Ranker:
    def for_domain(queries: DomainQueries) -> Callable[[int], Answer]:
        fitted = fit_baseline(name, options.queries, queries, seed=options.seed)
        if fitted.tried and dist.rank() == 0:
            tried = TypeAdapter(tuple[Trial, ...]).dump_json(fitted.tried, indent=1).decode()
            write_atomically(Path(options.out) / f"{queries.domain}.tuning.json", tried)
        return lambda i: (rank_by_baseline(fitted.score, queries, i, top_k=options.top_k), 0)
    return for_domain


def _rank_missing_parts(options: EvalOptions, inputs: EvalInputs, template: Template, model_folder: Path | None,
                        out: Path) -> None:
    """Write this process's part of every domain that lacks it; the model is loaded only if one does."""
    missing = [d for d in inputs.domains if not _part(out, d, dist.rank()).is_file()]
    if len(missing) < len(inputs.domains):
        log.info("%d of %d domains are done from before", len(inputs.domains) - len(missing), len(inputs.domains))
    if not missing:
        return
    ranker = (_baseline_ranker(str(options.baseline), options) if model_folder is None
              else _model_ranker(model_folder, template, options))
    for domain in missing:
        queries = load_queries(options.queries, domain).head(options.limit)
        if options.control is not None:
            queries = CONTROLS[options.control](queries)
        start_s = time.monotonic()
        table = _rank_domain(queries, ranker(queries), has_nll=model_folder is not None)
        seconds = f"{time.monotonic() - start_s:.3f}".encode()
        _write(table.replace_schema_metadata({SECONDS: seconds}), _part(out, domain, dist.rank()))


def _rank_domain(queries: DomainQueries, answer: Callable[[int], Answer], *, has_nll: bool) -> pa.Table:
    """Results of this process's queries, one row each."""
    mine = range(dist.rank(), len(queries), dist.world_size())
    rows = []
    for i in progress(mine, total=len(mine), label=f"rank {queries.domain}", unit="user"):
        ranked, n_dropped = answer(i)
        assert ranked.certified, f"query {i} of {queries.domain} came back without its proof"
        rows.append({
            "user_id": queries.user_ids[i], "rank": ranked.rank, "n_candidates": ranked.n_candidates,
            "nll": -ranked.score if has_nll else None, "n_nodes": ranked.n_nodes, "certified": ranked.certified,
            "top10": ranked.top_items.tolist(), "is_repeat": bool(queries.is_repeat[i]),
            "is_cold": bool(queries.is_cold[i]), "n_dropped": n_dropped,
        })
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def _part(out: Path, domain: str, rank: int) -> Path:
    return out / "parts" / f"{domain}.{rank}of{dist.world_size()}.parquet"


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    partial.replace(path)


def _merge(out: Path, inputs: EvalInputs, queries: QueriesManifest) -> None:
    """Put every domain's parts back into the queries' order, then write the manifest."""
    summaries = {}
    for domain in inputs.domains:
        parts = [pq.read_table(_part(out, domain, r), partitioning=None) for r in range(dist.world_size())]
        # row j of part r is query r + j * world_size
        order = np.argsort(np.concatenate([r + np.arange(len(p)) * len(parts) for r, p in enumerate(parts)]))
        seconds = sum(float(p.schema.metadata[SECONDS]) for p in parts)
        table = pa.concat_tables([p.replace_schema_metadata(None) for p in parts]).take(pa.array(order))
        _write(table, out / f"{domain}.parquet")
        summaries[domain] = _summary(table, queries, domain, seconds)
    manifest = EvalManifest(
        inputs=inputs, domains=summaries, template=queries.template, split=queries.split, split_hash=queries.split_hash,
        regime=queries.regime, target=queries.target, seen=queries.seen, world_size=dist.world_size(),
        versions=dict(_versions()))
    write_atomically(out / MANIFEST, manifest.model_dump_json(indent=1))


def _summary(table: pa.Table, queries: QueriesManifest, domain: str, seconds: float) -> DomainSummary:
    column = {name: table[name].to_numpy() for name in ("n_nodes", "certified", "n_dropped")}
    n_cut = int((column["n_dropped"] > 0).sum())
    log.info("%s: %d queries, %.0f trie prefixes each, %d histories cut to the model's context, %.1f s", domain,
             len(table), column["n_nodes"].mean(), n_cut, seconds)
    return DomainSummary(kind=queries.domains[domain], n_queries=len(table), n_items=queries.n_items[domain],
                         n_nodes=int(column["n_nodes"].sum()), n_certified=int(column["certified"].sum()),
                         n_histories_cut=n_cut, seconds=seconds)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in ("torch", "transformers", "numpy", "pyarrow"):
        yield package, metadata.version(package)
