"""A collective under way: who waits for it how, and what telemetry hears of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime import native
from runtime.comm.transfer import Copy
from runtime.telemetry import NullTelemetry, Telemetry

if TYPE_CHECKING:
    from runtime.comm.shared_memory import Posted


class Pending(Protocol):
    """What every collective hands back."""

    def wait(self) -> None:
        """Makes the result usable by the caller (on CUDA: by the current stream)."""

    def into(self, target: torch.Tensor, add: bool) -> None:
        """Instead of `wait`, for a reduce-scatter: leave the own shard's sum in `target` (its size), or add it
        there."""

    def fence(self) -> None:
        """After `wait` or `into`: returns when this rank's buffer may be written again."""


class Done:
    """What a world of one gets back: nothing to wait for. `own` is the reduced range, which nothing was added to."""

    def __init__(self, own: torch.Tensor | None = None) -> None:
        self._own = own

    def wait(self) -> None:
        return None

    def into(self, target: torch.Tensor, add: bool) -> None:
        assert self._own is not None
        combine(target, self._own, add)

    def fence(self) -> None:
        return None


class RankGone(RuntimeError):
    """A collective can't end, because a rank of it has."""


GONE = ("connection reset by peer", "connection closed by peer", "connection refused", "broken pipe", "socket closed")
"""What Gloo says then, depending on what it was doing."""


@contextmanager
def waiting_for_ranks(op: str) -> Iterator[None]:
    """Around a wait for Gloo: raises RankGone where the cause is another rank's end, which Gloo words as a matter of
    sockets."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error).lower() for words in GONE):
            text = str(error).splitlines()[0].rpartition("] ")[2]
            raise RankGone(f"another rank is gone ({text}); this rank was waiting for it in {op}") from error
        raise


class Arriving(Done):
    """In a world of one: something that is being copied to where it is gathered."""

    def __init__(self, copy: Copy) -> None:
        super().__init__()
        self._copy = copy

    def wait(self) -> None:
        self._copy.wait_device()


class HostPending:
    """A Gloo collective; its backend's thread notes the end, which `wait` could only guess later."""

    __slots__ = ("_ended_ns", "_issue_ns", "_nbytes", "_op", "_own", "_seq", "_telemetry", "_work")

    def __init__(
        self,
        telemetry: Telemetry | NullTelemetry,
        op: str,
        nbytes: int,
        start: Callable[[], Any],
        own: torch.Tensor | None = None,
    ) -> None:
        self._telemetry, self._op, self._nbytes, self._own = telemetry, op, nbytes, own
        self._seq = telemetry.issued(op, nbytes)
        # The callback must not hold this object: the backend's thread would drop the work, and with it perhaps the last
        # reference to a process group, which can't end its own thread.
        self._ended_ns = ended_ns = [0]
        self._issue_ns = time.monotonic_ns()
        self._work = start()
        self._work.get_future().add_done_callback(lambda _future: ended_ns.__setitem__(0, time.monotonic_ns()))

    def wait(self) -> None:
        before = time.monotonic_ns()
        with waiting_for_ranks(self._op):
            self._work.wait()
        after = time.monotonic_ns()
        end = self._ended_ns[0] or after
        self._telemetry.completed(self._seq, self._op, self._nbytes, self._issue_ns, end, after - before)

    def into(self, target: torch.Tensor, add: bool) -> None:
        self.wait()
        assert self._own is not None
        combine(target, self._own, add)

    def fence(self) -> None:
        """Nothing: the backend sent copies."""


class SharedPending:
    """A collective through shared memory: published at once, the work is done by whoever waits."""

    __slots__ = ("_nbytes", "_op", "_posted", "_seq", "_telemetry")

    def __init__(self, telemetry: Telemetry | NullTelemetry, op: str, nbytes: int, start: Callable[[], Posted]) -> None:
        self._telemetry, self._op, self._nbytes = telemetry, op, nbytes
        self._seq = telemetry.issued(op, nbytes)
        self._posted = start()

    def wait(self) -> None:
        self._posted.wait()
        self._report()

    def into(self, target: torch.Tensor, add: bool) -> None:
        self._posted.into(target, add)
        self._report()

    def fence(self) -> None:
        self._posted.fence()

    def _report(self) -> None:
        posted = self._posted
        self._telemetry.completed(self._seq, self._op, self._nbytes, posted.issue_ns, posted.end_ns, posted.wait_ns)


ZERO_HOLDS_NS = 10_000_000_000


