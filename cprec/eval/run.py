"""Ranks every query of a folder with one model or baseline: restartable, over any number of processes.

reads: a Hugging Face folder (or a baseline's name), a queries folder. writes, below `out`:

    inputs.json                          what is evaluated, first: asking for something else here is an error
    negatives/<domain>.parquet           the candidates of a sampled protocol, the same for every model
    <domain>.tuning.json                 of a tuned baseline: the settings tried on validation, best first
    parts/<domain>.<part>.parquet        QUERIES_PER_PART queries each, finished by a rename
    <domain>.parquet                     all results of a domain, in the order of its queries
    manifest.json                        last: `out` is finished

costs: see `cprec.eval.rank`; every process holds the queries of all domains, and fits a baseline to those that it has
parts of. A kill loses at most one part per process. Of the parts that are missing at the start, process r takes those
numbered r, r + n, ...; the same command goes on with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from cprec import dist
from cprec.errors import ConfigError, DataError, did_you_mean, raise_all
from cprec.eval.baselines import BASELINES, TRAINED, Baseline, Trial, baseline_hash, fit_baseline
from cprec.eval.controls import CONTROLS, chosen_queries, controlled
from cprec.eval.metrics import Floats, hits_at, ndcg_at
from cprec.eval.protocols import Protocol, expected_metric, negatives, parse_protocol
from cprec.eval.queries import DomainQueries, Seen, load_queries
from cprec.eval.rankers import DTYPES, Answered, Answerer, load_model, parse_scoring
from cprec.eval.results import INPUTS, RESULT_SCHEMA, DomainSummary, EvalInputs, EvalManifest, read_evaluation
from cprec.eval.stats import power_line
from cprec.format import MANIFEST, QueriesManifest, file_hash, read_queries_manifest, write_atomically
from cprec.log import get_logger, progress
from cprec.tokenizer import load_tokenizer

log = get_logger(__name__)
SECONDS = b"cprec.seconds"
QUERIES_PER_PART = 16
EXPECTED: dict[str, Callable[[Floats], Floats]] = {
    "HR@1": partial(hits_at, 1), "HR@10": partial(hits_at, 10), "NDCG@10": partial(ndcg_at, 10)}
"""What sampled candidates are compared in with what the full ranks make one expect."""
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
    protocol: str = "full"
    """See `cprec.eval.protocols`."""
    scoring: str = "sum"
    """See `cprec.eval.rankers.parse_scoring`."""
    rank_up_to: int | None = None
    """Ranks beyond need not be told apart; the top list stays exact."""
    seen: Seen | None = None
    """Whether items had before are candidates; None: as the queries were frozen."""
    items: Literal["all", "warm"] = "all"
    """`warm`: only items of the training window are candidates or targets."""
    control: str | None = None
    """Name of what to do to the queries first, see `cprec.eval.controls`."""
    seed: int = 0
    """Of a baseline that is trained."""


def evaluate(options: EvalOptions) -> EvalManifest:
    """Rank what `options` name and return the manifest; a finished evaluation of the same inputs is only read.

    Every process of a `torchrun` calls it. Raises ConfigError for options that cannot be, DataError when `out` holds
    an evaluation of other inputs.
    """
    queries, model_folder, inputs = _checked(options)
    out = Path(options.out)
    _refuse_other_inputs(out, inputs)
    if (out / MANIFEST).is_file():
        log.info("%s already holds this evaluation, finished; nothing to do", out)
        return read_evaluation(out)
    dist.barrier()  # nobody writes before everybody has looked
    (out / "parts").mkdir(parents=True, exist_ok=True)
    if dist.rank() == 0:
        write_atomically(out / INPUTS, inputs.model_dump_json(indent=1))
    domains = {d: _queries_of(inputs, queries, d) for d in inputs.domains}
    if dist.rank() == 0:
        for domain, of_domain in domains.items():
            log.info("%s: %s", domain, power_line(len(set(of_domain.user_ids))))
        if parse_protocol(options.protocol).is_sampled:
            _write_negatives(out, parse_protocol(options.protocol), domains, seed=queries.seed)
    _rank_missing_parts(options, domains, queries, model_folder, out)
    dist.barrier()
    if dist.rank() == 0:
        _merge(out, inputs, domains, queries)
    dist.barrier()
    return read_evaluation(out)


def _checked(options: EvalOptions) -> tuple[QueriesManifest, Path | None, EvalInputs]:
    """The queries, the model's folder, and all that the results will follow from. Raises ConfigError."""
    queries = read_queries_manifest(options.queries)
    raise_all(_problems(options, queries), of="ranking")
    model_folder = local_folder(options.model) if options.model is not None else None
    return queries, model_folder, _inputs(options, queries, model_folder)


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
    if options.rank_up_to is not None and options.rank_up_to < 1:
        problems.append(f"rank_up_to={options.rank_up_to}: give at least 1")
    problems += [f"domain {d!r} is not among the queries; {did_you_mean(d, queries.domains)}"
                 for d in options.domains or [] if d not in queries.domains]
    try:
        return problems + list(_contradictions(options))
    except ConfigError as e:
        return [*problems, str(e)]


