"""The order of a run's rows, as a function of its config and of the record of its data, and of nothing else.

reads: nothing. No manifest, no model and no world size is needed, so that any tool can say which rows a step reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cprec.config import MixConfig, RunConfig
from cprec.data.corpora import DataRecord
from cprec.data.sampler import PERIOD, Phase, Sampler, quotas_of, redistribute, resolve_caps, resolve_mix
from cprec.errors import ConfigError, raise_all
from cprec.schedule import Schedule


@dataclass(frozen=True)
class Order:
    """When a run reads what. `mix` has the weight of every corpus in every phase; `sampler` honours `data.max_epochs`
    up to the run's end. Positions beyond it it knows too, since the reader computes them in blocks, but the caps do not
    hold there, and no row of them is read."""

    schedule: Schedule
    mix: MixConfig
    caps: tuple[int | None, ...]
    """Most rows of each corpus of the sampler over the whole run; None: any number."""
    sampler: Sampler


def build_order(config: RunConfig, data: DataRecord) -> Order:
    """The order of the rows of `config` over the corpora of `data`.

    Raises ConfigError: impossible lengths or weights, a corpus that runs dry and may not, nothing left to read.
    """
    batch = config.batch.global_batch_size
    schedule = config.build_schedule(tokens_per_step=batch * data.seq_len)
    mix = _resolve_mix(config.data.mix, {name: c.n_tokens for name, c in data.corpora.items()})
    rows = {name: c.n_rows for name, c in data.corpora.items()}
    caps = resolve_caps(config.data.max_epochs, rows, field="data.max_epochs")
    past = _past_mixes(config, schedule, mix, {name: c.n_tokens for name, c in data.corpora.items()})
    reseeds = tuple((step * batch, seed) for step, seed in sorted(config.data.reseed.items()))
    wanted = Sampler(tuple(rows), tuple(rows.values()), _phases(batch, schedule, mix, past), config.data.seed, reseeds)
    end = schedule.total_steps * batch
    if config.data.when_dry == "error":
        raise_all(_dry_corpora(wanted, caps, config=config, end=end), of="run config")
        return Order(schedule, mix, tuple(caps), wanted)
    phases = redistribute(wanted.phases, caps, until=end) if config.data.max_epochs else wanted.phases
    if not any(phases[-1].quotas):
        raise ConfigError(f"data.max_epochs: in step {phases[-1].start_row // batch + 1:,} of {schedule.total_steps:,} "
                          f"every corpus with a weight has run dry; raise data.max_epochs, shorten the run, or give "
                          f"another corpus a weight in data.mix")
    return Order(schedule, mix, tuple(caps), replace(wanted, phases=phases))


def _dry_corpora(sampler: Sampler, caps: list[int | None], *, config: RunConfig, end: int) -> list[str]:
    """What is wrong with each corpus of which rows beyond its cap would be read before position `end`."""
    problems = []
    batch = config.batch.global_batch_size
    for c, (name, cap, wanted) in enumerate(zip(sampler.names, caps, sampler.drawn(end), strict=True)):
        if cap is None or wanted <= cap:
            continue
        at = sampler.position_of(c, cap)
        assert at is not None and at < end
        problems.append(f"data.max_epochs: {name} runs dry in step {at // batch + 1:,} of {end // batch:,}: {cap:,} "
                        f"rows ({cap / sampler.sizes[c]:g} epochs) may be read, the run wants {wanted:,}; "
                        f"lower its weight, shorten the run, raise its max_epochs, or set data.when_dry=redistribute")
    return problems


def _resolve_mix(mix: MixConfig, tokens: dict[str, int]) -> MixConfig:
    """Every corpus's weight in every phase, written out; the annealing phase keeps the stable weights unless told."""
    stable = resolve_mix(mix.stable, tokens, field="data.mix.stable")
    warmup = stable if mix.warmup is None else resolve_mix(mix.warmup, tokens, field="data.mix.warmup")
    anneal = None if mix.anneal is None else resolve_mix(mix.anneal, tokens, field="data.mix.anneal")
    return MixConfig(warmup=warmup, stable=stable, anneal=anneal)


def _past_mixes(config: RunConfig, schedule: Schedule, mix: MixConfig, tokens: dict[str, int]
                ) -> list[dict[str, float] | None]:
    """What each of the schedule's annealings that it returned from reads; None: as in the stable phase."""
    if not config.schedule.returns:  # cycles of the run's own
        return [mix.anneal] * len(schedule.returns)
    return [None if r.mix is None else resolve_mix(r.mix, tokens, field="schedule.returns.mix")
            for r in config.schedule.returns]


def _phases(batch: int, schedule: Schedule, mix: MixConfig, past: Sequence[dict[str, float] | None]
            ) -> tuple[Phase, ...]:
    """Phases of the sampler, in rows; a phase begins only where the weights change, so that the order of rows does not
    depend on how a constant mixture is cut into phases."""
    starts = [(0, mix.warmup), (schedule.warmup_steps, mix.stable)]
    for back, weights in zip(schedule.returns, past, strict=True):
        if weights is not None:
            starts += [(back.anneal.start, weights), (back.end, mix.stable)]
    if schedule.anneal and schedule.anneal.phase == "anneal" and mix.anneal is not None:
        starts.append((schedule.anneal.start, mix.anneal))
    phases: list[Phase] = []
    for step, weights in starts:
        assert weights is not None
        phase = Phase(step * batch, quotas_of(list(weights.values())))
        if phases and phases[-1].start_row == phase.start_row:
            phases.pop()
        if not phases or phases[-1].quotas != phase.quotas:
            phases.append(phase)
    assert sum(phases[0].quotas) == PERIOD
    return tuple(phases)
