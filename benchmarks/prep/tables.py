"""What the benchmark measured, as Markdown tables.

reads: the results of `benchmarks/prep/run.py` as JSON values. writes: nothing.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

COPY = "numpy copy to a new file"


def tables(found: dict[str, Any]) -> str:
    """The machine, what was wanted and is, then a section per part that was measured."""
    parts = (("growth", growth), ("encode_pack", encode_pack), ("pipeline", pipeline), ("fill", fill))
    lines = [*machine(found), "", *targets(found)]
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
    yield ""
    yield (f"Command: `{shlex.join(['python', '-m', 'benchmarks.prep.run', *found['argv']])}`"
           if "argv" in found else "The arguments of the command were not recorded.")


def targets(found: dict[str, Any]) -> Iterator[str]:
    """What was wanted, what was measured, and what stands between."""
    yield from head("Targets", ["target", "wanted", "measured", "met", "where the time goes"])
    races = found.get("encode_pack", {}).get("vocabularies", [])
    for side, wanted in (("tokenizers", 100), ("gigatoken", 3), (COPY, 0.3)):
        of_side = [race for race in races if race["ratios"].get(side) is not None]
        if of_side:
            race = min(of_side, key=lambda race: race["ratios"][side])
            yield target(f"encode and pack against {side} ({race['vocabulary']})", wanted, race["ratios"][side], "x",
                         to_floor(race, side))
    line = found.get("pipeline")
    if line and line["ratios"].get("datasets") is not None:
        yield target("raw files to rows against datasets", 10, line["ratios"]["datasets"], "x",
                     of_whole_line(found["growth"]["sizes"][0]) if "growth" in found else "")
    for one in found.get("fill", []):
        yield target(f"fill at {one['seq_len']:,}", 0.999, one["fill"], "", "")
    part = found.get("growth", {"sizes": [], "exponent": None})
    if part["exponent"] is not None:
        yield target("growth: events to the power", 1, part["exponent"], "", "", is_most=True)
    for size in part["sizes"]:
        yield target(f"peak memory of all processes, {size['n_events']:,} events", 2000, size["run"]["peak_mb"], "MB",
                     "", is_most=True)


def target(name: str, wanted: float, measured: float, unit: str, why: str, *, is_most: bool = False) -> str:
    """Its row; `wanted` is the least, or the most, that is to be."""
    is_met = measured <= wanted if is_most else measured >= wanted
    said = [f"{value:,.4g} {unit}".strip() for value in (wanted, measured)]
    return row([name, f"{'at most' if is_most else 'at least'} {said[0]}", said[1], "yes" if is_met else "no", why])


def to_floor(race: dict[str, Any], side: str) -> str:
    """The least that encoding once and writing can take, by what was measured beside it: the catalogue at the rate of
    the fastest other side that encodes (its planning and writing with it), and a copy of the rows' bytes to a file."""
    encoders = [s for s in race["sides"] if s["name"] != "ours" and not s["name"].startswith("numpy copy")]
    median_s = {s["name"]: statistics.median(s["seconds"]) for s in race["sides"] if s not in encoders}
    if not encoders or COPY not in median_s:
        return "no floor: its sides were skipped"
    fastest = max(encoders, key=rate_of)
    encode_s = race["catalogue_tokens"] / rate_of(fastest)
    copy_s, ours_s = median_s[COPY], median_s["ours"]
    floor_s = encode_s + copy_s
    return (f"floor {floor_s:.2f} s: the catalogue by {fastest['name']} {encode_s:.2f} s, the rows copied to a file "
            f"{copy_s:.2f} s; ours {ours_s:.2f} s; at the floor {race['ratios'][side] * ours_s / floor_s:.3g} x")


def rate_of(side: dict[str, Any]) -> float:
    """Tokens per second, by the median time."""
    return float(side["tokens"] / statistics.median(side["seconds"]))


def of_whole_line(size: dict[str, Any]) -> str:
    stages = size["run"]["stage_seconds"]
    return (f"at {size['n_events']:,} events {stages['encode'] + stages['pack']:.1f} s of {sum(stages.values()):.1f} s "
            f"encode and pack; the rest are joins and sorts, of which datasets does the sort")


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
            rate = rate_of(side)
            times = rate_of(ours) / rate
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
        rate = rate_of(line)
        times = rate_of(ours) / rate
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
