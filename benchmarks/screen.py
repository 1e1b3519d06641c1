"""What the screen costs: the real `zerotop attach` in pseudo-terminals, on a hub in this process.

python -m benchmarks.screen                                      every page at both sizes, 2 and 64 ranks: 20 minutes
python -m benchmarks.screen --against FOLDER --markdown benchmarks/results/screen.md
python -m benchmarks.screen --ranks 2 --pages 1 --sizes 200x50 --seconds 10
python -m benchmarks.screen --ticks --ranks 8                    ticks of the app alone, in this process

cpu           CPU time of the process over the time that was watched, in % of one core
frame         CPU time of the process in a quarter of a second, which holds one frame: median and 95th percentile
bytes         what the terminal was sent per second
key           milliseconds from a key to the first and to the last byte of what it changes, the hub being silent
first frame   CPU time from the start of the process until the run's name and state stand on the terminal
first paint   the same until the step does; of it `import` is what `import textual` alone takes, and `bare` what a
              Textual application with one line of text takes

--against is another checkout. Its screens run on the same hub at the same time, so that whatever else uses the machine
costs both the same. All times but those of keys are CPU times of the processes.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from runtime.wire.base import Message
from runtime.wire.messages import RunStatus
from tests.harness import ROOT
from tests.harness.fakehub import FakeHub
from tests.harness.fakerun import write_run
from tests.harness.terminal import Terminal
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import PAGE_NAMES

FRAME_S = 0.25
SETTLE_S = 4.0
"""After this time on a page all has been drawn, and the other pages have been imported."""
STEP_MS = {2: 250.0}
"""Ranks -> time of a step; a second for other numbers of ranks."""
KEYS = "2345678" + "1jkzz"
"""Every page, the selected rank, and a panel that fills the screen and goes back."""
KEY_ROUNDS = 4
QUIET_S = 0.15
"""What a key changes has all been sent when nothing came for so long."""
ROUNDS = 9
"""First paints of which the median is taken."""
SHOWN = "of 100000"
"""What stands on the terminal once the step does."""
FRAME = "opening the screen"
"""What stands there before."""
IMPORT = "import textual.app, textual.screen, textual.widgets, textual.containers; from textual.widgets import Input"
ATTACH = """
import sys
folder = sys.argv.pop()
sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__module__.startswith("_editable")]
sys.path[0] = folder
import zerotop
assert zerotop.__file__.startswith(folder + "/"), zerotop.__file__
from zerotop.cli import main
sys.argv[1:] = ["attach", "q1"]
sys.exit(main())
"""
BARE = """
from textual.app import App
from textual.widgets import Static
class Bare(App):
    def compose(self):
        yield Static("step 1 of 100000")
