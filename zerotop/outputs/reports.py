"""What the outputs' process tells its supervisor: one JSON line for each event. It may come from any thread."""

from __future__ import annotations

import json
import os
import threading
from types import TracebackType


class Reports:
    """Writes to the pipe `descriptor`, and closes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def say(self, text: str, severity: str = "info") -> None:
        """Report `text`. A supervisor that is gone hears nothing."""
        line = json.dumps({"text": text[:4000], "severity": severity}).encode() + b"\n"
        with self._lock:
            try:
                os.write(self._descriptor, line)
            except BrokenPipeError:
                print(text, flush=True)  # into outputs.log

    def warn(self, text: str) -> None:
        """Report something that does not work."""
        self.say(text, "warning")

    def __enter__(self) -> Reports:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
