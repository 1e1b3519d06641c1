"""A hub of a two-rank run in a process of its own: python -m tests.faults.fuzz.hub FOLDER. It ends with its stdin, and
prints what has become of it."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path

from runtime.wire.messages import Command, RunStatus
from runtime.wire.rundir import RunFile
from zerotop.hub.hub import Hub
from zerotop.hub.recorder import Recorder


async def main(folder: Path) -> None:
    run = RunFile(
        name="q1", created_wall_s=time.time(), attempt=1, host="h", boot_id="b", nproc=2, device="cpu", config_path="c",
        config_folder="/", sockets=str(folder),
    )  # fmt: skip
    acts: list[str] = []

    def act(command: Command) -> None:
        acts.append(command.name)

    recorder = Recorder(folder / "recording.sqlite", 1)
    hub = Hub(
        run, RunStatus(name="q1", state="running", attempt=1), recorder=recorder, abort=act, stacks=act,
        on_status=lambda status: None,
    )  # fmt: skip
    hub.start()
    print("ready", flush=True)
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    await stdin.read()
    numbered = [command.name for command in hub.router.open_commands()]
    print(
        json.dumps(
            {
                "acts": acts + numbered,
                "state": hub.status.state,
                "told_state": hub.state.state_name,
                "ranks": sorted(hub.state.ranks),
                "refused": hub.refused,
                "snapshot_bytes": len(hub.encoded_snapshot()),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        ),
        flush=True,
    )
    await hub.close(linger_ms=0)
    recorder.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
