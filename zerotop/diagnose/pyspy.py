"""Stacks by py-spy, where it is installed: C frames, and the stacks of ranks that answer no signal.

py-spy reads the memory of another process. With C frames it stops the process meanwhile (about 0.2 s, and 2 s with
torch's symbols); without them it need not, and so it also reads a process that is stopped or waits in the kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerotop.diagnose.frames import ThreadStack, native_frame, python_frame

PLAIN_S = 5.0
NATIVE_S = 20.0
"""Time limits: of a call, and of all calls for C frames together. They take 1 to 2 s a rank, on a machine that has time
for them."""
OUTPUT_BYTES = 4 * 2**20
FRAMES_KEPT = 200
MISSING = "py-spy is not installed"
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


@dataclass(frozen=True)
class Dump:
    """The threads of one process, the main thread first. `trouble`: why there are none, in a sentence."""

    threads: tuple[ThreadStack, ...] = ()
    holds_gil: bool = False
    """Whether the main thread holds the global interpreter lock."""
    trouble: str = ""


def find_pyspy() -> str | None:
    """The path of py-spy: on PATH, or beside this Python; None if it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    return shutil.which("py-spy") or (str(beside) if os.access(beside, os.X_OK) else None)


def dump(program: str, pid: int, *, native: bool, timeout_s: float | None = None) -> Dump:
    """The stacks of process `pid`. native: with C frames, for which the process must be able to run. Blocks."""
    limit_s = timeout_s if timeout_s is not None else NATIVE_S if native else PLAIN_S
    words = [program, "dump", "--json", "--native" if native else "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Dump(trouble=f"py-spy did not finish in time ({limit_s:.0f} s)")
    except OSError as error:
        return Dump(trouble=f"py-spy can't be started: {error.strerror or error}")
    if done.returncode != 0 or len(done.stdout) > OUTPUT_BYTES:
        return Dump(trouble=why_failed(done.stderr.decode(errors="replace")))
    try:
        return _read(json.loads(done.stdout), pid)
    except (ValueError, KeyError, TypeError) as error:
        return Dump(trouble=f"py-spy's output can't be read: {type(error).__name__}: {error}")


def ptrace_scope() -> int | None:
    """Yama's restriction on reading other processes: 0 none, 1 descendants and those that allow it, 2 root, 3 nobody;
    None without Yama."""
    try:
        return int(_YAMA.read_text())
    except (OSError, ValueError):
        return None


def why_failed(errors: str) -> str:
    """py-spy's error output as one sentence that says what to do."""
    first = next((line.strip() for line in errors.splitlines() if line.strip()), "it said nothing")
    refused = any(word in errors for word in ("Permission Denied", "Permission denied", "Operation not permitted"))
    if not refused:
        return f"py-spy failed: {first.removeprefix('Error: ')[:200]}"
    match ptrace_scope():
        case 2 | 3 as scope:
            cure = f"kernel.yama.ptrace_scope is {scope}: an administrator can set it to 1"
        case 1:
            cure = "kernel.yama.ptrace_scope is 1, and the rank did not allow it: an administrator can set it to 0"
        case _:
            cure = "in a container it needs the capability SYS_PTRACE (docker run --cap-add=SYS_PTRACE)"
    return f"py-spy may not read the process; {cure}"


def _read(document: list[dict[str, Any]], pid: int) -> Dump:
    threads, holds_gil = [], False
    for thread in document:
        main = thread["os_thread_id"] == pid
        holds_gil |= main and bool(thread.get("owns_gil"))
        frames = tuple(_frame(frame) for frame in thread["frames"][:FRAMES_KEPT])
        threads.append(ThreadStack(main, frames))
    if len(threads) == 1:  # a process of one thread, seen without its system number
        threads = [ThreadStack(True, threads[0].frames)]
    return Dump(tuple(sorted(threads, key=lambda stack: not stack.main)), holds_gil)


def _frame(frame: dict[str, Any]) -> str:
    file, module, name = str(frame["filename"]), frame.get("module"), str(frame["name"])
    if module is None:
        return python_frame(file, int(frame["line"]), name.rpartition(".")[2])
    library = str(module).rpartition("/")[2]
    return native_frame(name if len(name) <= 120 else f"{name[:117]}...", library.replace("(", "").replace(")", ""))
