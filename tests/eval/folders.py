"""Hand-made folders of ranking queries, and a byte-level tokenizer, for ranking tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from cprec.format import MANIFEST, QueriesManifest, file_hash
from cprec.template import Template

TEMPLATE = Template(name="test", version=1, lead_in="Chosen:\n", item="{title}\n")


@dataclass(frozen=True)
class Query:
    """One row of a queries file; `seen` is what the history shows unless given."""

    user_id: str
    history: list[int]
    target: int
    query_ts: int = 1000
    seen: list[int] | None = None
    is_cold: bool = False


@dataclass(frozen=True)
class Shop:
    """One domain: titles with their counts and first days, and its queries."""

    titles: list[str]
    queries: list[Query]
    kind: Literal["pretrain", "unseen"] = "pretrain"
    n_train: list[int] = field(default_factory=list)
    first_ts: list[int] = field(default_factory=list)


def write_queries(folder: Path, shops: dict[str, Shop], *, seen: Literal["exclude", "include"] = "exclude",
                  template: Template = TEMPLATE) -> Path:
    """Write a queries folder as preparation does, manifest and hashes included."""
    folder.mkdir(parents=True)
    for domain, shop in shops.items():
        _write_shop(folder, domain, shop, template)
    manifest = QueriesManifest(
        domains={d: s.kind for d, s in shops.items()}, n_queries={d: len(s.queries) for d, s in shops.items()},
        n_items={d: len(s.titles) for d, s in shops.items()}, template=template, split={"t_valid": 500, "t_test": 800},
        split_hash="s" * 32, regime="overlap", target="first", seen=seen, max_history=50, seed=17,
        files={p.name: file_hash(p) for p in sorted(folder.glob("*.parquet"))})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return folder


def _write_shop(folder: Path, domain: str, shop: Shop, template: Template) -> None:
    n = len(shop.titles)
    numbers = pa.list_(pa.int32())
    pq.write_table(pa.table({
        "item": pa.array(range(n), pa.int32()), "item_id": [f"i{i}" for i in range(n)], "title": shop.titles,
        "line": [template.line({"title": t, "domain": domain}) for t in shop.titles],
        "n_train": pa.array(shop.n_train or [1] * n, pa.int64()),
        "first_ts": pa.array(shop.first_ts or [0] * n, pa.int64()),
    }), folder / f"{domain}.items.parquet")
    q = shop.queries
    pq.write_table(pa.table({
        "user_id": [x.user_id for x in q], "history": pa.array([x.history for x in q], numbers),
        "target": pa.array([x.target for x in q], pa.int32()),
        "query_ts": pa.array([x.query_ts for x in q], pa.int64()),
        "is_repeat": [x.target in x.history for x in q], "is_cold": [x.is_cold for x in q],
        "seen": pa.array([sorted(set(x.history if x.seen is None else x.seen)) for x in q], numbers),
    }), folder / f"{domain}.parquet")


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes: 256 letters, then <s> 256 and </s> 257; it starts texts with no token."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


TOKENIZER_VOCAB = 258
