"""Both ends of the start of a supervisor: launch starts it and waits; it answers that it is up, or why it cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

from runtime.wire.rundir import RunFile
from zerotop.format import duration_text
from zerotop.launch.torchrun import with_import_path
from zerotop.rundir.directory import SUPERVISOR_MODULE
from zerotop.rundir.logs import tail
from zerotop.rundir.paths import RunError

UP_TIMEOUT_S = 30.0


def start_supervisor(path: Path, run: RunFile, *, resume: bool, lock: int) -> None:
    """Start the supervisor in a session of its own, with the descriptor that holds the run's lock, and wait until it
    is up. Raises RunError with its reason if it fails."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-P", "-m", SUPERVISOR_MODULE, str(path)]
    command += ["--lock-fd", str(lock), "--ready-fd", str(write_end)]
    try:
        starting = subprocess.Popen(
            command + (["--resume"] if resume else []),
            env=with_import_path(dict(os.environ)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(write_end, lock),
            start_new_session=True,
        )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    with starting, os.fdopen(read_end, "rb") as answers:
        assert starting.stderr is not None
        complaint = starting.stderr.read().decode(errors="replace")  # ends when it detaches
        with selectors.DefaultSelector() as waiting:  # select() fails where a program has over 1,024 files open
            waiting.register(answers, selectors.EVENT_READ)
            ready = waiting.select(UP_TIMEOUT_S)
        line = answers.readline() if ready else b""
    if line and "error" not in (answer := json.loads(line)):
        return
    if line:
        raise RunError(f"the run can't start: {answer['error']}")
    words = complaint.strip() or tail(path / "logs" / str(run.attempt) / "supervisor.log")
    slow = "" if ready else f" within {duration_text(UP_TIMEOUT_S)}"
    raise RunError(f"the supervisor did not start{slow}" + (f":\n{words}" if words else ""))


class Ready:
    """Answers the launch that waits for this supervisor with one JSON line: {"up": true} or {"error": "..."}."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def say_up(self) -> None:
        """The supervisor is up. Raises RunError if the launch has gone."""
        self._say({"up": True})

    def say_error(self, text: str) -> None:
        """The supervisor can not run, for the reason `text`."""
        with contextlib.suppress(RunError):  # nobody waits: state.json and supervisor.log tell it
            self._say({"error": text})

    def _say(self, message: dict[str, object]) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.write(descriptor, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise RunError("the launch was interrupted") from None
        finally:
            os.close(descriptor)
