"""The hub: ranks send to it, screens listen to it, and it never waits for either."""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Literal

import zmq
import zmq.asyncio

from runtime.wire.base import Message
from runtime.wire.codec import ProtocolError, decode_down, encode
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import (
    LIVE_STATES,
    PROTOCOL,
    Ack,
    CheckpointSaved,
    Command,
    Event,
    FlightRequest,
    Hello,
    LogRecord,
    Packet,
    Resend,
    RunStatus,
    Snapshot,
    StepResult,
)
from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC, RunFile, Sockets
from zerotop.hub.admission import EVENTS, TELEMETRY, Door
from zerotop.hub.limits import Limiter, Losses, TokenBucket
from zerotop.hub.recorder import Recorder
from zerotop.hub.router import CommandRouter
from zerotop.state.run import RunState

_YIELD_EVERY = 64
_RESEND_S = 0.5
_RESENDS = 4
"""After so many requests the missing event packets are given up and counted as lost."""
_SUBSCRIBE = b"\x01"
_SNAPSHOTS = (20.0, 40.0)
"""Limit per second, and burst. A screen asks for one, and again after two seconds."""
_COMMANDS_EACH, _COMMANDS_TOGETHER = (20.0, 50.0), (50.0, 200.0)
"""Limits per second, and bursts, from one screen and from all of them."""
_BEHIND_S = 5.0
"""When telemetry has arrived this late for this long, the hub does not keep up, and skips it. (The ranks are on the
hub's node and share its clock.)"""
_QUEUED = 200
"""Telemetry packets of one rank that may be queued: 20 s at the usual 10 Hz."""
_LARGEST = {"telemetry": 8 * 2**20, "ranks": 16 * 2**20, "screens": 2**12, "commands": 2**18}
"""Size limit of a frame in bytes. The sender of a larger one is disconnected."""
RESTART = "the restart"
"""Sender of the commands that bring new ranks to the settings of their predecessors."""


