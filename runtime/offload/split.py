"""How much of the update each of CPU and GPU takes on, from what they were measured to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

SAMPLE = 1 << 23
"""Elements that are updated to measure: 96 MiB of states, beyond any cache."""
ROUNDS = 3


class Rates(NamedTuple):
    """Elements per second of AdamW on states in host memory."""

    cpu: float
    gpu: float
    cpu_beside: float
    """While the GPU updates, too: both take from the same host memory."""
    gpu_beside: float


def device_share(rates: Rates) -> float:
    """The GPU's part, 0 to 1, with which the update ends soonest: both finish together, or the faster does it alone
    where they only slow each other down. (arXiv 2410.21316 splits by a model of the same rates)"""
    together = rates.cpu_beside + rates.gpu_beside
    if max(rates.cpu, rates.gpu) >= together:
        return 1.0 if rates.gpu > rates.cpu else 0.0
    return rates.gpu_beside / together


def measure(cpu: Callable[[], None], start_gpu: Callable[[], Callable[[], None]], elements: int = SAMPLE) -> Rates:
    """cpu(): updates `elements` on the CPU. start_gpu(): starts as many on the GPU, returns what waits for them."""

    def seconds_of(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def gpu() -> None:
        start_gpu()()

    cpu()
    gpu()  # pages and streams are there from now on
    cpu_s = min(seconds_of(cpu) for _ in range(ROUNDS))
    gpu_s = min(seconds_of(gpu) for _ in range(ROUNDS))
    cpu_beside, gpu_beside = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        wait = start_gpu()
        cpu()
        cpu_beside.append(time.perf_counter() - began)
        wait()
        gpu_beside.append(time.perf_counter() - began)
    return Rates(elements / cpu_s, elements / gpu_s, elements / min(cpu_beside), elements / min(gpu_beside))
