"""Pictures of runs and of packed data. The only module that draws.

reads: run folders (`config.yaml`, `metrics.jsonl`), packed corpora. writes: PNG files, one per call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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


def _save(fig: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)
