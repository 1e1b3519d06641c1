"""The CUDA AdamW kernels beside the bandwidth they share: resident states beside a copy on the GPU, streamed states
beside copies over PCIe in both directions at once.

    python -m benchmarks.gpu_adam --markdown benchmarks/results/gpu-adam.md

Needs an NVIDIA GPU and a build with nvcc. bf16 gradients in, fp32 states, bf16 parameters out: 28 bytes per parameter
where all is on the GPU, and 12 in each direction where the states are in host memory. Each timing of a kernel stands
between two of the copy, and its figure is the ratio to their mean. Goals: 0.9 for both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.context import markdown, measured_on, table
from runtime import native
from runtime.host.pinned import Arena
from runtime.plan.constants import STREAM_SLOTS

HYPER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
RESIDENT_BYTES, STREAMED_BYTES = 28, 24
"""Per parameter: what an update moves on the GPU, and over PCIe in both directions together."""
CHUNK = 64 * 2**20 // 12 // 64 * 64
"""Elements of a slot, as zerotop.offload.chunk_mib makes them by default."""


def seconds(work: Callable[[], None]) -> float:
    """Time on the GPU of `work`, which makes the current stream wait for all that it starts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def beside(kernel: Callable[[], None], copy: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Median times of `kernel` and `copy`, and the median over rounds of the ratio of the kernel's time to that of the
    copies around it."""
    for warm in (copy, kernel, copy):
        warm()
    kernels, copies, ratios = [], [], []
    for _ in range(rounds):
        before, taken, after = seconds(copy), seconds(kernel), seconds(copy)
        kernels.append(taken)
        copies.append((before + after) / 2)
        ratios.append(taken / copies[-1])
    return median(kernels), median(copies), median(ratios)


def resident(parameters: int, rounds: int) -> list[str]:
    """The row of states on the GPU."""
    p, m, v = (torch.zeros(parameters, device="cuda") for _ in range(3))
    g, out = (torch.zeros(parameters, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source, target = (torch.zeros(RESIDENT_BYTES * parameters // 8, device="cuda") for _ in range(2))
    stream = torch.cuda.current_stream().cuda_stream

    def copy() -> None:
        target.copy_(source)

    return row(
        "resident",
        parameters,
        RESIDENT_BYTES,
        beside(
            lambda: native.cuda_adamw(p, m, v, g, out, step=2, stream=stream, **HYPER),
            copy,
            rounds,
        ),
    )


def streamed(parameters: int, rounds: int) -> list[str]:
    """The row of states in page-locked host memory."""
    with Arena(device=torch.cuda.current_device()) as arena:
        p, m, v = (arena.zeros(parameters, torch.float32) for _ in range(3))
        g, out = (torch.zeros(parameters, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        loaded, stored = (torch.zeros(parameters, device="cuda") for _ in range(2))
        down, up = torch.cuda.Stream(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        hyper = [native.hyper(step=2, grad_scale=1.0, adamw=True, **HYPER)]
        memory = torch.empty(native.StreamedAdamW.bytes_needed(CHUNK, STREAM_SLOTS), dtype=torch.uint8, device="cuda")

        def copy() -> None:
            for stream in (down, up):
                stream.wait_stream(current)
            for host in (p, m, v):  # as many bytes in each direction as an update moves
                with torch.cuda.stream(up):
                    loaded.copy_(host, non_blocking=True)
            for host in (v, p, m):
                with torch.cuda.stream(down):
                    host.copy_(stored, non_blocking=True)
            for stream in (down, up):
                current.wait_stream(stream)

        with native.StreamedAdamW(memory, chunk=CHUNK, slots=STREAM_SLOTS) as optimizer:
            order = {"wait_stream": current.cuda_stream, "signal_stream": current.cuda_stream}
            figures = beside(lambda: optimizer.step([native.Range(p, m, v, g, out)], hyper, **order), copy, rounds)
            torch.cuda.synchronize()
        return row("streamed", parameters, STREAMED_BYTES, figures)


def row(name: str, parameters: int, nbytes: int, figures: tuple[float, float, float]) -> list[str]:
    """One row of the table."""
    kernel, copy, ratio = figures
    gb = nbytes * parameters / 1e9
    return [name, f"{kernel * 1e3:.2f}", f"{gb / kernel:,.0f}", f"{gb / copy:,.0f}", f"{1 / ratio:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--parameters", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not native.cuda_available():
        print(
            f"no GPU: torch sees {torch.cuda.device_count()}, our kernels are {native.cuda_status()}", file=sys.stderr
        )
        return 3
    rows = [measure(options.parameters, options.rounds) for measure in (resident, streamed)]
    header = ["states", "ms", "GB/s", "copy GB/s", "x copy"]
    print(table(header, rows))
    if options.markdown is not None:
        context = measured_on("benchmarks.gpu_adam", ("torch",))
        context["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        title = f"AdamW on a GPU: {options.parameters / 1e6:,.0f}M parameters"
        options.markdown.write_text(markdown(title, context, table(header, rows, pipes=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
