"""The main job from end to end on real data: prepare, pre-train, anneal twice, export, rank, and show the result.

    python launch/quickstart.py [--model small|smollm2]

Every step is a launch script that a user would type; the commands are printed. Stopped at any point, the same command
goes on: each script knows what of its work is done. Ends with a table and the paths of the pictures.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cprec import cli
from cprec.errors import CPRecError
from cprec.launcher import free_port
from cprec.log import get_logger
from cprec.process import die_with_parent, only_writer

log = get_logger(__name__)
REPO = Path(__file__).resolve().parents[1]
RANKS = "2"


class StepError(CPRecError):
    """A step of the line ended with an error of its own, which it has printed."""


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models."""

    run_config: str
    prepare: list[str]
    """Overrides of the preparation's config."""
    anneal_steps: str
    stable_step: int


RECIPES = {
    "small": Recipe("launch/configs/quickstart.yaml", [], "40", 200),
    "smollm2": Recipe("launch/configs/quickstart-smollm2.yaml", [
        "tokenizer={path: work/smollm2/base}", "pack.seq_len=512", "queries.max_per_domain=2"], "4", 12),
}


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", choices=RECIPES, default="small", help="small: from scratch; smollm2: pretrained")
    args = parser.parse_args()
    os.chdir(REPO)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ[cli.END_WITH] = str(os.getpid())
    if "MAKELEVEL" in os.environ:
        die_with_parent(signal.SIGKILL)
    work = Path("work") / ("quickstart" if args.model == "small" else args.model)
    started = time.monotonic()
    with only_writer(work, wait_s=5):
        run_line(work, args.model, RECIPES[args.model])
        show(work)
    log.info("done in %.1f min", (time.monotonic() - started) / 60)


def run_line(work: Path, model: str, recipe: Recipe) -> None:
    """Stages 1 to 12, each by its own script."""
    base, prepared, trunk, queries = work / "base", work / "prepared", work / "trunk", work / "prepared/queries"
    prepare = ["python", "launch/prepare.py", "--config", "data_prep/configs/complete_journey.yaml", f"out={prepared}",
               *recipe.prepare]
    if model == "smollm2":  # its tokenizer is needed to prepare; the small model's is trained on the catalogue
        step("base model", ["python", "launch/base_model.py", "smollm2", "--out", str(base)])
        step("prepare", prepare)
    else:
        step("prepare", prepare)
        step("base model", ["python", "launch/base_model.py", "small", "--tokenizer", str(prepared / "tokenizer"),
                            "--out", str(base)])
    deepspeed = ["deepspeed", "--num_accelerators", RANKS, "--master_port", free_port()]
    step("pre-train", [*deepspeed, "launch/pretrain.py", "--config", recipe.run_config])
    models = {"before": base, "stable": trunk / "hf"}
    stable = f"{trunk}@{recipe.stable_step}"
    step("export", ["python", "launch/export.py", "--from", stable, "--out", str(trunk / "hf")])
    for shape in ("sqrt", "linear"):
        branch = work / shape
        step(f"anneal {shape}", [*deepspeed, "launch/anneal.py", "--from", stable, "--steps", recipe.anneal_steps,
                                 "--shape", shape, "--final-lr-ratio", "0", "--run-dir", str(branch)])
        step("export", ["python", "launch/export.py", "--from", str(branch), "--out", str(branch / "hf")])
        models[shape] = branch / "hf"
    step("rank popularity", ["python", "launch/rank.py", "--baseline", "popularity", "--queries", str(queries), "--out",
                             str(work / "eval/popularity")])
    for name, folder in models.items():
        step(f"rank {name}", ["torchrun", "--standalone", "--nproc_per_node", RANKS, "launch/rank.py", "--model",
                              str(folder), "--queries", str(queries), "--out", str(work / "eval" / name)])


def step(label: str, command: list[str]) -> None:
    """Run one command of the line, or raise StepError with how to go on."""
    print(f"\n=== {label}: {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable if command[0] == "python" else command[0], *command[1:]],
                               preexec_fn=lambda: die_with_parent(signal.SIGKILL))
    if process.wait():
        raise StepError(f"{label} ended with exit code {process.returncode}: its message is above; once that is "
                        f"mended, the same command goes on from here")


def show(work: Path) -> None:
    """The table over all models and the pictures; prints where they are."""
    from cprec.eval.comparison import make_report
    from cprec.eval.report import to_text, write_report
    from cprec.plots import plot_learning_rates, plot_packing, plot_validation

    evals = {name: work / "eval" / name for name in ("popularity", "before", "stable", "sqrt", "linear")}
    report = make_report(evals, reference="before")
    write_report(report, work / "report")
    runs = {"trunk": work / "trunk", "anneal sqrt": work / "sqrt", "anneal linear": work / "linear"}
    plot_validation(runs, work / "report/validation_loss.png")
    plot_learning_rates(runs, work / "report/learning_rate.png")
    plot_packing(work / "prepared/packed", work / "report/packing.png")
    print("\n" + to_text(report))
    print("\nreport and pictures:")
    for path in sorted((work / "report").iterdir()):
        print(f"  {path}")


if __name__ == "__main__":
    cli.run(main)
