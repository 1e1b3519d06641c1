"""Sums of a few numbers over ranks that the training thread does not wait for, on the host.

training    | begin | goes on ...                                            | wait: they have long been there
this thread |       | own() waits for this rank's numbers | Gloo: all-reduce |

One thread of the process sums for all of its engines, in the order in which the training thread began the sums: that is
one order on all ranks, whichever engine's numbers arrive first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

from runtime.comm.pending import waiting_for_ranks
from runtime.telemetry import NullTelemetry, Telemetry

_OP, _NUMBER_BYTES = "all_reduce", 8
_thread: ThreadPoolExecutor | None = None


class HostSum:
    """A sum over ranks that is under way."""

    def __init__(
        self,
        own: Callable[[], Sequence[float]],
        count: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        telemetry: Telemetry | NullTelemetry,
    ) -> None:
        """own: returns the `count` numbers of this rank, on the thread that sums; it may wait for the device. device:
        this rank's. group: a Gloo group that nothing else uses; None in a world of one."""
        self._own, self._count, self._group, self._telemetry = own, count, group, telemetry
        self._seq = telemetry.issued(_OP, count * _NUMBER_BYTES) if group is not None else 0
        self._began_ns = self._ended_ns = 0
        self._result: Future[list[float]] = _sums_thread(device).submit(self._sum)

    def _sum(self) -> list[float]:
        numbers = torch.tensor(self._own(), dtype=torch.float64, device="cpu")
        self._began_ns = time.monotonic_ns()
        if self._group is not None:
            with waiting_for_ranks(_OP):
                dist.all_reduce(numbers, group=self._group)
        self._ended_ns = time.monotonic_ns()
        return numbers.tolist()  # type: ignore[no-any-return]

    def wait(self) -> list[float]:
        """Wait for the sums. Any thread may. Raises what `own` has raised, or RankGone."""
        return self._result.result()

    def report(self) -> None:
        """After `wait`, on the training thread, once: report the collective to telemetry. It has no exposed wait:
        whoever uses parameters waits for their update, and that is what counts the time."""
        if self._group is not None:
            nbytes = self._count * _NUMBER_BYTES
            self._telemetry.completed(self._seq, _OP, nbytes, self._began_ns, self._ended_ns, 0)


def _sums_thread(device: torch.device) -> ThreadPoolExecutor:
    global _thread
    if _thread is None:
        _thread = ThreadPoolExecutor(1, "host-sums", _init_thread, (device,))
    return _thread


def _init_thread(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise its calls would make a CUDA context on the first GPU