Bare().run()
"""


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


class Simulation:
    """A run that goes on in real time behind a hub: each rank sends `hz` times a second, the probe once."""

    def __init__(self, ranks: int, hz: float, step_ms: float) -> None:
        self.ranks, self.hz, self.step_ms = ranks, hz, step_ms
        self._home, self._folder = Path(tempfile.mkdtemp(prefix="zt-home-")), Path(tempfile.mkdtemp(prefix="zt-"))
        os.environ["XDG_STATE_HOME"] = str(self._home)
        self.run = Told(ranks)
        self.run.steps(200, step_ms)
        ScriptedRun.judge(self.run)
        self.hub = FakeHub(self._folder)
        status = RunStatus(name="q1", state="running", attempt=1)
        write_run(self._home, "q1", self._folder, status)
        self.hub.messages = [status, *self.run.state.snapshot_messages()]
        self.run.take()
        self._next_beat = self._next_step = self._next_probe = time.monotonic()

    def close(self) -> None:
        self.hub.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def go_on(self) -> float:
        """Send what is due; returns when the next is."""
        now = time.monotonic()
        if now < self._next_beat:
            return self._next_beat
        self._next_beat = max(now, self._next_beat + 1 / self.hz)
        self.run.now_ns += int(1e9 / self.hz)
        for rank in range(self.ranks):
            phase = ("forward", "backward")[int(now * self.hz) % 2]
            self.run.beat(rank, phase, 1 + int(now * self.hz) % self.run.accumulation)
        if now >= self._next_step:
            self._next_step += self.step_ms / 1000
            self.run.steps(1, self.step_ms)
        if now >= self._next_probe:
            self._next_probe += 1.0
            self.run.node()
        publish(self.hub, self.run.take())
        return self._next_beat


@contextmanager
def simulation(ranks: int, hz: float, step_ms: float) -> Iterator[Simulation]:
    """A simulation that leaves nothing behind."""
    run = Simulation(ranks, hz, step_ms)
    try:
        yield run
    finally:
        run.close()


def attach(folder: Path) -> list[str]:
    """The command that opens the screen of a checkout. An editable install would put its own in front of it."""
    return [sys.executable, "-c", ATTACH, str(folder)]


@dataclass
class Watched:
    """The screen of a checkout in a terminal, and what it has cost."""

    folder: Path
    size: tuple[int, int]
    page: str
    frames_ms: list[float] = field(default_factory=list)
    cpu_ms: float = 0.0
    bytes: int = 0

    def start(self) -> None:
        """Open the screen and its page."""
        self.terminal = Terminal(attach(self.folder), size=self.size)
        self.process = psutil.Process(self.terminal.process.pid)
        self.terminal.read_until(lambda: SHOWN.encode() in self.terminal.raw)
        self.first_paint_ms = self._process_ms()
        if self.page != "1":
            self.terminal.type(self.page)

    def begin(self) -> None:
        """Count from now on."""
        self.frames_ms.clear()
        self._begun_ms, self._begun_bytes = self._process_ms(), len(self.terminal.raw)
        self._before = self._thread_ns()

    def frame(self) -> None:
        """A quarter of a second is over."""
        now = self._thread_ns()
        spent = sum(max(0, ns - self._before.get(thread, 0)) for thread, ns in now.items())
        self.frames_ms.append(spent / 1e6)
        self._before = now

    def end(self) -> None:
        """Count no longer, and close the screen."""
        self.cpu_ms = self._process_ms() - self._begun_ms
        self.bytes = len(self.terminal.raw) - self._begun_bytes
        self.terminal.close()

    def _process_ms(self) -> float:
        return 1000 * sum(self.process.cpu_times()[:2])

    def _thread_ns(self) -> dict[str, int]:
        """Thread -> its CPU time so far."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(OSError):  # it has just ended
                found[task.name] = int((task / "schedstat").read_text().split()[0])
        return found


def watch(run: Simulation, screens: Sequence[Watched], seconds: float, silent: bool = False) -> None:
    """Let the run go on, and measure all screens at the same time. silent: nothing is sent any more."""
    try:
        for screen in screens:
            screen.start()
        began = time.monotonic()
        start, next_frame = began + SETTLE_S, 0.0
        while (now := time.monotonic()) < start + seconds:
            wake = now + 0.05 if silent else run.go_on()
            if now >= start and not next_frame:
                next_frame = now + FRAME_S
                for screen in screens:
                    screen.begin()
            elif next_frame and now >= next_frame:
                next_frame += FRAME_S
                for screen in screens:
                    screen.frame()
            for screen in screens:
                screen.terminal.read(0.0)
            time.sleep(max(0.0, min(wake - time.monotonic(), 0.01)))
    finally:
        for screen in screens:
            if hasattr(screen, "terminal"):
                screen.end()


def figures(screen: Watched, seconds: float) -> dict[str, float]:
    """The figures of a screen that was watched."""
    frames = sorted(screen.frames_ms)
    return {
        "cpu_percent": round(screen.cpu_ms / seconds / 10, 2),
        "frame_ms": round(statistics.median(frames), 1),
        "frame_p95_ms": round(frames[int(0.95 * len(frames))], 1),
        "kB_per_s": round(screen.bytes / seconds / 1000, 2),
    }


