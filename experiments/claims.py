"""The five claims, each as small tables of arms with their controls, and the steps that answer them.

reads: nothing. writes: nothing. A new arm is a `Row` of a table; the steps that it needs follow from the methods of
`experiments.arms.Line` that make its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.arms import BOTH, Answers, Line, Model

BASE = "base, no pre-training on behaviour"
CPREC = "CPRec: both kinds, all domains, WSA"
TUNED_BASE = "base, fine-tuned"
LONGER_BASE = "base, fine-tuned for as many tokens as pre-training took"
TUNED = "CPRec, fine-tuned"
SPECIFIC = "domain-specific histories only"
MIXED = "all-domain mixed histories only"
SHUFFLED = "control: each user's events in random order"
TITLES = "control: titles dealt out to random users"
BASELINE = "baseline: "
COSINE, LINEAR = "cosine from the warm-up on", "linear from the warm-up on"
CONSTANT = "constant: the trunk, never annealed"
CONSTANT_TUNED = "never annealed, fine-tuned"


@dataclass(frozen=True)
class Deciding:
    """A comparison that decides a claim: the claim says that `better` does better than `than`, rows of one table."""

    claim: int
    table: str
    better: str
    than: str


@dataclass(frozen=True)
class Row:
    """One arm of a table."""

    label: str
    seeds: tuple[Answers, ...]
    against: tuple[str, ...] = ()
    """Labels of the rows that it is held against, paired over users."""
    tokens: int | None = None
    """Of continual pre-training, or of fine-tuning in its place; null: none, or not counted."""
    x: float | None = None
    """Its place in the picture of a table that has one."""
    is_fixed: bool = False
    """The same whatever the seed: nothing is trained, or a baseline. Held against every seed of another row."""


@dataclass(frozen=True)
class Table:
    """Arms that answered the same queries."""

    key: str
    claim: int
    title: str
    domains: tuple[str, ...]
    rows: tuple[Row, ...]
    x_label: str | None = None


def tables(line: Line) -> list[Table]:
    """All tables; `line` then holds the steps that they need."""
    return [table for claim in (_cpt_helps, _all_domain_helps, _wsa_helps, _scaling, _forgetting)
            for table in claim(line)]


def deciding(line: Line) -> list[Deciding]:
    """What Holm's adjustment is over, and what a summary shows; all else explores."""
    form, k = line.form, _longest(line)
    baseline = "item_knn" if "item_knn" in form.rank.baselines else form.rank.baselines[0]
    return [Deciding(1, "zero_shot", CPREC, BASE), Deciding(1, "zero_shot", CPREC, BASELINE + baseline),
            *(Deciding(1, f"shots_{k}", TUNED, row) for row in (TUNED_BASE, LONGER_BASE)),
            *(Deciding(2, "corpora", CPREC, row) for row in (SPECIFIC, MIXED, SHUFFLED, TITLES)),
            *(Deciding(3, "schedules", CPREC, row) for row in (COSINE, LINEAR, CONSTANT)),
            Deciding(3, "schedules_tuned", TUNED, CONSTANT_TUNED),
            Deciding(4, "domains", _n_domains(len(line.world.pretrain)), _n_domains(1))]


def _longest(line: Line) -> int:
    """The most documents that a few-shot table has."""
    return max(k for k in line.form.tune.shots if k != "all")


def _n_domains(n: int) -> str:
    return f"{n} domain{'s' * (n > 1)}"


def _cpt_helps(line: Line) -> list[Table]:
    """Claim 1: with against without continual pre-training, zero-shot and after fine-tuning; against baselines."""
    form, base, seeds = line.form, line.base_model(), range(line.form.seeds)
    baselines = [Row(BASELINE + name, (line.baseline(name, 1),), is_fixed=True) for name in form.rank.baselines]
    disjoint = [line.pretrain("disjoint", BOTH, seed=s, prepared="disjoint") for s in seeds]
    zero = [Row(BASE, (line.rank(base, 1),), is_fixed=True),
            Row(CPREC, tuple(line.rank(line.cprec(s), 1) for s in range(form.headline_seeds)),
                (BASE, *(b.label for b in baselines)), form.tokens),
            Row("CPRec, no user of the queries learned from", _ranked(line, disjoint, 1), (BASE, CPREC), form.tokens),
            *baselines]
    found = [Table("zero_shot", 1, "Zero-shot on unseen domains", tuple(line.world.unseen), tuple(zero))]
    for k in form.tune.shots:
        rows = [Row(TUNED_BASE, tuple(line.tune(base, k, s, 1) for s in seeds))]
        if k == _longest(line):
            rows.append(Row(LONGER_BASE, tuple(line.tune(base, k, s, 1, tokens=form.tokens) for s in seeds),
                            tokens=form.tokens))
        rows.append(Row(TUNED, tuple(line.tune(line.cprec(s), k, s, 1) for s in seeds),
                        tuple(r.label for r in rows), form.tokens))
        shots = "all documents" if k == "all" else f"{k} documents"
        found.append(Table(f"shots_{k}", 1, f"Fine-tuned on {shots} of each domain", tuple(line.tuned_domains),
                           tuple(rows)))
    return found