def _contradictions(options: EvalOptions) -> Iterator[str]:
    """Options that mean nothing together. Raises ConfigError for a protocol or scoring that is none."""
    protocol, scoring = parse_protocol(options.protocol), parse_scoring(options.scoring)
    is_searched = options.baseline is None and protocol.kind in ("full", "uniform", "popularity")
    if options.baseline is not None and protocol.kind in ("choice", "beam", "open"):
        yield f"protocol={protocol}: a baseline has no text; give full, uniform-M or popularity-M"
    if scoring.kind != "sum" and not is_searched:
        yield f"scoring={scoring}: only the exact search of a model scores in more than one way"
    if scoring.kind == "pmi" and options.control == "no-history":
        yield f"scoring={scoring} subtracts what is known without a history, and control=no-history shows nothing else"
    if options.rank_up_to is not None and not is_searched:
        yield f"rank_up_to={options.rank_up_to}: only the exact search of a model can stop early"
    if options.baseline is not None and options.dtype != "float32":
        yield f"dtype={options.dtype}: a baseline has none"
    if options.seed != 0 and options.baseline not in TRAINED:
        yield f"seed={options.seed}: only of a baseline that is trained ({', '.join(TRAINED)})"


def local_folder(model: str) -> Path:
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
        dtype="" if model_folder is None else options.dtype, top_k=options.top_k, control=options.control,
        protocol=options.protocol, scoring=options.scoring, rank_up_to=options.rank_up_to,
        seen=options.seen or queries.seen, items=options.items)


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


def _queries_of(inputs: EvalInputs, manifest: QueriesManifest, domain: str) -> DomainQueries:
    """The domain's queries under the filter and control asked for. Raises DataError when none is left."""
    frozen = load_queries(inputs.queries, domain)
    left = chosen_queries(frozen, inputs.model_copy(update={"limit": None}), manifest.split)
    if len(left) < len(frozen):
        log.info("%s: %d of %d queries are left out, because the filter takes their target away", domain,
                 len(frozen) - len(left), len(frozen))
    if not len(left):
        raise DataError(f"{domain}: the filter (seen={inputs.seen}, items={inputs.items}) leaves none of its "
                        f"{len(frozen)} queries a target; leave the domain out, or filter less")
    return controlled(left.head(inputs.limit), inputs.control)


def _write_negatives(out: Path, protocol: Protocol, domains: Mapping[str, DomainQueries], *, seed: int) -> None:
    """Keep what was drawn, for whoever wants to rank the same candidates with something else."""
    (out / "negatives").mkdir(exist_ok=True)
    for domain, queries in domains.items():
        drawn = [negatives(protocol, queries, i, seed=seed) for i in range(len(queries))]
        table = pa.table({"user_id": queries.user_ids, "target": queries.targets,
                          "negatives": pa.array(drawn, pa.list_(pa.int32()))})
        _write(table, out / "negatives" / f"{domain}.parquet")


def _parts(queries: DomainQueries) -> list[range]:
    n = len(queries)
    return [range(start, min(start + QUERIES_PER_PART, n)) for start in range(0, n, QUERIES_PER_PART)]


