"""What a scrape of the Prometheus endpoint takes, with every figure of many ranks there.

    python -m benchmarks.scrape --ranks 64 --scrapes 200

The endpoint is the real one, asked over the loopback interface. Between two scrapes the state takes a second of the
ranks' messages, as it would in a run. README.md says what each figure includes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.context import markdown, measured_on, table
from runtime.wire.judgement import Alert, Verdict
from runtime.wire.messages import Heartbeat, Hello, Memory, RunStatus, StepResult
from runtime.wire.node import GpuStats, NodeStats
from zerotop.outputs.prometheus import MetricsServer, RunCollector
from zerotop.state.run import RunState

PER_NODE = 8
GOAL_MS = 50.0
RUN = "benchmark"


class Messages:
    """What `ranks` ranks say."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._step = 0

    def beginning(self) -> list[Any]:
        """Once."""
        hellos = [self._hello(rank) for rank in range(self._ranks)]
        status = RunStatus(name=RUN, state="running", attempt=1, started_wall_s=1.0, last_checkpoint_step=10)
        verdict = Verdict(what="straggler", severity="warning", ranks=[1], text="rank 1 is slow")
        alerts = [Alert(name=f"alert {index}", rule="loss > 10", state="firing") for index in range(10)]
        return [status, *hellos, verdict, *alerts]

    def second(self) -> list[Any]:
        """Of every rank a step, its memory and a heartbeat; of every node its probe's sample."""
        self._step += 1
        found: list[Any] = []
        for rank in range(self._ranks):
            found += [self._result(rank), self._memory(rank), self._beat(rank)]
        return found + [self._node(node) for node in range(-(-self._ranks // PER_NODE))]

    def _hello(self, rank: int) -> Hello:
        return Hello(
            run=RUN, attempt=1, rank=rank, local_rank=rank % PER_NODE, world_size=self._ranks,
            host=f"node{rank // PER_NODE}", pid=1000 + rank, boot_id="b", wall_s=0.0, mono_ns=0,
            device=f"cuda:{rank % PER_NODE}", device_uuid=f"GPU-{rank}", config_digest="d", stage=3, precision="bf16",
            micro_batch=1, accumulation=4, global_batch=4 * self._ranks, steps=1000, model_flops_per_token=6e9,
            peak_flops=1e15,
        )  # fmt: skip

    def _result(self, rank: int) -> StepResult:
        return StepResult(
            rank=rank, step=self._step, loss=2.5, lr=1e-3, grad_norm=0.5, step_ms=400.0, tokens_per_s=8000.0,
            wait_ms=30.0, comm_bytes=10**9, end_ns=self._step * 10**9,
        )  # fmt: skip

    def _memory(self, rank: int) -> Memory:
        gib = 2**30
        return Memory(
            rank=rank, ledger={"parameters": gib, "gradients": gib, "optimizer": gib, "masters": gib, "buffers": gib},
            rss_bytes=8 * gib, pinned_bytes=gib, allocated_bytes=20 * gib, reserved_bytes=30 * gib,
            device_used_bytes=40 * gib, device_total_bytes=80 * gib, host_total_bytes=1000 * gib, at_ns=0,
        )  # fmt: skip

    def _beat(self, rank: int) -> Heartbeat:
        return Heartbeat(
            rank=rank, phase="backward", phase_since_ns=0, step=self._step + 1, micro_step=2, micro_steps=4,
            entered_seq=5, completed_seq=4, progress_ns=0, now_ns=0,
        )  # fmt: skip

    def _node(self, node: int) -> NodeStats:
        ranks = range(node * PER_NODE, min(self._ranks, (node + 1) * PER_NODE))
        gpus = [
            GpuStats(
                index=rank % PER_NODE, uuid=f"GPU-{rank}", name="H200", used_bytes=40 * 2**30, total_bytes=80 * 2**30,
                utilization_percent=97.0, sm_activity_percent=80.0, tensor_activity_percent=50.0,
                dram_activity_percent=60.0, power_w=650.0, power_limit_w=700.0, energy_j=1e6 + self._step * 650.0,
                temperature_c=61.0, sm_clock_mhz=1830.0, pcie_tx_bytes_per_s=1e9, pcie_rx_bytes_per_s=1e9,
                nvlink_tx_bytes_per_s=1e11, nvlink_rx_bytes_per_s=1e11, ecc_uncorrected=0,
            )
            for rank in ranks
        ]  # fmt: skip
        return NodeStats(
            host=f"node{node}", cpu_percent=20.0, cpu_count=192, load_1m=12.0, ram_used_bytes=10**12,
            ram_total_bytes=2 * 10**12, ram_available_bytes=10**12, gpus=gpus, at_ns=self._step * 10**9, wall_s=1.0,
        )  # fmt: skip


def measure(ranks: int, scrapes: int) -> tuple[list[float], list[float], bytes]:
    """(milliseconds of each scrape, CPU milliseconds of this process in each, the last page)."""
    messages, state, lock = Messages(ranks), RunState(), threading.Lock()
    state.apply_all(messages.beginning(), 1)
    for _ in range(30):  # speed and energy are over several steps
        state.apply_all(messages.second(), 1)
    server = MetricsServer("127.0.0.1", 0, RunCollector(RUN, lambda: state, lock))
    took_ms: list[float] = []
    cpu_ms: list[float] = []
    page = b""
    try:
        for _ in range(scrapes):
            with lock:
                state.apply_all(messages.second(), 1)
            began, began_cpu = time.perf_counter(), time.process_time()
            with urllib.request.urlopen(server.url, timeout=30) as answer:
                page = answer.read()
            took_ms.append(1000 * (time.perf_counter() - began))
            cpu_ms.append(1000 * (time.process_time() - began_cpu))
    finally:
        server.close()
    return took_ms, cpu_ms, page


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--scrapes", type=int, default=200)
    parser.add_argument("--markdown", type=Path, help="write the page here")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for ranks in arguments.ranks:
        took_ms, cpu_ms, page = measure(ranks, arguments.scrapes)
        samples = sum(not line.startswith(b"#") for line in page.splitlines())
        worst = statistics.quantiles(took_ms, n=20)[-1]
        row = [
            str(ranks),
            f"{samples:,}",
            f"{len(page) / 1024:.0f}",
            f"{statistics.median(took_ms):.1f}",
            f"{worst:.1f}",
        ]
        rows.append([*row, f"{max(took_ms):.1f}", f"{statistics.median(cpu_ms):.1f}"])
    header = ["ranks", "samples", "KiB", "median ms", "95% within ms", "slowest ms", "CPU ms, median"]
    print(table(header, rows))
    if arguments.markdown:
        context = measured_on("benchmarks.scrape", ("prometheus-client",))
        context["load"] = f"{load:.0f} runnable processes before the measurement"
        body = f"Goal: a scrape of 64 ranks within {GOAL_MS:.0f} ms.\n\n{table(header, rows, pipes=True)}"
        arguments.markdown.write_text(markdown("A scrape of the Prometheus endpoint", context, body))


if __name__ == "__main__":
    main()
