"""A process of the trainer's that does one job for a command, and ends with it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def child_process(
    command: Sequence[str], environment: dict[str, str], stdin: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, with its stdout (and with stdin=subprocess.PIPE its stdin) as a pipe. Left by an error (Ctrl-C), it
    has ended, too, and is cleared up; a second Ctrl-C does not wait for that."""
    child: subprocess.Popen[bytes] | None = None
    try:
        with _interrupts_held():
            # In a process group of its own, so that the terminal's Ctrl-C comes once, through us, also while it starts.
            child = subprocess.Popen(command, env=environment, stdin=stdin, stdout=subprocess.PIPE, process_group=0)
        yield child
    except BaseException:
        if child is not None:
            child.terminate()
            try:
                child.wait()
            finally:
                child.kill()
                child.wait()
        raise
    finally:
        if child is not None and child.stdout is not None:
            child.stdout.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C only at the end: inside Popen it would leave a process nobody knows."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        raise KeyboardInterrupt
