"""What a rank on a CPU holds and how fast it steps, with glibc's own rule for mapping large blocks and with fixed ones.

    python -m benchmarks.heap --rounds 3 --markdown benchmarks/results/heap.md

Runs of ../peers' harness, two ranks each, one after the other in turns: A B C A B C. Ratios are of runs of one round.
Step times of a shared machine swing; CPU seconds of all ranks per step, which page faults are part of, swing less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from runtime.host.heap import MAPPED_FROM

# A tunable of the user's keeps runtime/host/heap.py from setting anything; this one changes nothing.
RULES: dict[str, dict[str, str]] = {"glibc's own": {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, "ours": {}}
RULES["1 MiB"] = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(2 << 20)}

CASES = {  # (stage, tokens, samples, timed steps)
    "stage 3, 1 x 128": ("zt3", 128, 1, 6),
    "stage 2, 1 x 128": ("zt2", 128, 1, 6),
    "stage 3, 4 x 512": ("zt3", 512, 4, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heap", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one (repeatable)")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    cases = options.case or list(CASES)
    records: dict[str, dict[str, list[dict[str, Any]]]] = {case: {rule: [] for rule in RULES} for case in cases}
    for number in range(options.rounds):
        for case in cases:
            for rule in RULES:
                records[case][rule].append(run(case, rule))
                one = records[case][rule][-1]
                figures = (
                    f"{max(one['delta_mb'])} MiB, {one['step_s']:.2f} s, {one['cpu_s_per_step']:.2f} CPU s per step"
                )
                print(f"round {number + 1}: {case}, {rule}: {figures}", flush=True)
            if options.markdown:  # after every case, so that an interrupted call leaves its figures
                options.markdown.write_text("\n".join(report(records, number + 1)) + "\n")
    print(*report(records, options.rounds), sep="\n")


def run(case: str, rule: str) -> dict[str, Any]:
    """bench_train's record."""
    peer, tokens, samples, steps = CASES[case]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.peers.bench_train"]
        command += ["--peer", peer, "--dtype", "fp32", "--seq", str(tokens), "--mb", str(samples), "--ga", "1"]
        command += ["--warm", "2", "--steps", str(steps), "--max-steps", str(steps), "--clean", "0", "--out", str(out)]
        environment = variables | {"OMP_NUM_THREADS": "1"} | RULES[rule]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        record: dict[str, Any] = json.loads(out.read_text())
        return record


def report(records: dict[str, dict[str, list[dict[str, Any]]]], rounds: int) -> Iterator[str]:
    yield "# Mapping large blocks, 2 ranks on the CPU"
    yield f"```\npython -m benchmarks.heap --rounds {rounds} --markdown benchmarks/results/heap.md\n```"
    yield f"- ours: gathered parameters from {MAPPED_FROM >> 20} MiB on are mapped by themselves (runtime/host/heap.py)"
    yield f"- system: {platform.platform()}, {os.cpu_count()} logical cores, Python {platform.python_version()}"
    yield f"- versions: torch {torch.__version__}, {' '.join(platform.libc_ver())}"
    yield "- GPT of 25.5M parameters in fp32; MiB: peak resident memory above the built model, of the larger rank\n"
    yield "| case | rule | MiB | step, against glibc's own | CPU time of a step, against glibc's own |"
    yield "| ---- | ---- | --: | ------------------------: | --------------------------------------: |"
    for case, rules in records.items():
        plain = rules["glibc's own"]
        for rule, runs in rules.items():
            if not runs:
                continue
            peak = statistics.median(max(one["delta_mb"]) for one in runs)
            step, cpu = (_against(runs, plain, figure) for figure in ("step_s", "cpu_s_per_step"))
            yield f"| {case} | {rule} | {peak:.0f} | {step} | {cpu} |"


def _against(runs: list[dict[str, Any]], plain: list[dict[str, Any]], figure: str) -> str:
    """Median and range of the ratios round by round."""
    ratios = [one[figure] / other[figure] for one, other in zip(runs, plain, strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
