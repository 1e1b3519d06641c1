"""Event packets for the hub, numbered so that they can be sent again."""

from __future__ import annotations

from collections import deque
from time import monotonic_ns, time
from typing import Any

from runtime.wire.codec import encode
from runtime.wire.messages import LogRecord, Packet

PACKETS_KEPT = 2000
BYTES_KEPT = 16 * 2**20
MESSAGES_PER_PACKET = 200
PACKET_BYTES = 8 * 2**20
"""Most bytes of a packet; the hub disconnects a rank that sends twice as much."""


class Outbox:
    """Encoded event packets, numbered from 1, and the number of the next one to send. Used by one thread.

    The newest PACKETS_KEPT packets (at most BYTES_KEPT bytes) are kept for `rewind`, and always the first one, because
    it has the hello.
    """

    def __init__(self, rank: int, attempt: int) -> None:
        self._rank = rank
        self._attempt = attempt
        self._first: bytes | None = None
        self._kept: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._last_seq = 0
        self._next_seq = 1

    def add(self, messages: list[Any]) -> None:
        """Make packets of `messages`. A message that can't be encoded as JSON, or is too large, is replaced by a log
        record that says so."""
        for start in range(0, len(messages), MESSAGES_PER_PACKET):
            self._add_packet(messages[start : start + MESSAGES_PER_PACKET])
        while len(self._kept) > PACKETS_KEPT or (self._bytes > BYTES_KEPT and len(self._kept) > 1):
            self._bytes -= len(self._kept.popleft()[1])

    def _add_packet(self, messages: list[Any]) -> None:
        try:
            frame = self._encode(messages)
        except (TypeError, ValueError):
            frame = self._encode([self._checked(message) for message in messages])
        if len(frame) > PACKET_BYTES and len(messages) > 1:
            half = len(messages) // 2
            self._add_packet(messages[:half])
            self._add_packet(messages[half:])
            return
        if len(frame) > PACKET_BYTES:
            frame = self._encode([self._refused(messages[0], f"it has {len(frame):,} bytes")])
        self._last_seq += 1
        self._first = self._first or frame
        self._kept.append((self._last_seq, frame))
        self._bytes += len(frame)

    def next_frame(self) -> bytes | None:
        """The next packet to send, or None when all are sent. It stays the next one until `sent`."""
        if self._next_seq > self._last_seq:
            return None
        if self._next_seq == 1:
            return self._first
        oldest = self._kept[0][0]
        self._next_seq = max(self._next_seq, oldest)  # dropped packets show as a gap in the numbers
        return self._kept[self._next_seq - oldest][1]

    def sent(self) -> None:
        """The packet that `next_frame` returned was sent."""
        self._next_seq += 1

    def rewind(self, first_seq: int) -> None:
        """Send all packets from `first_seq` on again."""
        self._next_seq = min(self._next_seq, max(1, first_seq))

    def _encode(self, messages: list[Any]) -> bytes:
        seq = self._last_seq + 1
        source = f"rank/{self._rank}"
        return encode(Packet(source=source, attempt=self._attempt, seq=seq, sent_ns=monotonic_ns(), messages=messages))

    def _checked(self, message: Any) -> Any:
        try:
            encode(message)
        except (TypeError, ValueError) as error:
            return self._refused(message, str(error))
        return message

    def _refused(self, message: Any, reason: str) -> LogRecord:
        text = f"a message of kind {message.kind} could not be sent: {reason}"
        return LogRecord(rank=self._rank, level="error", logger="runtime.telemetry", text=text, wall_s=time())
