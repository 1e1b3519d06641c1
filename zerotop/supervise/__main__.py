"""The supervisor's process, which `zerotop launch` starts and detaches.

python -P -m zerotop.supervise RUN --lock-fd N [--resume] [--ready-fd N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
import traceback
from pathlib import Path

from runtime.process.file_limit import raise_file_limit
from runtime.process.garbage import collect_less_often, keep_all_objects
from runtime.wire.rundir import RunFile, read_run, read_status
from zerotop.diagnose.outcome import Outcome
from zerotop.launch.handshake import Ready
from zerotop.rundir.logs import tail
from zerotop.rundir.paths import RunError, error_text
from zerotop.rundir.statusfile import write_status
from zerotop.supervise.processes import become_subreaper, detach, kill_descendants
from zerotop.supervise.supervisor import Supervisor


def main() -> int:
    """Supervise the run of the command line. The exit code is 0 if it finished or was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m zerotop.supervise", description="Supervise one run; started by zerotop launch."
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument("--lock-fd", type=int, required=True, help="file descriptor that holds the run's lock")
    parser.add_argument("--ready-fd", type=int, help="file descriptor to write to when it is up, or can't be")
    arguments = parser.parse_args()
    collect_less_often()
    keep_all_objects()
    os.umask(0o077)  # sockets, logs and the recording are the user's alone
    os.set_inheritable(arguments.lock_fd, False)  # torchrun is given it by name
    ready = Ready(arguments.ready_fd)
    run = read_run(arguments.run)
    raise_file_limit()
    detach(str(arguments.run / "logs" / str(run.attempt) / "supervisor.log"))
    become_subreaper()
    try:
        outcome = asyncio.run(_supervise(arguments.run, run, arguments.resume, arguments.lock_fd, ready))
    except RunError as error:
        _fail(arguments.run, str(error), "")
        ready.say_error(str(error))  # last: launch then removes the directory of a run that could not start
        return 1
    except Exception as error:
        # First of all: what follows writes to the disk, which may be what failed.
        reason = error_text(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        ready.say_error(f"the supervisor failed: {reason}")
        kill_descendants()
        with contextlib.suppress(OSError):  # supervisor.log may have no room either
            traceback.print_exc()
        log = arguments.run / "logs" / str(run.attempt) / "supervisor.log"
        _fail(arguments.run, f"the supervisor failed: {reason}", tail(log))
        return 1
    return 0 if outcome.state in ("finished", "stopped") else 1


async def _supervise(path: Path, run: RunFile, resume: bool, lock: int, ready: Ready) -> Outcome:
    return await Supervisor(path, run, resume=resume, lock=lock).supervise(ready)


def _fail(path: Path, reason: str, error: str) -> None:
    """Write state.json for a supervisor that cannot continue. If launch was interrupted, the run directory is gone
    already."""
    if not path.exists():
        return
    try:
        status = read_status(path)
        end = {"state": "failed", "reason": reason, "error": error, "ended_wall_s": time.time()}
        write_status(path, status.model_copy(update=end))
    except OSError as problem:
        with contextlib.suppress(OSError):
            print(f"can't write state.json: {problem}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