class Hub:
    """Collects, folds, records and publishes the messages of a run, attempt by attempt. Lives in the supervisor's event
    loop.

    `abort(command)` and `stacks(command)` carry out these commands, which the ranks never get; `on_stop(command)` is
    called for an accepted `stop`, which the ranks get too; `on_status(status)` for every change of the run's status;
    `on_hello(hello)` when a rank has introduced itself; `on_event(event)` for every event of a rank. `earlier` are
    steps and evaluations of attempts under earlier supervisors, so that the curves of a resumed run are complete.
    """

    def __init__(
        self,
        run: RunFile,
        status: RunStatus,
        *,
        recorder: Recorder,
        abort: Callable[[Command], None],
        stacks: Callable[[Command], None],
        on_stop: Callable[[Command], None] = lambda command: None,
        on_status: Callable[[RunStatus], None],
        on_hello: Callable[[Hello], None] = lambda hello: None,
        on_event: Callable[[Event], None] = lambda event: None,
        earlier: Iterable[StepResult | Evaluation] = (),
    ) -> None:
        self.state = RunState()
        for past in earlier:
            if isinstance(past, Evaluation):
                self.state.evaluations.add(past)
            else:
                self.state.series.add(past)
        self.status = status
        self._run = run
        self._sockets = Sockets(run.sockets)
        self._recorder = recorder
        self._on_status = on_status
        self._on_stop = on_stop
        self._on_hello = on_hello
        self._on_event = on_event
        self._context = zmq.asyncio.Context()
        self._telemetry = self._socket(zmq.SUB)
        self._ranks = self._socket(zmq.ROUTER)
        self._screens = self._socket(zmq.XPUB)
        self._commands = self._socket(zmq.ROUTER)
        self._tasks: list[asyncio.Task[None]] = []
        self._hub_seq = 0
        self._own_seq: dict[str, int] = {}
        self._heard: dict[int, _EventChannel] = {}
        self._door = Door(run.nproc, self.complain)
        self._losses = Losses()
        self._command_rate = Limiter(_COMMANDS_EACH, _COMMANDS_TOGETHER)
        self._snapshot_rate = TokenBucket(*_SNAPSHOTS)
        self._behind_since: float | None = None
        self.router = CommandRouter(
            self.state,
            forward=self._forward,
            publish=lambda record: self.say(record),
            abort=abort,
            stacks=stacks,
            wrapped=run.wrapped is not None,
        )

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        return socket

    # ---- life ------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Bind the four sockets and begin to listen. The caller holds the folder's lock."""
        self._telemetry.subscribe(b"")
        self._telemetry.rcvhwm = _QUEUED
        self._ranks.router_handover = 1
        self._screens.xpub_verbose = 1  # a frame for every subscription: late screens ask for a snapshot so
        # No ZeroMQ heartbeats: runtime/wire/rundir.py, class Sockets.
        for name, socket in self._named_sockets():
            socket.maxmsgsize = _LARGEST[name]
            socket.bind(self._sockets.endpoint(name))
        receivers = (
            (self._telemetry, self._from_telemetry),
            (self._ranks, self._from_rank),
            (self._screens, self._from_screen),
            (self._commands, self._from_asker),
        )
        self._tasks = [asyncio.create_task(self._receive(socket, handle)) for socket, handle in receivers]
        self._tasks.append(asyncio.create_task(self._tick()))
        self.set_status()

    async def close(self, linger_ms: int = 1000) -> None:
        """Stop listening. Messages queued for screens are still sent, for at most `linger_ms`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name, socket in self._named_sockets():
            socket.close(linger=linger_ms if name in ("screens", "commands") else 0)
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    def _named_sockets(self) -> list[tuple[str, zmq.asyncio.Socket]]:
        return list(zip(Sockets.names, (self._telemetry, self._ranks, self._screens, self._commands), strict=True))

    async def _receive(self, socket: zmq.asyncio.Socket, handle: Callable[[list[bytes]], None]) -> None:
        count = 0
        while True:
            frames = await socket.recv_multipart()
            try:
                handle(frames)
            except ProtocolError as error:
                self.complain(str(error))
            except Exception as error:  # one bad message must not make the hub deaf
                if self.complain(f"the hub failed on a message: {type(error).__name__}: {error}"):
                    traceback.print_exc()  # into supervisor.log
            count += 1
            if count % _YIELD_EVERY == 0:
                await asyncio.sleep(0)  # a full queue never makes recv wait, and the other sockets want their turn

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self.state.step != self.status.step and self.state.ranks:
                self.set_status(step=self.state.step)
            for text in self._recorder.news():
                self._warn(text)
            for text in self._losses.due():
                self._warn(text)
            now = time.monotonic()
            for rank, channel in self._heard.items():
                if channel.missing and now - channel.asked_s > _RESEND_S:
                    self._ask_again(rank, channel)

    # ---- what the supervisor and the probe say ---------------------------------------------------------------------
    def say(self, *messages: Message, source: str = "supervisor") -> None:
        """Fold, record and publish messages of the supervisor or the probe."""
        self._own_seq[source] = self._own_seq.get(source, 0) + 1
        packet = Packet(
            source=source,
            attempt=self._run.attempt,
            seq=self._own_seq[source],
            sent_ns=time.monotonic_ns(),
            messages=list(messages),  # type: ignore[arg-type]
        )
        self._take(packet, encode(packet))

    def begin_attempt(self, run: RunFile, **changes: Any) -> None:
        """All ranks are gone and new ones will report as `run.attempt`; `changes` are of the status.

        Packets of the old ranks that still arrive are ignored. Open commands: see `CommandRouter.ranks_restart`.
        Settings and a pause that the old ranks had applied are sent to the new ones.
        """
        paused = self._is_held()
        settings = self.router.settings_in_force()
        self.router.ranks_restart()
        self._run = run
        self._heard.clear()
        self._recorder.begin_attempt(run.attempt)
        self.set_status(attempt=run.attempt, **changes)
        if settings:
            self.command(Command(id=uuid.uuid4().hex, name="set", arguments=settings, who=RESTART))
        if paused is not None:
            self.command(paused.model_copy(update={"id": uuid.uuid4().hex, "who": RESTART, "number": 0}))

    def expect_ranks(self, world_size: int) -> None:
        """The ranks of a wrapped command have said how many they are."""
        self._run = self._run.model_copy(update={"nproc": world_size})
        self._door.world_size = world_size

    def _is_held(self) -> Command | None:
        """The pause that holds the run, unless it is about to resume; also one that was sent again after a restart
        and not applied yet."""
        pause = self.router.newest("pause")
        if pause is None or self.router.is_open("resume"):
            return None
        again = pause.who == RESTART and self.router.is_open("pause")
        return pause if again or self.status.state == "paused" else None

    def set_status(self, **changes: Any) -> None:
        """Change the run's status and publish it."""
        self.status = self.status.model_copy(update=changes)
        self.say(self.status)
        self._on_status(self.status)

    def event(self, what: str, text: str, severity: str = "info", **data: Any) -> None:
        """Publish an event of the run."""
        fields = {
            "rank": None,
            "what": what,
            "text": text,
            "severity": severity,
            "wall_s": time.time(),
            "step": self.state.step or None,
        }
        self.say(Event.model_validate(fields | ({"data": data} if data else {})))

    def complain(self, text: str) -> bool:
        """Publish a warning about something that came in. The same text is published once (returns True) and then
        counted."""
        told = self._losses.note(text)
        if told:
            self._warn(told)
        return bool(told)

    @property
    def refused(self) -> int:
        """How many messages and frames were rejected or dropped."""
        return self._losses.total

    def _warn(self, text: str) -> None:
        self.say(LogRecord(rank=None, level="warning", logger="zerotop.hub", text=text, wall_s=time.time()))

    # ---- what comes in ---------------------------------------------------------------------------------------------
    def _take(self, packet: Packet, frame: bytes) -> None:
        """Fold, record and publish one packet. The hub's stamps are spliced into the end of `frame`, its JSON."""
        self._hub_seq += 1
        stamped = packet.model_copy(update={"arrival_ns": time.monotonic_ns(), "hub_seq": self._hub_seq})
        self.state.apply_packet(stamped)
        for message in packet.messages:
            self._recorder.add(packet.source, message)
        stamps = b',"arrival_ns":%d,"hub_seq":%d}' % (stamped.arrival_ns, stamped.hub_seq)
        self._send(self._screens, [LIVE_TOPIC, frame.rstrip()[:-1] + stamps])

    def _from_telemetry(self, frames: list[bytes]) -> None:
        admitted = self._door.admit(frames[-1], self._run.attempt, TELEMETRY)
        if admitted is not None and not self._is_late(admitted.packet):
            self._take(admitted.packet, admitted.frame)
            self._look_for_start()

    def _is_late(self, packet: Packet) -> bool:
        """Whether to skip telemetry because the hub does not keep up. Screens see the gap in the packet numbers."""
        now = time.monotonic()
        if not packet.sent_ns or now - packet.sent_ns / 1e9 < _BEHIND_S:
            self._behind_since = None
            return False
        if self._behind_since is None:  # so are the first packets after a standstill
            self._behind_since = now
        if now - self._behind_since < _BEHIND_S:
            return False
        self.complain("the hub does not keep up with the ranks' telemetry: packets are skipped")
        return True

    def _from_rank(self, frames: list[bytes]) -> None:
        identity, frame = frames[0], frames[-1]
        admitted = self._door.admit(frame, self._run.attempt, EVENTS)
        if admitted is None:
            return
        rank, packet = admitted.rank, admitted.packet
        if identity != f"rank/{rank}/{packet.attempt}".encode():
            raise ProtocolError(f"a packet of rank {rank} on another one's connection")
        channel = self._heard.get(rank)
        if channel is None:
            channel = self._heard[rank] = _EventChannel(identity)
            for command in self.router.commands_for_new_rank():  # given before this rank was there to hear them
                self._send(self._ranks, [identity, encode(command)])
        match channel.place(packet.seq):
            case "known":
                return  # sent again after a Resend, and here already
            case "gap" if channel.asked < _RESENDS:
                if time.monotonic() - channel.asked_s > _RESEND_S:
                    self._ask_again(rank, channel)
                return  # it comes again, in its place
            case "gap":
                self.complain(f"rank {rank} lost its event packets {channel.last_seq + 1} to {packet.seq - 1}")
        channel.take(packet.seq)
        admitted, acks = self._door.take_acks(self._door.thin(admitted))
        self._take(admitted.packet, admitted.frame)
        for message in admitted.packet.messages:
            if isinstance(message, Hello):
                self._on_hello(message)
            elif isinstance(message, Event):
                self._on_event(message)
            elif isinstance(message, CheckpointSaved):
                self.set_status(last_checkpoint_step=message.step)
        for ack in acks:
            if rank == 0:
                self._acknowledged(ack)
        self._look_for_start()

    def _ask_again(self, rank: int, channel: _EventChannel) -> None:
        channel.asked += 1
        channel.asked_s = time.monotonic()
        self._send(self._ranks, [channel.identity, encode(Resend(first_seq=channel.last_seq + 1))])

    def _acknowledged(self, ack: Ack) -> None:
        command = self.router.hear(ack)
        if command is not None and (command.name, ack.state, self.status.state) == ("stop", "rejected", "stopping"):
            self.set_status(state="paused", reason=ack.reason)  # only a run whose memory was released rejects one
        if command is None or ack.state != "applied":
            return
        if command.name == "pause" and self.status.state in ("starting", "running"):
            self.set_status(state="paused", reason=f"paused at step {ack.step}")
        elif command.name == "resume" and self.status.state == "paused":
            self.set_status(state="running", reason="")

    def _look_for_start(self) -> None:
        if self.status.state != "starting" or len(self.state.ranks) < self._run.nproc:
            return
        ranks = self.state.ranks.values()
        # A step of one rank is a step of all: one that hangs right after its first steps may not have told its own.
        if any(rank.step for rank in ranks) or all(
            rank.heartbeat and rank.phase not in ("init", "idle") for rank in ranks
        ):
            self.set_status(state="running", reason="", failed_rank=None)

    # ---- screens ---------------------------------------------------------------------------------------------------
    def _from_screen(self, frames: list[bytes]) -> None:
        if not frames[0].startswith(_SUBSCRIBE + SNAPSHOT_TOPIC):
            return
        if self._snapshot_rate.take():
            self._send(self._screens, [frames[0][1:], self.encoded_snapshot()])
        else:
            self.complain("screens ask for the whole state too often and have to wait")

    def encoded_snapshot(self) -> bytes:
        """The snapshot as a frame."""
        return encode(self.snapshot())

    def snapshot(self) -> Snapshot:
        """The whole state, for a screen that connects late."""
        return Snapshot(
            hub_seq=self._hub_seq,
            now_ns=time.monotonic_ns(),
            wall_s=time.time(),
            heard_ns={rank: state.heard_ns for rank, state in self.state.ranks.items()},
            messages=self.state.snapshot_messages(),
        )

    def _from_asker(self, frames: list[bytes]) -> None:
        asker, frame = frames[0], frames[-1]
        try:
            command = decode_down(frame)
        except ProtocolError as error:
            raise ProtocolError(f"a screen sent something unreadable: {error}") from None
        if not isinstance(command, Command):
            return
        if self._command_rate.take(asker):
            self.command(command)
        else:  # a rejection would be published: a flood would reach every screen. Who waits for an answer asks again.
            self.complain("commands came too fast and were dropped")

    def command(self, command: Command) -> None:
        """Take a command from a screen, or from the supervisor itself. What becomes of it is published."""
        accepted = self.router.submit(command)
        if command.name == "stop" and accepted and self.status.state in LIVE_STATES:
            self.set_status(state="stopping", reason=f"stop asked by {command.who}" if command.who else "stop asked")
            self._on_stop(command)

    # ---- sending: queued or dropped, never waited for --------------------------------------------------------------
    def _forward(self, command: Command) -> None:
        for channel in self._heard.values():
            self._send(self._ranks, [channel.identity, encode(command)])

    def request_flight(self, number: int) -> list[int]:
        """Ask the connected ranks for their Flight Recorders, which they write to evidence-`number`; returns the ranks
        that were asked. Whether one answers only the folder tells."""
        for channel in self._heard.values():
            self._send(self._ranks, [channel.identity, encode(FlightRequest(number=number))])
        return sorted(self._heard)

    def _send(self, socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
        # XPUB and ROUTER drop what a full or vanished peer can't take. With NOBLOCK the future is done at once.
        sent = socket.send_multipart(frames, flags=zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)
        error = sent.exception()
        if error is not None and getattr(error, "errno", None) not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            raise error


class _EventChannel:
    """The event packets of one rank: which have arrived, and which are missing."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.last_seq = 0
        self.missing = False
        self.asked = 0
        self.asked_s = 0.0
        self._given_up_at: int | None = None
        """The number before packets that were given up. If they arrive after all, the number for which they were given
        up was wrong, and numbering continues from here."""

    def place(self, seq: int) -> Literal["next", "known", "gap"]:
        """Where the packet `seq` is in the order of the rank's packets."""
        if self._given_up_at is not None and seq == self._given_up_at + 1:
            self.last_seq = self._given_up_at
        if seq <= self.last_seq:
            return "known"
        self.missing = seq > self.last_seq + 1
        return "gap" if self.missing else "next"

    def take(self, seq: int) -> None:
        """The packet `seq` has arrived; packets missing before it are given up."""
        self._given_up_at = self.last_seq if self.missing else None
        self.last_seq, self.missing, self.asked = seq, False, 0


assert PROTOCOL == 1, "the hub's stamps are spliced into frames of protocol 1"
