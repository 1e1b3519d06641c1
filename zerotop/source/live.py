"""The live source: a hub's two Unix sockets, folded into a RunState.

The SUB socket first subscribes to the live packets, then to a snapshot topic of its own, which makes the hub send the
whole state. Packets that overtake the snapshot are held back. Both subscriptions stay: after a broken connection ZeroMQ
renews them by itself and the hub answers with a new snapshot, which replaces the state. A hole in the hub's numbering
(a screen that was suspended for long) is healed the same way.

A command goes out on the DEALER socket; its answers are the CommandRecords with its id that the hub publishes. One of
which nothing is heard is sent again: the same id acts once.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import zmq

from runtime.wire.codec import ProtocolError, encode, load, read_packet_frame, read_snapshot
from runtime.wire.messages import LIVE_STATES, Ack, Command, CommandRecord, LogRecord, Packet, RunStatus
from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC, Sockets
from zerotop.format import duration_text
from zerotop.state.run import RunState

FRAMES_PER_POLL = 5000
HELD_BACK = 10_000
FRAME_BYTES = 2**28
"""Size limit of a frame: far more than the whole state of a large run."""
SILENCE_S = 3.0
"""The hub's probe sends once a second: after this long without a message, check whether the run is still live."""
LOST_S = 6.0
ASK_AGAIN_S = 2.0
"""After this time a missing snapshot is requested again, and a command without an answer is sent again."""


