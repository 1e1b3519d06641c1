"""The time of CUDA events on the host's clock, and the marks that telemetry sets in the compute stream. It imports
torch, so import it only where there is a GPU."""

from __future__ import annotations

import time

import torch

ZERO_INTERVAL_NS = 10_000_000_000
"""After how long DeviceTime measures from a new reference event."""


class DeviceTime:
    """Converts events of one GPU to CLOCK_MONOTONIC."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """stream: for reference events. Waits for it once."""
        self._stream = stream
        zero = torch.cuda.Event(enable_timing=True)
        zero.record(stream)
        zero.synchronize()
        self._zeroed_ns = time.monotonic_ns()
        # One tuple, replaced as a whole: the telemetry thread converts events, too.
        self._zero: tuple[int, torch.cuda.Event] = (self._zeroed_ns, zero)
        self._next_zero: torch.cuda.Event | None = None

    def keep_up(self) -> None:
        """Move the reference event now and then, on the training thread: CUDA measures in fp32 milliseconds, which
        after an hour are 0.25 ms apart."""
        if self._next_zero is not None and self._next_zero.query():
            # No earlier than it was recorded, no later than now: the GPU's timer and the host's drift apart.
            reached_ns = min(max(self.ns(self._next_zero), self._zeroed_ns), time.monotonic_ns())
            self._zero, self._next_zero = (reached_ns, self._next_zero), None
        elif self._next_zero is None and time.monotonic_ns() - self._zeroed_ns > ZERO_INTERVAL_NS:
            self._zeroed_ns = time.monotonic_ns()
            self._next_zero = torch.cuda.Event(enable_timing=True)
            self._next_zero.record(self._stream)

    def ns(self, event: torch.cuda.Event) -> int:
        """Time of `event` in nanoseconds, on any thread."""
        zero_ns, zero = self._zero
        return zero_ns + int(zero.elapsed_time(event) * 1e6)


class StreamMarks:
    """Marks for telemetry's phases (telemetry.device_phases.Marks)."""

    def __init__(self, device: torch.device, device_time: DeviceTime) -> None:
        self._device, self._time = device, device_time

    def mark(self) -> torch.cuda.Event:
        """See Marks."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._time.keep_up()
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        """See Marks."""
        return mark.query()

    def ns(self, mark: torch.cuda.Event) -> int:
        """See Marks."""
        return self._time.ns(mark)
