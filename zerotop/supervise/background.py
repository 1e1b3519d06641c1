"""What a supervisor does besides its ranks: sample the node, cap the logs, and run the watchers. Each is a task of
its own, and the run continues if one fails."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from zerotop.hub.hub import Hub
from zerotop.probe.host import HostProbe
from zerotop.probe.nvml import GpuProbe
from zerotop.rundir.logs import cap_logs
from zerotop.supervise.attempt import Attempt

CAP_INTERVAL_S = 10.0
PROBE_INTERVAL_S = 1.0


class BackgroundTasks:
    """The background tasks of one supervisor. `attempt()` returns the current attempt."""

    def __init__(self, hub: Hub, attempt: Callable[[], Attempt], gpus: GpuProbe, disk: Executor) -> None:
        self._hub = hub
        self._attempt = attempt
        self._gpus = gpus
        self._disk = disk
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the probe and the cap on the log files."""
        self.add("the probe", self._probe())
        self.add("the cap on logs", self._cap_logs())

    def add(self, name: str, work: Awaitable[None]) -> None:
        """Run `work` in the background. A failure is reported as a failure of `name`."""
        task = asyncio.get_running_loop().create_task(self._reported(name, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all tasks and wait for them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reported(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            traceback.print_exc()
            self._hub.complain(f"{name} failed: {type(error).__name__}: {error}")

    async def _probe(self) -> None:
        host = HostProbe()
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="probe") as thread:
            while True:
                pids = {
                    rank: state.hello.pid
                    for rank, state in self._hub.state.ranks.items()
                    if state.hello and not state.goodbye
                }
                stats = await loop.run_in_executor(thread, host.sample, pids, *self._gpus.latest())
                self._hub.say(stats, source=f"probe/{stats.host}")
                self._attempt().collector.note(stats)
                self.hear_xids()
                await asyncio.sleep(PROBE_INTERVAL_S)

    def hear_xids(self) -> None:
        """Report the XID errors since the last call."""
        for xid in self._gpus.take_xids():
            self._attempt().collector.hear(xid)
            self._hub.event("xid", xid.text, "error", xid=xid.number, gpu=xid.gpu)

    async def _cap_logs(self) -> None:
        first: Path = self._attempt().logs
        while True:
            await asyncio.sleep(CAP_INTERVAL_S)
            # supervisor.log stays in the folder of the first attempt.
            for folder in {first, self._attempt().logs}:
                for path in await asyncio.get_running_loop().run_in_executor(self._disk, cap_logs, folder):
                    self._hub.event(
                        "log",
                        f"{path.name} reached its size limit and was emptied; its end is kept in {path.name}.1",
                        "warning",
                    )
