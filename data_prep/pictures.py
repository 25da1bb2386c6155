"""The pictures of a preparation's report. The only module of the preparation that draws.

reads: nothing. writes: PNG files, one per call; what they show comes counted. Costs about a second each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from cprec.format import Manifest

Matrix = npt.NDArray[np.int64]
MOST_CELLS = 14
"""Domains up to which a heat map says its numbers."""


def draw_tokens(manifests: Sequence[Manifest], path: Path) -> None:
    """Tokens of every corpus, and how full its rows are."""
    names = [_plain(m.corpus) for m in manifests]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 0.9 + 0.26 * len(names)), sharey=True)
    colours = ["tab:blue" if m.kind == "train" else "tab:gray" for m in manifests]
    left.barh(names, [max(m.n_tokens, 1) for m in manifests], color=colours)
    left.set_xscale("log")
    left.set_xlabel("tokens")
    right.barh(names, [100 * m.fill for m in manifests], color=colours)
    for i, m in enumerate(manifests):
        right.text(101, i, f"{100 * m.fill:.2f}", va="center", fontsize=8)
    right.set_xlim(0, 118)
    right.set_xlabel("real tokens, % of the rows")
    left.invert_yaxis()
    _save(fig, path)


def draw_lengths(lengths: Mapping[str, Mapping[int, int]], path: Path) -> None:
    """Histogram of the histories' lengths, one panel per corpus: `lengths` is corpus -> items -> histories."""
    n_columns = min(4, len(lengths))
    n_rows = -(-len(lengths) // n_columns)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(2.6 * n_columns, 1.9 * n_rows), squeeze=False)
    for ax in axes.flat[len(lengths):]:
        ax.set_axis_off()
    for ax, (corpus, counted) in zip(axes.flat, lengths.items(), strict=False):
        ax.bar(list(counted), list(counted.values()), width=1.0)
        ax.set_title(_plain(corpus), fontsize=9)
        ax.tick_params(labelsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("items", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("histories", fontsize=8)
    _save(fig, path)


def draw_overlap(domains: Sequence[str], shared: Mapping[str, Matrix], path: Path) -> None:
    """Heat maps of what domains share: a cell is the share of the row's users (or titles) that the column's has too."""
    size = 1.6 + 0.42 * len(domains)
    fig, axes = plt.subplots(1, len(shared), figsize=(size * len(shared) + 1, size), squeeze=False, sharey=True)
    for ax, (what, counts) in zip(axes[0], shared.items(), strict=True):
        share = 100 * counts / np.maximum(np.diag(counts), 1)[:, None]
        picture = ax.imshow(share, vmin=0, vmax=100, cmap="Blues")
        ax.set_title(f"{what} of the row that the column has, %", fontsize=9)
        ax.set_xticks(range(len(domains)), map(_plain, domains), rotation=90, fontsize=8)
        ax.set_yticks(range(len(domains)), map(_plain, domains), fontsize=8)
        for (i, j), value in np.ndenumerate(share if len(domains) <= MOST_CELLS else np.zeros((0, 0))):
            text = "" if counts[i, j] == 0 else f"{value:.0f}" if value >= 1 else "<1"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if value > 55 else "black")
        fig.colorbar(picture, ax=ax, fraction=0.046, pad=0.04)
    _save(fig, path)


def draw_times(by_domain: Mapping[str, Mapping[int, int]], clocks: Mapping[str, int], path: Path) -> None:
    """Events over time, stacked by domain: `by_domain` is domain -> day since 1970 -> events; `clocks` are in ms."""
    days = [d for counted in by_domain.values() for d in counted]
    first, last = min(days), max(days)
    n_days = next((n for n, most in ((1, 120), (7, 3 * 366)) if last - first < most), 30)
    edges = first + n_days * np.arange((last - first) // n_days + 2)
    fig, ax = plt.subplots(figsize=(9, 3.2))
    at = (edges[:-1] * 86_400).astype("datetime64[s]")
    bottom = np.zeros(len(at))
    colours = plt.get_cmap("tab20")
    for i, (domain, counted) in enumerate(by_domain.items()):
        n, _ = np.histogram(list(counted), bins=edges, weights=list(counted.values()))
        ax.bar(at, n, bottom=bottom, width=np.timedelta64(n_days, "D"), align="edge", label=_plain(domain),
               color=colours(i % 20))
        bottom += n
    for (name, ms), style in zip(clocks.items(), ("--", ":"), strict=True):
        ax.axvline(np.datetime64(ms, "ms"), color="black", linestyle=style, label=name)
    ax.set_ylabel(f"events in {n_days} days" if n_days > 1 else "events a day")
    ax.legend(fontsize=7, ncols=1 + len(by_domain) // 16, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    fig.autofmt_xdate()
    _save(fig, path)


def _plain(name: str) -> str:
    """The name as it is: matplotlib takes text between two `$` for a formula and hides what starts with `_`."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _save(fig: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(fig)