# ---- the first paint -------------------------------------------------------------------------------------------------
def first_paints(folders: dict[str, Path], ranks: int, size: tuple[int, int]) -> dict[str, float]:
    """Median CPU milliseconds until the step stands on the terminal, in turn: of each checkout, of importing Textual,
    and of the smallest application."""
    found: dict[str, list[float]] = {}
    with simulation(ranks, 5.0, 1000.0) as run:
        for _ in range(ROUNDS):
            found.setdefault("import", []).append(_cpu_ms([sys.executable, "-c", IMPORT]))
            found.setdefault("bare", []).append(_paint_ms([sys.executable, "-c", BARE], size))
            for name, folder in folders.items():
                found.setdefault(f"{name}, first frame", []).append(_paint_ms(attach(folder), size, FRAME))
                found.setdefault(name, []).append(_paint_ms(attach(folder), size))
        assert run.hub.snapshots_sent
    return {name: round(statistics.median(times)) for name, times in found.items()}


def _paint_ms(command: list[str], size: tuple[int, int], shown: str = SHOWN) -> float:
    terminal = Terminal(command, size=size)
    try:
        terminal.read_until(lambda: shown.encode() in terminal.raw)
        return 1000 * sum(psutil.Process(terminal.process.pid).cpu_times()[:2])
    finally:
        terminal.close()


def _cpu_ms(command: list[str]) -> float:
    process = os.posix_spawn(command[0], command, os.environ)
    _, _, usage = os.wait4(process, 0)
    return 1000 * (usage.ru_utime + usage.ru_stime)


# ---- keys ------------------------------------------------------------------------------------------------------------
def key_latencies(folder: Path, ranks: int, size: tuple[int, int]) -> dict[str, float]:
    """Milliseconds from a key to the first and the last byte of its effect: medians, and 95th percentiles. The first
    time, when a page is imported and made, is left out."""
    first_ms: list[float] = []
    last_ms: list[float] = []
    with simulation(ranks, 5.0, 1000.0):
        terminal = Terminal(attach(folder), size=size)
        try:
            terminal.read_until(lambda: SHOWN.encode() in terminal.raw)
            end = time.monotonic() + SETTLE_S
            while time.monotonic() < end:
                terminal.read(0.1)
            for number in range(KEY_ROUNDS + 1):
                for key in KEYS:
                    pressed, before = time.perf_counter(), len(terminal.raw)
                    terminal.type(key)
                    while len(terminal.raw) == before and time.perf_counter() < pressed + 2:
                        terminal.read(0.5)
                    came = time.perf_counter()
                    last = _until_quiet(terminal, QUIET_S) or came
                    if number:
                        first_ms.append(1000 * (came - pressed))
                        last_ms.append(1000 * (last - pressed))
        finally:
            terminal.close()
    found = {}
    for name, times in (("first", sorted(first_ms)), ("last", sorted(last_ms))):
        found |= {name: round(statistics.median(times), 1), f"{name}_p95": round(times[int(0.95 * len(times))], 1)}
    return found


def _until_quiet(terminal: Terminal, quiet_s: float) -> float | None:
    """Read until nothing comes for `quiet_s`; returns when something came last, None if nothing did."""
    last = None
    while True:
        before = len(terminal.raw)
        terminal.read(quiet_s)
        if len(terminal.raw) == before:
            return last
        last = time.perf_counter()


# ---- ticks in this process -------------------------------------------------------------------------------------------
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


# ---- the report ------------------------------------------------------------------------------------------------------
Row = dict[str, float | str]


def measure(given: argparse.Namespace, folders: dict[str, Path]) -> Iterator[Row]:
    """A row for each number of ranks, page and size. All checkouts and sizes are watched at the same time."""
    for ranks in given.ranks:
        step_ms = given.step_ms or STEP_MS.get(ranks, 1000.0)
        for page in [*given.pages, *(["silent"] if given.silent else [])]:
            silent = page == "silent"
            places = [(name, size) for size in given.sizes for name in folders]
            screens = [Watched(folders[name], _size(size), "1" if silent else page) for name, size in places]
            with simulation(ranks, given.hz, step_ms) as run:
                watch(run, screens, given.seconds, silent)
            for (name, size), screen in zip(places, screens, strict=True):
                shown = "1, a silent hub" if silent else f"{page} {PAGE_NAMES[page]}"
                place: Row = {"ranks": ranks, "page": shown, "size": size, "screen": name}
                yield {**place, **figures(screen, given.seconds)}


