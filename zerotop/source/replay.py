"""A recording as a source that can be played: forward at a chosen speed, frame by frame, or from moment to moment."""

from __future__ import annotations

import sqlite3
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path

from runtime.wire.messages import Ack, Command, CommandRecord
from zerotop.recording.marks import Mark, read_marks
from zerotop.recording.moments import Extent
from zerotop.recording.playback import Playback
from zerotop.source.base import SourceError
from zerotop.state.run import RunState

SPEEDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 60.0, 600.0)
LATER_S = 2.0
"""The recording of a run that goes on is looked at again after this time, when its end has been reached."""
FOLD_FRAMES = 60
"""A step forward over more frames than this is a jump."""


class ReplaySource:
    """Plays RUN/recording.sqlite. `state` is what a screen on the run showed at `wall_s`. Nothing can be sent.

    `clock` is a monotonic clock in seconds.
    """

    connection = "replay"
    can_control = False

    def __init__(self, run_path: Path, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = RunState()
        self.run_path = run_path
        self.name = name
        self.playing = False
        self.frame = 0
        self.marks: list[Mark] = []
        self._walls: list[float] = []
        self._speed_at = SPEEDS.index(1.0)
        self._clock = clock
        self._ticked_s = 0.0
        self._into_frame_s = 0.0
        """Recorded time that has been played of the next frame."""
        self._looked_s = 0.0
        self._changed = False
        self._playback: Playback | None = None

    # ---- Source ----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Open the recording at its beginning. Raises SourceError if there is none, or none that can be read."""
        try:
            self._playback = Playback(self.run_path)
            self.marks = read_marks(self.run_path)
            self._walls = [mark.wall_s for mark in self.marks]
            if not self._playback.frames.count:
                raise SourceError(f"the recording of {self.name} is empty: there is nothing to replay yet")
            self._jump(0)
        except FileNotFoundError:
            raise SourceError(
                f"{self.name} has no recording: {self.run_path / 'recording.sqlite'} is missing"
            ) from None
        except sqlite3.Error as error:
            raise SourceError(f"can't read the recording in {self.run_path}: {error}") from None
        self._ticked_s = self._looked_s = self._clock()

    def poll(self) -> bool:
        now_s = self._clock()
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        if self.playing:
            self._play(passed_s * self.speed)
        changed, self._changed = self._changed, False
        return changed

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s)

    def send(self, command: Command) -> None:
        reason = "this is a replay: nothing reaches the run"
        ack = Ack(id=command.id, state="rejected", reason=reason, wall_s=time.time())
        self.state.apply(CommandRecord(command=command, ack=ack))
        self._changed = True

    def age_s(self) -> float | None:
        return None

    def close(self) -> None:
        if self._playback is not None:
            self._playback.close()

    # ---- where we are ----------------------------------------------------------------------------------------------
    @property
    def playback(self) -> Playback:
        """The open recording."""
        assert self._playback is not None, "start() comes first"
        return self._playback

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return self.playback.frames.count

    @property
    def wall_s(self) -> float:
        """The moment that is shown: the end of the current frame."""
        return self.playback.frames.span(self.frame)[1]

    @property
    def frame_s(self) -> float:
        """The length of the current frame."""
        begin_s, end_s = self.playback.frames.span(self.frame)
        return end_s - begin_s

    @property
    def speed(self) -> float:
        """Recorded seconds per second."""
        return SPEEDS[self._speed_at]

    def extent(self) -> Extent:
        """What `parse_moment` needs to know of the recording."""
        frames = self.playback.frames
        return Extent(frames.begin_s, frames.end_s, self.playback.step_at)

    @property
    def next_mark(self) -> Mark | None:
        """The next thing that happens; None if nothing does."""
        place = bisect_left(self._walls, self.wall_s)
        return self.marks[place] if place < len(self.marks) else None

    # ---- moving ----------------------------------------------------------------------------------------------------
    def toggle(self) -> None:
        """Play or pause. At the end, play from the beginning."""
        if not self.playing and self.frame >= self.frames - 1:
            self._jump(0)
        self.playing = not self.playing
        self._into_frame_s = 0.0
        self._changed = True

    def step(self, frames: int) -> None:
        """Pause, and go so many frames on or back."""
        self.playing = False
        self._move_to(self.frame + frames)

    def change_speed(self, by: int) -> None:
        """The next speed up or down."""
        self._speed_at = min(max(self._speed_at + by, 0), len(SPEEDS) - 1)
        self._changed = True

    def set_speed(self, speed: float) -> None:
        """The speed nearest to `speed`."""
        self._speed_at = min(range(len(SPEEDS)), key=lambda at: abs(SPEEDS[at] - speed))
        self._changed = True

    def skip(self, seconds: float) -> None:
        """Go so many recorded seconds on or back, at least a frame."""
        target = self._frame_that_ends(self.wall_s + seconds)
        if target == self.frame:
            target += 1 if seconds > 0 else -1
        self._move_to(target)

    def go_to(self, wall_s: float) -> None:
        """Show a moment."""
        self._move_to(self.playback.frames.at(wall_s))

    def go_to_mark(self, direction: int) -> Mark | None:
        """Show the frame in which the next (1) or the previous (-1) thing happened; None if there is none."""
        begin_s, end_s = self.playback.frames.span(self.frame)
        if direction > 0:
            place = bisect_left(self._walls, end_s)
        else:
            place = bisect_left(self._walls, begin_s) - 1
        if not 0 <= place < len(self.marks):
            return None
        self._move_to(self.playback.frames.at(self._walls[place]))
        return self.marks[place]

    def marks_in_frame(self) -> list[Mark]:
        """What happened in the current frame."""
        begin_s, end_s = self.playback.frames.span(self.frame)
        return self.marks[bisect_left(self._walls, begin_s) : bisect_right(self._walls, end_s)]

    def _frame_that_ends(self, wall_s: float) -> int:
        return self.playback.frames.at(wall_s - 1e-3)

    def _play(self, recorded_s: float) -> None:
        self._into_frame_s += recorded_s
        target = self.frame
        frames = self.playback.frames
        while target < frames.count - 1:
            begin_s, end_s = frames.span(target + 1)
            if self._into_frame_s < end_s - begin_s:
                break
            self._into_frame_s -= end_s - begin_s
            target += 1
        if target != self.frame:
            into_s = self._into_frame_s
            self._move_to(target)
            self._into_frame_s = into_s
        if self.frame >= frames.count - 1:
            self._at_the_end()

    def _at_the_end(self) -> None:
        """Look for more; without it, pause."""
        now_s = self._clock()
        if now_s - self._looked_s < LATER_S:
            return
        self._looked_s = now_s
        before_s = self.playback.frames.end_s
        self.refresh()
        if self.playback.frames.end_s == before_s and not self._is_live():
            self.playing = False
            self._changed = True

    def _is_live(self) -> bool:
        """Whether the recording is that of a run that goes on, at the end of which we are."""
        from runtime.wire.messages import LIVE_STATES

        recent = time.time() - self.playback.frames.end_s < 60
        return recent and self.state.state_name in LIVE_STATES

    def refresh(self) -> None:
        """Take note of what has been recorded since."""
        moment_s = self.wall_s - 1e-3
        self.playback.refresh()
        self.frame = self.playback.frames.at(moment_s)
        self.marks = read_marks(self.run_path)
        self._walls = [mark.wall_s for mark in self.marks]

    def _move_to(self, target: int) -> None:
        target = min(max(target, 0), self.frames - 1)
        if target == self.frame:
            return
        if 0 < target - self.frame <= FOLD_FRAMES:
            _, after_s = self.playback.frames.span(self.frame)
            _, to_s = self.playback.frames.span(target)
            self.playback.advance(self.state, after_s, to_s)
            self.frame = target
            self._into_frame_s = 0.0
            self._changed = True
        else:
            self._jump(target)

    def _jump(self, target: int) -> None:
        self.state = self.playback.state_at(target)
        self.frame = target
        self._into_frame_s = 0.0
        self._changed = True
