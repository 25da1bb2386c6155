"""What follows from a run config, its data and its world size, before anything starts: `--dry-run` prints it.

reads: the run config, the manifests of the packed corpora. Everything that training needs to know and that two ranks
must agree on is decided here, and every disagreement is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from cprec.config import DataConfig, MixConfig, RunConfig, check_batch, load_deepspeed_config
from cprec.data.dataset import check_alike, open_manifests
from cprec.data.remote import ShardCache
from cprec.data.sampler import PERIOD, Phase, Sampler, quotas_of, resolve_mix
from cprec.errors import ConfigError, DataError, raise_all
from cprec.format import Manifest, Template
from cprec.schedule import Schedule
from cprec.settings import Settings
from cprec.storage import is_url
from cprec.tokenizer import load_tokenizer

DATA = "data.json"


class CorpusRecord(Settings):
    """What a run remembers of a training corpus: enough to know it again, and to tell of it in a model card."""

    n_documents: int
    n_tokens: int
    rows_hash: str
    """Over the hashes of its shards: the same rows, wherever the folder is."""


class DataRecord(Settings):
    """The data of a run, as `data.json` in its folder. A run never goes on with other data than it began with."""

    split_hash: str
    template: Template | None
    """None where all of it is plain text."""
    is_audited: bool
    corpora: dict[str, CorpusRecord]


@dataclass(frozen=True)
class Plan:
    """A run, resolved. `config` is the config with every default, mixture and length made explicit."""

    config: RunConfig
    world_size: int
    seq_len: int
    schedule: Schedule
    sampler: Sampler
    train: dict[str, Manifest]
    valid: dict[str, Manifest]
    cache: ShardCache | None = None
    """Through which the data come, where they lie at a URL."""

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes per rank and optimizer step."""
        batch = self.config.batch
        return batch.global_batch_size // (batch.micro_batch_size * self.world_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of packed rows (padding included) per optimizer step, over all ranks."""
        return self.config.batch.global_batch_size * self.seq_len

    @property
    def first_step(self) -> int:
        """Where the run begins: 0, or the fork of a branch."""
        return self.config.parent.step if self.config.parent else 0

    @property
    def data(self) -> DataRecord:
        """What the run's folder records of its training data."""
        first = next(iter(self.train.values()))
        corpora = {name: CorpusRecord(n_documents=m.n_documents, n_tokens=m.n_tokens, rows_hash=_rows_hash(m))
                   for name, m in self.train.items()}
        return DataRecord(split_hash=first.split_hash, corpora=corpora,
                          template=next((m.template for m in self.train.values() if m.template), None),
                          is_audited=all(m.audit is not None and m.audit.passed for m in self.train.values()))

    def checkpoint_steps(self) -> list[int]:
        """Steps at which a checkpoint is written, the run's last among them."""
        every, last = self.config.checkpoint.every, self.schedule.total_steps
        return sorted({*range(every, last, every), last} - set(range(self.first_step + 1)))

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of `step` is never pruned: in the stable phase, at a multiple of keep_stable_every."""
        every = self.config.checkpoint.keep_stable_every
        return bool(every) and step % (every or 1) == 0 and self.schedule.phase(step) == "stable"

    def text(self) -> str:
        """The plan as lines to read: sizes, rates at the corners, data per corpus, checkpoints that will exist."""
        s, first, last = self.schedule, self.first_step, self.schedule.total_steps
        start, end = (self.config.batch.global_batch_size * n for n in (first, last))
        before, after = self.sampler.drawn(start), self.sampler.drawn(end)
        lines = [
            f"world size {self.world_size}, micro batch {self.config.batch.micro_batch_size} rows, accumulation "
            f"{self.grad_accum_steps}: {self.config.batch.global_batch_size} rows of {self.seq_len:,} = "
            f"{self.tokens_per_step:,} tokens per step",
            f"steps {first:,} to {last:,}: {(last - first) * self.tokens_per_step:,} tokens",
            "learning rate: " + ", ".join(f"{s.lr(n):.3e} at step {n:,} ({s.phase(n)})"
                                          for n in sorted({first, *s.corners()}) if n >= first),
            "corpus                           rows      share    rows read   epochs",
        ]
        total = max(end - start, 1)
        for name, size, b, a in zip(self.sampler.names, self.sampler.sizes, before, after, strict=True):
            lines.append(f"  {name:<24} {size:>10,}   {(a - b) / total:>8.3%}   {a - b:>10,}   {a / size:>6.2f}")
        steps = self.checkpoint_steps()
        shown = ", ".join(f"{n:,}" for n in steps[:6]) + (f", ... {steps[-1]:,}" if len(steps) > 6 else "")
        kept = [n for n in steps if self.is_kept(n)]
        lines.append(f"checkpoints at steps {shown}; the last {self.config.checkpoint.keep_last} are kept, and "
                     f"{len(kept)} of the stable phase for good")
        return "\n".join(lines)


def build_plan(config: RunConfig, world_size: int) -> Plan:
    """The plan of `config` on `world_size` ranks. Raises ConfigError or DataError listing what stands against it."""
    cache = _cache_of(config.data)
    train = open_manifests(config.data.packed, "train", cache)
    valid = open_manifests(config.data.packed, "valid", cache) if config.validation.every else {}
    check_alike({**train, **valid}, config.data.packed)
    _check_data(config, {**train, **valid})
    load_deepspeed_config(config.deepspeed)
    seq_len = next(iter(train.values())).seq_len
    schedule = config.build_schedule(tokens_per_step=config.batch.global_batch_size * seq_len)
    problems = check_batch(config.batch, world_size)
    if config.parent and schedule.anneal and schedule.anneal.start != config.parent.step:
        problems.append(f"schedule.anneal starts at step {schedule.anneal.start}, the branch forks at step "
                        f"{config.parent.step}; let launch/anneal.py write the config")
    raise_all(problems, of="run config")
    weights = _resolve_mix(config.data.mix, train)
    sampler = Sampler(tuple(train), tuple(m.n_rows for m in train.values()), _phases(config, schedule, weights),
                      config.data.seed)
    return Plan(_explicit(config, schedule, weights), world_size, seq_len, schedule, sampler, train, valid,
                cache)


def _cache_of(data: DataConfig) -> ShardCache | None:
    """The machine's cache of shards, for data at a URL."""
    return ShardCache(data.cache_dir, round(data.cache_gb * 1e9)) if is_url(data.packed) else None


