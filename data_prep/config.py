"""The settings of a preparation: one YAML file, checked as a whole before anything is read or written.

reads: a YAML file (through `cprec.settings`). writes: nothing. Times are milliseconds since 1970, UTC.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cprec.errors import did_you_mean
from cprec.format import Target
from cprec.settings import Settings, describe_problems
from cprec.template import Template
from data_prep.records import PARSER_NAMES, TEMPLATE_NAMES, Corpora, PackMode
from data_prep.templates import template_of

Positive = Annotated[int, Field(ge=1)]


class EngineSettings(Settings):
    """The relational engine of stages 1-4. None of this changes a byte of the output."""

    name: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: str = "2GB"
    """Of the engine alone: DuckDB's buffers, or each of Spark's heaps. The whole process tree takes more, with the
    interpreter and every worker's shard; docs/scale.md has measured peaks."""
    threads: int | None = Field(default=None, ge=1)
    """Default: all cores."""
    spill: str | None = None
    """Folder for what does not fit into memory; default: `.spill/` below `out`, removed at the end."""
    master: str | None = None
    """Of Spark: the cluster's URL; default: what spark-submit says, without it this machine. See docs/spark.md."""

    @model_validator(mode="after")
    def _master_is_of_spark(self) -> EngineSettings:
        if self.master is not None and self.name != "spark":
            raise ValueError(f"master={self.master!r} is Spark's; set name: spark, or take it out")
        return self


class Columns(Settings):
    """Names of the source's columns; null means the parser's default name, for optional ones: taken where present."""

    user_id: str | None = None
    item_id: str | None = None
    timestamp: str | None = None
    timestamp_unit: Literal["s", "ms", "auto"] = "auto"
    rating: str | None = None
    domain: str | None = None
    """Column of the interactions that says the shop; only where the dataset has no `domain` of its own."""
    title: str | None = None
    brand: str | None = None
    category: str | None = None


