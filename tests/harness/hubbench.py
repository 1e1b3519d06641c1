"""A hub of a one-rank run in this process, and sockets to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zmq.asyncio

from runtime.wire.codec import encode
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import Command, Event, Heartbeat, Packet, RunStatus, StepResult
from runtime.wire.rundir import RunFile, Sockets
from tests.harness.waiting import patient
from zerotop.hub.hub import Hub
from zerotop.hub.recorder import Recorder


class Bench:
    """A hub of a one-rank run, and sockets to it."""

    def __init__(self, folder: Path, nproc: int = 1, earlier: Iterable[StepResult | Evaluation] = ()) -> None:
        self.run = RunFile(
            name="q1", created_wall_s=0, attempt=1, host="h", boot_id="b", nproc=nproc, device="cpu", config_path="c",
            config_folder="/", sockets=str(folder),
        )  # fmt: skip
        self.statuses: list[str] = []
        self.aborts: list[Command] = []
        self.stacks: list[Command] = []
        self.recorder = Recorder(folder / "recording.sqlite", 1)
        self.hub = Hub(
            self.run,
            RunStatus(name="q1", state="starting"),
            recorder=self.recorder,
            abort=self.aborts.append,
            stacks=self.stacks.append,
            on_status=lambda status: self.statuses.append(status.state),
            earlier=earlier,
        )
        self.hub.start()
        self._context = zmq.asyncio.Context()
        self._open: list[zmq.asyncio.Socket] = []

    def connect(self, kind: int, name: str, identity: bytes = b"") -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        if identity:
            socket.routing_id = identity
        socket.connect(Sockets(self.run.sockets).endpoint(name))
        self._open.append(socket)
        return socket

    async def close(self) -> None:
        for socket in self._open:
            socket.close()
        self._context.term()
        await self.hub.close(linger_ms=0)
        self.recorder.close()

    def event_texts(self) -> list[str]:
        return [event.text for event in self.hub.state.events]


async def heard(socket: zmq.asyncio.Socket) -> list[bytes]:
    return await asyncio.wait_for(socket.recv_multipart(), patient(10))


def packet(seq: int, *messages: Any, attempt: int = 1) -> bytes:
    said = messages or (Event(rank=0, what="x", text=f"event {seq}", wall_s=0),)
    return encode(Packet(source="rank/0", attempt=attempt, seq=seq, sent_ns=0, messages=list(said)))


def beat(phase: str = "forward") -> Heartbeat:
    return Heartbeat.model_validate(
        {
            "rank": 0, "phase": phase, "phase_since_ns": 0, "step": 1, "micro_step": 1, "micro_steps": 1,
            "entered_seq": 0, "completed_seq": 0, "progress_ns": 0, "now_ns": 0,
        }
    )  # fmt: skip
