"""What memory the loss takes beside its inputs, at a vocabulary of 150,000: full logits, torch's chunked call, ours.

    python -m benchmarks.train.loss_memory [--tokens 1024] [--hidden 64] [--vocabulary 150000]

Every side computes value and gradients of the summed loss of 4 rows in a process of its own; what counts is the peak
resident memory above that with the inputs in place. The gradients themselves are part of it, as nobody can do without.
Prints one JSON object; its first field is our peak over that of full logits.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

N_ROWS = 4


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(  # type: ignore[no-any-return]
        hidden.flatten(0, 1), weight, labels.flatten(), reduction="sum", ignore_index=-100,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256))


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cprec.loss import row_losses

    return row_losses(hidden, weight, labels).sum()


SIDES = {"full": full, "torch_chunked": torch_chunked, "ours": ours}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_side(name: str, tokens: int, hidden_size: int, vocabulary: int) -> dict[str, float]:
    """Peak bytes above the inputs, seconds, and the loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warm = torch.randn(N_ROWS, 8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    SIDES[name](*warm, torch.zeros(N_ROWS, 8, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    hidden = torch.randn(N_ROWS, tokens // N_ROWS, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size).mul_(0.05).requires_grad_()
    labels = torch.randint(0, vocabulary, (N_ROWS, tokens // N_ROWS))
    before, begin = peak_bytes(), time.perf_counter()
    loss = SIDES[name](hidden, weight, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"bytes": peak_bytes() - before, "seconds": time.perf_counter() - begin, "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--side", choices=SIDES, help="used by the script itself")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args.side, args.tokens, args.hidden, args.vocabulary)))
        return
    sizes = ["--tokens", str(args.tokens), "--hidden", str(args.hidden), "--vocabulary", str(args.vocabulary)]
    names = [n for n in SIDES if n != "torch_chunked" or hasattr(torch.nn.functional, "linear_cross_entropy")]
    found = {name: json.loads(subprocess.run(
        [sys.executable, "-m", "benchmarks.train.loss_memory", "--side", name, *sizes], check=True,
        capture_output=True, text=True).stdout.splitlines()[-1]) for name in names}
    spread = max(f["loss"] for f in found.values()) / min(f["loss"] for f in found.values()) - 1
    assert spread < 1e-4, f"the sides do not compute the same: {found}"
    print(json.dumps({
        "loss_peak_memory_vs_full_logits": round(found["ours"]["bytes"] / found["full"]["bytes"], 3),
        "peak_mb": {n: round(f["bytes"] / 1e6) for n, f in found.items()},
        "seconds": {n: round(f["seconds"], 2) for n, f in found.items()},
        "of_which_gradients_mb": round(4e-6 * (args.tokens + args.vocabulary) * args.hidden),
        "tokens": args.tokens, "hidden": args.hidden, "vocabulary": args.vocabulary, "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
