"""What one tick of the GPU probe costs at 8 GPUs, on the fake libnvidia-ml.so.1 of the tests.

    python -m benchmarks.gpu_probe --ticks 300

The fake driver answers at once: this is the cost of our side, Python, ctypes, and the message. A real driver's own time
comes on top; the number of calls stands beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.context import markdown, measured_on, table
from runtime.wire.codec import encode
from tests.harness.fake_nvml import FakeNvml
from zerotop.probe.nvml import list_devices, read
from zerotop.probe.slow import SlowReader
from zerotop.probe.slowfields import GROUPS, Reader


def measured(work: Callable[[], Any], ticks: int) -> tuple[float, float]:
    """Median CPU milliseconds of this thread, and the 99th percentile."""
    times = []
    for _ in range(ticks):
        begin = time.thread_time_ns()
        work()
        times.append((time.thread_time_ns() - begin) / 1e6)
        time.sleep(0.002)  # a tick comes once a second, never back to back
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def counted(nvml: ModuleType, work: Callable[[], Any]) -> int:
    """How many calls of NVML `work` makes."""
    calls, original = Counter[str](), nvml._nvmlGetFunctionPointer

    def count(name: str) -> Any:
        calls[name] += 1
        return original(name)

    nvml._nvmlGetFunctionPointer = count  # type: ignore[attr-defined]
    work()
    nvml._nvmlGetFunctionPointer = original  # type: ignore[attr-defined]
    return calls.total()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=300)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeNvml(Path(folder))
        fake.gpus(given.gpus)
        os.environ["FAKE_NVML"] = str(fake.control)
        nvml = fake.binding()
        nvml.nvmlInit()
        devices = list_devices(nvml, [])
        samples = [read(device) for device in devices]
        slow = SlowReader(nvml)
        readers = [Reader(device) for device in devices]
        rows: list[list[str]] = []

        def add(name: str, every: str, work: Callable[[], Any]) -> None:
            calls = counted(nvml, work)
            median, worst = measured(work, given.ticks)
            rows.append([name, every, str(calls), f"{median:.2f}", f"{worst:.2f}"])

        add("quick fields", "1 s", lambda: [read(device, slow) for device in devices])
        for group in GROUPS:
            add(group.name, f"{group.ttl_s:g} s", lambda group=group: [group.read(one, devices) for one in readers])
        add("encoding the samples", "1 s", lambda: [encode(sample) for sample in samples])
        nvml.nvmlShutdown()
    header = ["read", "every", "NVML calls", "CPU ms, median", "CPU ms, p99"]
    print(table(header, rows))
    if given.markdown is not None:
        context = measured_on("benchmarks.gpu_probe", ("nvidia-ml-py", "pydantic"))
        title = f"Cost of the GPU probe, {given.gpus} GPUs of the fake driver"
        given.markdown.write_text(markdown(title, context, table(header, rows, pipes=True)))


if __name__ == "__main__":
    main()