def markdown(
    rows: list[Row], keys: dict[str, dict[str, float]], paints: dict[str, float], names: list[str], command: str
) -> str:
    """All tables, with what each screen costs side by side."""
    wanted = (("cpu_percent", "CPU %"), ("frame_ms", "frame ms"), ("frame_p95_ms", "p95"), ("kB_per_s", "kB/s"))
    lines = ["# What the screen costs", f"`{command}`", "", "See [README.md](../README.md#the-screen).", ""]
    titles = [f"{title}, {name}" for _, title in wanted for name in names]
    lines += [f"| ranks | page | size | {' | '.join(titles)} |", "|" + "---|" * (3 + len(titles))]
    for row in rows:
        if row["screen"] == names[0]:
            place = ("ranks", "page", "size")
            those = {one["screen"]: one for one in rows if all(one[key] == row[key] for key in place)}
            cells = [str(those[name][key]) for key, _ in wanted for name in names]
            lines.append(f"| {row['ranks']} | {row['page']} | {row['size']} | {' | '.join(cells)} |")
    lines += ["", "| from a key, ms | to the first byte | p95 | to the last byte | p95 |", "|---|---|---|---|---|"]
    for name, of in keys.items():
        lines.append(f"| {name} | {of['first']:g} | {of['first_p95']:g} | {of['last']:g} | {of['last_p95']:g} |")
    lines += [
        "",
        "| first paint, CPU ms | all | beyond `import textual` | beyond a bare application |",
        "|---|---|---|---|",
    ]
    for name, ms in paints.items():
        lines.append(f"| {name} | {ms:g} | {ms - paints['import']:g} | {ms - paints['bare']:g} |")
    return "\n".join(lines) + "\n"


def _size(text: str) -> tuple[int, int]:
    columns, lines = text.split("x")
    return int(columns), int(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64])
    parser.add_argument("--pages", nargs="+", default=list(PAGE_NAMES), help="their keys")
    parser.add_argument("--sizes", nargs="+", default=["80x24", "200x50"])
    parser.add_argument("--hz", type=float, default=5.0, help="messages per rank and second")
    parser.add_argument("--step-ms", type=float, help="default: 250 for two ranks, else 1000")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each page")
    parser.add_argument("--silent", action="store_true", help="also watch a hub that says nothing")
    parser.add_argument("--keys", action="store_true", help="measure keys and first paints alone")
    parser.add_argument("--no-paint", action="store_true", help="leave out the first paint")
    parser.add_argument("--against", type=Path, help="another checkout, measured at the same time")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--ticks", action="store_true", help="ticks of every page in this process")
    given = parser.parse_args()
    if given.ticks:
        print(json.dumps(asyncio.run(ticks(given.ranks[0], _size(given.sizes[-1]))), indent=1))
        return
    folders = {"before": given.against.resolve()} if given.against else {}
    folders["now"] = ROOT
    rows: list[Row] = []
    for row in () if given.keys else measure(given, folders):
        print(json.dumps(row), flush=True)
        rows.append(row)
    keys = {
        f"{ranks} ranks, {size}": key_latencies(ROOT, ranks, _size(size))
        for ranks in given.ranks
        for size in given.sizes
        if given.keys or given.markdown is not None
    }
    print(json.dumps({"key_ms": keys}))
    paints = {} if given.no_paint else first_paints(folders, given.ranks[0], _size(given.sizes[-1]))
    print(json.dumps({"first_paint_cpu_ms": paints}))
    if given.markdown is not None:
        command = f"python -m benchmarks.screen {' '.join(sys.argv[1:])}".strip()
        given.markdown.write_text(markdown(rows, keys, paints, list(folders), command), encoding="utf-8")


if __name__ == "__main__":
    main()
