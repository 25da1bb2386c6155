"""A grid of annealings of one stable checkpoint: planned, run one after the other, or listed for a SLURM array job.

reads: the checkpoint, and what its branches have left from before. writes: below the sweep's folder a run folder
`<name>/` and a log `<name>.log` per annealing (launch/anneal.py does), `commands-<hash>.txt` for SLURM; in the trunk's
`branches/` a lease on the checkpoint. The grid is checked as a whole before anything starts.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import xxhash

from cprec.cli import weights
from cprec.config import Length, RunConfig
from cprec.data.corpora import find_corpora
from cprec.data.sampler import matching
from cprec.errors import EXIT_REQUEUE, ConfigError, CPRecError, raise_all
from cprec.format import write_atomically
from cprec.log import get_logger
from cprec.process import die_with_parent
from cprec.train.branch import Annealing, annealing_config
from cprec.train.checkpoint import CONFIG, Checkpoint, list_checkpoints, read_checkpoint, read_run_config
from cprec.train.metrics import read_metrics
from cprec.train.retention import lease

log = get_logger(__name__)
TRUNK = "trunk"
"""The mixture that is the trunk's own."""
JobState = Literal["finished", "skipped", "failed", "stopped", "to do"]


@dataclass(frozen=True)
class Grid:
    """What the annealings differ in, and what they have in common. A mixture is `CORPUS=WEIGHT,...` or TRUNK."""

    lengths: Sequence[Length]
    shapes: Sequence[str] = ("sqrt",)
    mixes: Sequence[str] = (TRUNK,)
    seeds: Sequence[int | None] = (None,)
    final_lr_ratio: float = 0.1
    packed: Sequence[str] = ()
    """Read by those annealings whose mixture names something of it."""
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """One annealing. `arguments` are those of launch/anneal.py; it is finished once it has a checkpoint of its end."""

    name: str
    run_dir: Path
    arguments: list[str]
    last_step: int

    @property
    def is_finished(self) -> bool:
        return any(c.state.step >= self.last_step for c in list_checkpoints(self.run_dir)[-1:])


@dataclass(frozen=True)
class Outcome:
    """What became of a job: `exit_code` and `seconds` of the one that was run."""

    job: Job
    state: JobState
    exit_code: int = 0
    seconds: float = 0.0


def plan_sweep(parent: Checkpoint, grid: Grid, out: Path) -> list[Job]:
    """A job for every point of the grid, in its order. Raises ConfigError listing every point that cannot be."""
    jobs, problems = [], []
    for shape, length, mix, seed in product(grid.shapes, grid.lengths, grid.mixes, grid.seeds):
        try:
            jobs.append(_job(parent, grid, out, shape, length, mix, seed))
        except CPRecError as e:
            problems.append(f"{shape}, {length.model_dump(exclude_none=True)}, {mix}: {e}")
    raise_all(problems, of="sweep")
    twice = sorted({j.name for j in jobs if [i.name for i in jobs].count(j.name) > 1})
    if twice:
        raise ConfigError(f"sweep: {', '.join(twice)} would be made twice; take out what the grid says twice")
    return jobs


def keep_parent(parent: Checkpoint, out: Path) -> None:
    """Have the trunk, which may go on training, keep `parent` for the branches below `out` that have not begun: as long
    as that folder is there. Raises CheckpointError when it was pruned in this very moment."""
    out.mkdir(parents=True, exist_ok=True)
    lease(parent.run_dir, parent.state.step, run_dir=out, is_of_sweep=True)
    read_checkpoint(parent.folder)


def _job(parent: Checkpoint, grid: Grid, out: Path, shape: str, length: Length, mix: str, seed: int | None) -> Job:
    wanted = None if mix == TRUNK else weights([mix])
    packed = [f for f in grid.packed if any(matching(p, find_corpora(f)) for p in wanted or {})]
    config = annealing_config(parent, Annealing(
        length, seed=seed, overrides=grid.overrides, pinned=True, shape=shape, final_lr_ratio=grid.final_lr_ratio,
        mix=wanted, packed=packed))
    assert config.schedule.anneal is not None
    steps, total = config.schedule.anneal.length.steps, config.schedule.total.steps
    assert steps is not None and total is not None
    slug = "" if wanted is None else "-" + re.sub(r"[^A-Za-z0-9.]+", "-", mix.replace("*", "all")).strip("-")
    name = f"{shape}-{steps}{slug}" + ("" if seed is None else f"-seed{seed}")
    arguments = ["--from", str(parent.folder), "--steps", str(steps), "--shape", shape,
                 "--final-lr-ratio", str(grid.final_lr_ratio), "--run-dir", str(out / name)]
    arguments += ["--mix", mix] if wanted else []
    arguments += [a for folder in packed for a in ("--packed", folder)]
    arguments += [] if seed is None else ["--seed", str(seed)]
    _refuse_another(out / name, config)
    return Job(name, out / name, [*arguments, *grid.overrides], total)


