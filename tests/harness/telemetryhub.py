"""The hub's two sockets towards ranks, bare: what a rank's telemetry is tested against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from runtime.wire.codec import decode_packet, encode
from runtime.wire.messages import Command, Packet, Resend
from runtime.wire.rundir import Sockets
from tests.harness.waiting import patient, until

DEADLINE_S = patient(10)


class RankHub:
    """Binds `telemetry` (SUB) and `ranks` (ROUTER) in `folder`. Everything read must come within DEADLINE_S."""

    def __init__(self, folder: Path) -> None:
        self.sockets = Sockets(folder)
        self._context = zmq.Context()
        self._telemetry = self._context.socket(zmq.SUB)
        self._telemetry.subscribe(b"")
        self._telemetry.bind(self.sockets.endpoint("telemetry"))
        self.bind_ranks()

    def bind_ranks(self) -> None:
        self._ranks = self._context.socket(zmq.ROUTER)
        self._ranks.bind(self.sockets.endpoint("ranks"))

    def unbind_ranks(self) -> None:
        """End the connection as a hub that breaks down would."""
        self._ranks.close(linger=0)

    def close(self) -> None:
        self._context.destroy(linger=0)

    # ---- reading ---------------------------------------------------------------------------------------------------
    def packet(self) -> Packet:
        """The next telemetry packet."""
        assert self._telemetry.poll(DEADLINE_S * 1000), "no telemetry packet"
        return decode_packet(self._telemetry.recv())

    def message(self, kind: str, accept: Callable[[Any], bool] = lambda message: True) -> Any:
        """The next telemetry message of `kind` that `accept` likes; packets before it are thrown away."""
        return _first_of(self.packet, kind, accept)

    def event_frames(self) -> list[bytes]:
        """The next event packet as it came: [identity, JSON]."""
        assert self._ranks.poll(DEADLINE_S * 1000), "no event packet"
        return self._ranks.recv_multipart()

    def event_packet(self) -> Packet:
        return decode_packet(self.event_frames()[-1])

    def event(self, kind: str, accept: Callable[[Any], bool] = lambda message: True) -> Any:
        """The next event message of `kind` that `accept` likes."""
        return _first_of(self.event_packet, kind, accept)

    def no_more_events(self) -> bool:
        return not self._ranks.poll(0)

    # ---- speaking --------------------------------------------------------------------------------------------------
    def send(self, message: Command | Resend) -> None:
        self.send_raw(encode(message))

    def send_raw(self, frame: bytes) -> None:
        self._ranks.send_multipart([b"rank/0/1", frame])


def _first_of(read: Callable[[], Packet], kind: str, accept: Callable[[Any], bool]) -> Any:
    def look() -> Any:
        return next((message for message in read().messages if message.kind == kind and accept(message)), None)

    return until(look, f"such a message of kind {kind}", pause=lambda _: None)
