"""Pictures of runs and of packed data. The only module that draws.

reads: run folders (`config.yaml`, `metrics.jsonl`), packed corpora. writes: PNG files, one per call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

from cprec.format import PackedCorpus, list_corpora
from cprec.train.metrics import read_metrics

PathLike = str | os.PathLike[str]
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class FamilyLine:
    """A run in the picture of its family: from `first_step` to `step` of `last_step`; `parent` is its parent's name.

    The points are (step, value): learning rate and training loss as logged, validation loss.
    """

    name: str
    parent: str | None
    first_step: int
    step: int
    last_step: int
    lr: Points
    loss: Points
    validation: Points


def plot_validation(runs: Mapping[str, PathLike], out: Path) -> None:
    """Validation loss over the steps, one panel per corpus; branches start where they left the trunk."""
    logs = {name: _validations(run) for name, run in runs.items()}
    corpora = sorted({c for log in logs.values() for r in log for c in r["loss_by_corpus"]})
    n_columns = min(4, len(corpora))
    n_rows = -(-len(corpora) // n_columns)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(3.2 * n_columns, 2.5 * n_rows), squeeze=False, sharex=True)
    for ax, corpus in zip(axes.flat, corpora, strict=False):
        for name, log in logs.items():
            at = [(r["step"], r["loss_by_corpus"][corpus]) for r in log]
            ax.plot(*zip(*at, strict=True), marker=".", label=name)
        ax.set_title(corpus.removeprefix("valid/"), fontsize=9)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(corpora):]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("nats per token")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    fig.suptitle(" ")  # room for the legend
    _save(fig, out)


def _validations(run: PathLike) -> list[dict[str, Any]]:
    """Validation records of a run, from its parent's at the fork on where it is a branch."""
    parent = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))["parent"]
    at_fork = [r for r in _validations(parent["run_dir"]) if r["step"] == parent["step"]] if parent else []
    return at_fork + [r for r in read_metrics(run) if r["kind"] == "valid"]


def plot_learning_rates(runs: Mapping[str, PathLike], out: Path) -> None:
    """Learning rate as it was used, trunk and branches in one panel."""
    fig, ax = plt.subplots(figsize=(7, 3))
    for name, run in runs.items():
        log = [r for r in read_metrics(run) if r["kind"] == "train"]
        ax.plot([r["step"] for r in log], [r["lr"] for r in log], label=name)
    ax.set_xlabel("step")
    ax.set_ylabel("learning rate")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    _save(fig, out)


def plot_family(lines: Sequence[FamilyLine], out: Path) -> None:
    """The tree of runs, their learning rates and their losses over the steps, one under another; branches leave the
    trunk at their fork. What a run has still to do is dotted."""
    height = 0.6 + 0.26 * len(lines)
    fig, (tree, rates, losses) = plt.subplots(
        3, 1, figsize=(9, height + 6), sharex=True, height_ratios=[height, 2.2, 3.4])
    row = {line.name: -i for i, line in enumerate(lines)}
    colors = plt.get_cmap("tab10").colors if len(lines) <= 10 else plt.get_cmap("turbo")(np.linspace(0, 1, len(lines)))
    for line, color in zip(lines, colors, strict=False):
        y = row[line.name]
        if line.parent in row:
            tree.plot([line.first_step] * 2, [row[line.parent], y], color=color, lw=1)
        tree.plot([line.first_step, line.step], [y, y], color=color, lw=3, solid_capstyle="butt")
        tree.plot([line.step, line.last_step], [y, y], color=color, lw=1, ls=":")
        tree.annotate(line.name, (max(line.step, line.last_step), y), (4, 0), textcoords="offset points", fontsize=8,
                      va="center")
        for ax, points, style in ((rates, line.lr, {}), (losses, line.loss, {"lw": 0.8, "alpha": 0.5}),
                                  (losses, line.validation, {"marker": "o", "ms": 3, "lw": 1.5, "label": line.name})):
            if points:
                ax.plot(*zip(*points, strict=True), color=color, **style)
    tree.set_yticks([])
    tree.margins(x=0.2, y=0.5 / max(len(lines), 1))
    tree.set_title("runs: solid as far as they are, dotted what is left", fontsize=9)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    losses.set_ylabel("nats per token")
    losses.set_xlabel("step")
    losses.set_title("loss: thin in training, with dots on the validation corpora", fontsize=9)
    for ax in (tree, rates, losses):
        ax.grid(alpha=0.3)
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False, fontsize=8)
    _save(fig, out)


def plot_packing(packed: PathLike, out: Path) -> None:
    """Share of real tokens per corpus, and how long its documents are."""
    corpora = [PackedCorpus(Path(packed) / name) for name in list_corpora(packed)]
    names = [c.manifest.corpus for c in corpora]
    lens = [np.concatenate([row.real_doc_lens for row in c]) for c in corpora]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 0.6 + 0.3 * len(corpora)), sharey=True)
    left.barh(names, [100 * c.manifest.fill for c in corpora], color="tab:blue")
    for i, c in enumerate(corpora):
        left.text(101, i, f"{100 * c.manifest.fill:.2f}", va="center", fontsize=8)
    left.set_xlim(0, 120)
    left.set_xlabel("real tokens, % of the rows")
    right.boxplot(lens, orientation="horizontal", positions=range(len(names)), showfliers=False)
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("document length, tokens")
    left.invert_yaxis()
    _save(fig, out)


@dataclass(frozen=True)
class Mark:
    """A number with its interval."""

    label: str
    mean: float
    low: float
    high: float


def plot_marks(panels: Mapping[str, Sequence[Mark]], out: Path, *,
               lines: Mapping[str, float] | None = None) -> None:
    """One panel per title, a number with its interval a line; `lines`: a value to hold a panel's numbers against."""
    n_columns = min(2, len(panels))
    n_rows, longest = -(-len(panels) // n_columns), max(len(marks) for marks in panels.values())
    size = (4.6 * n_columns, n_rows * (0.9 + 0.28 * longest))
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    for ax, (title, marks) in zip(axes.flat, panels.items(), strict=False):
        mean, low, high = np.array([(m.mean, m.low, m.high) for m in marks]).T
        ax.errorbar(mean, range(len(marks)), xerr=np.maximum([mean - low, high - mean], 0), fmt="o", capsize=3)
        ax.set_yticks(range(len(marks)), [m.label for m in marks], fontsize=8)
        ax.set_ylim(len(marks) - 0.5, -0.5)
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3, axis="x")
        if lines and title in lines:
            ax.axvline(lines[title], color="gray", linestyle="--", linewidth=1)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    _save(fig, out)


def plot_curves(panels: Mapping[str, Sequence[tuple[float, float, float, float]]], out: Path, *, x_label: str) -> None:
    """One panel per title: a value with its interval, points of (x, mean, low, high), over what is counted on x."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 2.8), squeeze=False)
    for ax, (title, points) in zip(axes.flat, panels.items(), strict=True):
        if points:
            x, mean, low, high = np.array(sorted(points)).T
            ax.fill_between(x, low, high, alpha=0.2)
            ax.plot(x, mean, marker="o", ms=4)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(x_label)
        ax.grid(alpha=0.3)
    _save(fig, out)


def _save(fig: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)
