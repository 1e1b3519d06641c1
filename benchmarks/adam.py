"""The CPU AdamW kernel beside STREAM's triad, torch and DeepSpeed: bf16 gradients in, fp32 states, bf16 parameters out.

    python -m benchmarks.adam --markdown benchmarks/results/adam.md

Each timing of a kernel stands between two of the triad (with non-temporal stores, on the same number of threads), and
its figure is the ratio to their mean: bandwidth on shared machines swings several times over, ratios don't. A step
moves 28 bytes per parameter, however many passes a kernel takes for it: p, m and v read and written in fp32, the
gradient read and the parameter written in bf16.

    zerotop    one pass: unscale, clip, AdamW, cast
    torch      the gradient cast to fp32 and scaled, torch.optim.AdamW(fused=True), the parameter cast to bf16
    deepspeed  the gradient cast to fp32, DeepSpeedCPUAdam, the parameter cast to bf16 (it scales inside ZeRO, in a pass
               of its own that is left out here); where DeepSpeed is installed
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.context import markdown, measured_on, table  # noqa: E402
from runtime import native  # noqa: E402

BYTES = 28  # per parameter and step
HYPER = {"lr": 1e-4, "weight_decay": 0.1, "eps": 1e-8}
BETAS = (0.9, 0.95)
SCALE = 0.5


class Record(NamedTuple):
    kernel: str
    isa: str  # "" where a peer chooses by itself
    threads: int
    parameters: int
    gb_per_s: float  # 28 bytes per parameter over the median time
    stream_gb_per_s: float  # the triad's median in the same rounds
    ns_per_parameter: float
    stream_ratio: float  # median over rounds of the ratio within the round
    rounds: int


class Kernel(NamedTuple):
    name: str
    isa: str
    step: Callable[[int], None]  # with that many threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="*", help="default: 1 and all")
    parser.add_argument("--kernels", nargs="*", help="of: zerotop torch deepspeed; default: all that are there")
    parser.add_argument("--isas", nargs="*", default=["avx512", "avx2", "sve", "generic"])
    parser.add_argument("--json", action="store_true", help="print one record a line")
    parser.add_argument("--markdown", type=Path, help="write a page")
    options = parser.parse_args()
    if not native.available():
        raise SystemExit(native.cpu_status())
    cores = len(os.sched_getaffinity(0))
    records = list(measure(options, options.threads or sorted({1, cores})))
    if options.json:
        for record in records:
            print(json.dumps(record._asdict()))
    text = page(records)
    if options.markdown:
        about = measured_on("benchmarks.adam", ("torch", "deepspeed"))
        options.markdown.write_text(markdown("AdamW on the CPU, bf16 in and out", about, text))
    elif not options.json:
        print(table(*rows(records)))


def measure(options: argparse.Namespace, threads: list[int]) -> Iterator[Record]:
    n = options.parameters // 64 * 64
    triad = Triad(n)
    for make in kernels(options, n):
        kernel = make()  # one at a time: each has states of its own
        for count in threads:
            os.environ["OMP_NUM_THREADS"] = str(count)
            torch.set_num_threads(count)
            kernel.step(count)
            triad.seconds(count)
            times, streams, ratios = [], [], []
            before = triad.seconds(count)
            for _ in range(options.rounds):
                times.append(seconds(kernel, count))
                after = triad.seconds(count)
                streams.append(12e-9 * n / after)
                ratios.append(BYTES / times[-1] / (12 / ((before + after) / 2)))
                before = after
            took = median(times)
            figures = (BYTES * n / took / 1e9, median(streams), took / n * 1e9, median(ratios))
            yield Record(kernel.name, kernel.isa, count, n, *(round(f, 4) for f in figures), options.rounds)


def kernels(options: argparse.Namespace, n: int) -> Iterator[Callable[[], Kernel]]:
    wanted = options.kernels or ["zerotop", "torch", "deepspeed"]
    if "zerotop" in wanted:
        for isa in options.isas:
            if native.isa(isa):
                yield lambda isa=isa: ours(n, isa)
    if "torch" in wanted:
        yield lambda: peer("torch", n, lambda p: torch.optim.AdamW([p], betas=BETAS, fused=True, **HYPER), scale=True)
    if "deepspeed" in wanted:
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError:
            print("DeepSpeed is not installed: its row is missing", file=sys.stderr)
            return
        yield lambda: peer("deepspeed", n, lambda p: DeepSpeedCPUAdam([p], betas=BETAS, **HYPER), scale=False)


def ours(n: int, isa: str) -> Kernel:
    p, g = initial(n)
    m, v, out = torch.zeros(n), torch.zeros(n), torch.empty(n, dtype=torch.bfloat16)
    count = [0]

    def step(threads: int) -> None:
        count[0] += 1
        kw = {"beta1": BETAS[0], "beta2": BETAS[1], "grad_scale": SCALE, "threads": threads, "isa": isa}
        native.adamw(p, m, v, g, out, step=count[0], **kw, **HYPER)

    return Kernel("zerotop", isa, step)


def peer(name: str, n: int, make: Callable[[torch.Tensor], torch.optim.Optimizer], *, scale: bool) -> Kernel:
    start, g = initial(n)
    p = torch.nn.Parameter(start)
    p.grad = torch.zeros(n)
    out = torch.empty(n, dtype=torch.bfloat16)
    optimizer = make(p)

    @torch.no_grad()
    def step(_: int) -> None:
        p.grad.copy_(g)
        if scale:
            p.grad.mul_(SCALE)
        optimizer.step()
        out.copy_(p)

    return Kernel(name, "", step)


def initial(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(n) * 0.02, (torch.randn(n) * 1e-3).bfloat16()


class Triad:
    """STREAM's triad over arrays as long as the parameters."""

    def __init__(self, n: int) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not compiler:
            raise SystemExit("no C compiler: benchmarks/triad.c is what everything is measured against")
        self._n = n
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/libtriad.so"
            flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(ROOT / "benchmarks/triad.c"), "-o", path], check=True)
            self._triad = ctypes.CDLL(path).triad
        self._triad.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
        self._triad.restype = ctypes.c_double
        self._arrays = [torch.full((n,), value) for value in (0.0, 1.0, 2.0)]

    def seconds(self, threads: int) -> float:
        took: float = self._triad(*(array.data_ptr() for array in self._arrays), self._n, threads)
        return took