class Dataset(Settings):
    """One source. `path` and `items` are a file, a folder of files, a glob, a URL of these (`s3://`, `gs://`, `hf://`
    and whatever else fsspec knows), or `package:<distribution>/<path inside it>`; `.gz` and `.zst` are unpacked."""

    parser: str
    """The format (docs/formats.md)."""
    path: str
    """Where the events are."""
    items: str | None = None
    """Where the items are; MovieLens and RecBole have them beside the events, Complete Journey in its folder."""
    domain: str | None = None
    """Name of the shop."""
    columns: Columns = Columns()
    layout: Literal["auto", "user_item", "item_user"] = "auto"
    """Of Amazon's ratings without a header: user,item,rating,time (2014) or item,user,rating,time (2018)."""
    encoding: str | None = None
    """Of delimited text, e.g. cp1252; null: UTF-8. JSON lines and Parquet are UTF-8."""

    @field_validator("parser")
    @classmethod
    def _known_parser(cls, value: str) -> str:
        if value not in PARSER_NAMES:
            raise ValueError(f"no such parser; {did_you_mean(value, PARSER_NAMES)}")
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _null_means_defaults(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            ends_lines = value is None or "\n".encode(value) == b"\n"
        except LookupError:
            ends_lines = False
        if not ends_lines:
            raise ValueError("no encoding in which a line ends as in ASCII; e.g. utf-8, latin-1, cp1252, gb18030")
        return value

    @model_validator(mode="after")
    def _only_what_the_parser_heeds(self) -> Dataset:
        if self.layout != "auto" and self.parser != "amazon":
            raise ValueError(f"layout={self.layout} is of parser amazon only; remove it")
        if self.encoding is not None and self.parser not in ("recbole", "tabular"):
            raise ValueError(f"encoding={self.encoding} cannot be set, parser {self.parser} knows its own; remove it")
        if self.items is not None and self.parser == "complete_journey":
            raise ValueError(f"items={self.items} cannot be set, Complete Journey's lie in its folder; remove it")
        if self.columns.domain is not None and self.parser in ("amazon", "recbole"):
            raise ValueError(f"columns.domain={self.columns.domain} cannot be set, a dataset of parser {self.parser} "
                             f"is one shop; remove it, and set `domain` to the shop's name")
        if self.columns.domain is not None and self.domain is not None:
            raise ValueError(f"columns.domain={self.columns.domain} and domain={self.domain}: the shop is a column's "
                             f"or one for all; remove one")
        if self.columns.timestamp_unit != "auto" and self.parser == "complete_journey":
            raise ValueError("columns.timestamp_unit cannot be set, Complete Journey's times are dates; remove it")
        given = sorted(self.columns.model_dump(exclude_defaults=True).keys() - {"timestamp_unit"})
        if given and self.parser in ("complete_journey", "movielens"):
            raise ValueError(f"columns.{given[0]} cannot be set, parser {self.parser} knows its files; remove it, or "
                             f"use parser: tabular")
        return self


class IngestSettings(Settings):
    """Rules of stage 1."""

    max_malformed: float = Field(default=0.001, ge=0, le=1)
    """Share of a source file's lines that may be malformed: these are set aside, counted and quoted in the report."""


class Replay(Settings):
    """Plain text against forgetting: JSON lines or Parquet at `path` (as a dataset's), packed as `replay/<name>`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    path: str
    text: str = "text"
    """Name of the column or field that holds the documents."""


class Domains(Settings):
    """Which shops are learned from, and which are kept out of every training corpus to be ranked on."""

    pretrain: Annotated[list[str], Field(min_length=1)]
    unseen: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _each_once(self) -> Domains:
        twice = sorted(d for d, n in Counter([*self.pretrain, *self.unseen]).items() if n > 1)
        if twice:
            raise ValueError(f"{', '.join(twice)} named more than once in pretrain and unseen; a domain is either "
                             f"learned from or unseen: keep each in one list")
        odd = sorted(d for d in [*self.pretrain, *self.unseen] if not d or "/" in d or d in (".", ".."))
        if odd:
            raise ValueError(f"{', '.join(map(repr, odd))} cannot name a folder; use names without '/'")
        return self

    @property
    def corpora(self) -> Corpora:
        return Corpora(tuple(sorted(self.pretrain)), tuple(sorted(self.unseen)))


class CleanSettings(Settings):
    """Rules of stage 2. The two minima are a k-core of the training window, iterated until nothing changes."""

    untitled_items: Literal["error", "drop"] = "error"
    """`drop` leaves out items without a title, with their events, and counts them."""
    merge_same_titles: bool = False
    """Make one item of a domain's items with the same title."""
    shared_item_ids: bool = False
    """Item ids mean the same thing in every domain: an item is then also dropped from pre-training when its id occurs
    in an unseen domain's catalogue, whatever its title, also when untitled there."""
    max_title_chars: Positive = 300
    """A longer title is cut at the last word border before."""
    min_user_events: Positive = 1
    """Events that a user has in a domain's training window, at least; 1 keeps everyone."""
    min_item_events: Positive = 1
    """The same of an item."""


class SplitSettings(Settings):
    """The global clock: given, or quantiles of the time stamps of all chosen domains together."""

    t_valid: int | None = None
    """Training ends before it: ms since 1970, UTC."""
    t_test: int | None = None
    """Validation ends before it."""
    quantiles: tuple[float, float] = (0.8, 0.9)
    """Of both, where they are not given."""

    @model_validator(mode="after")
    def _in_order(self) -> SplitSettings:
        if (self.t_valid is None) != (self.t_test is None):
            raise ValueError("t_valid and t_test go together: give both (ms since 1970) or neither")
        if self.t_valid is not None and self.t_test is not None and not 0 < self.t_valid < self.t_test:
            raise ValueError(f"t_valid={self.t_valid} must be positive and before t_test={self.t_test}")
        low, high = self.quantiles
        if not 0 < low < high < 1:
            raise ValueError(f"quantiles={list(self.quantiles)} must rise strictly between 0 and 1, e.g. [0.8, 0.9]")
        return self


class SequenceSettings(Settings):
    """Which events of a user become histories, and how long these are. `min_rating`, `repeats` and `max_events` choose
    what is learned from: they leave validation corpora and ranking queries as they are. Applied in the order of the
    fields, after the k-core; see `data_prep.sequences.mark_events`."""

    min_rating: float | None = Field(default=None, allow_inf_nan=False)
    """Events rated below are left out; an event without a rating stays."""
    session_gap_s: int | None = Field(default=None, ge=1)
    """A new history starts where a user paused for longer; null: a user's events are one history."""
    repeats: Literal["keep", "consecutive", "first"] = "keep"
    """Of an item that comes more than once in a history, keep: every time; the first of each run; the first time."""
    max_events: int | None = Field(default=None, ge=1)
    """At most so many events of a user per corpus; null: all."""
    max_events_by: Literal["latest", "draw"] = "latest"
    """Which these are: the latest, or drawn in favour of the latest, so that old ones are represented too."""
    mixed_min_domains: Positive = 2
    """Domains that a user's all-domain history needs to be one, and each window that it is cut into."""
    min_items: Positive = 2
    """A shorter history is dropped, and counted."""
    max_items: int = Field(default=50, ge=1, lt=1 << 16)
    """A longer history is cut into windows of nearly equal length."""

    @model_validator(mode="after")
    def _in_order(self) -> SequenceSettings:
        if self.max_items < 2 * self.min_items - 1:
            raise ValueError(f"max_items={self.max_items} is too small for min_items={self.min_items}: windows of a "
                             f"long history could fall below the minimum; use at least {2 * self.min_items - 1}")
        if self.max_events is not None and self.max_events < self.min_items:
            raise ValueError(f"max_events={self.max_events} is below min_items={self.min_items}: every history would "
                             f"be dropped; raise one or lower the other")
        if self.max_events is None and self.max_events_by == "draw":
            raise ValueError("max_events_by=draw says which events max_events keeps, but that is null; set max_events")
        return self


LEAST_VOCAB_SIZE = 512
"""256 bytes, 94 printable ASCII characters, the mark of a space and 4 control pieces; and some for words."""


class TokenizerSettings(Settings):
    """An existing tokenizer (`path`: folder, `.model` file or hub name), or one trained on the titles at hand."""

    path: str | None = None
    """Hugging Face folder, its tokenizer.json, a SentencePiece `.model`, or a hub name."""
    train_vocab_size: int | None = None
    """Pieces of the SentencePiece tokenizer that is trained; fewer where the titles hold no more."""
    exact: Literal["gather", "slow"] = "gather"
    """`gather` encodes each line once; `slow` tokenizes every document whole, for tokenizers that merge over lines."""

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerSettings:
        if (self.path is None) == (self.train_vocab_size is None):
            raise ValueError("set exactly one of path (an existing tokenizer) and train_vocab_size (train one here)")
        if self.train_vocab_size is not None and self.train_vocab_size < LEAST_VOCAB_SIZE:
            raise ValueError(f"train_vocab_size={self.train_vocab_size} is below {LEAST_VOCAB_SIZE}: every byte and "
                             f"every printable character alone take 355 pieces; give at least {LEAST_VOCAB_SIZE}")
        return self


class PackSettings(Settings):
    """Rows of `seq_len` tokens; about `window` histories are planned at a time, `shard_rows` rows go into one file."""

    mode: PackMode = "best_fit"
    """`best_fit` cuts nothing; `concat` cuts documents where a row ends, as other stacks do; `one_per_row` pads."""
    seq_len: int = Field(default=1024, ge=16, lt=1 << 16)
    """Tokens per row."""
    shard_rows: Positive = 16384
    """Rows per file."""
    window: Positive = 1_000_000
    """Rounded to whole row groups of the histories (65,536). Documents tokenized whole, and plain text, are planned by
    single row groups, for each takes so much longer."""


class QuerySettings(Settings):
    """Frozen ranking queries, one per user and domain (`successive`: one per event); see
    `cprec.format.QueriesManifest`."""

    target: Target = "first"
    """Which event of the test part is asked for; `leave_one_out` leaks and is there to compare with papers."""
    seen: Literal["exclude", "include"] = "exclude"
    """Whether items that the user had before are candidates."""
    min_history: Positive = 3
    """Events before the target that a query needs."""
    max_history: Positive = 50
    """The last so many are shown."""
    max_per_domain: int | None = Field(default=None, ge=1)
    """A seeded sample of users; null: all."""


class PrepConfig(Settings):
    """Everything `launch/prepare.py` needs to know."""

    out: str
    """Folder that everything is written into; the same command goes on from what is in it."""
    seed: int = 17
    """Breaks ties between events of one time, draws the samples."""
    engine: EngineSettings = EngineSettings()
    workers: Positive = Field(default_factory=lambda: min(os.cpu_count() or 1, 8))
    """Processes for encoding and packing; without it the machine's cores, at most 8. Changes no byte of the output."""
    datasets: Annotated[list[Dataset], Field(min_length=1)]
    replay: list[Replay] = Field(default_factory=list)
    ingest: IngestSettings = IngestSettings()
    domains: Domains
    clean: CleanSettings = CleanSettings()
    split: SplitSettings = SplitSettings()
    regime: Literal["overlap", "disjoint"] = "overlap"
    """`disjoint`: nobody with held-out events in an unseen domain is learned from."""
    sequences: SequenceSettings = SequenceSettings()
    template: str | Template = "cprec"
    """The name of a built-in one, or one's own: `{name: mine, lead_in: "Bought:\\n", item: "{title}\\n"}`."""
    tokenizer: TokenizerSettings
    pack: PackSettings = PackSettings()
    queries: QuerySettings = QuerySettings()

    @field_validator("template", mode="before")
    @classmethod
    def _known_or_whole_template(cls, value: Any) -> str | Template:
        if isinstance(value, str):
            if value not in TEMPLATE_NAMES:
                raise ValueError(f"no such template; {did_you_mean(value, TEMPLATE_NAMES)}")
            return value
        if not isinstance(value, Mapping | Template):
            raise ValueError("give the name of a built-in template, or a mapping with name, lead_in and item")
        try:
            template = Template.model_validate(value)
        except ValidationError as e:
            raise ValueError("; ".join(describe_problems(Template, e))) from None
        if template.name in TEMPLATE_NAMES:
            raise ValueError(f"name={template.name!r} is a built-in template's; give your own another name")
        return template

    @field_validator("replay")
    @classmethod
    def _each_replay_once(cls, value: list[Replay]) -> list[Replay]:
        twice = sorted(name for name, n in Counter(r.name for r in value).items() if n > 1)
        if twice:
            raise ValueError(f"{', '.join(twice)} named more than once; give each its own name")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> PrepConfig:
        if self.regime == "disjoint" and not self.domains.unseen:
            raise ValueError("regime='disjoint' removes the held-out users of the unseen domains, but domains.unseen "
                             "is empty; name one, or use regime: overlap")
        if self.tokenizer.exact == "slow" and template_of(self.template).is_supervised:
            raise ValueError("tokenizer.exact='slow' with a supervised template: a document tokenized whole does not "
                             "say where its target starts; use exact: gather, or a template without before_target")
        if self.queries.min_history > self.queries.max_history:
            raise ValueError(f"queries.min_history={self.queries.min_history} is above queries.max_history="
                             f"{self.queries.max_history}; lower one or raise the other")
        return self