def _rank_missing_parts(options: EvalOptions, domains: Mapping[str, DomainQueries], manifest: QueriesManifest,
                        model_folder: Path | None, out: Path) -> None:
    """Write this process's share of what is missing; the model is loaded only if there is some. Collective."""
    mine = _share_of_missing(domains, out)
    if not any(mine.values()):
        return

    def fit(queries: DomainQueries) -> Baseline:
        return _fit(options, queries, out if 0 in mine[queries.domain] else None)

    answerer = Answerer(options.protocol, options.scoring, template=manifest.template, seed=manifest.seed,
                        top_k=options.top_k, rank_up_to=options.rank_up_to,
                        by=fit if model_folder is None else load_model(model_folder, options.protocol, options.dtype))
    for domain in (d for d in domains if mine[d]):
        queries, parts = domains[domain], _parts(domains[domain])
        answer = answerer.of_domain(queries)
        for p in progress(mine[domain], total=len(mine[domain]), label=f"rank {domain}", unit="part"):
            start_s = time.monotonic()
            table = _table(queries, parts[p], answer(parts[p]))
            seconds = f"{time.monotonic() - start_s:.3f}".encode()
            _write(table.replace_schema_metadata({SECONDS: seconds}), _part(out, domain, p))


def _share_of_missing(domains: Mapping[str, DomainQueries], out: Path) -> dict[str, list[int]]:
    """Of each domain, the missing parts that this process ranks: every n-th of those that process 0 finds. Collective.

    They are dealt anew at every start, so that all processes have work whatever the ones before had finished.
    """
    everything = [(d, p) for d, q in domains.items() for p in range(len(_parts(q)))]
    absent = [i for i, (d, p) in enumerate(everything) if not _part(out, d, p).is_file()] if dist.rank() == 0 else []
    missing = [everything[int(i)] for i in dist.gather_texts([str(i) for i in absent])]
    mine = missing[dist.rank()::dist.world_size()]
    log.info("%d of %d parts of %d queries are missing; process %d ranks %d of them", len(missing), len(everything),
             QUERIES_PER_PART, dist.rank(), len(mine))
    return {domain: [p for d, p in mine if d == domain] for domain in domains}


def _fit(options: EvalOptions, queries: DomainQueries, out: Path | None) -> Baseline:
    """The baseline, fitted to the domain; what was tried is written below `out`, which one process is given."""
    fitted = fit_baseline(str(options.baseline), options.queries, queries, seed=options.seed)
    if fitted.tried and out is not None:
        tried = TypeAdapter(tuple[Trial, ...]).dump_json(fitted.tried, indent=1).decode()
        write_atomically(out / f"{queries.domain}.tuning.json", tried)
    return fitted.score


def _table(queries: DomainQueries, numbers: Sequence[int], answers: Sequence[Answered]) -> pa.Table:
    """Results of these queries, one row each."""
    rows = [{
        "user_id": queries.user_ids[i], "rank": a.ranked.rank, "n_candidates": a.ranked.n_candidates, "nll": a.nll,
        "n_nodes": a.ranked.n_nodes, "certified": a.certified, "top10": a.ranked.top_items.tolist(),
        "is_repeat": bool(queries.is_repeat[i]), "is_cold": bool(queries.is_cold[i]), "n_dropped": a.n_dropped,
        "score": a.ranked.score, "top_scores": a.ranked.top_scores.tolist(), "bound": a.ranked.bound,
        "n_tokens": a.n_tokens, "valid_share": a.valid_share,
    } for i, a in zip(numbers, answers, strict=True)]
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def _part(out: Path, domain: str, part: int) -> Path:
    return out / "parts" / f"{domain}.{part:05d}.parquet"


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    partial.replace(path)


def _merge(out: Path, inputs: EvalInputs, domains: Mapping[str, DomainQueries], manifest: QueriesManifest) -> None:
    """Put every domain's parts together, then write the manifest."""
    summaries = {}
    for domain, queries in domains.items():
        parts = [pq.read_table(_part(out, domain, p), partitioning=None) for p in range(len(_parts(queries)))]
        seconds = sum(float(p.schema.metadata[SECONDS]) for p in parts)
        table = pa.concat_tables([p.replace_schema_metadata(None) for p in parts])
        _write(table, out / f"{domain}.parquet")
        summaries[domain] = _summary(table, manifest, domain, seconds)
    made = EvalManifest(
        inputs=inputs, domains=summaries, template=manifest.template, split=manifest.split,
        split_hash=manifest.split_hash, regime=manifest.regime, target=manifest.target, seen=inputs.seen,
        world_size=dist.world_size(), versions=dict(_versions()))
    write_atomically(out / MANIFEST, made.model_dump_json(indent=1))