def seconds(kernel: Kernel, threads: int) -> float:
    begin = perf_counter()
    kernel.step(threads)
    return perf_counter() - begin


def rows(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    header = ["kernel", "isa", "threads", "x triad", "GB/s", "triad GB/s", "ns/parameter"]
    return header, [
        [
            r.kernel,
            r.isa,
            str(r.threads),
            f"{r.stream_ratio:.2f}",
            f"{r.gb_per_s:.1f}",
            f"{r.stream_gb_per_s:.1f}",
            f"{r.ns_per_parameter:.3f}",
        ]
        for r in records
    ]


def page(records: list[Record]) -> str:
    """The table and the ratios that matter, by threads."""
    lines = [table(*rows(records), pipes=True), ""]
    if records:
        about = f"{records[0].parameters:,} parameters, {BYTES} bytes each, medians of {records[0].rounds} rounds."
        lines.insert(0, f"{about} `x triad` is the figure to quote.\n")
    for threads in sorted({r.threads for r in records}):
        ratio = {r.isa or r.kernel: r.stream_ratio for r in records if r.threads == threads}
        best = next((ratio[isa] for isa in ("avx512", "avx2", "sve", "generic") if isa in ratio), None)
        if best is None:
            continue
        parts = [f"{best / ratio[other]:.2f} x {other}" for other in ("torch", "deepspeed") if other in ratio]
        if "avx512" in ratio and "avx2" in ratio:
            parts.append(f"avx2 {ratio['avx2'] / ratio['avx512']:.2f} of avx512")
        plural = "s" if threads > 1 else ""
        lines.append(", ".join([f"- {threads} thread{plural}: {best:.2f} x triad", *parts]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
