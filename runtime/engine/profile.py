"""Profiles steps with torch.profiler on command, while the run goes on.

The profiler starts at a boundary and stops at another one. The trace is written by a thread and merged with those of
the other ranks by the supervisor (zerotop/supervise/profiles.py). Nothing that fails in here ends the run.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns
from typing import Any

import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile, record_function

from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.messages import Command
from runtime.wire.profile import CLOCK, PART, part_path

GROWN_BYTES = 4 * 2**30
"""A profile ends early when this process has grown by so much since its start: events take host memory."""


@dataclass
class _Profile:
    """One command's profile on this rank."""

    command: Command
    ranks: Sequence[int]
    after: int
    """The step at whose boundary it began."""
    until: int
    """The last step."""
    rss_bytes: int
    profiler: Any = None
    thread: threading.Thread | None = field(default=None)


class StepProfiler:
    """The profiles of one rank, one at a time."""

    def __init__(self, rank: int, device: torch.device, link: Telemetry | NullTelemetry, run: Path | None) -> None:
        """run: the run directory; None: there is no run, and so no command."""
        self._rank, self._device, self._link, self._run = rank, device, link, run
        self._profile: _Profile | None = None
        self._writing: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """Whether steps are being profiled on this rank."""
        return self._profile is not None

    def refusal(self) -> str:
        """Why this rank can't begin a profile; empty if it can."""
        if self._run is None:
            return "this engine has no run directory to write into"
        if self._profile is not None or (self._writing is not None and self._writing.is_alive()):
            return "a profile is being taken already"
        return ""

    def begin(self, command: Command, step: int) -> str:
        """Profile the steps after `step`, if this rank is chosen. Returns what failed; empty if nothing did."""
        ranks, steps = command.arguments["ranks"], command.arguments["steps"]
        if self._rank not in ranks:
            return ""
        if autograd_profiler._is_profiler_enabled:
            return f"rank {self._rank}: another profiler is running, perhaps the script's own"
        try:
            profiler = _make_profiler(self._device)
            profiler.start()
        except Exception as error:
            return f"rank {self._rank}: torch.profiler can't start: {_first_line(error)}"
        self._profile = _Profile(command, ranks, step, step + steps, _rss_bytes(), profiler)
        _mark_clock()
        return ""

    def at_boundary(self, step: int) -> None:
        """Call it at each boundary while `active`: end the profile after its last step, and early when it takes too
        much memory."""
        assert self._profile is not None
        _mark_clock()
        if step >= self._profile.until:
            self.end(step)
        elif _rss_bytes() - self._profile.rss_bytes > GROWN_BYTES:
            self.end(step, f"ended early: the trace takes more than {GROWN_BYTES >> 30} GiB of host memory")

    def end(self, step: int, problem: str = "", wait: bool = False) -> None:
        """End the profile if there is one, after `step`. problem: why it ends early. wait: return when it is written,
        because the process is about to end."""
        found, self._profile = self._profile, None
        if found is not None:
            try:
                found.profiler.stop()
            except Exception as error:
                self._report(found, step, "", f"torch.profiler can't stop: {_first_line(error)}")
            else:
                name = "zerotop-profile"
                self._writing = threading.Thread(target=self._write, args=(found, step, problem), name=name)
                self._writing.start()
        if wait and self._writing is not None:
            self._writing.join()

    def _write(self, found: _Profile, step: int, problem: str) -> None:
        assert self._run is not None
        path = part_path(self._run, found.command.number, self._rank)
        partial = path.with_suffix(".partial.json")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            found.profiler.export_chrome_trace(str(partial))
            os.chmod(partial, 0o600)
            os.replace(partial, path)
        except Exception as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._report(found, step, "", f"the trace can't be written: {_first_line(error)}")
            return
        self._report(found, step, str(path.relative_to(self._run)), problem)

    def _report(self, found: _Profile, step: int, path: str, problem: str) -> None:
        steps = [found.after + 1, step]
        data: Mapping[str, Any] = {
            "id": found.command.id,
            "number": found.command.number,
            "ranks": list(found.ranks),
            "steps": steps,
            "path": path,
            "problem": problem,
        }
        text = f"profiled steps {steps[0]} to {steps[1]}" if path else "no profile"
        severity: Any = "warning" if problem else "info"
        text += f": {problem}" if problem else ""
        self._link.event(PART, text, severity=severity, step=step, data=dict(data))


def _make_profiler(device: torch.device) -> Any:
    """A profiler of CPU and, on a GPU, CUDA, on all threads where torch can. Not yet started."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    options: dict[str, Any] = {"profile_all_threads": True, "trace_only": True}
    known = torch._C._profiler._ExperimentalConfig
    for left_out in ((), ("trace_only",), ("trace_only", "profile_all_threads")):
        try:
            config = known(**{name: value for name, value in options.items() if name not in left_out})
            break
        except TypeError:  # an older torch
            continue
    return profile(activities=activities, experimental_config=config)


def _mark_clock() -> None:
    with record_function(f"{CLOCK}{monotonic_ns()}"):
        pass


def _rss_bytes() -> int:
    """The process's resident memory; 0 where the system doesn't say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
