"""How the update of offloaded states is split between CPU and GPU, by their measured rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

SAMPLE = 1 << 23
"""Elements of one measured update: 96 MiB of states, more than any cache holds."""
ROUNDS = 3
"""Measurements of each rate, of which the fastest counts."""


class Rates(NamedTuple):
    """Rates of AdamW on states in host memory, in elements per second."""

    cpu: float
    gpu: float
    cpu_beside: float
    """Rate of the CPU while the GPU updates, too, and both use the bandwidth of the host memory."""
    gpu_beside: float
    """Rate of the GPU while the CPU updates, too."""


def device_share(rates: Rates) -> float:
    """The GPU's share, 0 to 1, with which the update takes least time: both finish together, or the faster one works
    alone if together they are slower. (arXiv 2410.21316 splits by a model of the same rates)"""
    together = rates.cpu_beside + rates.gpu_beside
    if max(rates.cpu, rates.gpu) >= together:
        return 1.0 if rates.gpu > rates.cpu else 0.0
    return rates.gpu_beside / together


def measure(cpu: Callable[[], None], start_gpu: Callable[[], Callable[[], None]], elements: int = SAMPLE) -> Rates:
    """Measure the rates. cpu: updates `elements` on the CPU. start_gpu: starts updating as many on the GPU and returns
    a function that waits for it."""

    def seconds_of(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def gpu() -> None:
        start_gpu()()

    cpu()
    gpu()  # warm-up: page faults, creation of streams
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
