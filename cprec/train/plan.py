"""What follows from a run config, its data and its world size, before anything starts: `--dry-run` prints it.

reads: the run config, the manifests of the packed corpora. Everything that training needs to know and that two ranks
must agree on is decided here, and every disagreement is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cprec.config import MixConfig, RunConfig, check_batch, load_deepspeed_config
from cprec.data.corpora import (
    DATA,
    DataRecord,
    cache_for,
    check_alike,
    check_fits,
    find_corpora,
    of_kind,
    read_data_record,
    read_manifests,
    record_of,
    shown,
)
from cprec.data.remote import ShardCache
from cprec.data.sampler import PERIOD, Sampler, badly_rounded
from cprec.errors import ConfigError, DataError, raise_all
from cprec.format import Manifest
from cprec.schedule import Schedule
from cprec.tokenizer import load_tokenizer
from cprec.train.order import Order, build_order
from cprec.train.trackers import missing_packages


@dataclass(frozen=True)
class Plan:
    """A run, resolved. `config` is the config with every default, mixture and length made explicit."""

    config: RunConfig
    world_size: int
    seq_len: int
    order: Order
    data: DataRecord
    """What the run's folder records of its training data; of a branch also the trunk's corpora that are not there."""
    places: dict[str, str]
    """Folder or URL of each corpus, training and validation, by name."""
    train: dict[str, Manifest]
    """The training corpora that are there."""
    valid: dict[str, Manifest]
    cache: ShardCache | None = None
    """Through which the data come, where they lie at a URL."""

    @property
    def schedule(self) -> Schedule:
        return self.order.schedule

    @property
    def sampler(self) -> Sampler:
        return self.order.sampler

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

    def only_embeddings(self, step: int) -> bool:
        """Whether the update after `step` is one of the first phase, of the embeddings alone."""
        phase = self.config.schedule.embeddings_only
        return phase is not None and phase.steps is not None and step < phase.steps

    def checkpoint_steps(self) -> list[int]:
        """Steps at which a checkpoint is written, the run's last among them."""
        every, last = self.config.checkpoint.every, self.schedule.total_steps
        return sorted({*range(every, last, every), last} - set(range(self.first_step + 1)))

    def validation_steps(self) -> list[int]:
        """Steps after which the validation loss is computed, the run's last among them; none without such data."""
        every, last = self.config.validation.every, self.schedule.total_steps
        if every is None or not self.valid:
            return []
        return [n for n in sorted({*range(every, last, every), last}) if n > self.first_step]

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
        ]
        if phase := self.config.schedule.embeddings_only:
            lines.append(f"up to step {phase.steps:,} the embeddings alone are trained")
        lines.append("corpus                           rows      share    rows read   epochs")
        total = max(end - start, 1)
        for name, size, b, a in zip(self.sampler.names, self.sampler.sizes, before, after, strict=True):
            gone = "" if name in self.train else "   only the trunk read it"
            lines.append(f"  {name:<24} {size:>10,}   {(a - b) / total:>8.3%}   {a - b:>10,}   {a / size:>6.2f}{gone}")
        lines += [*(f"  {line}" for line in self.warnings()), *self._dry_lines()]
        steps = self.checkpoint_steps()
        shown = ", ".join(f"{n:,}" for n in steps[:6]) + (f", ... {steps[-1]:,}" if len(steps) > 6 else "")
        kept = [n for n in steps if self.is_kept(n)]
        lines.append(f"checkpoints at steps {shown}; the last {self.config.checkpoint.keep_last} are kept, and "
                     f"{len(kept)} of the stable phase for good")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Each corpus that the run reads a tenth more or less often than its weight says, and the way out."""
        batch, s = self.config.batch.global_batch_size, self.sampler
        epochs = self.sampler.drawn(self.schedule.total_steps * batch) / s.sizes
        return [f"{s.names[r.corpus]} has {r.share:.2g} of the weights of data.mix.{phase}, but gets {r.quota} of "
                f"every {PERIOD:,} rows, {r.quota / PERIOD:.2g}, and {epochs[r.corpus]:,.2f} epochs of its "
                f"{s.sizes[r.corpus]:,} rows by the run's end; limit it with data.max_epochs, or name a mix "
                f"in which it has weight 0, or 10/{PERIOD} and more"
                for phase, weights in self._mixes().items() for r in badly_rounded(list(weights.values()))]

    def _mixes(self) -> dict[str, dict[str, float]]:
        """The mixtures that the run reads, by phase; of a branch not those of its trunk."""
        mix, schedule = self.order.mix, self.schedule
        annealing = mix.anneal if schedule.anneal and schedule.anneal.phase == "anneal" else None
        found = {"warmup": None if mix.warmup == mix.stable or schedule.warmup_steps == 0 else mix.warmup,
                 "stable": mix.stable, "anneal": annealing}
        if self.config.parent:
            found = {"stable": mix.stable} if annealing is None else {"anneal": annealing}
        return {phase: weights for phase, weights in found.items() if weights}

    def _dry_lines(self) -> list[str]:
        """In which step each corpus reaches its `max_epochs`, of those that do."""
        batch, end = self.config.batch.global_batch_size, self.schedule.total_steps
        lines: list[str] = []
        if self.config.data.when_dry == "error":
            return lines
        for c, (name, cap) in enumerate(zip(self.sampler.names, self.order.caps, strict=True)):
            last = None if cap is None else self.sampler.position_of(c, cap - 1)
            if last is not None and last < end * batch:
                lines.append(f"  {name} reaches its max_epochs in step {last // batch + 1:,}; from there on the others "
                             f"take its share")
        return lines


def build_plan(config: RunConfig, world_size: int) -> Plan:
    """The plan of `config` on `world_size` ranks. Raises ConfigError or DataError listing what stands against it."""
    cache = cache_for(config.data.packed, folder=config.data.cache_dir, gb=config.data.cache_gb)
    places = find_corpora(config.data.packed, cache)
    found = read_manifests(places, cache)
    train = of_kind(found, "train", config.data.packed)
    valid = of_kind(found, "valid", config.data.packed) if config.validation.every else {}
    check_alike({**train, **valid}, config.data.packed, allow_unaudited=config.data.allow_unaudited)
    _check_data(config, {**train, **valid})
    load_deepspeed_config(config.deepspeed)
    trunk = _trunk_record(config)
    data = record_of(train, trunk)
    order = build_order(config, data)
    raise_all([*check_batch(config.batch, world_size), *_wrong_fork(config, order.schedule),
               *missing_packages(config.metrics)], of="run config")
    if trunk and config.parent:
        check_fits(trunk, train, config.parent.run_dir, config.data.packed, allow_unaudited=config.data.allow_unaudited)
        raise_all(_wanted_but_gone(config, order.mix, set(data.corpora) - set(train)), of="run config", error=DataError)
    resolved = _explicit(config, order, data.seq_len)
    return Plan(resolved, world_size, data.seq_len, order, data, places, train, valid, cache)


def _trunk_record(config: RunConfig) -> DataRecord | None:
    """The data of a branch's trunk. Where the trunk has moved away, a branch that has begun knows them itself."""
    if config.parent is None:
        return None
    trunk, own = Path(config.parent.run_dir), Path(config.run_dir)
    return read_data_record(own if not (trunk / DATA).is_file() and (own / DATA).is_file() else trunk)