def _summary(table: pa.Table, manifest: QueriesManifest, domain: str, seconds: float) -> DomainSummary:
    column = {name: table[name].to_numpy() for name in ("n_nodes", "certified", "n_dropped", "n_tokens")}
    n_cut = int((column["n_dropped"] > 0).sum())
    log.info("%s: %d queries, %.0f trie prefixes each, %d histories cut to the model's context, %.1f s", domain,
             len(table), column["n_nodes"].mean(), n_cut, seconds)
    return DomainSummary(kind=manifest.domains[domain], n_queries=len(table), n_items=manifest.n_items[domain],
                         n_nodes=int(column["n_nodes"].sum()), n_certified=int(column["certified"].sum()),
                         n_histories_cut=n_cut, n_tokens=int(column["n_tokens"].sum()), seconds=seconds)


def refuse_full(options: EvalOptions, full: str) -> None:
    """Raise before anything is ranked where no expectation could be set beside it: ConfigError for a protocol that has
    none, DataError where `full` is no finished full ranking of the same model and queries with exact ranks."""
    if parse_protocol(options.protocol).kind != "uniform":
        raise ConfigError(f"full={full}: protocol={options.protocol} has no expectation that follows from full ranks; "
                          f"give protocol=uniform-M, or leave --full out")
    whole = read_evaluation(full).inputs
    if whole.protocol != "full":
        raise DataError(f"{full} holds no full ranking but {whole.protocol}; give that of the same model with "
                        f"protocol full")
    _refuse_incomparable(full, whole, options.out, _checked(options)[2])


def _refuse_incomparable(full: str, whole: EvalInputs, sampled_out: str, drawn: EvalInputs) -> None:
    different = [d for d in whole.differs(drawn) if not d.startswith("protocol")]
    if whole.rank_up_to:
        different.append(f"ranks only up to rank_up_to={whole.rank_up_to}")
    if parse_protocol(drawn.protocol).kind != "uniform" or whole.protocol != "full" or different:
        raise DataError(f"{full} and {sampled_out} cannot be compared: the one has to be protocol full with exact "
                        f"ranks, the other uniform-M, of the same model and queries "
                        f"({'; '.join([f'{whole.protocol} / {drawn.protocol}', *different])})")


def expectation(full: str, sampled_out: str) -> str:
    """A text that sets sampled HR@k and NDCG@k beside what the same model's full ranks make one expect, per domain.

    A rank says what is better, not what is equal: of a target that ties with many others, as in baselines that count,
    the expectation is that of half as many better ones. Raises DataError when the folders are not of the same model and
    queries, or not of these protocols.
    """
    whole, drawn = read_evaluation(full), read_evaluation(sampled_out)
    _refuse_incomparable(full, whole.inputs, sampled_out, drawn.inputs)
    protocol = parse_protocol(drawn.inputs.protocol)
    lines = [f"{protocol}, measured and (expected from the full ranks; exact where few candidates tie with a target)"]
    for domain in drawn.domains:
        ranks = pq.read_table(Path(full) / f"{domain}.parquet")
        found = pq.read_table(Path(sampled_out) / f"{domain}.parquet")["rank"].to_numpy()
        cells = []
        for name, value_at in EXPECTED.items():
            expected = [expected_metric(value_at, r, n, protocol.n)
                        for r, n in zip(ranks["rank"].to_pylist(), ranks["n_candidates"].to_pylist(), strict=True)]
            cells.append(f"{name} {value_at(found).mean():.4f} ({np.mean(expected):.4f})")
        lines.append(f"  {domain}: {', '.join(cells)}")
    return "\n".join(lines)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in ("torch", "transformers", "numpy", "pyarrow"):
        yield package, metadata.version(package)
