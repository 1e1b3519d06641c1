"""What the kernel says of a process that can't tell its stacks itself: its state, and where in the kernel it waits."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil

from runtime.wire.rundir import STACKS_SIGNAL

GONE = "gone"
STOPPED = "stopped by a signal"
TRACED = "held by a debugger"
ENDED = ("ended, not collected by torchrun", "ended")
IN_KERNEL = "in the kernel"
STATES = {
    psutil.STATUS_STOPPED: STOPPED,
    psutil.STATUS_TRACING_STOP: TRACED,
    psutil.STATUS_DISK_SLEEP: IN_KERNEL,
    psutil.STATUS_ZOMBIE: ENDED[0],
    psutil.STATUS_DEAD: ENDED[1],
}
_STATUS_LINES = ("State", "TracerPid", "SigQ", "SigBlk", "VmRSS", "VmSwap", "voluntary_ctxt_switches")
_KERNEL_FRAMES = 16


def process_state(process: psutil.Process | None) -> str:
    """The state of a process in words: that of its first thread, which trains."""
    if process is None:
        return GONE
    try:
        state = process.status() if process.is_running() else psutil.STATUS_DEAD
    except psutil.ZombieProcess:
        state = psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return GONE
    words = STATES.get(state, str(state))
    where = wait_channel(process.pid) if state == psutil.STATUS_DISK_SLEEP else ""
    return f"{words}: {where}" if where else words


def wait_channel(pid: int) -> str:
    """The kernel function in which the process waits; empty if the kernel does not tell."""
    name = _read(pid, "wchan").strip()
    return "" if name == "0" else name


def is_frozen(state: str) -> bool:
    """Whether a process in this state (of `process_state`) runs no instruction, so that no signal is answered and no
    debugger can stop it."""
    return state in (STOPPED, TRACED) or state.startswith(IN_KERNEL)


def catches(pid: int, signal_number: int = STACKS_SIGNAL) -> bool | None:
    """Whether the process handles the signal; None where the kernel does not say (not Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", _read(pid, "status"), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal_number - 1) & 1)


def kernel_view(pid: int) -> tuple[str, ...]:
    """Lines of /proc/PID about a process that does not answer: state, what it waits in, CPU time, and the kernel's
    stack where the kernel shows it (to root only). Empty where there is no /proc."""
    status = dict(line.partition(":")[::2] for line in _read(pid, "status").splitlines())
    lines = [f"{name}: {' '.join(status[name].split())}" for name in _STATUS_LINES if name in status]
    if where := wait_channel(pid):
        lines.append(f"waits in: {where}")
    if call := _read(pid, "syscall").strip():
        lines.append(f"system call: {call[:80]}")
    if cpu_s := _cpu_s(pid):
        lines.append(f"CPU time: {cpu_s:.1f} s")
    stack = _read(pid, "stack").splitlines()
    lines += [f"kernel stack: {line.removeprefix('[<0>] ')}" for line in stack[:_KERNEL_FRAMES]]
    return tuple(lines)


def _cpu_s(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