class LiveSource:
    """Reads a running hub. When the hub is silent, `read_status` returns the state of the run as its directory has
    it."""

    def __init__(
        self, sockets: Sockets, run_path: Path | None = None, read_status: Callable[[], RunStatus | None] | None = None
    ) -> None:
        self.state = RunState()
        self.sockets = sockets
        self.run_path = run_path
        self.on_packet: Callable[[Packet], None] | None = None
        """Called for every packet that was folded into the state; not for what a snapshot brings."""
        self._read_status = read_status
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._screens: zmq.Socket[bytes] | None = None
        self._commands: zmq.Socket[bytes] | None = None
        self._topic = b""
        self._have_snapshot = False
        self._asked_at = 0.0
        self._held_back: list[Packet] = []
        self._heard_at: float | None = None
        self._looked_at = 0.0
        self._broken = ""
        self._sent: dict[str, tuple[Command, float]] = {}
        """Own commands without a final answer, by id, and when each was sent last."""
        self._connection_before = ""
        self._told_skipped = False

    # ---- life ------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Connect to the hub. Returns at once."""
        self._context = zmq.Context()
        screens = self._screens = self._context.socket(zmq.SUB)
        commands = self._commands = self._context.socket(zmq.DEALER)
        for socket in (screens, commands):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        screens.setsockopt(zmq.RCVHWM, HELD_BACK)
        screens.subscribe(LIVE_TOPIC)
        screens.connect(self.sockets.endpoint("screens"))
        commands.connect(self.sockets.endpoint("commands"))
        self._ask_for_snapshot()

    def close(self) -> None:
        for socket in (self._screens, self._commands):
            if socket is not None:
                socket.close(0)
        if self._context is not None:
            self._context.term()
        self._screens = self._commands = self._context = None

    # ---- reading ---------------------------------------------------------------------------------------------------
    @property
    def connection(self) -> str:
        if self._broken:
            return f"lost: {self._broken}"
        if self.state.status is not None and self.state.status.state not in LIVE_STATES:
            return "ended"
        if self._heard_at is None or not self._have_snapshot:
            return "connecting"
        age_s = self.age_s() or 0.0
        return "live" if age_s < LOST_S else f"lost: nothing heard for {duration_text(age_s)}"

    @property
    def can_control(self) -> bool:
        return self.connection != "ended" and not self._broken

    @property
    def broken(self) -> str:
        """Why this source can never work (the hub uses another protocol version); empty if all is well."""
        return self._broken

    def age_s(self) -> float | None:
        return None if self._heard_at is None else time.monotonic() - self._heard_at

    def wait(self, timeout_s: float) -> None:
        poller = zmq.Poller()
        if self._screens is not None:
            poller.register(self._screens, zmq.POLLIN)
        poller.poll(int(timeout_s * 1000))

    def poll(self) -> bool:
        if self._screens is None:
            return False
        changed = False
        try:
            for frames in _drain(self._screens):
                changed = self._screen_frames(frames) or changed
        except ProtocolError as error:
            self._broken = str(error)
        changed = self._look_after() or changed
        connection = self.connection.split(" for ")[0]  # a growing age alone is no change
        changed = changed or connection != self._connection_before
        self._connection_before = connection
        return changed

    def _screen_frames(self, frames: list[bytes]) -> bool:
        topic, frame = frames[0], frames[-1]
        self._heard()
        if topic == self._topic:
            decoded = read_snapshot(load(frame))
            snapshot = decoded.shell
            self.state = RunState()
            self.state.apply_snapshot(snapshot)
            self._have_snapshot = True
            self._broken = ""
            for packet in self._held_back:
                self._fold(packet)
            self._held_back.clear()
            self._tell_skipped(decoded.malformed)
            return True
        if topic != LIVE_TOPIC:
            return False  # an answer to an earlier question of ours
        packet, malformed = read_packet_frame(frame)
        if not self._have_snapshot:
            self._held_back.append(packet)
            del self._held_back[:-HELD_BACK]
            return False
        hole = packet.hub_seq > self.state.hub_seq + 1
        changed = self._fold(packet)
        self._tell_skipped(malformed)
        if hole and time.monotonic() - self._asked_at > ASK_AGAIN_S:
            self._ask_for_snapshot()
        return changed

    def _fold(self, packet: Packet) -> bool:
        changed = self.state.apply_packet(packet)
        if changed and self.on_packet is not None:
            self.on_packet(packet)
        return changed

    def _tell_skipped(self, malformed: list[str]) -> None:
        """Report the first message of the run that this version cannot read; the screen continues without it."""
        if malformed and not self._told_skipped:
            self._told_skipped = True
            text = f"skipping messages of the run that this version of zerotop can't read: {malformed[0]}"
            self.state.apply(LogRecord(rank=None, level="warning", logger="zerotop", text=text, wall_s=time.time()))

    def _heard(self) -> None:
        self._heard_at = time.monotonic()

    def _ask_for_snapshot(self) -> None:
        assert self._screens is not None
        if self._topic:
            self._screens.unsubscribe(self._topic)
        self._topic = SNAPSHOT_TOPIC + uuid.uuid4().hex.encode()
        self._screens.subscribe(self._topic)
        self._asked_at = time.monotonic()

    # ---- looking after the connection ------------------------------------------------------------------------------
    def _look_after(self) -> bool:
        now = time.monotonic()
        if self.connection == "ended":
            return self._refuse_unanswered()
        if self._heard_at is not None and not self._have_snapshot and now - self._asked_at > ASK_AGAIN_S:
            self._ask_for_snapshot()
        silent = self._heard_at is None or now - self._heard_at > SILENCE_S
        if silent and now - self._looked_at > 1.0:
            self._looked_at = now
            status = self._read_status() if self._read_status else None
            if status is not None and (status.state not in LIVE_STATES or self.state.status is None):
                self.state.apply(status)
                return True
        self._send_again(now)
        return False

    def _send_again(self, now: float) -> None:
        """Commands of which the hub has said nothing: the first try may have gone down with a broken tunnel."""
        for identity, (command, sent_at) in list(self._sent.items()):
            record = self.state.commands.get(identity)
            if record is not None and record.ack.state != "accepted":
                del self._sent[identity]
            elif record is None and now - sent_at > ASK_AGAIN_S and self._push(command):
                self._sent[identity] = (command, now)

    def _refuse_unanswered(self) -> bool:
        """The run has ended: a command that was not answered never will be."""
        unanswered = [command for command, _ in self._sent.values() if command.id not in self.state.commands]
        self._sent.clear()
        for command in unanswered:
            ack = Ack(id=command.id, state="rejected", reason=self._ended_reason(), wall_s=time.time())
            self.state.apply(CommandRecord(command=command, ack=ack))
        return bool(unanswered)

    def _ended_reason(self) -> str:
        status = self.state.status
        assert status is not None
        why = f": {status.reason}" if status.reason else ""
        return f"{status.name} has ended ({status.state}{why})"

    # ---- commands --------------------------------------------------------------------------------------------------
    def send(self, command: Command) -> None:
        self._sent[command.id] = (command, time.monotonic())
        if self.connection == "ended":
            self._refuse_unanswered()
        else:
            self._push(command)

    def _push(self, command: Command) -> bool:
        assert self._commands is not None, "start() comes first"
        try:
            self._commands.send(encode(command), zmq.NOBLOCK)
        except zmq.Again:  # the queue is full or nobody is connected: _send_again comes back to it
            return False
        return True


def _drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """All that has arrived, at most FRAMES_PER_POLL messages."""
    arrived = []
    for _ in range(FRAMES_PER_POLL):
        try:
            arrived.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            break
    return arrived
