"""Collectives under way: waiting for them, and reporting them to telemetry."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime import native
from runtime.comm.transfer import Copy
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.telemetry.device_time import DeviceTime

if TYPE_CHECKING:
    from runtime.comm.shared_memory import Posted


class Pending(Protocol):
    """A collective that has been issued."""

    def wait(self) -> None:
        """Wait until the caller can use the result (on CUDA: make the current stream wait)."""

    def into(self, target: torch.Tensor, add: bool) -> None:
        """Instead of `wait`, for a reduce-scatter: copy the sum of this rank's shard to `target` (shard,), or add it
        there."""

    def fence(self) -> None:
        """After `wait` or `into`: wait until this rank's buffer may be written again."""


class Done:
    """The result of a collective in a world of one. own: (shard,) the buffer of a reduce-scatter."""

    def __init__(self, own: torch.Tensor | None = None) -> None:
        self._own = own

    def wait(self) -> None:
        """Return at once."""

    def into(self, target: torch.Tensor, add: bool) -> None:
        """See Pending."""
        assert self._own is not None
        combine(target, self._own, add)

    def fence(self) -> None:
        """Return at once."""


class RankGone(RuntimeError):
    """A collective can't complete, because another rank has ended."""


GLOO_DISCONNECTED = (
    "connection reset by peer",
    "connection closed by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
)
"""Parts of Gloo's error messages when another rank has ended."""


@contextlib.contextmanager
def waiting_for_ranks(op: str) -> Iterator[None]:
    """Around a wait for Gloo: raises RankGone instead of Gloo's socket errors, whose cause is that another rank has
    ended."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error).lower() for words in GLOO_DISCONNECTED):
            text = str(error).splitlines()[0].rpartition("] ")[2]
            raise RankGone(f"another rank is gone ({text}); this rank was waiting for it in {op}") from error
        raise


class CopyPending(Done):
    """An all-gather in a world of one: only the copy of its shard is under way."""

    def __init__(self, copy: Copy) -> None:
        super().__init__()
        self._copy = copy

    def wait(self) -> None:
        """Make the current stream wait for the copy."""
        self._copy.wait_device()


class HostPending:
    """A Gloo collective. The backend's thread records the time of its end."""

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
        """Block the calling thread until the collective is complete, and report it."""
        before = time.monotonic_ns()
        with waiting_for_ranks(self._op):
            self._work.wait()
        after = time.monotonic_ns()
        end = self._ended_ns[0] or after
        self._telemetry.completed(self._seq, self._op, self._nbytes, self._issue_ns, end, after - before)

    def into(self, target: torch.Tensor, add: bool) -> None:
        """See Pending."""
        self.wait()
        assert self._own is not None
        combine(target, self._own, add)

    def fence(self) -> None:
        """Return at once: the backend has sent copies."""


class SharedPending:
    """A collective through shared memory: it is published when issued, and its work is done in `wait` or `into`."""

    __slots__ = ("_nbytes", "_op", "_posted", "_seq", "_telemetry")

    def __init__(self, telemetry: Telemetry | NullTelemetry, op: str, nbytes: int, start: Callable[[], Posted]) -> None:
        self._telemetry, self._op, self._nbytes = telemetry, op, nbytes
        self._seq = telemetry.issued(op, nbytes)
        self._posted = start()

    def wait(self) -> None:
        """See Pending."""
        self._posted.wait()
        self._report()

    def into(self, target: torch.Tensor, add: bool) -> None:
        """See Pending."""
        self._posted.into(target, add)
        self._report()

    def fence(self) -> None:
        """See Pending."""
        self._posted.fence()

    def _report(self) -> None:
        posted = self._posted
        self._telemetry.completed(self._seq, self._op, self._nbytes, posted.issue_ns, posted.end_ns, posted.wait_ns)


