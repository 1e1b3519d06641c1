"""The process of a run's outputs, which its supervisor starts and ends.

python -P -m zerotop.outputs RUN --supervisor PID --after STEP --say-fd N

It watches the run as a screen does. So whatever an output costs or waits for, the hub and the ranks do not notice; and
what a tracker brings along (threads, processes, hundreds of megabytes of modules) is not in the supervisor.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from zerotop.outputs.process import OutputsProcess
from zerotop.outputs.reports import Reports

NICENESS = 5
"""The ranks come first."""


def main() -> int:
    """Serve until the run has ended."""
    parser = argparse.ArgumentParser(prog="python -m zerotop.outputs", description="Started by a run's supervisor.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--supervisor", type=int, required=True, help="its process id")
    parser.add_argument("--after", type=int, default=0, help="the step after which trackers get points")
    parser.add_argument("--say-fd", type=int, required=True, help="file descriptor for reports to the supervisor")
    arguments = parser.parse_args()
    os.umask(0o077)
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(arguments.say_fd, False)
    with Reports(arguments.say_fd) as reports:
        process = OutputsProcess(arguments.run, arguments.supervisor, arguments.after, reports)
        signal.signal(signal.SIGTERM, lambda *_: process.stop())
        process.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
