"""Raw files to token rows the way that users of `datasets` or `datatrove` write it; run as a program of its own.

    python -m benchmarks.prep.pipeline_rivals {datasets,datatrove} --raw FOLDER --out FOLDER --tokenizer FOLDER ...

reads: the raw files of `benchmarks/prep/inputs.py`. writes: rows as Arrow (datasets), or tokens and document ends
(datatrove, which cuts rows when it reads). Neither library joins tables, so pandas makes the documents: titles joined,
events before the clock, sorted, histories of at most 50 items per user and domain and per user over all domains, and
the validation window's. Keeps all events in memory. Prints one JSON line: tokens, events.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.prep.documents import RowSettings
from benchmarks.prep.sides import tokenize_and_group
from cprec.tokenizer import load_tokenizer

LEAD_IN = "Items that one person chose, in order of time:\n"
MAX_ITEMS, MIN_ITEMS = 50, 2
QUANTILES = (0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("datasets", "datatrove"))
    for name in ("raw", "out", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--cores", type=int, required=True)
    args = parser.parse_args()
    texts, n_events = documents(args.raw)
    way = with_datasets if args.way == "datasets" else with_datatrove
    args.out.mkdir(parents=True)
    n_tokens = way(texts, args.out, args.tokenizer, seq_len=args.seq_len, cores=args.cores)
    (args.out / "counts.json").write_text(json.dumps({"tokens": n_tokens, "events": n_events}))


def documents(raw: Path) -> tuple[list[str], int]:
    """Texts of all histories, and how many events are in them."""
    import pandas as pd

    events = pd.read_parquet(raw / "interactions")
    items = pd.read_parquet(raw / "items", columns=["domain", "item_id", "title"])
    t_valid, t_test = events["ts_ms"].quantile(list(QUANTILES))
    items["title"] = items["title"].str.split().str.join(" ")
    events = events.merge(items, on=["domain", "item_id"]).drop_duplicates(["user_id", "domain", "title", "ts_ms"])
    events = events.sort_values(["user_id", "ts_ms"], kind="stable")
    train = events[events["ts_ms"] < t_valid]
    valid = events[(events["ts_ms"] >= t_valid) & (events["ts_ms"] < t_test)]
    many = train[train.groupby("user_id")["domain"].transform("nunique") >= 2]
    texts: list[str] = []
    n_events = 0
    for table, keys in ((train, ["domain", "user_id"]), (many, ["user_id"]), (valid, ["domain", "user_id"])):
        for titles in table.groupby(keys, sort=False)["title"].agg(list):
            for begin in range(0, len(titles), MAX_ITEMS):
                window = titles[begin:begin + MAX_ITEMS]
                if len(window) >= MIN_ITEMS:
                    texts.append(LEAD_IN + "\n".join(window) + "\n")
                    n_events += len(window)
    return texts, n_events


def with_datasets(texts: list[str], out: Path, tokenizer: Path, *, seq_len: int, cores: int) -> int:
    """`Dataset.map` twice: tokenize, then join and cut into rows, on `cores` processes."""
    import datasets

    datasets.disable_progress_bars()
    known = load_tokenizer(str(tokenizer))
    settings = RowSettings(seq_len, 0, "", known.bos_id, known.eos_id, known.pad_id)
    return tokenize_and_group(datasets.Dataset.from_dict({"text": texts}), tokenizer, settings, out, processes=cores)


def with_datatrove(texts: list[str], out: Path, tokenizer: Path, *, seq_len: int, cores: int) -> int:
    """Documents as Parquet, then datatrove's reader and document tokenizer, one task per core."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    share = -(-len(texts) // cores)
    for number in range(cores):
        mine = texts[number * share:(number + 1) * share]
        table = pa.table({"text": mine, "id": [str(i) for i in range(len(mine))]})
        (out / "documents").mkdir(exist_ok=True)
        pq.write_table(table, out / "documents" / f"part-{number}.parquet")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    steps: list[Any] = [
        ParquetReader(str(out / "documents"), batch_size=1000),
        DocumentTokenizer(str(out / "tokens"), tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
                          eos_token=config["eos_token"], shuffle_documents=False, batch_size=1000)]
    LocalPipelineExecutor(pipeline=steps, tasks=cores, workers=cores, logging_dir=str(out / "logs")).run()
    known = load_tokenizer(str(tokenizer))
    n_bytes = sum(p.stat().st_size for p in (out / "tokens").glob("*.ds"))
    return n_bytes // (2 if known.vocab_size <= 1 << 16 else 4)


if __name__ == "__main__":
    main()
