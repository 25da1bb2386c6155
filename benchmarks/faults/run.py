"""Kills training again and again, and looks each time whether anything but the last steps was lost.

    make soak KILLS=200                 # or: python -m benchmarks.faults.run --kills 200 [--seed 0] [--out docs]

Runs of the tests' tiny world, on one rank and on two, are killed at moments drawn from the seed, go on with the same
command, are killed again, until they are done, and begin anew. After every fault all of metrics.jsonl and every byte of
every complete checkpoint are compared with an unbroken run. The same command goes on where it was stopped itself.
reads: nothing but the repository; gcc. writes: the work folder; with --out, OUT/soak.json and the table in
OUT/reliability.md. Prints the table and, as its last line, one JSON object, for which `benchmarks.checkpoint` is run,
too. Costs: a few seconds per kill, two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.checks import Reference, examine, read_reference, resumed_at
from benchmarks.faults.lives import KILLED, REPO, Life, Moment, build_moments, fork, launch, stand_by
from benchmarks.reader.run import machine, say
from benchmarks.train.measure import versions
from cprec.errors import EXIT_REQUEUE
from cprec.train.metrics import read_metrics

STEPS, EVERY, STABLE_EVERY = 40, 2, 6
MARKS = "<!-- soak:begin -->", "<!-- soak:end -->"
FIRST_STEP_WITHIN_S = 200.0
TIME = "at a random time"
DECK = {  # cards of 50 kills and 4 requests to stop: (ranks, launcher, kind) -> how many
    (1, False, TIME): 10, (1, False, "mkdir"): 2, (1, False, "write"): 8, (1, False, "fsync"): 4,
    (1, False, "rename"): 5, (1, False, "unlink"): 6,
    (2, False, "one rank, " + TIME): 4, (2, False, "both ranks, " + TIME): 3, (2, False, "one rank, write"): 2,
    (2, False, "one rank, fsync"): 1, (2, False, "one rank, rename"): 1, (2, False, "one rank, unlink"): 1,
    (2, True, "one rank, " + TIME): 1, (2, True, "everything, " + TIME): 2,
    (1, False, "SIGTERM"): 1, (1, False, "SIGUSR1"): 1, (2, False, "SIGTERM"): 1, (2, False, "SIGUSR1"): 1,
}
SAID = {"mkdir": "before a folder is made", "write": "in a write, half done", "fsync": "before a file is synced",
        "rename": "before a file gets its name", "unlink": "before a file is removed (pruning, rests)"}
COUNTS = {"mkdir": 8, "write": 250, "fsync": 40, "rename": 14, "unlink": 24}
"""Of how many operations one is drawn: about as many as a run makes in the life of an average draw by time."""


@dataclass(frozen=True)
class Fault:
    """One card: what is done to which run."""

    n: int
    ranks: int
    launched: bool
    kind: str
    victim: int
    count: int
    """Of the file operations, which one."""
    in_start: bool
    """Of times: in the first seconds, before there is a step."""
    delay: float
    """Of times: in seconds from the start, or in steps from the first one that is logged."""

    @property
    def is_stop(self) -> bool:
        return self.kind.startswith("SIG")

    @property
    def operation(self) -> str | None:
        last = self.kind.split(", ")[-1]
        return last if last in COUNTS else None

    @property
    def row(self) -> str:
        """Its row of the table."""
        who = "`deepspeed`, 2 ranks" if self.launched else f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        *of, last = self.kind.split(", ")
        return ": ".join([who, ", ".join([*of, SAID.get(last, last)])])


def draw(seed: int, n: int) -> Fault:
    """The n-th fault of a seed: every deck holds each card, in an order of its own."""
    cards = [card for card, number in DECK.items() for _ in range(number)]
    deck, at = divmod(n, len(cards))
    random.Random(f"{seed} deck {deck}").shuffle(cards)
    ranks, launched, kind = cards[at]
    drawn = random.Random(f"{seed} fault {n}")
    operation = kind.split(", ")[-1]
    in_start = drawn.random() < 0.2 and not launched and not kind.startswith("SIG")
    return Fault(n, ranks, launched, kind, drawn.randrange(ranks), drawn.randint(1, COUNTS.get(operation, 1)), in_start,
                 drawn.uniform(0.0, 5.0 if in_start else 12.0))


@dataclass
class Outcome:
    """What became of one fault; a line of soak.jsonl."""

    n: int
    row: str
    is_stop: bool
    codes: list[int | None]
    newest: int
    """Newest complete checkpoint right after it."""
    steps_again: int
    """Steps that were logged and have to be done again."""
    other_losses: list[str]
    damaged: list[str]
    damaged_stable: list[str]
    resumed_at: int | None = None

    @property
    def is_well(self) -> bool:
        return (self.resumed_at == self.newest and not self.other_losses and not self.damaged
                and not self.damaged_stable and None not in self.codes)


@dataclass
class Course:
    """One run, on so many ranks, in the hands of the soak; `open_faults` wait to see from where it goes on."""

    config: Path
    run_dir: Path
    ranks: int
    reference: Reference
    step_s: float
    """Seconds per step of the unbroken run, saving included."""
    open_faults: list[Outcome] = field(default_factory=list)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=200, help="SIGKILLs; requests to stop (SIGTERM, SIGUSR1) come on top")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", type=Path, default=REPO / "work" / "soak")
    p.add_argument("--out", type=Path, help="folder of reliability.md: keep the table there")
    o = p.parse_args()
    here = machine() | {"versions": versions()}
    outcomes = soak(o.work.absolute() / f"{here['commit']}-seed-{o.seed}", seed=o.seed, kills=o.kills)
    last_line = headline(outcomes) | {"save_stall_vs_blocking": save_stall()}
    found = {"machine": here, "seed": o.seed, **last_line, "table": table(outcomes)}
    print("\n" + found["table"], flush=True)
    if o.out is not None:
        keep(found, o.out)
    print(json.dumps(last_line))
    sys.exit(0 if all(outcome.is_well for outcome in outcomes) else 1)


def soak(work: Path, *, seed: int, kills: int) -> list[Outcome]:
    """Faults of `seed`, in order, until so many kills have struck; those of an earlier call are taken over."""
    work.mkdir(parents=True, exist_ok=True)
    log = work / "soak.jsonl"
    done = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    stand_by(build_moments(work))
    courses: dict[int, Course] = {}
    n = 1 + max((outcome.n for outcome in done), default=-1)
    while sum(not outcome.is_stop for outcome in done) < kills:
        fault = draw(seed, n)
        n += 1
        if fault.ranks not in courses:
            courses[fault.ranks] = _course(work, fault.ranks)
        for outcome in _inject(courses[fault.ranks], fault, work):
            done.append(outcome)
            with log.open("a") as f:
                f.write(json.dumps(asdict(outcome)) + "\n")
            if not outcome.is_well:
                say(f"NOT WELL: {outcome}")
        if n % 10 == 0:
            say(f"{sum(not outcome.is_stop for outcome in done)} of {kills} kills")
    return done


def _course(work: Path, ranks: int) -> Course:
    """The unbroken run, trained on the first call, and the config of the one that will be killed."""
    sys.path.insert(0, str(REPO / "tests" / "train"))
    from tiny import write_world

    world, unbroken = work / f"world-{ranks}", work / f"unbroken-{ranks}"
    if not (world / "world.yaml").exists():
        shutil.rmtree(world, ignore_errors=True)
        values = write_world(world) | {
            "schedule": {"total": {"steps": STEPS}, "warmup": {"steps": 2}}, "validation": {"every": 10},
            "checkpoint": {"every": EVERY, "keep_last": 2, "keep_stable_every": STABLE_EVERY}}
        (world / "world.yaml").write_text(yaml.safe_dump(values))
    values = yaml.safe_load((world / "world.yaml").read_text())
    config, run_dir = work / f"run-{ranks}.yaml", work / f"run-{ranks}"
    config.write_text(yaml.safe_dump(values | {"run_dir": str(run_dir)}))
    if not (unbroken / "checkpoints" / f"step_{STEPS:08d}" / "state.json").exists():
        shutil.rmtree(unbroken, ignore_errors=True)
    whole = work / f"unbroken-{ranks}.yaml"
    whole.write_text(yaml.safe_dump(values | {"run_dir": str(unbroken),
                                              "checkpoint": {"every": 1, "keep_last": STEPS}}))
    life = fork(whole, work / f"unbroken-{ranks}.log", ranks=ranks)
    assert life.end() == [0] * ranks, life.said()
    seconds = [r["step_s"] + r["time_s"]["checkpoint"] for r in read_metrics(unbroken) if r["kind"] == "train"]
    return Course(config, run_dir, ranks, read_reference(unbroken), statistics.median(seconds))


def _inject(course: Course, fault: Fault, work: Path) -> list[Outcome]:
    """Start the run, strike, look; the outcomes that are known now, since the run has told from where it goes on."""
    life, struck = _strike(course, fault, work / f"life-{course.ranks}.log")
    codes = life.end()
    said = life.said()
    known = _settle(course, resumed_at(said))
    found = examine(course.run_dir, course.reference, stable_every=STABLE_EVERY)
    outcome = Outcome(fault.n, fault.row, fault.is_stop, codes, found.newest, found.logged - found.newest,
                      found.other_losses, found.damaged, found.damaged_stable)
    if codes and set(codes) == {0}:
        _begin_anew(course, outcome)
    elif struck and (KILLED in codes or None in codes or fault.launched or set(codes) <= _codes_of_stop(fault)):
        course.open_faults.append(outcome)
    else:
        raise RuntimeError(f"{fault} did not strike, and yet the run ended with {codes}:\n{said[-3000:]}")
    return known


def _codes_of_stop(fault: Fault) -> set[int | None]:
    """How ranks end that are asked to: while they train, or when they have done so."""
    return {EXIT_REQUEUE, -signal.Signals[fault.kind]} if fault.is_stop else set()


def _strike(course: Course, fault: Fault, log: Path) -> tuple[Life, bool]:
    """A life of the run, and whether it was, or may have been, struck."""
    if fault.operation:
        moment = Moment(fault.operation, f"{course.run_dir}/", fault.count)
        return fork(course.config, log, ranks=course.ranks, moment=moment, dying_rank=fault.victim), True
    life: Life = launch(course.config, log) if fault.launched else fork(course.config, log, ranks=course.ranks)
    if not fault.in_start:
        before = _logged(course)
        _wait(life, FIRST_STEP_WITHIN_S, until=lambda: _logged(course) != before)
    _wait(life, fault.delay * (1.0 if fault.in_start else course.step_s))
    if life.is_over():
        return life, False
    if fault.is_stop:
        life.signal(signal.Signals[fault.kind])
    else:
        life.kill(fault.victim if "one rank" in fault.kind else None)
    return life, True


def _logged(course: Course) -> bytes:
    path = course.run_dir / "metrics.jsonl"
    return path.read_bytes()[-200:] if path.exists() else b""


def _wait(life: Life, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not life.is_over() and not until():
        time.sleep(0.002)


def _settle(course: Course, resumed: int | None) -> list[Outcome]:
    """The open faults, once a later life has come so far as to say from where it goes on."""
    if resumed is None:
        return []
    settled, course.open_faults = course.open_faults, []
    for outcome in settled:
        outcome.resumed_at = resumed
    return settled


def _begin_anew(course: Course, last: Outcome) -> None:
    """Remove a run that came to its end; RuntimeError if it is not all that the unbroken run is."""
    n_records = len(course.reference.losses)
    if last.newest != STEPS or len(read_metrics(course.run_dir)) != n_records or last.other_losses or last.damaged:
        raise RuntimeError(f"{course.run_dir} ended with code 0, but {last}")
    shutil.rmtree(course.run_dir)


def headline(outcomes: list[Outcome]) -> dict[str, Any]:
    """The last line, as far as the faults go."""
    kills = [outcome for outcome in outcomes if not outcome.is_stop]
    return {
        "kills": len(kills), "resumed": sum(outcome.resumed_at == outcome.newest for outcome in kills),
        "losses_identical": not any(outcome.other_losses for outcome in outcomes),
        "damaged_stable_checkpoints": sum(len(outcome.damaged_stable) for outcome in outcomes),
    }


def save_stall() -> float | None:
    """For how long a save in the background holds up training, over a blocking one; None, and said, if that fails."""
    say("how long a save holds up training")
    done = subprocess.run([sys.executable, "-m", "benchmarks.checkpoint"], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        say(f"benchmarks.checkpoint FAILED: {done.stderr[-2000:]}")
        return None
    return float(json.loads(done.stdout.splitlines()[-1])["save_stall_vs_blocking"])


def table(outcomes: list[Outcome]) -> str:
    """One row per kind of fault, as Markdown."""
    lines = ["| fault | times | went on from the newest complete checkpoint | steps done again: median, most | "
             "other losses | damaged checkpoints | a rank hung |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in sorted({outcome.row for outcome in outcomes}):
        of = [outcome for outcome in outcomes if outcome.row == row]
        again = [outcome.steps_again for outcome in of]
        lines.append(f"| {row} | {len(of)} | {sum(o.resumed_at == o.newest for o in of)} | "
                     f"{statistics.median(again):g}, {max(again)} | {sum(bool(o.other_losses) for o in of)} | "
                     f"{sum(bool(o.damaged or o.damaged_stable) for o in of)} | {sum(None in o.codes for o in of)} |")
    return "\n".join(lines)


def keep(found: dict[str, Any], out: Path) -> None:
    """Write OUT/soak.json and the table between the marks of OUT/reliability.md."""
    (out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    m, (begin, end), page = found["machine"], MARKS, out / "reliability.md"
    v = m["versions"]
    text = (f"{found['kills']} kills, seed {found['seed']} ({m['cpu']}, {m['cores']} cores; python {m['python']}, "
            f"torch {v['torch']}, deepspeed {v['deepspeed']}; commit {m['commit']}; `make soak "
            f"KILLS={found['kills']}`).\n\n{found['table']}")
    page.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page.read_text(encoding="utf-8"),
                           flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
