"""What the benchmark measured, as Markdown tables.

reads: the results of `benchmarks/prep/run.py` as JSON values. writes: nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any


def tables(found: dict[str, Any]) -> str:
    """One section per part that was measured, the machine first."""
    parts = (("growth", growth), ("encode_pack", encode_pack), ("pipeline", pipeline), ("fill", fill))
    lines = [*machine(found)]
    for name, section in parts:
        if name in found:
            lines += ["", *section(found[name])]
    return "\n".join(lines)


def machine(found: dict[str, Any]) -> Iterator[str]:
    m, data = found["machine"], found["data"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield (f"Measured on {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, commit {m['commit']}; Python "
           f"{m['python']}, {versions}. Data: {data['name']} ({data['events']:,} events, {data['items']:,} items), "
           f"resampled; engine memory limit {found['memory_limit']}, rows of {found['seq_len']} tokens.")


def growth(part: dict[str, Any]) -> Iterator[str]:
    """Seconds and memory by size."""
    stages = [*part["sizes"][-1]["run"]["stage_seconds"]]
    yield from head("Growth", ["events", "tokens packed", "seconds", "peak MB", *(f"{s} s" for s in stages)])
    for size in part["sizes"]:
        run = size["run"]
        yield row([f"{size['n_events']:,}", f"{size['n_tokens']:,}", f"{run['seconds']:.1f}", f"{run['peak_mb']:,.0f}",
                   *(f"{run['stage_seconds'].get(s, 0):.1f}" for s in stages)])
    if part["exponent"] is not None:
        yield ""
        yield (f"Time grows as events to the power {part['exponent']:.2f} (over all sizes; {part['last_exponent']:.2f} "
               f"between the two largest). Peak MB: PSS of all processes together.")


def encode_pack(part: dict[str, Any]) -> Iterator[str]:
    """Every side's rate, by vocabulary."""
    yield from head(f"Encoding and packing, {part['events']:,} events",
                    ["vocabulary", "side", "setup", "tokens", "median s (all)", "million tokens/s", "ours is"])
    for race in part["vocabularies"]:
        ours = next(s for s in race["sides"] if s["name"] == "ours")
        for side in race["sides"]:
            rate = side["tokens"] / statistics.median(side["seconds"])
            times = ours["tokens"] / statistics.median(ours["seconds"]) / rate
            yield row([race["vocabulary"], side["name"], side["setup"], f"{side['tokens']:,}", seconds(side["seconds"]),
                       f"{rate / 1e6:,.2f}", f"{times:,.2f} x"])
        for name, why in race["skipped"].items():
            yield row([race["vocabulary"], name, f"SKIPPED: {why}", "", "", "", ""])
    yield ""
    for race in part["vocabularies"]:
        ours = next(s for s in race["sides"] if s["name"] == "ours")
        yield (f"{race['vocabulary']}: of ours, {statistics.median(race['encode_s']):.2f} s encode the catalogue "
               f"({race['catalogue_tokens']:,} tokens, each used {ours['tokens'] / race['catalogue_tokens']:.0f} "
               f"times), "
               f"{statistics.median(race['pack_s']):.2f} s pack {race['n_documents']:,} documents into "
               f"{race['output_bytes'] / 1e6:,.0f} MB. Byte by byte the same shards as ours: "
               f"{', '.join(f'{n} {same}' for n, same in race['same_rows'].items()) or 'not compared'}.")


def pipeline(part: dict[str, Any]) -> Iterator[str]:
    """Every side's rate from raw files on."""
    yield from head(f"Raw files to packed rows, {part['n_events']:,} events",
                    ["side", "tokens in rows", "median s (all)", "million tokens/s", "peak MB", "ours is"])
    ours = part["lines"]["ours"]
    for name, line in part["lines"].items():
        rate = line["tokens"] / statistics.median(line["seconds"])
        times = ours["tokens"] / statistics.median(ours["seconds"]) / rate
        yield row([name, f"{line['tokens']:,}", seconds(line["seconds"]), f"{rate / 1e6:,.2f}",
                   f"{line['peak_mb']:,.0f}", f"{times:,.2f} x"])
    for name, why in part["skipped"].items():
        yield row([name, f"SKIPPED: {why}", "", "", "", ""])
    yield ""
    yield f"With queries and leak audit, ours takes {statistics.median(ours['all_seconds']):.1f} s."


def fill(part: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Shares of real tokens by row length."""
    yield from head("Fill of the real data's training rows", ["row length", "rows", "padding tokens", "fill",
                                                              "lowest corpus"])
    for one in part:
        low = min(one["by_corpus"], key=one["by_corpus"].get)
        yield row([f"{one['seq_len']:,}", f"{one['n_rows']:,}", f"{one['n_pad']:,}", f"{one['fill']:.4%}",
                   f"{low} {one['by_corpus'][low]:.4%}"])


def head(title: str, columns: Sequence[str]) -> Iterator[str]:
    yield f"### {title}"
    yield ""
    yield row(columns)
    yield "|" + "---|" * len(columns)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def seconds(all_s: Sequence[float]) -> str:
    return f"{statistics.median(all_s):.2f} ({', '.join(f'{s:.2f}' for s in all_s)})"