def _all_domain_helps(line: Line) -> list[Table]:
    """Claim 2: which histories, and whether their order counts."""
    arms: list[tuple[str, str, dict[str, float], str]] = [
        ("specific", SPECIFIC, {"specific/*": 1.0}, "main"),
        ("mixed", MIXED, {"mixed": 1.0}, "main"),
        ("single", f"one domain ({line.world.single})", {f"specific/{line.world.single}": 1.0}, "main"),
        ("shuffled", SHUFFLED, BOTH, "shuffled"),
        ("titles", TITLES, BOTH, "titles")]
    rows = [Row(CPREC, _cprec(line, 2), tokens=line.form.tokens)]
    for name, label, mix, prepared in arms:
        models = [line.pretrain(name, mix, seed=s, prepared=prepared) for s in range(line.form.seeds)]
        rows.append(Row(label, _ranked(line, models, 2), (CPREC,), line.form.tokens))
    return [Table("corpora", 2, "What is learned from, zero-shot", tuple(line.world.unseen), tuple(rows))]


def _wsa_helps(line: Line) -> list[Table]:
    """Claim 3: the schedule, at the same tokens and peak; the shape and length of the annealing; and after
    fine-tuning."""
    form, seeds = line.form, range(line.form.seeds)
    rows = [Row(CPREC, _cprec(line, 3), tokens=form.tokens)]
    decays = {kind: [line.pretrain(kind, BOTH, seed=s, schedule={"schedule.kind": kind}) for s in seeds]
              for kind in ("cosine", "linear")}
    rows += [Row(label, _ranked(line, decays[kind], 3), (CPREC,), form.tokens)
             for kind, label in (("cosine", COSINE), ("linear", LINEAR))]
    ends = [line.mark(1.0, s) for s in seeds]
    rows.append(Row(CONSTANT, _ranked(line, ends, 3), (CPREC,), form.tokens))
    for shape, share in (("linear", 0.1), ("cosine", 0.1), ("sqrt", 0.05), ("sqrt", 0.2)):
        rows.append(Row(f"WSA, {shape} over the last {share:.0%}", _ranked(line, [line.branch(shape, share)], 3),
                        (CPREC,), form.tokens))
    k = _longest(line)
    tuned = [Row(TUNED, tuple(line.tune(line.cprec(s), k, s, 3) for s in seeds), tokens=form.tokens),
             Row(CONSTANT_TUNED, tuple(line.tune(ends[s], k, s, 3) for s in seeds), (TUNED,), form.tokens)]
    return [Table("schedules", 3, "Learning rate schedules, zero-shot", tuple(line.world.unseen), tuple(rows)),
            Table("schedules_tuned", 3, f"... and after fine-tuning on {k} documents", tuple(line.tuned_domains),
                  tuple(tuned))]


def _scaling(line: Line) -> list[Table]:
    """Claim 4: tokens seen (stable checkpoints of one trunk), and number of domains (their own histories only)."""
    base, form = line.base_model(), line.form
    start = Row(BASE, (line.rank(base, 4, measure=True),), x=0, is_fixed=True)
    by_tokens = [start]
    for share in (0.25, 0.5, 0.75, 1.0):
        n = round(share * form.train.steps) * form.tokens_per_step
        by_tokens.append(Row(f"trunk after {n:,} tokens", (line.rank(line.mark(share), 4, measure=True),), (BASE,), n,
                             x=n))
    counts: list[tuple[str, dict[str, float], int]] = [
        ("single", {f"specific/{line.world.single}": 1.0}, 1),
        ("few", {f"specific/{d}": 1.0 for d in line.world.few}, len(line.world.few)),
        ("specific", {"specific/*": 1.0}, len(line.world.pretrain))]
    by_domains = [start]
    for name, mix, n_domains in counts:
        models = [line.pretrain(name, mix, seed=s) for s in range(form.seeds)]
        answers = tuple(line.rank(m, 4, measure=s == 0) for s, m in enumerate(models))
        against = (BASE,) if n_domains == 1 else (BASE, _n_domains(1))
        by_domains.append(Row(_n_domains(n_domains), answers, against, form.tokens, x=n_domains))
    unseen = tuple(line.world.unseen)
    return [Table("tokens", 4, "Tokens seen", unseen, tuple(by_tokens), "tokens of pre-training"),
            Table("domains", 4, "Number of pre-training domains, at the same tokens", unseen, tuple(by_domains),
                  "pre-training domains")]


def _forgetting(line: Line) -> list[Table]:
    """Claim 5: plain text before and after, with shares of it in the mixture."""
    form = line.form
    rows = [Row(BASE, (line.rank(line.base_model(), 5, measure=True),), is_fixed=True),
            Row("CPRec, no replay", (line.rank(line.cprec(0), 5, measure=True),), (BASE,), form.tokens)]
    for percent in (1, 5):
        share = percent / 100
        mix = {"specific/*": (1 - share) / 2, "mixed": (1 - share) / 2, "replay/learned": share}
        model = line.pretrain(f"replay{percent}", mix, seed=0)
        rows.append(Row(f"CPRec, {percent} % replay", (line.rank(model, 5, measure=True),), ("CPRec, no replay",),
                        form.tokens))
    return [Table("forgetting", 5, "Plain text before and after", tuple(line.world.unseen), tuple(rows))]


def _cprec(line: Line, claim: int) -> tuple[Answers, ...]:
    return _ranked(line, [line.cprec(s) for s in range(line.form.seeds)], claim)


def _ranked(line: Line, models: Sequence[Model], claim: int) -> tuple[Answers, ...]:
    return tuple(line.rank(m, claim) for m in models)


