"""What the benchmark measured, as Markdown tables.

reads: the results of `benchmarks/train/run.py` as JSON values. writes: nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.reader.tables import head, row


def tables(found: dict[str, Any]) -> str:
    """The machine, then one section per part that was measured."""
    lines = [*machine(found)]
    sections = {"race": race, "overhead": overhead, "scaling": scaling, "attention": attention, "loss": loss}
    for name, section in sections.items():
        if name in found:
            lines += [""]
            lines += [f"{name}: FAILED: {found[name]['failed'][-300:]}"] if "failed" in found[name] else \
                [*section(found[name])]
    return "\n".join(lines)


def machine(found: dict[str, Any]) -> Iterator[str]:
    m, d = found["machine"], found["data"]
    known = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield (f"Measured on {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, commit {m['commit']}; Python "
           f"{m['python']}, {known}. Complete Journey in rows of {d['seq_len']:,} tokens, documents of "
           f"{d['mean_doc_tokens']} on average; a Llama of {d['n_layers']} layers of {d['hidden_size']} over "
           f"{d['vocabulary']:,} tokens, float32; each rank on one core, {d['rows_per_forward']} rows of tokens per "
           f"forward pass. Medians of {d['repeats']} runs a side of {d['steps']} steps, the first two not timed, the "
           f"sides in turn.")


def race(part: dict[str, Any]) -> Iterator[str]:
    yield from head("Two ranks, ZeRO-3: useful tokens per second",
                    ["side", "useful tokens/s", "lowest to highest", "ours is", "padding", "held-out nats per token",
                     "lowest to highest", "after tokens", "peak MB per rank"])
    ours = next((s["rate"] for s in part["sides"] if s["side"] == "ours" and not s["failed"]), None)
    for s in part["sides"]:
        if s["failed"]:
            yield row([s["side"], f"FAILED: {' '.join(s['failed'].split())[-200:]}", *[""] * 7])
            continue
        yield row([s["side"], f"{s['rate']:,.0f}", span(s["rates"], "{:,.0f}"), f"{ours / s['rate']:.2f} x" if ours
                   else "", f"{s['padding']:.1%}", f"{middle(s['losses']):.3f}", span(s["losses"], "{:.3f}"),
                   f"{middle(s['useful_tokens']):,.0f}", f"{s['peak_mb']:,.0f}"])


def overhead(part: dict[str, Any]) -> Iterator[str]:
    yield from head("One rank: what the loop and ZeRO-3 cost over the bare step",
                    ["way over the same batches", "ms per step", "over the line below"])
    yield row(["our loop", f"{1000 * part['loop_s']:,.0f}", f"{part['loop_over_engine_pct']:+.1f} %"])
    yield row(["DeepSpeed's forward, backward, step", f"{1000 * part['engine_s']:,.0f}",
               f"{part['engine_over_torch_pct']:+.1f} %"])
    yield row(["plain torch: forward, backward, clip, AdamW", f"{1000 * part['torch_s']:,.0f}", ""])
    yield ""
    yield (f"Times are medians of all steps, whose batches differ; the last column is the median of the ratios of "
           f"the same steps, which is what counts. Of the loop's time "
           f"{part['outside_step_pct']:.2f} % passes outside of the engine's step.")


def scaling(part: dict[str, Any]) -> Iterator[str]:
    rates = part["rates"]
    yield from head("From one rank to two", ["", "useful tokens/s", "of one rank"])
    for name, label in (("one", "one rank, one core"), ("apart", "two runs of one rank each, at the same time"),
                        ("two", "two ranks of one run")):
        yield row([label, f"{middle(rates[name]):,.0f}", f"{scaled(rates, name):.2f} x"])


def attention(part: dict[str, Any]) -> Iterator[str]:
    ways = next(iter(part["milliseconds"].values()))
    yield from head("Attention of packed documents, forward and backward, one layer: milliseconds",
                    ["tokens", *ways, "dense mask over one by one"])
    for tokens, ms in part["milliseconds"].items():
        yield row([f"{int(tokens):,}", *(f"{value:,.1f}" for value in ms.values()),
                   f"{part['isolated_attention_vs_dense_mask'][tokens]:.1f} x"])


def loss(part: dict[str, Any]) -> Iterator[str]:
    yield from head(f"Loss and its gradients: {part['tokens']:,} tokens, hidden size {part['hidden']}, vocabulary "
                    f"{part['vocabulary']:,}", ["way", "peak MB", "seconds"])
    for way, label in (("full", "full logits"), ("torch_chunked", "torch's linear_cross_entropy"), ("ours", "ours")):
        yield row([label, f"{part['peak_mb'][way]:,}", f"{part['seconds'][way]:.2f}"])
    yield ""
    yield f"{part['of_which_gradients_mb']} MB of each are the gradients."


def scaled(rates: dict[str, list[float]], name: str) -> float:
    """Median rate over that of one rank."""
    return round(middle(rates[name]) / middle(rates["one"]), 2)


def middle(numbers: Sequence[float]) -> float:
    return statistics.median(numbers)


def span(numbers: Sequence[float], form: str) -> str:
    return f"{form.format(min(numbers))} to {form.format(max(numbers))}"
