"""python -m tests.faults.fuzz [--frames N] [--seed S]: N bad frames against each socket of a hub (a tenth of that
against the one of its screens, where each may be answered with the whole state), and a tenth from a hub to a screen.
Prints what came of it; exit code 1 when something broke, or grew without end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import psutil
import zmq

from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC, Sockets
from tests.faults.fuzz.frames import Frames
from tests.harness.waiting import patient, until
from zerotop.source.live import LiveSource

GROWTH_BYTES = 64 * 2**20
"""What a hub may grow by while bad frames come in: its buffers, and texts as long as they may be."""
LATE_S = 60.0


@dataclass
class Report:
    hub: dict[str, Any]
    growth_bytes: int
    seconds: float

    def problems(self) -> list[str]:
        found = []
        if self.hub["acts"]:
            found.append(f"the hub acted: {self.hub['acts']}")
        if (self.hub["state"], self.hub["told_state"]) != ("running", "running"):
            found.append(f"the run's state was changed: {self.hub['state']}, {self.hub['told_state']}")
        if not set(self.hub["ranks"]) <= {0, 1}:
            found.append(f"ranks that the run does not have: {self.hub['ranks']}")
        if self.growth_bytes > GROWTH_BYTES:
            found.append(f"the hub grew by {self.growth_bytes / 2**20:.0f} MiB")
        return found


def attack_hub(frames: int, seed: int) -> Report:
    """`frames` bad frames against each of a hub's sockets. Raises AssertionError when the hub dies or goes deaf."""
    with tempfile.TemporaryDirectory(prefix="zt-", dir="/tmp") as name:
        hub = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fuzz.hub", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert hub.stdin is not None and hub.stdout is not None
        try:
            assert hub.stdout.readline() == b"ready\n"
            began = time.monotonic()
            process = psutil.Process(hub.pid)
            _send(Sockets(name), max(1, frames // 10), seed)  # so that its buffers have their size
            _until_answered(Sockets(name))
            before = process.memory_info().rss
            _send(Sockets(name), frames - max(1, frames // 10), seed + 1)
            _until_answered(Sockets(name))
            growth = process.memory_info().rss - before
            seconds = time.monotonic() - began
            answer, _ = hub.communicate(timeout=patient(LATE_S))
        finally:
            hub.kill()
            hub.wait()
        assert hub.returncode == 0, f"the hub ended with {hub.returncode}"
        return Report(json.loads(answer.splitlines()[-1]), growth, seconds)


def _send(sockets: Sockets, count: int, seed: int) -> None:
    frames = Frames(seed)
    with zmq.Context() as context:
        telemetry = _connect(context, zmq.PUB, sockets, "telemetry")
        ranks = _connect(context, zmq.DEALER, sockets, "ranks", b"rank/0/1")
        screens = _connect(context, zmq.XSUB, sockets, "screens")
        commands = _connect(context, zmq.DEALER, sockets, "commands")
        opened = [telemetry, ranks, screens, commands]
        for number in range(count):
            telemetry.send(frames.packet())
            ranks.send(frames.packet())
            commands.send(frames.command())
            if number % 10 == 0:  # each may be answered with the whole state
                screens.send(frames.subscription())
            for socket in (ranks, screens, commands):
                _discard(socket)
            if number % 100 == 99:
                time.sleep(0.01)  # a queue that only grows would test the sender
        for socket in opened:
            socket.close(linger=int(patient(LATE_S) * 1000))


def _connect(
    context: zmq.Context[Any], kind: int, sockets: Sockets, name: str, identity: bytes = b""
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.sndhwm = 0
    if identity:
        socket.routing_id = identity
    socket.connect(sockets.endpoint(name))
    return socket


def _discard(socket: zmq.Socket[bytes]) -> None:
    while socket.poll(0):
        socket.recv_multipart()


def _until_answered(sockets: Sockets) -> None:
    """A screen that comes now is told the whole state, and can read all of it."""
    source = LiveSource(sockets)
    source.start()
    try:

        def answered() -> bool:
            source.poll()
            return source.connection == "live"

        until(answered, lambda: f"an answer from the hub: {source.connection}", LATE_S, pause=source.wait)
        told = [event.text for event in source.state.events if "can't read" in getattr(event, "text", "")]
        assert not told, f"the hub has sent on what can't be read: {told}"
    finally:
        source.close()


def attack_screen(frames: int, seed: int) -> LiveSource:
    """`frames` bad frames from a hub to a screen's source, which is returned, closed."""
    supply = Frames(seed)
    with tempfile.TemporaryDirectory(prefix="zt-", dir="/tmp") as name, zmq.Context() as context:
        sockets = Sockets(name)
        screens, commands = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        for socket, which in ((screens, "screens"), (commands, "commands")):
            socket.linger = 0
            socket.bind(sockets.endpoint(which))
        source = LiveSource(sockets)
        source.start()
        try:
            assert screens.poll(int(patient(LATE_S) * 1000))
            for number in range(frames):
                while screens.poll(0):
                    topic = screens.recv()[1:]
                    if topic.startswith(SNAPSHOT_TOPIC):
                        content = supply.packet().replace(b'"packet"', b'"snapshot"')
                        screens.send_multipart([topic, content])
                screens.send_multipart([LIVE_TOPIC, supply.packet()])
                if number % 50 == 49:
                    source.wait(0.01)
                    source.poll()
        finally:
            source.close()
            screens.close()
            commands.close()
    return source


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=200_000, help="against each socket (default: 200,000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = attack_hub(arguments.frames, arguments.seed)
    print(json.dumps({**report.hub, "growth_bytes": report.growth_bytes, "seconds": round(report.seconds, 1)}))
    attack_screen(arguments.frames // 10, arguments.seed)
    problems = report.problems()
    print("\n".join(problems) or "nothing broke")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