def _wrong_fork(config: RunConfig, schedule: Schedule) -> list[str]:
    if config.parent and schedule.anneal and schedule.anneal.start != config.parent.step:
        return [f"schedule.anneal starts at step {schedule.anneal.start}, the branch forks at step "
                f"{config.parent.step}; let launch/anneal.py write the config"]
    return []


def _wanted_but_gone(config: RunConfig, mix: MixConfig, gone: set[str]) -> list[str]:
    """Each corpus of the trunk that the branch would read on and that no folder has."""
    weights = mix.stable if mix.anneal is None else mix.anneal
    assert weights is not None and config.parent is not None
    return [f"{name}, which {config.parent.run_dir} was trained on, is in no folder of data.packed="
            f"{shown(config.data.packed)}, but the branch gives it weight {weights[name]:g}; add its folder, or anneal "
            f"with a --mix without it" for name in sorted(gone) if weights[name] > 0]


def _check_data(config: RunConfig, manifests: dict[str, Manifest]) -> None:
    """The leak audit passed, and the packed tokens are the model's own."""
    unaudited = [n for n, m in manifests.items() if m.kind == "train" and (m.audit is None or not m.audit.passed)]
    if unaudited and not config.data.allow_unaudited:
        raise DataError(f"data.packed={shown(config.data.packed)}: the leak audit of {', '.join(unaudited)} is missing "
                        f"or failed; run launch/prepare.py to its end, or set data.allow_unaudited=true knowingly")
    packed_with = next(iter(manifests.values())).tokenizer
    own = load_tokenizer(config.model.path)
    if own.fingerprint != packed_with.fingerprint:
        raise ConfigError(f"model.path={config.model.path!r} has another tokenizer (vocabulary {own.vocab_size:,}, "
                          f"fingerprint {own.fingerprint[:12]}) than the one that packed {shown(config.data.packed)} "
                          f"({packed_with.name}, {packed_with.vocab_size:,}, {packed_with.fingerprint[:12]}); "
                          f"prepare the data with this model's tokenizer, or take the model of that one")


def _explicit(config: RunConfig, order: Order, seq_len: int) -> RunConfig:
    """The config with lengths in steps and weights by corpus, as it is written into the run folder."""
    schedule, values = order.schedule, config.model_dump()
    values["run_dir"] = str(Path(config.run_dir))
    values["data"]["mix"] = order.mix.model_dump()
    values["schedule"]["total"] = {"steps": schedule.total_steps}
    values["schedule"]["warmup"] = {"steps": schedule.warmup_steps}
    if config.schedule.anneal and schedule.anneal:
        values["schedule"]["anneal"]["length"] = {"steps": schedule.anneal.steps}
    if phase := config.schedule.embeddings_only:
        tokens_per_step = config.batch.global_batch_size * seq_len
        steps = phase.in_steps(tokens_per_step=tokens_per_step, total_steps=schedule.total_steps)
        values["schedule"]["embeddings_only"] = {"steps": steps}
    return RunConfig.model_validate(values)
