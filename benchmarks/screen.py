"""What the screen costs: the real `zerotop attach` in a pseudo-terminal, on a hub in this process.

python -m benchmarks.screen --ranks 8 --hz 5 --size 120x38 --seconds 20

first paint   from the start of the process until the step stands on the terminal: wall time, and CPU time
cpu           CPU time of the process over the time that was watched, in % of one core
bytes         what the terminal was sent per second
ticks         CPU time of one tick of the app (poll and drawing of the changed lines), measured in this process

CPU times are those of the process and can be compared on a busy machine; wall times can not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from runtime.wire.base import Message
from runtime.wire.messages import RunStatus
from tests.harness.fakehub import FakeHub
from tests.harness.fakerun import write_run
from tests.harness.terminal import Terminal
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import PAGE_NAMES


class Told(ScriptedRun):
    """A scripted run that also keeps what it says."""

    def __init__(self, ranks: int) -> None:
        self.said: list[Message] = []
        super().__init__(ranks=ranks, gpu=True, steps=100_000)

    def say(self, *messages: Message) -> None:
        self.said += messages
        super().say(*messages)

    def judge(self) -> None:
        """The hub's work, and no cost of the screen."""

    def take(self) -> list[Message]:
        """What was said since the last call."""
        said, self.said = self.said, []
        return said


def publish(hub: FakeHub, messages: list[Message]) -> None:
    """One packet per rank, as a hub passes them on."""
    by_source: dict[str, list[Message]] = {}
    for message in messages:
        rank = getattr(message, "rank", None)
        by_source.setdefault(f"rank/{rank}" if isinstance(rank, int) else "probe/node-a", []).append(message)
    for source, those in by_source.items():
        hub.publish(*those, source=source)


def live(ranks: int, hz: float, size: tuple[int, int], seconds: float, step_ms: float) -> dict[str, float]:
    """Watch the real process for some time."""
    home, folder = Path(tempfile.mkdtemp(prefix="zt-home-")), Path(tempfile.mkdtemp(prefix="zt-", dir="/tmp"))
    os.environ["XDG_STATE_HOME"] = str(home)
    run = Told(ranks)
    run.steps(200, step_ms)
    hub = FakeHub(folder)
    hub.messages = []
    try:
        status = RunStatus(name="q1", state="running", attempt=1)
        write_run(home, "q1", folder, status)
        hub.messages = [status, *run.state.snapshot_messages()]
        run.take()
        began = time.monotonic()
        terminal = Terminal([sys.executable, "-m", "zerotop", "attach", "q1"], size=size)
        try:
            process = psutil.Process(terminal.process.pid)
            terminal.read_until(lambda: "of 100000" in terminal.shown)
            paint_s, paint_cpu_s = time.monotonic() - began, sum(process.cpu_times()[:2])
            return watch(terminal, process, hub, run, hz, seconds, step_ms) | {
                "first_paint_ms": round(1000 * paint_s),
                "first_paint_cpu_ms": round(1000 * paint_cpu_s),
            }
        finally:
            terminal.close()
    finally:
        hub.close()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def watch(
    terminal: Terminal, process: psutil.Process, hub: FakeHub, run: Told, hz: float, seconds: float, step_ms: float
) -> dict[str, float]:
    """Let the run go on, and measure."""
    settled = time.monotonic() + 3.0
    begun, cpu_s, count = 0.0, 0.0, 0
    next_beat, next_step = time.monotonic(), time.monotonic()
    while True:
        now = time.monotonic()
        if not begun and now >= settled:
            begun, cpu_s, count = now, sum(process.cpu_times()[:2]), len(terminal.raw)
        if begun and now - begun >= seconds:
            break
        if now >= next_beat:
            next_beat += 1 / hz
            run.now_ns += int(1e9 / hz)
            for rank in range(run.ranks):
                run.beat(rank, "backward", 1 + int(now * hz) % run.accumulation)
            if now >= next_step:
                next_step += step_ms / 1000
                run.steps(1, step_ms)
                run.node()
            publish(hub, run.take())
        terminal._read(max(0.0, next_beat - time.monotonic()))
    took = now - begun
    return {
        "cpu_percent": round(100 * (sum(process.cpu_times()[:2]) - cpu_s) / took, 2),
        "kB_per_s": round((len(terminal.raw) - count) / took / 1000, 2),
        "watched_s": round(took, 1),
    }


async def ticks(ranks: int, size: tuple[int, int], count: int = 40) -> dict[str, dict[str, float]]:
    """CPU milliseconds of a tick on every screen, and of opening it."""
    run = Told(ranks)
    run.steps(200)
    app = ZerotopApp(run)
    found = {}
    async with app.run_test(size=size) as pilot:
        for key, name in PAGE_NAMES.items():
            begun = time.process_time()
            await pilot.press(key)
            await pilot.pause()
            opened_ms = 1000 * (time.process_time() - begun)
            spent = []
            for _ in range(count):
                run.steps(1)
                begun = time.process_time()
                app.tick()
                await pilot.pause()
                spent.append(1000 * (time.process_time() - begun))
            spent.sort()
            found[name] = {
                "key_ms": round(opened_ms, 1),
                "tick_ms": round(statistics.median(spent), 1),
                "tick_p95_ms": round(spent[int(0.95 * len(spent))], 1),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--hz", type=float, default=5.0, help="messages per rank and second")
    parser.add_argument("--step-ms", type=float, default=1000.0)
    parser.add_argument("--size", default="120x38")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--ticks", action="store_true", help="ticks of every screen, instead of the real process")
    given = parser.parse_args()
    size = (int(given.size.split("x")[0]), int(given.size.split("x")[1]))
    if given.ticks:
        print(json.dumps(asyncio.run(ticks(given.ranks, size)), indent=1))
    else:
        print(json.dumps(live(given.ranks, given.hz, size, given.seconds, given.step_ms)))


if __name__ == "__main__":
    main()
