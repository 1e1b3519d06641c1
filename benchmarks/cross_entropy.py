"""The cross-entropy in chunks beside whole logits: time and peak memory of the head's forward and backward.

    python -m benchmarks.cross_entropy --markdown benchmarks/results/cross-entropy.md

Peaks are what torch's allocator gave out beyond the inputs, at most. Whole logits have their peak before there are
gradients; the chunks have theirs beside the gradients of hidden states and weight, which are a column of their own.
`peak` is what the chunks take beside gradients, against whole logits. `time` is the median over rounds of the ratio
within a round, in which the two take turns; on a CPU it is CPU time. `ms` is of the chunks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.context import markdown, measured_on, table
from runtime.models.cross_entropy import chunked_cross_entropy
from runtime.plan.loss_chunks import cut_tokens
from tests.harness.peak_bytes import peak_bytes


class Case(NamedTuple):
    tokens: int
    vocab: int
    dim: int
    dtype: str


ON_CPU = [
    Case(512, 32_000, 576, "fp32"),
    Case(512, 49_152, 576, "fp32"),
    Case(2048, 49_152, 576, "fp32"),
    Case(512, 8192, 64, "bf16"),
    Case(1024, 8192, 64, "bf16"),
]
ON_GPU = [Case(2048, 49_152, 576, "bf16"), Case(8192, 128_256, 4096, "bf16"), Case(32_768, 128_256, 4096, "bf16")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def measure(case: Case, device: torch.device, rounds: int) -> list[str]:
    dtype = DTYPES[case.dtype]
    hidden = torch.randn(case.tokens, case.dim, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(case.vocab, case.dim, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(case.vocab, (case.tokens,), device=device)

    def once(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        clock = perf_counter if device.type == "cuda" else process_time
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = clock()
        (loss(hidden, weight, targets) / case.tokens).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = clock() - began
        hidden.grad = weight.grad = None
        return took

    def peak(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        if device.type != "cuda":
            return peak_bytes(lambda: once(loss))
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once(loss)
        return torch.cuda.max_memory_allocated(device) - before

    peaks = peak(whole), peak(chunked_cross_entropy)
    chunked, plain, ratios = [], [], []
    for _ in range(rounds):
        plain.append(once(whole))
        chunked.append(once(chunked_cross_entropy))
        ratios.append(chunked[-1] / plain[-1])
    of_gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    cut = cut_tokens(case.tokens, case.vocab, case.dim, dtype.itemsize)
    return [
        f"{case.tokens} x {case.vocab} x {case.dim}, {case.dtype}",
        str(cut.tokens),
        "fp32" if cut.fp32_sum else case.dtype,
        f"{peaks[0] / 2**20:.0f}",
        f"{peaks[1] / 2**20:.0f}",
        f"{of_gradients / 2**20:.0f}",
        f"{(peaks[1] - of_gradients) / peaks[0]:.3f}",
        f"{1000 * median(chunked):.0f}",
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="cross_entropy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, with what it ran on")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for case in ON_GPU if device.type == "cuda" else ON_CPU:
        rows.append(measure(case, device, options.rounds))
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["tokens x vocabulary x dim", "chunk", "sum", "whole MiB", "chunked MiB", "gradients MiB", "peak"]
    header += ["ms", "time"]
    print(table(header, rows))
    if options.markdown:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        context = {**measured_on("benchmarks.cross_entropy", ("torch",)), "on": name}
        title = "Cross-entropy in chunks against whole logits, forward and backward of the head"
        options.markdown.write_text(markdown(title, context, table(header, rows, pipes=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
