"""What a preparation would read and make, estimated from a bounded look into its sources; the check of its columns.

reads: sizes of all source files, some of their first rows (`data_prep.look`), the tokenizer. writes: nothing but a
temporary folder. Every number that is not exact is called about.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cprec.errors import DataError, did_you_mean, n_of, raise_all
from cprec.template import Template
from cprec.tokenizer import Tokenizer, load_tokenizer
from data_prep.config import EngineSettings, PrepConfig
from data_prep.engines.registry import connect
from data_prep.ingest import Staging
from data_prep.look import CHARS_PER_TOKEN, Look, Rows, TextLook, look_at, look_at_texts, unmatched
from data_prep.records import utc

ITEMS_PER_HISTORY = 10
"""Assumed, for the share of the lead-ins."""
HASH_BYTES = 19
"""On disk, of an event's name: 32 hex digits, half of which is chance."""
HISTORY_BYTES = 5
"""On disk, compressed, of an event in a history: its item's number and its time."""
ITEM_TABLES = 8.0
"""An item's texts stand in its three tables, in the catalogue (title and line) and among the queries' items."""
DOCUMENT_BYTES = 16
"""Of a document in a shard, besides its tokens: its id, its length."""
SHARD_BYTES = 2_000
"""Of a shard, besides its rows: schema, footer, its lines in manifest and record."""
REPORT_BYTES = 1_000_000
"""Report with pictures, stamps, manifests, tokenizer."""


@dataclass(frozen=True)
class Clock:
    """Where the looked-at events put the clock."""

    t_valid: int
    t_test: int
    learned: dict[str, float]
    """Pre-training domain -> share of its events before `t_valid`."""
    is_whole: bool
    """Every event was looked at; else it is a guess from the first rows of the files."""
    notes: list[str]


@dataclass(frozen=True)
class Artifact:
    """Something below `out`."""

    name: str
    n_bytes: float


