"""What isolated attention costs on a CPU: documents one by one, batched by length, or under one dense mask.

    python -m benchmarks.train.attention [--repetitions 7] [--threads 1]

Forward and backward of one layer (8 query heads, 4 key heads of 64) over one row of documents of about 150 tokens.
Every repetition runs all sides in turn; a ratio is that of medians. Prints one JSON object; its first field is the
dense mask's time over that of documents one by one, the CPU default, by length of row.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cprec.attention import Documents, Scores, _doc_sdpa, _sdpa

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
SCORES = Scores(scale=None, window=None, softcap=None)


class Batched:
    """Documents in length order, each padded to the longest of its bucket, whose documents are at most a quarter apart:
    one SDPA call per bucket. Padding comes behind a document, so that causality alone hides it."""

    def __init__(self, documents: Documents) -> None:
        borders = documents.cu_seqlens.tolist()
        self.shapes: list[tuple[int, int]] = []
        there, home = [], torch.empty(borders[-1], dtype=torch.int64)
        at = 0
        for bucket in self._buckets(documents.lens):
            longest = documents.lens[bucket[-1]]
            self.shapes.append((len(bucket), longest))
            for i in bucket:
                n = documents.lens[i]
                there.append((borders[i] + torch.arange(longest)).clamp(max=borders[i] + n - 1))
                home[borders[i]:borders[i] + n] = torch.arange(at, at + n)
                at += longest
        self.there, self.home = torch.cat(there), home

    @staticmethod
    def _buckets(lens: list[int]) -> list[list[int]]:
        buckets: list[list[int]] = []
        for i in sorted(range(len(lens)), key=lambda i: lens[i]):
            if buckets and lens[i] <= 1.25 * lens[buckets[-1][0]]:
                buckets[-1].append(i)
            else:
                buckets.append([i])
        return buckets

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query (1, heads, n, head_dim), key and value (1, kv_heads, n, head_dim) to (1, n, heads, head_dim)."""
        moved = [_Moved.apply(x[0].transpose(0, 1), self.there, self.home) for x in (query, key, value)]
        out, at = [], 0
        for n, longest in self.shapes:
            q, k, v = (x[at:at + n * longest].view(n, longest, -1, HEAD_DIM).transpose(1, 2) for x in moved)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=HEADS != KV_HEADS)
            out.append(y.transpose(1, 2).reshape(n * longest, HEADS, HEAD_DIM))
            at += n * longest
        return torch.cat(out).index_select(0, self.home)[None]


class _Moved(torch.autograd.Function):
    """x[there], of which each row counts once: the gradient is taken from `home`, padding has none."""

    @staticmethod
    def forward(ctx, x, there, home):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(home)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.index_select(0, *ctx.saved_tensors), None, None


def document_lens(seq_len: int) -> list[int]:
    """Lengths between 30 and 270 tokens that fill the row."""
    generator = torch.Generator().manual_seed(3)
    lens: list[int] = []
    while sum(lens) < seq_len:
        lens.append(min(int(torch.randint(30, 271, (1,), generator=generator)), seq_len - sum(lens)))
    return lens


def measure(seq_len: int, repetitions: int) -> dict[str, float]:
    """Median seconds of forward and backward, by side; asserts that all compute the same."""
    cu = torch.tensor([0, *torch.tensor(document_lens(seq_len)).cumsum(0).tolist()], dtype=torch.int32)
    documents = Documents(cu, int(cu.diff().max()))
    qkv = [torch.randn(1, seq_len, h, HEAD_DIM).transpose(1, 2).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)]
    sides: dict[str, Callable[[], Tensor]] = {
        "one by one": lambda: _doc_sdpa(*qkv, documents, SCORES),
        "batched by length": lambda: batched(*qkv),
        "dense mask": lambda: _sdpa(*qkv, documents, SCORES),
    }
    batched = Batched(documents)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    first = None
    for _ in range(repetitions + 1):  # the first is for warming up and comparing
        for name, side in sides.items():
            begin = time.perf_counter()
            out = side()
            grads = torch.autograd.grad(out.square().sum(), qkv)
            seconds[name].append(time.perf_counter() - begin)
            first = first or (out, *grads)
            for a, b in zip(first, (out, *grads), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    times = {seq_len: measure(seq_len, args.repetitions) for seq_len in (1024, 2048, 4096)}
    print(json.dumps({
        "isolated_attention_vs_dense_mask": {n: round(t["dense mask"] / t["one by one"], 2) for n, t in times.items()},
        "batched_by_length_vs_one_by_one": {
            n: round(t["batched by length"] / t["one by one"], 2) for n, t in times.items()},
        "milliseconds": {n: {s: round(1e3 * t, 1) for s, t in by.items()} for n, by in times.items()},
        "threads": args.threads, "torch": torch.__version__, "cpu": platform.processor() or platform.machine(),
    }))


if __name__ == "__main__":
    main()
