"""The process of the outputs (zerotop/outputs/__main__.py): started with the run, started again if it dies, and ended
after the run. Its reports become events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from runtime.config import ZerotopConfig
from runtime.wire.rundir import RunFile
from zerotop.hub.hub import Hub
from zerotop.rundir.logs import tail

MODULE = "zerotop.outputs"
STARTS = 3
"""Times that the process is started; one that dies more often stays away."""
PATIENCE_S = 20.0
"""How long it may take after the end of the run: more than it allows itself (zerotop/outputs/process.py)."""
PAUSE_S = 1.0
REAPED_S = 5.0


def wanted(settings: ZerotopConfig) -> bool:
    """Whether the run has outputs that need the process."""
    return bool(settings.prometheus or settings.writers or settings.notify)


class Outputs:
    """The process, as the supervisor holds it. Without anything to do there is none."""

    def __init__(self, path: Path, run: RunFile, hub: Hub, settings: ZerotopConfig) -> None:
        self._path = path
        self._run = run
        self._hub = hub
        self._wanted = wanted(settings)
        self._log = path / "logs" / str(run.attempt) / "outputs.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = asyncio.Event()
        self._finishing = False

    @property
    def pids(self) -> frozenset[int]:
        """The process, which the end of an attempt spares."""
        return frozenset() if self._process is None or self._ended.is_set() else frozenset({self._process.pid})

    def collect(self, ended: Mapping[int, int]) -> None:
        """Take the exit codes of children, by process id."""
        if self._process is not None and self._process.pid in ended:
            self._process.returncode = ended[self._process.pid]
            self._ended.set()

    async def watch(self) -> None:
        """Run the process as long as the run lasts."""
        if not self._wanted:
            return
        after = self._hub.status.step
        for _ in range(STARTS):
            reports = await self._start(after)
            if reports is None:
                return
            await reports
            # Its end of the pipe is closed, so it is gone, or about to be. Somebody else may have reaped it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), REAPED_S)
            self._ended.set()
            assert self._process is not None
            if self._finishing:
                return
            last = tail(self._log).strip().splitlines()[-1:]
            why = f": {last[0]}" if last else ""
            text = (
                f"the process for metrics, trackers and notifications ended (exit code {self._process.returncode}){why}"
            )
            self._hub.event("outputs", text, "warning")
            after = self._hub.state.step
            await asyncio.sleep(PAUSE_S)
        self._hub.event("outputs", f"it ended {STARTS} times and is not started again; see {self._log}", "error")

    async def _start(self, after: int) -> asyncio.Task[None] | None:
        """Start the process; returns the task that reads its reports."""
        read_end, write_end = os.pipe()
        command = [sys.executable, "-P", "-m", MODULE, str(self._path), "--supervisor", str(os.getpid())]
        command += ["--after", str(after), "--say-fd", str(write_end)]
        self._ended.clear()
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=self._run.config_folder or None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_end,),
                    start_new_session=True,
                )
        except OSError as error:
            os.close(read_end)
            self._hub.event("outputs", f"can't start the process for metrics and trackers: {error.strerror}", "warning")
            return None
        finally:
            os.close(write_end)
        return asyncio.get_running_loop().create_task(self._hear(read_end))

    async def _hear(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while line := await reader.readline():
                said = json.loads(line)
                self._hub.event("outputs", said["text"], said["severity"])
        finally:
            transport.close()

    async def finish(self) -> None:
        """The run has ended, and the hub has said so: let the process do the rest, for a limited time."""
        self._finishing = True
        if self._process is None or self._ended.is_set():
            return
        deadline = time.monotonic() + PATIENCE_S
        while not self._ended.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
