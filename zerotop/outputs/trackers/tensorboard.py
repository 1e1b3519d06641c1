"""Event files for TensorBoard, written by its own package, without torch or TensorFlow."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

from runtime.config.outputs import WriterConfig
from zerotop.outputs.points import Point
from zerotop.outputs.trackers.base import About

FLUSH_S = 5.0


class TensorBoard:
    """One folder per run below the log directory; `tensorboard --logdir` shows them side by side."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._writer: Any = None
        self._flushed_s = 0.0

    def load(self) -> None:
        importlib.import_module("tensorboard.summary.writer.event_file_writer")

    def open(self, about: About) -> str:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        logs = about.config_folder / (self._config.folder or "tensorboard")
        folder = logs / about.name
        self._writer = EventFileWriter(str(folder))
        # TensorBoard drops the points of earlier files from this step on: a resumed run takes these steps again.
        start = Event(wall_time=time.time(), step=about.after + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.add_event(start)
        return f"tensorboard --logdir {logs}"

    def write(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._writer.add_event(Event(wall_time=point.wall_s, step=point.step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self._flushed_s = time.monotonic()
            self._writer.flush()

    def close(self, good: bool) -> None:
        self._writer.close()