class DeviceClock:
    """The GPU stream of collectives, and their reports to telemetry."""

    def __init__(
        self, stream: torch.cuda.Stream, device_time: DeviceTime, telemetry: Telemetry | NullTelemetry
    ) -> None:
        self.stream, self._time, self.telemetry = stream, device_time, telemetry
        self._unreported: deque[DevicePending] = deque()
        self._ended = 0
        telemetry.completed_on_device = self.ended

    def ns(self, event: torch.cuda.Event) -> int:
        """Time of `event` on CLOCK_MONOTONIC, in nanoseconds."""
        return self._time.ns(event)

    def watch(self, pending: DevicePending) -> None:
        """Report `pending` to telemetry when it has ended."""
        self.report()
        self._time.keep_up()
        self._unreported.append(pending)

    def report(self) -> None:
        """Report collectives that have ended to telemetry, without waiting for the GPU."""
        while self._unreported and self._unreported[0].over():
            self._unreported.popleft().report()

    def ended(self) -> int:
        """Sequence number of the newest collective that has ended. For the telemetry thread, whose heartbeats go on
        while no collective is issued; collectives are reported only when the next one is."""
        with contextlib.suppress(RuntimeError):  # the training thread has changed the deque meanwhile
            for pending in [*self._unreported]:
                if not pending.ended():
                    break
                self._ended = max(self._ended, pending.seq)
        return self._ended


class DevicePending:
    """An NCCL collective on the stream of collectives, between two events."""

    __slots__ = ("_clock", "_end", "_nbytes", "_op", "_own", "_place", "_start", "_wait_begun", "seq")

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
        self.seq = clock.telemetry.issued(op, nbytes)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait_begun: torch.cuda.Event | None = None
        self._place = clock.telemetry.place
        clock.stream.wait_stream(torch.cuda.current_stream(clock.stream.device))
        with torch.cuda.stream(clock.stream):
            if after is not None:
                after.wait_device()
            self._start.record()
            start()  # not async_op: this stream itself then waits for the backend's
            self._end.record()
        clock.watch(self)

    def wait(self) -> None:
        """Make the current stream wait for the collective."""
        current = torch.cuda.current_stream(self._clock.stream.device)
        self._place = self._clock.telemetry.place
        self._wait_begun = torch.cuda.Event(enable_timing=True)
        self._wait_begun.record(current)
        current.wait_event(self._end)
        self._own = None  # the unreported collective must not keep the buffer alive

    def into(self, target: torch.Tensor, add: bool) -> None:
        """See Pending."""
        own = self._own
        self.wait()
        assert own is not None
        combine(target, own, add)

    def fence(self) -> None:
        """Return at once: the next write is on the stream that `wait` has ordered after the collective."""

    def ended(self) -> bool:
        """Whether the collective has ended."""
        return self._end.query()

    def over(self) -> bool:
        """Whether the collective has ended and the compute stream has reached the wait for it."""
        return self._wait_begun is not None and self._end.query() and self._wait_begun.query()

    def report(self) -> None:
        """Report the collective to telemetry. Its exposed wait is the time from when the compute stream reached the
        wait to the collective's end."""
        assert self._wait_begun is not None
        clock = self._clock
        start_ns, end_ns, reached_ns = clock.ns(self._start), clock.ns(self._end), clock.ns(self._wait_begun)
        wait_ns = max(0, end_ns - reached_ns)
        clock.telemetry.completed(self.seq, self._op, self._nbytes, start_ns, end_ns, wait_ns, self._place)


def combine(target: torch.Tensor, source: torch.Tensor, add: bool, threads: int | None = None) -> None:
    """target = source or (add) target += source, for (numel,) tensors of any dtypes; `source` may be `target` itself.
    threads: number of CPU threads; None: torch's."""
    if add:
        accumulate(target, source, threads)
    elif target.data_ptr() != source.data_ptr() or target.dtype != source.dtype:
        target.copy_(source)


def accumulate(target: torch.Tensor, grad: torch.Tensor, threads: int | None = None) -> None:
    """target += grad. Uses our kernel for a 16-bit gradient and an fp32 target on a CPU, where torch takes five times
    as long."""
    mixed = target.dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16)
    if mixed and target.device.type == "cpu" and grad.is_contiguous() and native.available():
        native.accumulate(target, grad.view(-1), threads=threads or torch.get_num_threads())
    else:
        target.view(grad.shape).add_(grad)
