"""Commands as a rank finds them: in order, once, and without burning a core while it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from runtime.telemetry import Inbox
from runtime.wire.messages import Command
from tests.harness.waiting import patient


def command(number: int, id: str | None = None) -> Command:
    return Command(id=id or f"c{number}", name="pause", number=number)


@pytest.fixture
def later() -> Iterator[list[threading.Timer]]:
    timers: list[threading.Timer] = []
    yield timers
    for timer in timers:
        timer.join()


def test_commands_come_in_number_order_and_once() -> None:
    inbox = Inbox()
    assert not inbox.waiting()
    for number in (2, 1, 3):
        assert inbox.put(command(number))
    assert inbox.waiting()
    assert [taken.number for taken in inbox.take()] == [1, 2, 3]
    assert not inbox.waiting()
    assert inbox.take() == []


def test_a_repeated_number_or_id_is_dropped() -> None:
    inbox = Inbox()
    assert inbox.put(command(1, "a"))
    assert not inbox.put(command(1, "other"))
    assert not inbox.put(command(2, "a"))
    assert [taken.id for taken in inbox.take()] == ["a"]
    assert not inbox.put(command(1, "a"))
    assert not inbox.put(command(5, "a"))
    assert not inbox.put(command(0, "never numbered"))
    assert not inbox.waiting()
    assert inbox.put(command(2, "b"))


def test_next_and_take_share_what_is_there() -> None:
    inbox = Inbox()
    for number in (1, 2, 3):
        inbox.put(command(number))
    first = inbox.next(0)
    assert first is not None and first.number == 1
    assert inbox.waiting()
    assert [taken.number for taken in inbox.take()] == [2, 3]
    assert inbox.next(0) is None


def test_what_a_broadcast_applied_is_dropped_before_and_after_it_arrives() -> None:
    inbox = Inbox()
    inbox.put(command(1))
    inbox.put(command(2))
    inbox.mark_applied(3)
    assert not inbox.waiting()
    assert inbox.take() == []
    assert not inbox.put(command(3))
    assert inbox.put(command(4))
    inbox.mark_applied(2)  # an old word takes nothing back
    assert inbox.waiting()
    assert [taken.number for taken in inbox.take()] == [4]


def test_next_wakes_when_a_command_arrives(later: list[threading.Timer]) -> None:
    inbox = Inbox()
    later.append(threading.Timer(0.1, inbox.put, [command(1)]))
    later[0].start()
    taken = inbox.next(10)
    assert taken is not None and taken.number == 1


def test_next_wakes_when_the_supervisor_is_gone(later: list[threading.Timer]) -> None:
    inbox = Inbox()
    later.append(threading.Timer(0.1, inbox.mark_orphaned))
    later[0].start()
    start = time.monotonic()
    assert inbox.next(10) is None and inbox.orphaned
    assert time.monotonic() - start < patient(5)


def test_commands_that_arrived_before_that_are_still_handed_out() -> None:
    inbox = Inbox()
    inbox.put(command(1))
    inbox.mark_orphaned()
    assert inbox.next(10) is not None
    assert inbox.next(10) is None


def test_waiting_costs_no_cpu() -> None:
    inbox = Inbox()
    before = time.thread_time()
    assert inbox.next(0.5) is None
    assert time.thread_time() - before < 0.02
