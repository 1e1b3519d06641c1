"""Recordings of real runs: the messages that the verdict code saw, packet by packet, in one small file.

The first line is a JSON header: the fault, when it began, what the run ran on, and how loaded the machine was. Every
other line is [seconds, source, messages], in order of arrival. Kept are the kinds that verdicts are made of; text that
could name a machine or its other processes is replaced, and the times of a collective that nothing reads are 0.
"""

from __future__ import annotations

import json
import lzma
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from runtime.wire.codec import load
from runtime.wire.messages import RunStatus
from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC, Sockets

FOLDER = Path(__file__).parent / "recordings"
KINDS = frozenset({"status", "hello", "step", "heartbeat", "collectives", "memory", "node", "goodbye"})
FRAMES_HELD = 100_000
STARTED_S = 10.0
"""How long the hub may take to send the state from which a recording starts."""

Item = dict[str, Any]
Line = tuple[float, str, list[Item]]


@dataclass(frozen=True)
class Recording:
    """`lines`: (seconds, source, messages as JSON). The fault begins at `fault_s`, on rank `faulty`."""

    fault: str
    faulty: int
    fault_s: float
    seconds: float
    lines: list[Line]
    loads: tuple[float, float] = (0.0, 0.0)
    """The smallest and the largest load average of the machine, over a minute each."""
    cpus: int = 1
    context: dict[str, str] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        """Whether more processes wanted a CPU than there are, so that contention is a right verdict at any time."""
        return self.loads[1] > self.cpus

    @property
    def load_text(self) -> str:
        """The load in words."""
        return f"load average {self.loads[0]:.1f} to {self.loads[1]:.1f} on {self.cpus} CPUs"


class Tape:
    """Reads what a hub publishes, as it comes. `drain` must be called often enough."""

    def __init__(self, sockets: Sockets) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, FRAMES_HELD)
        self._socket.subscribe(LIVE_TOPIC)
        self._socket.connect(sockets.endpoint("screens"))
        self._topic = SNAPSHOT_TOPIC + uuid.uuid4().hex.encode()
        self._socket.subscribe(self._topic)
        self._lines: list[Line] = []
        self._start_ns: int | None = None
        self._hub_seq = 0
        self.fault_s = 0.0
        self._loads = [os.getloadavg()[0]]

    @property
    def now_s(self) -> float:
        """The arrival of the newest packet."""
        return self._lines[-1][0] if self._lines else 0.0

    def begin(self) -> None:
        """Wait for the state of the run so far. Raises TimeoutError if the hub does not send it."""
        deadline = time.monotonic() + STARTED_S
        while self._start_ns is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the hub has not sent its state within {STARTED_S:g} s")
            if self._socket.poll(100):
                topic, *_, frame = self._socket.recv_multipart()
                if topic == self._topic:
                    snapshot = load(frame)
                    self._start_ns, self._hub_seq = int(snapshot["now_ns"]), int(snapshot["hub_seq"])
                    self._add(0.0, "supervisor", snapshot["messages"])

    def mark_fault(self) -> None:
        """The fault begins now."""
        self.drain()
        self.fault_s = self.now_s

    def drain(self) -> None:
        """Take the packets that have come."""
        assert self._start_ns is not None
        while self._socket.poll(0):
            topic, *_, frame = self._socket.recv_multipart()
            if topic != LIVE_TOPIC:
                continue
            packet = load(frame)
            if packet.get("hub_seq", 0) <= self._hub_seq:
                continue
            self._add((packet["arrival_ns"] - self._start_ns) / 1e9, packet["source"], packet["messages"])
        self._loads.append(os.getloadavg()[0])

    def end(self, status: RunStatus) -> None:
        """The hub has ended, perhaps before its last packet was read: add the status that it left."""
        self._add(self.now_s, "supervisor", [status.model_dump(mode="json")])

    def _add(self, at_s: float, source: str, messages: list[Item]) -> None:
        kept = [_without_names(message) for message in messages if message.get("kind") in KINDS]
        if kept:
            self._lines.append((round(at_s, 4), "probe/box" if source.startswith("probe/") else source, kept))

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def recording(self, fault: str, faulty: int, context: dict[str, str]) -> Recording:
        """What was read so far."""
        loads = (min(self._loads), max(self._loads))
        return Recording(
            fault, faulty, self.fault_s, self.now_s, list(self._lines), loads, os.cpu_count() or 1, context
        )


def _without_names(message: Item) -> Item:
    """Without what names the machine or its other processes, and without figures that no verdict reads."""
    message = dict(message)
    match message["kind"]:
        case "hello":
            message |= {"host": "box", "boot_id": "b", "run": "recorded", "planned": None, "knobs": {}}
            message |= {"pid": 100 + message["rank"], "device_name": "", "torch_version": ""}
        case "status":
            message |= {"name": "recorded", "error": ""}
        case "goodbye":
            message |= {"error": ""}
        case "node":
            busy = [one | {"pid": 9000 + place, "name": "other"} for place, one in enumerate(message.get("busy", []))]
            message |= {"host": "box", "busy": busy}
        case "collectives":
            message["records"] = [
                [seq, op, size, 0, 0, *times] for seq, op, size, _issue, _end, *times in message["records"]
            ]
        case "step":
            message["step_ms"] = round(message["step_ms"], 2)
            for name in ("phase_ms", "phase_wait_ms"):
                message[name] = {phase: round(ms, 2) for phase, ms in message.get(name, {}).items()}
    return message


def write_recording(path: Path, recording: Recording) -> None:
    """Write the file. Its size is about a hundredth of that of the messages' JSON in the run."""
    header = {
        "fault": recording.fault,
        "faulty": recording.faulty,
        "fault_s": round(recording.fault_s, 3),
        "seconds": round(recording.seconds, 3),
        "loads": recording.loads,
        "cpus": recording.cpus,
        "context": recording.context,
    }
    text = "\n".join(json.dumps(line, separators=(",", ":")) for line in (header, *recording.lines))
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def read_recording(path: Path) -> Recording:
    """Read a file that `write_recording` wrote."""
    header, *lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    about = json.loads(header)
    return Recording(
        about["fault"],
        about["faulty"],
        about["fault_s"],
        about["seconds"],
        [(at_s, source, messages) for at_s, source, messages in map(json.loads, lines)],
        (about["loads"][0], about["loads"][1]),
        about["cpus"],
        about["context"],
    )


def recordings() -> list[Path]:
    """The files of this repository."""
    return sorted(FOLDER.glob("*.jsonl.xz"))