@dataclass(frozen=True)
class Estimate:
    """What the preparation would read and make."""

    looks: list[Look]
    texts: list[TextLook]
    n_events: dict[str, Rows]
    """Chosen domain -> events before cleaning."""
    clock: Clock | None
    """None where no event of a chosen domain was seen."""
    n_tokens: float
    """Of the specific training histories; the mixed ones have as many again where everyone is in several domains."""
    disk: tuple[Artifact, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def n_bytes(self) -> float:
        """Of all artifacts."""
        return sum(made.n_bytes for made in self.disk)

    def lines(self) -> Iterator[str]:
        """The estimate for people."""
        yield "estimate, from a look at the first rows; cleaning, k-core and sequence options will leave less:"
        for look in self.looks:
            yield (f"  {look.name}: events {look.events}, items {look.items}; columns fit; from "
                   f"{n_of(look.n_sampled, 'event')} and {n_of(look.n_titles, 'title')}: {look.tokens_per_event:.1f} "
                   f"tokens per event")
        for text in self.texts:
            yield f"  replay {text.name}: {text.texts}; column fits; {text.tokens_per_text:.0f} tokens per text"
        for domain, rows in self.n_events.items():
            yield f"  {domain}: {n_of(rows.n, 'event') if rows.is_exact else f'about {_round(rows.n):,} events'}"
        if self.clock is not None:
            by = "" if self.clock.is_whole else " (by the first rows alone, which may all be early ones)"
            yield f"  clock: about t_valid {utc(self.clock.t_valid)}, t_test {utc(self.clock.t_test)}{by}"
        yield (f"  training corpora: about {_round(self.n_tokens):,} tokens in specific histories, "
               f"at most as many again in mixed ones")
        shown = ", ".join(f"{made.name} {_size(made.n_bytes)}" for made in self.disk if made.n_bytes)
        yield (f"  disk: about {_size(self.n_bytes)}, with mixed histories at their most ({shown}); while stages 1-4 "
               f"run, up to as much as interactions again for spilling")
        yield from (f"  note: {note}" for note in (*(self.clock.notes if self.clock else ()), *self.notes))


def estimate(config: PrepConfig, staging: Staging, *, template: Template) -> Estimate:
    """Look into every source. Raises one DataError naming all whose columns or time stamps do not fit the config.

    The embedded engine looks, whatever the config's, in a temporary folder: a preparation may be at work in `out`.
    """
    tokenizer = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
    looks: list[Look] = []
    texts: list[TextLook] = []
    problems: list[str] = []
    with (tempfile.TemporaryDirectory(prefix="cprec-") as folder,
          closing(connect(EngineSettings(), spill=Path(folder) / "spill")) as engine):
        for i, tasks in enumerate(staging.datasets):
            with _noting(problems):
                looks.append(look_at(tasks, Path(folder) / str(i), engine=engine, template=template,
                                     tokenizer=tokenizer, max_title_chars=config.clean.max_title_chars))
        for i, (name, files) in enumerate(staging.replay.items()):
            with _noting(problems):
                texts.append(look_at_texts(name, files, Path(folder) / f"replay-{i}", tokenizer=tokenizer))
        raise_all(problems, of="sources", error=DataError)
        lost = unmatched(engine, looks, _chosen(config))
    return _sum_up(config, looks, texts, template, tokenizer, lost)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except DataError as e:
        problems.append(str(e))


def _chosen(config: PrepConfig) -> list[str]:
    return sorted([*config.domains.pretrain, *config.domains.unseen])


def _sum_up(config: PrepConfig, looks: list[Look], texts: list[TextLook], template: Template,
            tokenizer: Tokenizer | None, lost: Sequence[str]) -> Estimate:
    n_events = {d: _n_events(looks, d) for d in _chosen(config)}
    clock = clock_of(config, looks)
    frame = len(tokenizer.encode_start(template.lead_in)) if tokenizer else len(template.lead_in) / CHARS_PER_TOKEN
    n_tokens = sum(
        (clock.learned[d] if clock else 0) * len(look.times[d]) * look.per_sampled
        * (look.tokens_per_event + frame / ITEMS_PER_HISTORY)
        for look in looks for d in config.domains.pretrain if d in look.times)
    seen = {d for look in looks for d in look.times}
    notes = [f"no looked-at event is of domain {d!r}; {did_you_mean(d, seen)}" for d in n_events if d not in seen]
    notes += [f"{said}; correct columns.item_id or the dataset's `items`, or write the ids of both alike"
              for said in lost]
    for name, rows in [(look.name, r) for look in looks for r in (look.events, look.items)] + [
            (f"replay {t.name}", t.texts) for t in texts]:
        if rows.n_malformed > config.ingest.max_malformed * rows.n_lines:
            notes.append(f"{name}: {rows.n_malformed:,} of {n_of(rows.n_lines, 'line')} looked at malformed, more than "
                         f"ingest.max_malformed={config.ingest.max_malformed:g} allows: the run would stop")
    if tokenizer is None:
        notes.append(f"the tokenizer is yet to be trained; {CHARS_PER_TOKEN:g} characters are taken for a token")
    return Estimate(looks, texts, n_events, clock, n_tokens,
                    _disk(config, looks, texts, n_events, n_tokens, template, tokenizer), notes)


def _n_events(looks: Sequence[Look], domain: str) -> Rows:
    mine = [look for look in looks if domain in look.times]
    return Rows(round(sum(len(look.times[domain]) * look.per_sampled for look in mine)),
                is_exact=all(look.events.is_whole for look in mine))


def clock_of(config: PrepConfig, looks: Sequence[Look]) -> Clock | None:
    """The clock by the looked-at events of the chosen domains, each counting for as many as its dataset has for one
    looked at; and which domains it would leave without a part."""
    chosen = _chosen(config)
    times = {d: np.concatenate([look.times[d] for look in looks if d in look.times]) for d in chosen
             if any(d in look.times for look in looks)}
    if not times:
        return None
    weights = {d: np.concatenate([np.full(len(look.times[d]), look.per_sampled) for look in looks if d in look.times])
               for d in times}
    t_valid, t_test = config.split.t_valid, config.split.t_test
    if t_valid is None or t_test is None:
        every, weight = np.concatenate([*times.values()]), np.concatenate([*weights.values()])
        order = np.argsort(every, kind="stable")
        up_to = np.cumsum(weight[order])
        places = np.searchsorted(up_to, [share * up_to[-1] for share in config.split.quantiles], side="right")
        t_valid, t_test = (int(every[order][min(place, len(every) - 1)]) for place in places)
    learned = {d: float(weights[d][times[d] < t_valid].sum() / weights[d].sum())
               for d in times if d in config.domains.pretrain}
    is_whole = all(rows.is_exact for rows in (_n_events(looks, d) for d in times))
    would = "would" if is_whole else "may"
    notes = []
    for d, at in times.items():
        missing = [part for part, n in (("train", learned.get(d, 1.0)), ("test", (at >= t_test).sum())) if not n]
        if missing:
            notes.append(f"domain {d} {would} have no event in {' and none in '.join(missing)}, by those looked at: "
                         f"from {utc(int(at.min()))} to {utc(int(at.max()))}; the run {would} stop at split: move the "
                         f"clock (split.t_valid and split.t_test, or split.quantiles) or leave the domain out")
    return Clock(t_valid, t_test, learned, is_whole, notes)


def _disk(config: PrepConfig, looks: Sequence[Look], texts: Sequence[TextLook], n_events: dict[str, Rows],
          n_tokens: float, template: Template, tokenizer: Tokenizer | None) -> tuple[Artifact, ...]:
    """What will lie below `out`."""
    low, high = config.split.quantiles
    n_ids = tokenizer.vocab_size if tokenizer else config.tokenizer.train_vocab_size or 0
    id_bytes = 2 if n_ids <= 1 << 16 else 4
    n_all, n_chosen = (sum(look.events.n for look in looks), sum(rows.n for rows in n_events.values()))
    n_learned = sum(n_events[d].n for d in config.domains.pretrain)
    per_event = sum(look.bytes_per_event * look.events.n for look in looks) / max(n_all, 1)
    tokens_per_event = sum(look.tokens_per_event * look.events.n for look in looks) / max(n_all, 1)
    n_packed = 2 * n_tokens + (high - low) * n_chosen * tokens_per_event  # specific, mixed, validation
    n_documents = n_packed / max(ITEMS_PER_HISTORY * tokens_per_event, 1)
    n_rows = n_documents if config.pack.mode == "one_per_row" else n_packed / config.pack.seq_len
    packed = (n_rows * (config.pack.seq_len * id_bytes + SHARD_BYTES / config.pack.shard_rows)
              + n_documents * DOCUMENT_BYTES)
    of_text = sum(t.texts.n * t.tokens_per_text for t in texts) * id_bytes
    is_slow = config.tokenizer.exact == "slow"
    staged = sum(rows.staged_bytes for look in looks for rows in (look.events, look.items))
    sizes = {
        "staged": staged + sum(t.texts.staged_bytes for t in texts),
        "interactions": per_event * (n_all + n_chosen + low * n_learned)
        + HASH_BYTES * (n_chosen + low * n_learned + (1 - low) * n_chosen),
        "items": ITEM_TABLES * sum(look.bytes_per_item * look.items.n for look in looks),
        "texts": sum(t.texts.n * t.bytes_per_text for t in texts),
        "histories": HISTORY_BYTES * (2 * low * n_learned + (high - low) * n_chosen),
        "segments": 0 if is_slow else sum(look.items.n * (look.tokens_per_event * id_bytes + 8) for look in looks),
        "packed": packed + template.is_supervised * n_packed / 8 + is_slow * n_packed * id_bytes + 2 * of_text,
        "queries": 2 * HISTORY_BYTES * (1 - high) * n_chosen,
        "report and others": REPORT_BYTES,
    }  # what is tokenized whole is kept in packed/<corpus>/parts/ too
    return tuple(Artifact(name, n_bytes) for name, n_bytes in sizes.items())


def _round(n: float) -> int:
    """Two digits, so that it looks like what it is."""
    return int(float(f"{n:.2g}"))


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")
