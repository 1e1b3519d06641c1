"""How large the recording of a long run is, and how quickly it is replayed.

python -m benchmarks.recordings                       a week of eight ranks
python -m benchmarks.recordings --days 1 --ranks 64 --passes 3

The recording is made of a scripted run's messages, as the recorder would have thinned them by the end of the run: of
the days before the last one a minute, of the last day ten seconds, of the last hour every second. Then it is opened,
sought in, and played from end to end.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psutil

from tests.harness.longrun import SpokenRun, create, insert, moments
from zerotop.format import bytes_text, duration_text
from zerotop.hub import blocks
from zerotop.hub.thinning import thin_steps
from zerotop.recording.playback import Playback
from zerotop.source.replay import ReplaySource

SEEKS = 60


def make(folder: Path, days: float, ranks: int) -> int:
    """Write the recording; returns the number of messages that went in."""
    run = SpokenRun(ranks, gpu=True, steps=10**7)
    count = 0
    with closing(create(folder / "recording.sqlite")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=OFF")
        packer = blocks.Packer()
        for number, gap_s in enumerate(moments(days)):
            run.jump(gap_s)
            run.second()
            if number % 60 == 59:
                rows = run.take()
                count += len(rows)
                insert(database, rows)
                while packer.work(database, run.wall_s):
                    pass
                thin_steps(database)
        rows = run.take()
        insert(database, rows)
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return count + len(rows)


def seek(folder: Path) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU time, and elapsed, of SEEKS jumps to random moments. On a machine that other work shares, the
    first is what the jump takes on an idle one."""
    chosen = random.Random(0)
    cpu, took = [], []
    with Playback(folder) as playback:
        for _ in range(SEEKS):
            frame = chosen.randrange(playback.frames.count)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            playback.state_at(frame)
            took.append(1000 * (time.perf_counter() - begin))
            cpu.append(1000 * (time.process_time() - begin_cpu))
    return cpu, took


def play(folder: Path, passes: int) -> None:
    """Play it from end to end, and print the memory of this process."""
    process = psutil.Process()
    with Playback(folder) as playback:
        frames = playback.frames
        for number in range(passes):
            state, folded = playback.state_at(0), 0
            begin = time.perf_counter()
            for frame in range(1, frames.count):
                folded += playback.advance(state, frames.span(frame - 1)[1], frames.span(frame)[1])
                if frame == 1000 or frame == frames.count - 1:
                    took = time.perf_counter() - begin
                    print(
                        f"pass {number + 1}, frame {frame:,}: {folded:,} messages in {duration_text(took)}, "
                        f"RSS {bytes_text(process.memory_info().rss)}",
                        flush=True,
                    )


def main() -> None:
    """Make, open, seek, play."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the recording here, or use the one that is here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recording.sqlite"
        if not path.exists():
            begin = time.perf_counter()
            count = make(folder, given.days, given.ranks)
            print(f"{count:,} messages written in {duration_text(time.perf_counter() - begin)}")
        print(f"{given.days:g} days of {given.ranks} ranks: {bytes_text(path.stat().st_size)}")
        begin = time.perf_counter()
        source = ReplaySource(folder, "week")
        with closing(source):
            source.start()
            print(f"opened in {1000 * (time.perf_counter() - begin):.0f} ms: {source.frames:,} frames")
        for what, took in zip(("CPU time", "elapsed"), seek(folder), strict=True):
            print(f"{SEEKS} jumps, {what}: median {statistics.median(took):.0f} ms, longest {max(took):.0f} ms")
        play(folder, given.passes)


if __name__ == "__main__":
    main()
