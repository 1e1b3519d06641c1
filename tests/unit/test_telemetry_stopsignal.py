"""SIGUSR1 in a rank: in a process of its own, since it is about the process's handlers."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = """
import os, signal
from runtime.telemetry import Inbox, stopsignal
stopsignal.listen()
inbox = Inbox()
{order}
assert inbox.stop_reason == "SIGUSR1", inbox.stop_reason
"""
OWN = """
import os, signal
from runtime.telemetry import Inbox, stopsignal
heard = []
{before}
stopsignal.listen()
{after}
inbox = Inbox()
stopsignal.deliver_to(inbox)
os.kill(os.getpid(), signal.SIGUSR1)
assert heard == [signal.SIGUSR1] and not inbox.stop_requested
"""
HANDLER = "signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))"
KILL = "os.kill(os.getpid(), signal.SIGUSR1)"
DELIVER = "stopsignal.deliver_to(inbox)"


def run(code: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("order", [f"{DELIVER}\n{KILL}", f"{KILL}\n{DELIVER}"])
def test_it_asks_for_a_stop_also_when_it_comes_before_the_inbox(order: str) -> None:
    run(LATER.format(order=order))


def test_one_that_came_while_it_was_blocked_is_found() -> None:
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})"
    run(f"import os, signal\n{block}\n{KILL}" + LATER.format(order=DELIVER))


@pytest.mark.parametrize(("before", "after"), [(HANDLER, ""), ("", HANDLER)])
def test_a_handler_of_the_scripts_own_stays(before: str, after: str) -> None:
    run(OWN.format(before=before, after=after))
