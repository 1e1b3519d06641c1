"""The two sockets between a rank and the hub, and the socket pair that wakes the thread which owns them."""

from __future__ import annotations

import errno
import math
import socket
import time
from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import zmq

from runtime.telemetry.outbox import Outbox
from runtime.wire.codec import ProtocolError, decode_down, encode
from runtime.wire.messages import Command, FlightRequest, Packet, Resend
from runtime.wire.rundir import Sockets

FRAME_BYTES = 2**20
"""Most bytes of a command; a larger frame is not from the hub."""
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
TELEMETRY_QUEUED = 100
"""Most packets that are queued while the hub does not read: ten seconds at 10 Hz."""


class Link:
    """Sockets to the hub of one run. All methods but `wake` belong to one thread.

    The hub may start later or restart: the sockets reconnect in the background. report: called for malformed frames.
    Raises ValueError if a socket's path is too long for the kernel.
    """

    def __init__(self, sockets: Sockets, rank: int, attempt: int, report: Callable[[str], None]) -> None:
        self.outbox = Outbox(rank, attempt)
        self._source = f"rank/{rank}"
        self._attempt = attempt
        self._report = report
        self._seq = 0
        self._context = zmq.Context()
        self._publisher = self._connect(zmq.XPUB, sockets, "telemetry", {zmq.SNDHWM: TELEMETRY_QUEUED})
        self._unheard: deque[bytes] | None = deque(maxlen=TELEMETRY_QUEUED)
        """Packets from before the hub has subscribed, which would be lost; None: it has."""
        self._dealer = self._connect(
            zmq.DEALER,
            sockets,
            "ranks",
            {zmq.ROUTING_ID: f"rank/{rank}/{attempt}".encode()},
        )
        # Socket objects, not bare descriptors: after close() a late wake() can't write to what reuses the number.
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._wake_fd = self._wake_read.fileno()
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._publisher, zmq.POLLIN)
        self._monitor = self._dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._connections = 0
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def _connect(self, kind: int, sockets: Sockets, name: str, options: dict[int, Any]) -> zmq.Socket[bytes]:
        connected = self._context.socket(kind)
        try:
            connected.linger = 0
            connected.maxmsgsize = FRAME_BYTES
            connected.reconnect_ivl = RECONNECT_MS
            connected.reconnect_ivl_max = RECONNECT_MAX_MS
            for option, value in options.items():
                connected.setsockopt(option, value)
            connected.connect(sockets.endpoint(name))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            way_out = ": a Unix socket's path holds 107 characters" if error.errno == errno.ENAMETOOLONG else ""
            raise ValueError(f"can't use the socket {sockets.path(name)}: {error.strerror}{way_out}") from None
        return connected

    def wake(self) -> None:
        """Make `wait` return. For any thread, and signal handlers."""
        try:
            self._wake_write.send(b"\0")
        except OSError:
            return  # full: `wait` wakes anyway; closed: no thread waits

    def wait(self, timeout_s: float) -> list[Command | Resend | FlightRequest]:
        """Wait until a message arrives, `wake`, or timeout_s seconds. Returns the messages that have arrived."""
        ready = dict(self._poller.poll(_ceil_ms(timeout_s)))
        if self._wake_fd in ready:
            self._wake_read.recv(4096)
        if self._publisher in ready:
            self._publisher.recv_multipart()
            self._send_unheard()
        arrived: list[Command | Resend | FlightRequest] = []
        if self._monitor in ready:
            self._monitor.recv_multipart()
            self._connections += 1
            if self._connections > 1:
                # Packets that were being sent when the connection broke are lost; the hub drops those it has already.
                self.outbox.rewind(1)
        while self._dealer in ready:
            try:
                frame = self._dealer.recv_multipart(zmq.NOBLOCK)[-1]
            except zmq.Again:
                break
            try:
                message = decode_down(frame)
            except ProtocolError as error:
                self._report(f"a frame from the hub was ignored: {error}")
                continue
            if message is not None:
                arrived.append(message)
        return arrived

    def publish(self, messages: list[Any]) -> None:
        """Send one telemetry packet. If the hub does not read it, it is lost, and a gap in the numbers shows it."""
        self._seq += 1
        packet = Packet.model_construct(
            source=self._source, attempt=self._attempt, seq=self._seq, sent_ns=monotonic_ns(), messages=messages
        )
        if self._unheard is not None:
            self._unheard.append(encode(packet))
        else:
            self._publisher.send(encode(packet), zmq.NOBLOCK)

    def _send_unheard(self) -> None:
        """The hub has subscribed (or, later, gone): send what waited for it."""
        unheard, self._unheard = self._unheard, None
        for frame in unheard or ():
            self._publisher.send(frame, zmq.NOBLOCK)

    def send_events(self, messages: list[Any]) -> None:
        """Queue `messages` and send as many packets as the hub takes now; the rest is sent in the next call."""
        self.outbox.add(messages)
        while (frame := self.outbox.next_frame()) is not None:
            try:
                self._dealer.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                return
            self.outbox.sent()

    def close(self, timeout_s: float) -> None:
        """Flush for at most timeout_s seconds, then close the sockets."""
        deadline = time.monotonic() + timeout_s
        if self._unheard and self._publisher.poll(_ceil_ms(timeout_s)):
            self._send_unheard()
        while self.outbox.next_frame() is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._dealer.poll(_ceil_ms(remaining), zmq.POLLOUT):
                break
            self.send_events([])
        linger = max(0, int((deadline - time.monotonic()) * 1000))
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=linger)
        self._publisher.close(linger=linger)
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()


def _ceil_ms(seconds: float) -> int:
    # Rounded up: otherwise the poll would spin in the last fraction of a millisecond before a tick.
    return math.ceil(seconds * 1000)