class DeviceClock:
    """A GPU stream of our own for collectives, and its events as times of CLOCK_MONOTONIC."""

    def __init__(self, device: torch.device, telemetry: Telemetry | NullTelemetry) -> None:
        self.stream = torch.cuda.Stream(device)
        self.telemetry = telemetry
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record(self.stream)
        self._zero.synchronize()
        self._zero_ns = self._zeroed_ns = time.monotonic_ns()
        self._next_zero: torch.cuda.Event | None = None
        self._unreported: deque[DevicePending] = deque()

    def _move_zero(self) -> None:
        """CUDA tells times between events as fp32 milliseconds: after an hour they are a quarter of one apart."""
        if self._next_zero is not None and self._next_zero.query():
            self._zero_ns, self._zero, self._next_zero = self.ns(self._next_zero), self._next_zero, None
        elif self._next_zero is None and time.monotonic_ns() - self._zeroed_ns > ZERO_HOLDS_NS:
            self._zeroed_ns = time.monotonic_ns()
            self._next_zero = torch.cuda.Event(enable_timing=True)
            self._next_zero.record(self.stream)

    def ns(self, event: torch.cuda.Event) -> int:
        return self._zero_ns + int(self._zero.elapsed_time(event) * 1e6)

    def watch(self, pending: DevicePending) -> None:
        self.report()
        self._move_zero()
        self._unreported.append(pending)

    def report(self) -> None:
        """Tell telemetry of collectives that have ended meanwhile; never waits for the GPU."""
        while self._unreported and self._unreported[0].over():
            self._unreported.popleft().report()


class DevicePending:
    """An NCCL collective between two events on the stream that collectives have to themselves."""

    __slots__ = ("_clock", "_end", "_nbytes", "_op", "_own", "_reached", "_seq", "_start")

    def __init__(
        self,
        clock: DeviceClock,
        op: str,
        nbytes: int,
        start: Callable[[], Any],
        own: torch.Tensor | None = None,
        after: Copy | None = None,
    ) -> None:
        """after: a copy that the collective's stream waits for first."""
        self._clock, self._op, self._nbytes, self._own = clock, op, nbytes, own
        self._seq = clock.telemetry.issued(op, nbytes)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._reached: torch.cuda.Event | None = None
        clock.stream.wait_stream(torch.cuda.current_stream(clock.stream.device))
        with torch.cuda.stream(clock.stream):
            if after is not None:
                after.wait_device()
            self._start.record()
            start()  # not async_op: this stream itself then waits for the backend's
            self._end.record()
        clock.watch(self)

    def wait(self) -> None:
        current = torch.cuda.current_stream(self._clock.stream.device)
        self._reached = torch.cuda.Event(enable_timing=True)
        self._reached.record(current)
        current.wait_event(self._end)
        self._own = None  # waiting to be reported must not keep a buffer

    def into(self, target: torch.Tensor, add: bool) -> None:
        own = self._own
        self.wait()
        assert own is not None
        combine(target, own, add)

    def fence(self) -> None:
        """Nothing: whoever writes next does so on the stream that `wait` has ordered."""

    def over(self) -> bool:
        return self._reached is not None and self._end.query() and self._reached.query()

    def report(self) -> None:
        """The exposed wait is the time from when the computing stream reached the wait to the collective's end."""
        assert self._reached is not None
        clock = self._clock
        start_ns, end_ns, reached_ns = clock.ns(self._start), clock.ns(self._end), clock.ns(self._reached)
        clock.telemetry.completed(self._seq, self._op, self._nbytes, start_ns, end_ns, max(0, end_ns - reached_ns))


def combine(target: torch.Tensor, source: torch.Tensor, add: bool, threads: int | None = None) -> None:
    """target = source or target += source, 1-D tensors of one size, any dtypes; `source` may be `target` itself.
    threads: of the CPU kernels; None: torch's number."""
    if add:
        accumulate(target, source, threads)
    elif target.data_ptr() != source.data_ptr() or target.dtype != source.dtype:
        target.copy_(source)


def accumulate(target: torch.Tensor, grad: torch.Tensor, threads: int | None = None) -> None:
    """target += grad, where torch is slow: a 16-bit gradient into an fp32 buffer on a CPU takes it five times as
    long."""
    mixed = target.dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16)
    if mixed and target.device.type == "cpu" and grad.is_contiguous() and native.available():
        native.accumulate(target, grad.view(-1), threads=threads or torch.get_num_threads())
    else:
        target.view(grad.shape).add_(grad)
