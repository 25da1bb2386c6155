"""The one schema of interactions and items, the names of stages and files, and what a stage has to report.

reads: nothing. writes: nothing. Costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

INTERACTIONS = pa.schema([
    ("user_id", pa.string()),
    ("domain", pa.string()),
    ("item_id", pa.string()),
    ("ts_ms", pa.int64()),
    ("rating", pa.float32()),  # null where the source has none
])
"""What a parser gives. Cleaning adds `h`, the md5 of (seed, user, domain, item, ts) as 32 hex digits: the event's
name, and the tie-breaker of the order (user, ts_ms, h). Every engine computes md5 of UTF-8 text alike."""

CLEAN_INTERACTIONS = INTERACTIONS.append(pa.field("h", pa.string()))
"""What cleaning and everything after it has."""

ITEMS = pa.schema([
    ("domain", pa.string()),
    ("item_id", pa.string()),
    ("title", pa.string()),
    ("brand", pa.string()),
    ("category", pa.string()),
])

STAGES = ("ingest", "clean", "split", "sequences", "vocabulary", "encode", "pack", "queries", "audit")
PARSER_NAMES = ("amazon", "complete_journey", "movielens", "recbole", "tabular")
"""What a config may call a parser; `data_prep.parsers.registry` holds one for each."""
TEMPLATE_NAMES = ("attributes", "compact", "cprec", "domains", "supervised")
"""What a config may call a template; `data_prep.templates` holds one for each."""
PackMode = Literal["best_fit", "concat", "one_per_row"]
"""What a config may call a way to pack; `data_prep.plan` holds one function for each."""


class Stamp(BaseModel):
    """What a finished stage leaves behind: what it was made from, what it made, what it counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    settings: dict[str, Any]
    """The part of the config that decides this stage's output."""
    inputs: dict[str, str]
    """Upstream stage -> its key, and for ingest: source file -> its hash."""
    outputs: dict[str, int]
    """File below `out` -> its size in bytes, -1 where later stages may rewrite it."""
    counts: dict[str, int]
    key: str


@dataclass
class Counts:
    """Counters of one stage, reason -> n, in the order in which they were first named."""

    stage: str
    by_reason: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, n: int) -> None:
        """Count `n` more for `reason`; a zero is kept, so that the report shows that it was looked at."""
        self.by_reason[reason] = self.by_reason.get(reason, 0) + n


@dataclass(frozen=True)
class Layout:
    """Where everything lies below the output folder."""

    out: Path

    def stamp(self, stage: str) -> Path:
        return self.out / "stages" / f"{stage}.json"

    @property
    def staged(self) -> Path:
        return self.out / "staged"

    @property
    def raw_interactions(self) -> Path:
        return self.out / "interactions" / "ingested.parquet"

    @property
    def raw_items(self) -> Path:
        return self.out / "items" / "ingested.parquet"

    @property
    def titled_items(self) -> Path:
        return self.out / "items" / "titled.parquet"

    @property
    def item_mapping(self) -> Path:
        return self.out / "items" / "mapping.parquet"

    @property
    def duplicates(self) -> Path:
        return self.out / "duplicates.parquet"

    @property
    def interactions(self) -> Path:
        return self.out / "interactions" / "clean.parquet"

    @property
    def items(self) -> Path:
        return self.out / "items" / "clean.parquet"

    @property
    def split(self) -> Path:
        return self.out / "split.json"

    @property
    def holdout(self) -> Path:
        return self.out / "holdout.parquet"

    @property
    def train(self) -> Path:
        return self.out / "interactions" / "train.parquet"

    @property
    def catalogue(self) -> Path:
        return self.out / "catalogue.parquet"

    def texts(self, name: str) -> Path:
        return self.out / "texts" / f"{name}.parquet"

    def histories(self, corpus: str) -> Path:
        return self.out / "histories" / f"{corpus}.parquet"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def segments(self) -> Path:
        return self.out / "segments.arrow"

    @property
    def segments_info(self) -> Path:
        return self.out / "segments.json"

    @property
    def packed(self) -> Path:
        return self.out / "packed"

    @property
    def queries(self) -> Path:
        return self.out / "queries"

    @property
    def audit(self) -> Path:
        return self.out / "audit.json"


@dataclass(frozen=True)
class Corpora:
    """Names of all corpora of a preparation, and what each is for."""

    pretrain: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def train(self) -> list[str]:
        return [f"specific/{d}" for d in sorted(self.pretrain)] + ["mixed"]

    @property
    def valid(self) -> list[str]:
        return [f"valid/{d}" for d in sorted((*self.pretrain, *self.unseen))]

    @property
    def all(self) -> list[str]:
        return self.train + self.valid


class Split(BaseModel):
    """The global clock: training ends before `t_valid`, validation before `t_test` (both ms since 1970, UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    t_valid: int
    t_test: int
    counts: dict[str, int]
    """Events of the chosen domains in each part."""
    hash: str
    """Sha256 of the clock, the regime and every held-out event."""


def utc(ms: int) -> str:
    """The time for people: `2017-03-01 12:00:00`."""
    try:
        return f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # beyond the year 9999: a config may say anything
        return f"{ms} ms"


def title_key(title: str) -> str:
    """What makes two titles one: casefolded NFKC letters and digits only; the folded title where it has neither."""
    folded = unicodedata.normalize("NFKC", title).casefold()
    return "".join(c for c in folded if c.isalnum()) or "".join(folded.split())


def digest(value: Any) -> str:
    """Sha256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