def _refuse_another(run_dir: Path, config: RunConfig) -> None:
    """What stands in a job's folder is that job: its name says neither the parent nor the last rate."""
    if not (run_dir / CONFIG).is_file():
        return
    there = read_run_config(run_dir)
    if there.parent is None:
        raise ConfigError(f"{run_dir} holds a run that is no branch; give this sweep another --out")
    assert config.parent is not None
    if (there.parent.state_hash, there.schedule.anneal) != (config.parent.state_hash, config.schedule.anneal):
        raise ConfigError(f"{run_dir} holds another annealing (of {there.parent.run_dir} at step "
                          f"{there.parent.step:,}, {there.schedule.text()}); give this sweep another --out")


def command_of(job: Job, launcher: str, script: Path) -> str:
    """The job as a line for a shell; `launcher` as its user wrote it."""
    return f"{launcher} {shlex.join([str(script), *job.arguments])}"


def run_sweep(jobs: Sequence[Job], launcher: str, script: Path) -> Iterator[Outcome]:
    """Run what is not finished, one after the other; what becomes of each job, as it does.

    A failed one does not keep the others from running; one that was asked to stop and saved does. If this process is
    ended, the job that runs saves and stops too.
    """
    stopped = False
    for job in jobs:
        if job.is_finished:
            yield Outcome(job, "skipped")
        elif stopped:
            yield Outcome(job, "to do")
        else:
            outcome = _run(job, launcher, script)
            stopped = outcome.state == "stopped"
            yield outcome


def _run(job: Job, launcher: str, script: Path) -> Outcome:
    path = log_of(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s: its log is %s", job.name, path)
    started = time.monotonic()
    with path.open("a", encoding="utf-8") as f:
        try:
            code = subprocess.run([*shlex.split(launcher), str(script), *job.arguments], stdout=f,
                                  stderr=subprocess.STDOUT, preexec_fn=lambda: die_with_parent(signal.SIGTERM)
                                  ).returncode
        except OSError as e:
            raise ConfigError(f"--launcher {launcher!r} cannot be started: {e.strerror}; give a command such as "
                              f"'deepspeed --num_gpus 8'") from None
    done = job.is_finished
    state: JobState = "finished" if done else "stopped" if code == EXIT_REQUEUE else "failed"
    if state == "failed":
        log.error("%s failed with exit code %d; the others go on; see %s", job.name, code, path)
    return Outcome(job, state, code, time.monotonic() - started)


def log_of(job: Job) -> Path:
    """Where a job that is run here writes what it says."""
    return job.run_dir.with_name(job.run_dir.name + ".log")


def write_commands(jobs: Sequence[Job], launcher: str, script: Path, out: Path) -> list[str]:
    """Write every job's command as a line of `out/commands-<hash>.txt`; what to submit for those to be run still. The
    hash is of the lines: an array that waits in a queue finds the ones that it was submitted with."""
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(command_of(job, launcher, script) + "\n" for job in jobs)
    path = out / f"commands-{xxhash.xxh3_64_hexdigest(text.encode())[:8]}.txt"
    write_atomically(path, text)
    left = ",".join(str(i) for i, job in enumerate(jobs) if not job.is_finished)
    return [f"--array={left}", str(script.parent / "slurm/sweep.sbatch"), str(path)] if left else []


def submission(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command that hands an array job to SLURM as the site asks for it, with further `options` of sbatch."""
    return [str(Path(arguments[1]).with_name("submit.sh")), *options, *arguments]


def submit(arguments: Sequence[str], options: Sequence[str]) -> str:
    """Hand an array job to SLURM, with further `options` of sbatch; what sbatch answers. Raises ConfigError."""
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm submit: there is no sbatch here; use --slurm write, and submit where there is one")
    done = subprocess.run(submission(arguments, options), capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip()


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table: each job, what became of it, its steps and its last validation loss."""
    lines = [("annealing", "state", "step", "valid. loss", "minutes", "")]
    for o in outcomes:
        records = read_metrics(o.job.run_dir)
        loss = next((f"{r['loss']:.4f}" for r in reversed(records) if r["kind"] == "valid"), "-")
        step = max((r["step"] for r in records), default="-")
        state = o.state if o.state != "failed" else f"failed ({o.exit_code})"
        lines.append((o.job.name, state, f"{step}", loss, f"{o.seconds / 60:.1f}" if o.seconds else "-",
                      str(log_of(o.job)) if o.state == "failed" else ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) if i in (0, 1, 5) else c.rjust(w) for i, (c, w) in
                               enumerate(zip(line, widths, strict=True))).rstrip() for line in lines)
