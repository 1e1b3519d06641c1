"""What every byte of a rank's RSS is called, in real runs of two ranks on the CPU, and how much is left without a name.

    python -m benchmarks.memory_truth --samples 5

Each configuration runs until its third step; then `samples` reports of each rank are read from the run's hub, as a
screen does. The table has the last one of each rank, and the largest rest of all. Below it: what the readings cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.context import ROOT, markdown, measured_on, table
from runtime.host.heap import heap_use
from runtime.host.resident import read_resident, reset_peak
from runtime.wire.messages import Command, Memory
from zerotop.launch.start import start_run
from zerotop.rundir.directory import read_entry
from zerotop.source.live import LiveSource
from zerotop.state.memory import CATEGORIES, category_label, memory_use, planned_peak

MIB = 1 << 20
RANKS = 2
FROM_STEP = 3
PATIENCE_S = 120.0
READINGS = 200
ON_HOST = {"device": "cpu"}


class RunFailed(Exception):
    """One line: why a run could not be measured."""


def configurations() -> dict[str, dict[str, Any]]:
    """Name -> config."""
    quickstart = json.loads((ROOT / "examples" / "quickstart.json").read_text())
    small = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zerotop": {
            "model": {"preset": "gpt-small"},
            "data": {"tokenizer": "bytes", "seq_len": 128},
            "train": {"steps": 100_000, "seed": 0},
            "checkpoint": {"interval": 100_000},
        },
    }
    quickstart["zerotop"]["train"]["steps"] = 100_000
    found = {"quickstart (gpt-tiny, stage 2)": quickstart}
    for stage in range(4):
        found[f"gpt-small, stage {stage}"] = small | {"zero_optimization": {"stage": stage}}
    offload = {"stage": 2, "offload_optimizer": ON_HOST}
    found["gpt-small, stage 2, offload"] = small | {"zero_optimization": offload}
    both = {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST}
    found["gpt-small, stage 3, offload of both"] = small | {"zero_optimization": both}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="memory_truth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=5, help="reports of each rank that are read, one a second")
    parser.add_argument("--only", metavar="TEXT", default="", help="configurations with this in their name")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here, with what they ran on")
    options = parser.parse_args()
    chosen = {name: config for name, config in configurations().items() if options.only in name}
    if options.samples < 1 or not chosen:
        parser.error("--samples: expected 1 or more, and --only: a part of a configuration's name")
    failed = False
    found: list[tuple[str, int, list[Memory], int | None]] = []
    with tempfile.TemporaryDirectory(prefix="memory-truth-") as folder:
        os.environ["XDG_STATE_HOME"] = folder
        for number, (name, config) in enumerate(chosen.items()):
            print(name, file=sys.stderr, flush=True)
            try:
                found += [(name, *one) for one in _measure(config, Path(folder), f"m{number}", options.samples)]
            except RunFailed as failure:
                print(f"memory_truth: {name}: {failure}", file=sys.stderr)
                failed = True
    costs = _costs()
    print(_parts(found), _costs_table(costs), sep="\n\n")
    if options.markdown:
        body = f"{_parts(found, pipes=True)}\n\n{_costs_table(costs, pipes=True)}"
        context = measured_on("benchmarks.memory_truth", ("torch",))
        options.markdown.write_text(markdown("Every byte of a rank's RSS, 2 ranks on the CPU", context, body))
    return int(failed)


# ---- runs ------------------------------------------------------------------------------------------------------------
def _measure(config: dict[str, Any], folder: Path, name: str, count: int) -> list[tuple[int, list[Memory], int | None]]:
    """(rank, `count` reports after the first steps, the plan's peak) of every rank of a run, which is then aborted."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    entry = start_run(config_path=path, nproc=RANKS, device="cpu", name=name)
    source = LiveSource(entry.sockets, entry.path, lambda: read_entry(entry.path).status)
    source.start()

    def begun() -> bool:
        ranks = source.state.ranks
        return len(ranks) == RANKS and all(rank.step and rank.step.step >= FROM_STEP for rank in ranks.values())

    try:
        _until(source, begun)
        samples: dict[int, list[Memory]] = {rank: [] for rank in range(RANKS)}
        newest = {rank: source.state.ranks[rank].memory for rank in samples}

        def full() -> bool:
            for rank, kept in samples.items():
                memory = source.state.ranks[rank].memory
                if memory is not None and memory is not newest[rank]:
                    newest[rank] = memory
                    kept.append(memory)
            return all(len(kept) >= count for kept in samples.values())

        _until(source, full)
        hello = source.state.hello
        plan = hello.planned if hello is not None else None
        return [(rank, kept, planned_peak(kept[-1], plan)) for rank, kept in samples.items()]
    finally:
        source.send(Command(id=uuid.uuid4().hex, name="abort", who="benchmark", wall_s=time.time()))
        _until(source, lambda: not read_entry(entry.path).live)
        source.close()


def _until(source: LiveSource, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline or source.state.state_name == "failed":
            raise RunFailed(f"the run is {source.state.state_name} at step {source.state.step}")
        source.wait(0.1)
        source.poll()


def _parts(found: list[tuple[str, int, list[Memory], int | None]], *, pipes: bool = False) -> str:
    """One row per configuration and rank, in MiB."""
    uses = [dict(memory_use(samples[-1]).parts) for _, _, samples, _ in found]
    shown = [name for name in CATEGORIES if name != "other" and any(name in use for use in uses)]
    head = ["MiB", "rank", *map(category_label, shown), "not written", "RSS", "rest", "most", "peak", "plan"]
    rows = []
    for (name, rank, samples, planned), use in zip(found, uses, strict=True):
        last = samples[-1]
        sizes = [use.get(part, 0) for part in shown] + [last.untouched_bytes, last.rss_bytes]
        peak = max(last.peak_bytes.values(), default=0)
        row = [name, str(rank), *(f"{size / MIB:.0f}" for size in sizes)]
        row += [f"{_rest(last):.1%}", f"{max(map(_rest, samples)):.1%}"]
        rows.append([*row, f"{peak / MIB:.0f}", f"{(planned or 0) / MIB:.0f}"])
    return table(head, rows, pipes=pipes)


def _rest(memory: Memory) -> float:
    """What has no name, or is counted beyond the RSS, as a share of it."""
    return (memory.rss_parts.get("rest", 0) + memory.untouched_bytes) / memory.rss_bytes


# ---- costs -----------------------------------------------------------------------------------------------------------
def _costs() -> dict[str, float]:
    """Median CPU time of each reading in this process, in microseconds."""
    rollup = Path("/proc/self/smaps_rollup").read_bytes
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "/proc/self/status": (read_resident, READINGS),
        "clear_refs": (reset_peak, READINGS),
        "mallinfo2": (heap_use, READINGS),
        "for comparison: smaps_rollup": (rollup, 10),
    }
    return {name: statistics.median(_microseconds(call) for _ in range(count)) for name, (call, count) in calls.items()}


def _microseconds(call: Callable[[], object]) -> float:
    began = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - began) / 1000


def _costs_table(costs: dict[str, float], *, pipes: bool = False) -> str:
    rows = [[name, f"{cost:.1f}"] for name, cost in costs.items()]
    return table(["reading", "CPU us"], rows, pipes=pipes)


if __name__ == "__main__":
    sys.exit(main())
