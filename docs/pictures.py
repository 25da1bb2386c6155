"""Draws the pictures of docs/concepts.md: each from the code that it explains, not from memory.

    python docs/pictures.py [FOLDER]

reads: nothing. writes: four small SVG files into FOLDER (docs/pictures), the same bytes every time. A test compares
them with what is committed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cprec.attention import Documents
from cprec.schedule import SHAPES, Schedule, decay
from data_prep.plan import PACK_MODES

FOLDER = Path(__file__).with_suffix("")
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Paul Tol's bright scheme, told apart by colour-blind readers too."""
GREY = "#bbbbbb"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "cprec", "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
         "axes.spines.right": False}
LENGTHS = (11, 7, 13, 4, 9, 16, 3, 8, 5, 12, 6, 2)
"""Tokens of twelve documents; rows are 16."""


def packing() -> Figure:
    """The same documents in rows of 16 tokens, by every mode of `pack.mode`."""
    lengths = np.array(LENGTHS, dtype=np.int64)
    fig = Figure(figsize=(8, 2.6), layout="constrained")
    axes = fig.subplots(1, 3, sharey=True)
    for ax, mode in zip(axes, ("one_per_row", "concat", "best_fit"), strict=True):
        plan = PACK_MODES[mode](lengths, seq_len=16)
        rows = np.repeat(np.arange(len(plan.pieces_per_row)), plan.pieces_per_row)
        for k, (row, doc, n) in enumerate(zip(rows.tolist(), plan.docs.tolist(), plan.n_tokens.tolist(), strict=True)):
            left = int(plan.n_tokens[:k][rows[:k] == row].sum())
            ax.barh(row, n, left=left, height=0.8, color=COLORS[doc % len(COLORS)], edgecolor="white")
            ax.text(left + n / 2, row, str(doc), ha="center", va="center", color="white", fontsize=7)
        n_rows = len(plan.pieces_per_row)
        ax.set_title(f"{mode}: {n_rows} rows, {1 - sum(LENGTHS) / (16 * n_rows):.0%} padding")
        ax.set_xlim(0, 16)
        ax.set_xlabel("token of the row")
    axes[0].set_ylabel("row")
    axes[0].invert_yaxis()
    return fig


def isolation() -> Figure:
    """Who sees whom in a row of three documents: without isolation, and as every backend here computes it."""
    borders = [0, 6, 10, 16]
    alone = Documents(torch.tensor(borders, dtype=torch.int32), 6).mask(None)
    fig = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    dense = torch.ones(16, 16, dtype=torch.bool).tril()
    for ax, seen, title in ((axes[0], dense, "rows as plain text"), (axes[1], alone, "documents isolated")):
        for token, line in enumerate(seen):
            own = int(alone[token].nonzero()[0])  # first of its own document that it sees; before it: others'
            first = int(line.nonzero()[0])
            ax.barh(token + 0.5, own - first, left=first, height=0.85, color=GREY)
            ax.barh(token + 0.5, token + 1 - own, left=own, height=0.85, color=COLORS[borders.index(own)])
        ax.set(xlim=(0, 16), ylim=(16, 0), aspect="equal", xlabel="is seen", title=f"{title}: {int(seen.sum())} pairs")
        ax.set_xticks(borders)
    axes[0].set_ylabel("token")
    axes[0].set_yticks(borders)
    return fig


def clock() -> Figure:
    """Events of eight people: split by everybody's last event, and by one clock for all."""
    rng = np.random.default_rng(7)
    people = [np.sort(rng.uniform(start, end, n)) for start, end, n in
              ((0, 40, 6), (5, 95, 9), (10, 60, 7), (30, 100, 8), (0, 75, 8), (50, 98, 7), (20, 88, 8), (60, 99, 6))]
    first_test = min(events[-1] for events in people)
    fig = Figure(figsize=(8, 2.8), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for y, events in enumerate(people):
        last = np.arange(len(events)) == len(events) - 1
        leak = ~last & (events > first_test)
        _dots(axes[0], y, {"learned from": events[~last & ~leak], "learned from, though later than a target":
                           events[leak], "target": events[last]})
        _dots(axes[1], y, {"learned from": events[events < 70], "validation": events[(events >= 70) & (events < 85)],
                           "test": events[events >= 85]})
    axes[0].axvline(first_test, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_xticks([first_test], ["first target"])
    axes[1].set_xticks([70, 85], ["t_valid", "t_test"])
    for t in (70, 85):
        axes[1].axvline(t, color="black", linewidth=0.8, linestyle=":")
    for ax, title in ((axes[0], "everybody's last event held out"), (axes[1], "one clock for all")):
        ax.set(title=title, xlabel="time", yticks=[], ylim=(7.6, -0.6))
        ax.legend(*_once(ax), loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=3, frameon=False, fontsize=7,
                  handletextpad=0.1, columnspacing=0.8)
    axes[0].set_ylabel("a person per line")
    return fig


def _dots(ax: Axes, y: int, parts: dict[str, np.ndarray]) -> None:
    for (name, times), color in zip(parts.items(), (GREY, COLORS[1], COLORS[0]), strict=True):
        ax.scatter(times, np.full_like(times, y), s=18, color=color, label=name)


def _once(ax: Axes) -> tuple[list[object], list[str]]:
    """The legend's handles and labels, each label once."""
    found = dict(zip(reversed(ax.get_legend_handles_labels()[1]), reversed(ax.get_legend_handles_labels()[0]),
                     strict=True))
    return list(reversed(found.values())), list(reversed(found))


def wsa() -> Figure:
    """One trunk and its branches, beside the cosine schedule that has to know its end before it starts."""
    trunk = Schedule(peak_lr=1.0, warmup_steps=50, total_steps=1000)
    fig = Figure(figsize=(8, 2.6), layout="constrained")
    (left, right) = fig.subplots(1, 2, width_ratios=(2, 1))
    steps = range(1000)
    left.plot(steps, [trunk.lr(s) for s in steps], color="black", label="trunk")
    for start, color in ((400, COLORS[0]), (800, COLORS[2])):
        branch = trunk.branch(start, 100, "sqrt", 0.1)
        left.plot(range(start, start + 101), [branch.lr(s) for s in range(start, start + 101)], color=color,
                  label=f"annealed from step {start}")
    cosine = decay(1.0, 50, 1000, "cosine", 0.1)
    left.plot(steps, [cosine.lr(s) for s in steps], color=GREY, linestyle="--", label="cosine over 1000 steps")
    left.set(xlabel="step", ylabel="learning rate / peak", ylim=(0, 1.05))
    left.legend(loc="lower left", fontsize=7, frameon=False, bbox_to_anchor=(0.06, 0))
    x = np.linspace(0, 1, 51)
    for (name, shape), color in zip(SHAPES.items(), COLORS, strict=False):
        right.plot(x, [shape(float(p), 0.1) for p in x], color=color, label=name)
    right.set(xlabel="share of the annealing", ylim=(0, 1.05))
    right.legend(fontsize=7, frameon=False)
    return fig


PICTURES: dict[str, Callable[[], Figure]] = {"packing": packing, "isolation": isolation, "clock": clock, "wsa": wsa}


def draw(folder: Path) -> None:
    """All pictures as `<name>.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            picture().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
