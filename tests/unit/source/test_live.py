"""LiveSource against a hub of the test's own: snapshots, order, holes, reconnects, the run's end, commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.wire.codec import encode
from runtime.wire.messages import Ack, Command, RunStatus
from tests.harness.fakehub import FakeHub, step_result
from tests.harness.waiting import until
from zerotop.source.live import LiveSource


@pytest.fixture
def hub(short_folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(short_folder)
    yield hub
    hub.close()


@pytest.fixture
def source(hub: FakeHub) -> Iterator[LiveSource]:
    source = LiveSource(hub.sockets)
    source.start()
    yield source
    source.close()


def see(source: LiveSource, condition: Callable[[], bool]) -> None:
    def look() -> bool:
        source.poll()
        return condition()

    until(look, lambda: f"{source.connection}; step {source.state.step}", pause=source.wait)


def test_snapshot_then_packets(hub: FakeHub, source: LiveSource) -> None:
    assert source.connection == "connecting"
    assert source.age_s() is None
    see(source, lambda: source.connection == "live")
    assert source.state.world_size == 2
    assert source.state.state_name == "running"
    hub.publish(step_result(0, 1), step_result(1, 1))
    see(source, lambda: source.state.step == 1)
    age_s = source.age_s()
    assert age_s is not None and age_s < 1


def test_packets_before_the_snapshot_are_held_back(hub: FakeHub) -> None:
    hub.answers_snapshots = False
    source = LiveSource(hub.sockets)
    source.start()
    try:

        def heard() -> bool:
            hub.publish(step_result(0, 5), step_result(1, 5))
            source.poll()
            return source.age_s() is not None

        until(heard, "a live packet: the subscription takes a moment", pause=source.wait)
        assert source.connection == "connecting"
        assert source.state.step == 0
        hub.answers_snapshots = True
        hub.publish(step_result(0, 6), step_result(1, 6))
        see(source, lambda: source.connection == "live")  # asks again by itself
        assert source.state.step == 6
        assert [point.step for point in source.state.series] == sorted({point.step for point in source.state.series})
    finally:
        source.close()


def test_what_a_screen_cannot_read_is_skipped_and_told_once(hub: FakeHub, source: LiveSource) -> None:
    """A newer version's values, or a box that one should not trust: nothing of it may end the screen."""
    see(source, lambda: source.connection == "live")
    good = json.loads(encode(step_result(0, 3)))
    for number in range(3):
        messages = [{**good, "step": 10**30}, {**good, "kind": "of 2031"}, good, json.loads(encode(step_result(1, 3)))]
        shell = {"kind": "packet", "source": "rank/\u00b2", "attempt": 1, "seq": number, "sent_ns": 0, "hub_seq": 0}
        hub.publish_raw(json.dumps({**shell, "messages": messages}).encode())
    see(source, lambda: source.state.step == 3)
    see(source, lambda: source.connection == "live")
    told = [event.text for event in source.state.events if "can't read" in event.text]
    assert len(told) == 1 and "step.step: Input should be less than or equal to" in told[0]


def test_a_hole_in_the_hubs_numbers_is_healed_by_a_new_snapshot(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    source._asked_at -= 60  # the first question was long ago
    hub.publish(step_result(0, 3), step_result(1, 3), hub_seq=50)
    see(source, lambda: hub.snapshots_sent == 2 and source.state.hub_seq == 50)
    see(source, lambda: source.state.step == 3)


def test_a_new_hub_at_the_same_sockets_replaces_the_state(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    hub.publish(step_result(0, 9), step_result(1, 9))
    see(source, lambda: source.state.step == 9)
    hub.close()
    second = FakeHub(hub.sockets.folder)
    try:
        second.publish(step_result(0, 4), step_result(1, 4))
        see(source, lambda: source.state.step == 4)
        assert source.connection == "live"
    finally:
        second.close()


def test_final_status_ends_it_and_the_state_stays(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    hub.publish(step_result(0, 9), step_result(1, 9))
    hub.publish(RunStatus(name="r1", state="finished", step=9), source="supervisor")
    see(source, lambda: source.connection == "ended")
    assert source.state.step == 9
    assert not source.can_control
    source.send(Command(id="late", name="pause"))
    record = source.state.commands["late"]
    assert record.ack.state == "rejected"
    assert "has ended (finished)" in record.ack.reason


def test_a_hub_that_vanishes_leaves_the_directorys_word(short_folder: Path) -> None:
    hub = FakeHub(short_folder)
    died = RunStatus(name="r1", state="failed", reason="the supervisor was killed")
    alive = [True]
    source = LiveSource(hub.sockets, read_status=lambda: None if alive[0] else died)
    source.start()
    try:
        see(source, lambda: source.connection == "live")
        hub.close()
        alive[0] = False
        source._heard_at = time.monotonic() - 60
        see(source, lambda: source.connection == "ended")
        assert source.state.status == died
    finally:
        source.close()
        hub.close()


def test_silence_is_called_lost(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    assert source._heard_at is not None
    source._heard_at -= 42
    assert source.connection == "lost: nothing heard for 42 s"
    assert source.can_control


def test_command_accepted_then_applied(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    source.send(Command(id="c1", name="pause", who="me"))
    see(source, lambda: "c1" in source.state.commands and source.state.commands["c1"].ack.state == "applied")
    record = source.state.commands["c1"]
    assert (record.ack.step, record.command.number, record.command.name) == (7, 1, "pause")
    assert [command.id for command in hub.commands] == ["c1"]


def test_an_unanswered_command_is_sent_again_with_its_id(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    heard: list[str] = []

    def answer_the_second(command: Command) -> list[Ack]:
        heard.append(command.id)
        return [Ack(id=command.id, number=1, state="applied", step=3)] if len(heard) > 1 else []

    hub.answer = answer_the_second
    source.send(Command(id="c1", name="checkpoint"))
    see(source, lambda: "c1" in source.state.commands)
    assert heard == ["c1", "c1"]


def test_another_protocol_says_so(hub: FakeHub, source: LiveSource) -> None:
    see(source, lambda: source.connection == "live")
    hub.publish_raw(json.dumps({"protocol": 99, "messages": []}).encode())
    see(source, lambda: source.connection.startswith("lost"))
    assert "speaks protocol 99" in source.broken
    assert not source.can_control
