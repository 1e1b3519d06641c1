"""Compiles csrc/cuda for every supported GPU generation, with warnings as errors, and says what the kernels need.

    python tools/cuda_registers.py [--jobs 2] [--arch 90 ...] [--write benchmarks/results/cuda-registers.md]

Needs nvcc (on PATH, or named by CUDACXX) and no GPU. Exit code 1: a source does not compile, or a kernel spills
registers to memory. The table is Markdown: registers per thread and, for the kernels of the update, the warps that
these leave room for on a multiprocessor.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
PTX = "75"
"""What is also compiled to PTX, as the oldest of them would be."""
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills"]
FLAGS += ["-Xcompiler", "-Wall,-Wextra,-fPIC,-fvisibility=hidden"]
DTYPES = {"Fp32": "fp32", "Bf16": "bf16", "Fp16": "fp16", "NoOut": "none"}
THREADS = 256
"""Of a block: csrc/cuda/common.cuh."""

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_ADAMW = re.compile(r"adamw_kernelINS_\d+(\w+?)E(?:NS_\d+(\w+?)E|S\d?_)Lb([01])E")


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def find_nvcc() -> str | None:
    """The CUDA compiler; None if there is none."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def parse(output: str) -> list[Kernel]:
    """The kernels of one `ptxas -v`."""
    found, name, spills, stack = [], "", 0, 0
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            name = readable(match[1])
        elif match := _SPILLS.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := _REGISTERS.search(line)) and name:
            found.append(Kernel(name, int(match[1]), spills, stack))
            name = ""
    return found


def readable(mangled: str) -> str:
    """A kernel's name without its namespaces, from the name that the linker sees."""
    if match := _ADAMW.search(mangled):
        gradient, output = match[1], match[2] or match[1]
        return f"adamw {DTYPES[gradient]} to {DTYPES[output]}{', L2' if match[3] == '1' else ''}"
    return next(name for name in ("block_sums", "fold", "total") if re.search(rf"\d{name}E", mangled))


def compile_one(nvcc: str, source: Path, architecture: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile one source for one architecture, or for "ptx"."""
    kind = f"arch=compute_{PTX},code=compute_{PTX}" if architecture == "ptx" else ""
    kind = kind or f"arch=compute_{architecture},code=sm_{architecture}"
    target = folder / f"{source.stem}-{architecture}.o"
    command = ["nice", "-n", "5", nvcc, *FLAGS, "-gencode", kind, "-c", source, "-o", target]
    return subprocess.run(command, capture_output=True, text=True)


def build(nvcc: str, architectures: list[str], jobs: int) -> tuple[dict[str, dict[str, Kernel]], list[str]]:
    """Compile all sources for all `architectures` and PTX. Returns the kernels by architecture and name, and what is
    wrong."""
    work = [(source, architecture) for architecture in [*architectures, "ptx"] for source in SOURCES]
    kernels: dict[str, dict[str, Kernel]] = {architecture: {} for architecture in architectures}
    problems = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda item: compile_one(nvcc, *item, Path(folder)), work)
        for (source, architecture), result in zip(work, results, strict=True):
            if result.returncode != 0:
                problems.append(f"{source.name} for {architecture} does not compile:\n{result.stdout}{result.stderr}")
            elif architecture != "ptx":
                for kernel in parse(result.stdout + result.stderr):
                    kernels[architecture][kernel.name] = kernel
                    if kernel.spill_bytes or kernel.stack_bytes:
                        problems.append(f"{kernel.name} for sm_{architecture} spills or has a stack: {kernel}")
    return kernels, problems


def warps(registers: int) -> int:
    """Warps that the 65,536 registers of a multiprocessor have room for, in blocks of THREADS; at most 48, the limit of
    sm_86, sm_89 and sm_120."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (per_warp * THREADS // 32), 1536 // THREADS) * THREADS // 32


def table(kernels: dict[str, dict[str, Kernel]]) -> str:
    """Registers per kernel and architecture, as Markdown."""
    names = sorted({name for found in kernels.values() for name in found})
    rows = ["| kernel | " + " | ".join(f"sm_{a}" for a in kernels) + " | warps per multiprocessor, at least |"]
    rows.append("|---" + "|--:" * (len(kernels) + 1) + "|")
    for name in names:
        used = [found[name].registers for found in kernels.values()]
        rows.append(f"| {name} | " + " | ".join(map(str, used)) + f" | {warps(max(used))} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--write", type=Path, help="file for the table, with the command and the compiler's version")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc on PATH, in CUDACXX or in /usr/local/cuda", file=sys.stderr)
        return 2
    kernels, problems = build(nvcc, options.arch, options.jobs)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    text = table(kernels)
    print(text)
    if options.write is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release ([\d.]+)", version)
        options.write.write_text(
            "# Registers of the CUDA kernels\n"
            "Registers per thread, in blocks of 256; none spills, none has a stack frame. All warnings are errors, and "
            f"PTX for compute_{PTX}\nis built, too. This is a build: nothing has run.\n```\n"
            f"python tools/cuda_registers.py --write {options.write}\n```\n"
            f"nvcc {release[1] if release else 'of an unknown release'}.\n\n{text}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
