"""What the benchmark measured, as Markdown tables.

reads: the results of `benchmarks/reader/run.py` as JSON values. writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.reader.balance import Spread


def tables(found: dict[str, Any]) -> str:
    """The machine, then one section per part that was measured."""
    lines = [*machine(found)]
    for name, section in (("cases", cases), ("same_rows", same_rows), ("spread", spread)):
        if name in found:
            lines += ["", *section(found[name])]
    return "\n".join(lines)


def machine(found: dict[str, Any]) -> Iterator[str]:
    m, data = found["machine"], found["data"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield (f"Measured on {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, commit {m['commit']}; Python "
           f"{m['python']}, {versions}. Rows: {data['rows']}, of {data['seq_len']} tokens; micro-batches of "
           f"{data['micro_batch_size']} rows; {data['corpora']}. Medians of {data['repeats']} fresh processes a side, "
           f"the sides in turn.")


def cases(part: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One table per case, every setup a line."""
    for case in part:
        yield from head(case["case"], ["side", "rows/s", "million tokens/s", "ours is", "first batch ms", "imports s",
                                       "anonymous MB (before opening)", "file MB", "files in page cache"])
        ours = next((s["rows_per_s"] for s in case["setups"] if s["side"] == "ours" and s["rows_per_s"]), None)
        for s in case["setups"]:
            if s["failed"]:
                yield row([s["label"], f"FAILED: {' '.join(s['failed'].split())[-200:]}", *[""] * 7])
                continue
            rate = s["rows_per_s"]
            yield row([s["label"], f"{rate:,.0f}" if rate else "", f"{rate * case['seq_len'] / 1e6:,.1f}" if rate
                       else "", f"{ours / rate:,.2f} x" if rate and ours else "", f"{s['first_batch_ms']:,.1f}",
                       f"{s['imports_s']:.1f}", f"{s['anon_mb']:,.0f} ({s['anon_before_mb']:,.0f})",
                       f"{s['file_mb']:,.0f}", f"{s['cached']:.0%}"])
        yield ""
        for name, why in case["skipped"].items():
            yield f"{name}: SKIPPED, {why}."


def same_rows(part: dict[str, dict[str, bool | str]]) -> Iterator[str]:
    yield from head("An epoch holds every row once", ["side", "1 rank", "2 ranks", "rows left after resuming"])
    for label, ok in part.items():
        cells = ["yes" if v is True else "NO" if v is False else f"FAILED: {' '.join(v.split())[-200:]}"
                 for v in ok.values()]
        yield row([label, *cells, *[""] * (3 - len(cells))])


def spread(part: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Slowest rank over the mean, before and after dealing; apart from the rest, where there is nothing to deal."""
    title = "Slowest rank over the mean, modelled FLOPs (Qwen2.5-1.5B)"
    shared, single = ([s for s in part if Spread(**s).has_choice is choice] for choice in (True, False))
    yield from spread_table(title, shared)
    if shared:
        yield ""
        yield (f"The worst of these, as drawn {max(s['before'] for s in shared):.4f} and as dealt "
               f"{max(s['after'] for s in shared):.4f}, are the headline: settings in which a rank has more than one "
               f"row per step.")
    if single:
        yield ""
        yield from spread_table(f"{title}: one row per rank and step, nothing to deal, not in the headline", single)


def spread_table(title: str, part: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from head(title, ["ranks", "micro-steps a step", "rows a micro-batch", "as drawn", "as dealt",
                            "worst as drawn", "worst as dealt", "attention alone, as drawn", "as dealt"])
    for s in part:
        yield row([f"{s['world_size']}", f"{s['grad_accum_steps']}", f"{s['micro_batch_size']}",
                   *(f"{s[name]:.4f}" for name in ("before", "after", "worst_before", "worst_after",
                                                   "attention_before", "attention_after"))])


def head(title: str, columns: Sequence[str]) -> Iterator[str]:
    yield f"### {title}"
    yield ""
    yield row(columns)
    yield "|" + "---|" * len(columns)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
