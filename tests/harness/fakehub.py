"""A hub in a thread, as small as the protocol allows: what the sources and the control commands are tested against."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq

from runtime.wire.codec import decode_down, encode
from runtime.wire.messages import Ack, Command, CommandRecord, Hello, Packet, RunStatus, Snapshot, StepResult
from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC, Sockets
from tests.harness.waiting import patient


def hello(rank: int = 0, **changes: Any) -> Hello:
    values: dict[str, Any] = {
        "run": "r1",
        "attempt": 1,
        "rank": rank,
        "local_rank": rank,
        "world_size": 2,
        "host": "box",
        "pid": 100 + rank,
        "boot_id": "b",
        "wall_s": 0.0,
        "mono_ns": 0,
        "device": "cpu",
        "config_digest": "d",
        "stage": 2,
        "precision": "bf16",
        "micro_batch": 1,
        "accumulation": 4,
        "global_batch": 8,
        "steps": 200,
    }
    return Hello(**{**values, **changes})


def step_result(rank: int = 0, step: int = 1, **changes: Any) -> StepResult:
    values: dict[str, Any] = {
        "rank": rank,
        "step": step,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "step_ms": 100.0,
        "tokens_per_s": 1000.0,
        "end_ns": step * 10**8,
    }
    return StepResult(**{**values, **changes})


class FakeHub:
    """Binds `screens` and `commands` in `folder`. `answer(command)` gives the acks that a command gets, one by one."""

    def __init__(self, folder: Path, answer: Callable[[Command], Iterable[Ack]] | None = None) -> None:
        self.sockets = Sockets(folder)
        self.messages: list[Any] = [RunStatus(name="r1", state="running", attempt=1), hello(0), hello(1)]
        self.commands: list[Command] = []
        self.answer: Callable[[Command], Iterable[Ack]] = answer or self._apply_everything
        self.answers_snapshots = True
        self.snapshots_sent = 0
        self.hub_seq = 0
        self._outbox: list[list[bytes]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="fake hub")
        self._thread.start()
        assert self._up.wait(patient(5))

    def publish(self, *messages: Any, source: str = "rank/0", hub_seq: int | None = None) -> None:
        """Send one live packet; afterwards it is part of every snapshot."""
        with self._lock:
            self.hub_seq = self.hub_seq + 1 if hub_seq is None else hub_seq
            self.messages += messages
            packet = Packet(
                source=source, attempt=1, seq=self.hub_seq, sent_ns=1, arrival_ns=time.monotonic_ns(),
                hub_seq=self.hub_seq, messages=list(messages),
            )  # fmt: skip
            self._outbox.append([LIVE_TOPIC, encode(packet)])

    def publish_raw(self, frame: bytes) -> None:
        with self._lock:
            self._outbox.append([LIVE_TOPIC, frame])

    def close(self) -> None:
        self._stop.set()
        self._thread.join(patient(10))
        assert not self._thread.is_alive()

    def _apply_everything(self, command: Command) -> list[Ack]:
        number = len(self.commands)
        return [
            Ack(id=command.id, number=number, state="accepted"),
            Ack(id=command.id, number=number, state="applied", step=7, rank=0),
        ]

    def _serve(self) -> None:
        with zmq.Context() as context, context.socket(zmq.XPUB) as screens, context.socket(zmq.ROUTER) as commands:
            for socket, name in ((screens, "screens"), (commands, "commands")):
                socket.setsockopt(zmq.LINGER, 0)
                socket.bind(self.sockets.endpoint(name))
            self._up.set()
            poller = zmq.Poller()
            poller.register(screens, zmq.POLLIN)
            poller.register(commands, zmq.POLLIN)
            while not self._stop.is_set():
                for socket, _ in poller.poll(10):
                    if socket is screens:
                        self._subscription(screens)
                    else:
                        self._command(commands)
                with self._lock:
                    outbox, self._outbox = self._outbox, []
                for frames in outbox:
                    screens.send_multipart(frames)

    def _subscription(self, screens: zmq.Socket[bytes]) -> None:
        frame = screens.recv()
        topic = frame[1:]
        if frame[:1] == b"\x01" and topic.startswith(SNAPSHOT_TOPIC) and self.answers_snapshots:
            with self._lock:
                snapshot = Snapshot(
                    hub_seq=self.hub_seq,
                    now_ns=time.monotonic_ns(),
                    wall_s=time.time(),
                    heard_ns={m.rank: time.monotonic_ns() for m in self.messages if isinstance(m, Hello)},
                    messages=self.messages,
                )
            screens.send_multipart([topic, encode(snapshot)])
            self.snapshots_sent += 1

    def _command(self, commands: zmq.Socket[bytes]) -> None:
        frame = commands.recv_multipart()[-1]
        command = decode_down(frame)
        assert isinstance(command, Command), json.loads(frame)
        if all(command.id != known.id for known in self.commands):
            self.commands.append(command)
        for ack in self.answer(command):
            numbered = command.model_copy(update={"number": ack.number})
            self.publish(CommandRecord(command=numbered, ack=ack), source="supervisor")
