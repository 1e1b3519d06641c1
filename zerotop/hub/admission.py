"""Checks what comes in from the ranks: only their own messages, of the kinds that ranks send, and no more than screens
can use.

Everything that can write to the run's sockets belongs to the user, but it may be out of order: a rank of another
attempt, a script with a bug, an older version. So nothing is folded, recorded or passed on unchecked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.wire.base import Message
from runtime.wire.bounds import MAX_RANKS
from runtime.wire.codec import Decoded, ProtocolError, encode_data, load, rank_of, read_packet
from runtime.wire.finetuning import DataReport, Evaluation
from runtime.wire.messages import (
    Ack,
    CheckpointSaved,
    Collectives,
    Event,
    Goodbye,
    Heartbeat,
    Hello,
    LogRecord,
    Memory,
    Packet,
    Phases,
    StepResult,
)
from zerotop.hub.limits import TokenBucket

TELEMETRY = (Phases, StepResult, Memory, Collectives, Heartbeat)
EVENTS = (Hello, LogRecord, Event, CheckpointSaved, DataReport, Evaluation, Ack, Goodbye)
LOGS_PER_S, LOGS_AT_ONCE = 50.0, 1000.0
"""Limits on the log records of one rank. All of them are in its log file."""
EVENTS_PER_S, EVENTS_AT_ONCE = 200.0, 2000.0
REPORTS_PER_S, REPORTS_AT_ONCE = 5.0, 100.0
"""Limits on the data reports and evaluations of rank 0, each of which may have 300 KB."""


@dataclass(frozen=True)
class Admitted:
    """A packet that passed the checks."""

    rank: int
    packet: Packet
    frame: bytes
    """The JSON of the packet without the rejected messages."""
    decoded: Decoded[Packet]


class Door:
    """The checks of one hub. `report(text)` is called for everything that is rejected."""

    def __init__(self, world_size: int, report: Callable[[str], object]) -> None:
        self.world_size = world_size
        """0: not known yet."""
        self._report = report
        self._buckets: dict[tuple[int, type[Message]], TokenBucket] = {}

    def admit(self, frame: bytes, attempt: int, kinds: tuple[type[Message], ...]) -> Admitted | None:
        """A rank's packet, without the messages that it may not send; None for a packet of another attempt. Raises
        ProtocolError."""
        decoded = read_packet(load(frame))
        packet = decoded.shell
        rank = rank_of(packet.source)
        if rank is None or rank >= (self.world_size or MAX_RANKS):
            last = (self.world_size or MAX_RANKS) - 1
            raise ProtocolError(f"a packet of {packet.source[:40]!r}: expected one of rank 0 to {last}")
        if packet.attempt != attempt:
            return None
        for problem in decoded.malformed:
            self._report(f"{packet.source}: {problem}")
        admitted = Admitted(rank, packet, frame, decoded)
        return self._sift(admitted, lambda message: _foreign(rank, message, kinds), again=bool(decoded.malformed))

    def take_acks(self, admitted: Admitted) -> tuple[Admitted, list[Ack]]:
        """The packet without its acks, and the acks: they are for the hub alone."""
        acks = [message for message in admitted.packet.messages if isinstance(message, Ack)]
        if not acks:
            return admitted, acks
        return self._sift(admitted, lambda message: "an ack" if isinstance(message, Ack) else "", silently=True), acks

    def thin(self, admitted: Admitted) -> Admitted:
        """The packet without the log records and events that the rank sends faster than anybody could read."""
        return self._sift(admitted, lambda message: self._too_fast(admitted.rank, message))

    def _sift(
        self, admitted: Admitted, refusal: Callable[[Message], str], again: bool = False, silently: bool = False
    ) -> Admitted:
        """The packet without the messages for which `refusal` returns a reason. `again`: the frame holds messages
        that could not be decoded, so it must be encoded again."""
        packet, decoded = admitted.packet, admitted.decoded
        kept, known, refused = [], [], set()
        for message, at in zip(packet.messages, decoded.known, strict=True):
            if why := refusal(message):
                refused.add(at)
                if not silently:
                    self._report(f"{packet.source}: {why}")
            else:
                kept.append(message)
                known.append(at)
        if not refused and not again:
            return admitted
        places = [at for at in range(len(decoded.items)) if at not in refused]
        items = [decoded.items[at] for at in places]
        moved = [places.index(at) for at in known]
        frame = encode_data({**decoded.data, "messages": items})
        packet = packet.model_copy(update={"messages": kept})
        return Admitted(admitted.rank, packet, frame, replace(decoded, shell=packet, items=items, known=moved))

    def _too_fast(self, rank: int, message: Message) -> str:
        if isinstance(message, LogRecord) and not self._take(rank, LogRecord, LOGS_PER_S, LOGS_AT_ONCE):
            return "log records came too fast and are only in its log file"
        if isinstance(message, Event) and not self._take(rank, Event, EVENTS_PER_S, EVENTS_AT_ONCE):
            return "events came too fast and were dropped"
        if isinstance(message, DataReport | Evaluation) and not self._take(
            rank, Evaluation, REPORTS_PER_S, REPORTS_AT_ONCE
        ):
            return "data reports and evaluations came too fast and were dropped"
        return ""

    def _take(self, rank: int, kind: type[Message], per_s: float, burst: float) -> bool:
        bucket = self._buckets.get((rank, kind))
        if bucket is None:
            bucket = self._buckets[rank, kind] = TokenBucket(per_s, burst)
        return bucket.take()


def _foreign(rank: int, message: Message, kinds: tuple[type[Message], ...]) -> str:
    kind = getattr(message, "kind", "")
    if not isinstance(message, kinds):
        return f"a message of the kind {kind!r}, which ranks do not send here"
    if isinstance(message, DataReport):  # it has no sender: it is about the run
        return "" if rank == 0 else f"a message of the kind {kind!r}, which only rank 0 sends"
    whose = getattr(message, "rank", None)
    if whose != rank and not (whose is None and isinstance(message, Ack)):
        return f"a message of the kind {kind!r} in the name of {'the run' if whose is None else f'rank {whose}'}"
    return ""