def _check_data(config: RunConfig, manifests: dict[str, Manifest]) -> None:
    """The leak audit passed, and the packed tokens are the model's own."""
    unaudited = [n for n, m in manifests.items() if m.kind == "train" and (m.audit is None or not m.audit.passed)]
    if unaudited and not config.data.allow_unaudited:
        raise DataError(f"data.packed={config.data.packed}: the leak audit of {', '.join(unaudited)} is missing or "
                        f"failed; run launch/prepare.py to its end, or set data.allow_unaudited=true knowingly")
    packed_with = next(iter(manifests.values())).tokenizer
    own = load_tokenizer(config.model.path)
    if own.fingerprint != packed_with.fingerprint:
        raise ConfigError(f"model.path={config.model.path!r} has another tokenizer (vocabulary {own.vocab_size:,}, "
                          f"fingerprint {own.fingerprint[:12]}) than the one that packed {config.data.packed} "
                          f"({packed_with.name}, {packed_with.vocab_size:,}, {packed_with.fingerprint[:12]}); "
                          f"prepare the data with this model's tokenizer, or take the model of that one")


def _rows_hash(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest("".join(s.xxh3_128 for s in manifest.shards).encode())


def _resolve_mix(mix: MixConfig, train: dict[str, Manifest]) -> MixConfig:
    """Every corpus's weight in every phase, written out; the annealing phase keeps the stable weights unless told."""
    tokens = {name: m.n_tokens for name, m in train.items()}
    stable = resolve_mix(mix.stable, tokens, field="data.mix.stable")
    warmup = stable if mix.warmup is None else resolve_mix(mix.warmup, tokens, field="data.mix.warmup")
    anneal = None if mix.anneal is None else resolve_mix(mix.anneal, tokens, field="data.mix.anneal")
    return MixConfig(warmup=warmup, stable=stable, anneal=anneal)


def _phases(config: RunConfig, schedule: Schedule, mix: MixConfig) -> tuple[Phase, ...]:
    """Phases of the sampler, in rows; a phase begins only where the weights change, so that the order of rows does not
    depend on how a constant mixture is cut into phases."""
    starts = [(0, mix.warmup), (schedule.warmup_steps, mix.stable)]
    if schedule.anneal and mix.anneal is not None:
        starts.append((schedule.anneal.start, mix.anneal))
    phases: list[Phase] = []
    for step, weights in starts:
        assert weights is not None
        phase = Phase(step * config.batch.global_batch_size, quotas_of(list(weights.values())))
        if phases and phases[-1].start_row == phase.start_row:
            phases.pop()
        if not phases or phases[-1].quotas != phase.quotas:
            phases.append(phase)
    assert sum(phases[0].quotas) == PERIOD
    return tuple(phases)


def _explicit(config: RunConfig, schedule: Schedule, mix: MixConfig) -> RunConfig:
    """The config with lengths in steps and weights by corpus, as it is written into the run folder."""
    values = config.model_dump()
    values["run_dir"] = str(Path(config.run_dir))
    values["data"]["mix"] = mix.model_dump()
    values["schedule"]["total"] = {"steps": schedule.total_steps}
    values["schedule"]["warmup"] = {"steps": schedule.warmup_steps}
    if schedule.anneal:
        values["schedule"]["anneal"]["length"] = {"steps": schedule.anneal.steps}
    return RunConfig.model_validate(values)
