"""A rank's telemetry against a hub: what arrives, what comes again, and what happens without a hub."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from runtime.telemetry import Telemetry, TelemetryError
from runtime.telemetry import outbox as outbox_module
from runtime.telemetry import publisher as publisher_module
from runtime.telemetry.orphan import SupervisorWatch
from runtime.telemetry.recorder import SPANS_KEPT
from runtime.wire.codec import decode_packet
from runtime.wire.messages import Ack, Command, Event, Memory, Resend
from runtime.wire.rundir import Sockets
from tests.harness.fakehub import hello, step_result
from tests.harness.telemetryhub import DEADLINE_S, RankHub
from tests.harness.waiting import patient, until


@pytest.fixture
def hub(short_folder: Path) -> Iterator[RankHub]:
    hub = RankHub(short_folder)
    yield hub
    hub.close()


@pytest.fixture
def telemetry(short_folder: Path) -> Iterator[Telemetry]:
    telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(short_folder))
    yield telemetry
    telemetry.close(0.2)


def memory(rss_bytes: int = 1) -> Memory:
    return Memory(rank=0, ledger={}, rss_bytes=rss_bytes, host_total_bytes=2, at_ns=time.monotonic_ns())


def test_the_first_event_is_the_hello(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.event("early", "said before the start")
    telemetry.start(hello())
    identity, frame = hub.event_frames()
    packet = decode_packet(frame)
    assert identity == b"rank/0/1"
    assert (packet.source, packet.attempt, packet.seq) == ("rank/0", 1, 1)
    assert [message.kind for message in packet.messages] == ["hello", "event"]
    assert packet.messages[0] == hello()


def test_everything_the_training_thread_records_arrives(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello(start_step=6))
    first = hub.message("heartbeat")  # from here on the hub is subscribed
    assert (first.phase, first.step, first.micro_steps) == ("init", 7, 4)
    telemetry.enter("forward", step=7, micro_step=1)
    telemetry.enter("backward")
    seq = telemetry.issued("reduce_scatter", 4096)
    telemetry.completed(seq, "reduce_scatter", 4096, 1_000_000, 3_000_000, 500_000)
    telemetry.step(step_result(step=7))
    result = hub.message("step")
    assert (result.step, result.wait_ms, result.comm_bytes) == (7, 0.5, 4096)
    assert set(result.phase_ms) == {"forward", "backward"}
    telemetry.enter("idle", step=8, micro_step=0)
    spans = hub.message("phases", lambda phases: phases.spans[-1][0] == "backward")
    assert spans.spans[-1][1:3] == (7, 1)
    heartbeat = hub.message("heartbeat")
    assert (heartbeat.phase, heartbeat.step, heartbeat.entered_seq, heartbeat.completed_seq) == ("idle", 8, 1, 1)
    assert heartbeat.entered_op == "reduce_scatter"


def test_a_hub_that_is_late_hears_the_first_steps(short_folder: Path, telemetry: Telemetry) -> None:
    """A publisher's messages are lost until the hub has subscribed."""
    telemetry.start(hello())
    for step in (1, 2):
        telemetry.step(step_result(step=step))
    until(lambda: telemetry._link._seq > 2, "packets that nobody hears")
    hub = RankHub(short_folder)
    try:
        first = hub.packet()
        assert first.seq == 1
        packets = [first, *(hub.packet() for _ in range(2))]
        assert [m.step for packet in packets for m in packet.messages if m.kind == "step"] == [1, 2]
    finally:
        hub.close()


def test_collectives_come_in_one_message_per_step(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    hub.packet()
    telemetry.enter("backward", step=1)
    first = telemetry.issued("all_reduce", 8)
    telemetry.enter("backward", step=2)
    second = telemetry.issued("all_reduce", 8)
    telemetry.completed(first, "all_reduce", 8, 0, 1_000_000, 0)
    telemetry.completed(second, "all_reduce", 8, 0, 3_000_000, 0)
    by_step: dict[int, list[int]] = {}
    while len(by_step) < 2:
        for message in hub.packet().messages:
            if message.kind == "collectives":
                by_step.setdefault(message.step, []).extend(record[5] for record in message.records)
    assert by_step == {1: [1000], 2: [2000]}


def test_telemetry_packets_are_numbered_without_a_gap(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello(telemetry_hz=100.0))
    numbers = [hub.packet().seq for _ in range(10)]
    assert numbers == list(range(numbers[0], numbers[0] + 10))


def test_the_heartbeat_goes_on_while_the_training_thread_hangs(hub: RankHub, telemetry: Telemetry) -> None:
    hanging, release = threading.Event(), threading.Event()

    def train() -> None:
        telemetry.enter("backward", step=3, micro_step=2)
        telemetry.issued("all_reduce", 8)
        hanging.set()
        release.wait(DEADLINE_S)

    telemetry.start(hello(telemetry_hz=50.0))
    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert hanging.wait(DEADLINE_S)
        beats = [hub.message("heartbeat", lambda beat: beat.entered_seq == 1) for _ in range(5)]
    finally:
        release.set()
        thread.join()
    assert {(beat.phase, beat.step, beat.micro_step, beat.completed_seq, beat.progress_ns) for beat in beats} == {
        ("backward", 3, 2, 0, beats[0].progress_ns)
    }
    times = [beat.now_ns for beat in beats]
    assert times == sorted(set(times))


def test_what_a_full_ring_lost_is_counted(hub: RankHub, telemetry: Telemetry) -> None:
    for _ in range(SPANS_KEPT + 7):
        telemetry.enter("forward")
    telemetry.start(hello())
    assert hub.message("heartbeat").dropped == 7
    telemetry.enter("backward")
    assert hub.message("heartbeat").dropped == 7


def test_a_packet_holds_the_newest_spans_only(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello(telemetry_hz=1.0))
    hub.packet()
    for micro_step in range(2000):
        telemetry.enter("forward", micro_step=micro_step)
    phases = hub.message("phases", lambda phases: phases.spans[-1][2] == 1998)
    assert len(phases.spans) == publisher_module.SPANS_PER_PACKET


# ---- events ----------------------------------------------------------------------------------------------------------
def test_events_come_again_when_asked_for(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    frames = [hub.event_frames()]
    for number in range(5):
        telemetry.event("note", f"number {number}", step=number, data={"n": number})
        frames.append(hub.event_frames())
    assert [decode_packet(frame[-1]).seq for frame in frames] == [1, 2, 3, 4, 5, 6]
    hub.send(Resend(first_seq=3))
    assert [hub.event_frames() for _ in range(4)] == frames[2:]
    hub.send(Resend(first_seq=1))
    assert [hub.event_frames() for _ in range(6)] == frames


def test_events_wait_for_a_hub_that_comes_later(short_folder: Path, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    telemetry.event("note", "nobody there")
    hub = RankHub(short_folder)
    try:
        assert hub.event("hello") == hello()
        telemetry.event("note", "now")
        assert hub.event("event", lambda event: event.text == "now")
        assert hub.message("heartbeat")
    finally:
        hub.close()


def test_a_broken_connection_loses_no_event(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    assert hub.event_packet().seq == 1
    hub.unbind_ranks()
    for number in range(3):
        telemetry.event("note", str(number))
    hub.bind_ranks()
    events: dict[int, list[str]] = {1: []}  # packets may come twice: the hub drops what it has by its number
    while sum(map(len, events.values())) < 3:
        packet = hub.event_packet()
        events[packet.seq] = [message.text for message in packet.messages if message.kind == "event"]
    assert sorted(events) == list(range(1, len(events) + 1))
    assert [text for seq in sorted(events) for text in events[seq]] == ["0", "1", "2"]


def test_an_acknowledgement_carries_rank_and_time(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    telemetry.ack(Ack(id="a", number=1, state="applied", step=9, result={"path": "step-9"}))
    ack = hub.event("ack")
    assert (ack.id, ack.state, ack.step, ack.rank, ack.result) == ("a", "applied", 9, 0, {"path": "step-9"})
    assert ack.wall_s > 0


def test_an_event_that_json_cannot_carry_is_reported_and_takes_no_other_with_it(
    hub: RankHub, telemetry: Telemetry
) -> None:
    telemetry.event("bad", "holds a set", data={"ranks": {1, 2}})
    telemetry.event("good", "fine")
    telemetry.start(hello())
    messages = hub.event_packet().messages
    assert [message.kind for message in messages] == ["hello", "log", "event"]
    assert "set" in messages[1].text  # type: ignore[union-attr]


def test_log_records_travel_while_telemetry_runs(hub: RankHub, telemetry: Telemetry) -> None:
    logger = logging.getLogger("runtime.test_telemetry")
    logger.setLevel(logging.DEBUG)
    telemetry.start(hello())
    logger.debug("too fine")
    logger.warning("loss is %s", "high")
    record = hub.event("log")
    assert (record.level, record.logger, record.text, record.rank) == ("warning", logger.name, "loss is high", 0)
    telemetry.log_handler.setLevel(logging.DEBUG)
    logger.debug("fine enough")
    assert hub.event("log").text == "fine enough"
    try:
        raise ValueError("no such file")
    except ValueError:
        logger.exception("reading failed")
    assert "ValueError: no such file" in hub.event("log").text
    telemetry.close()
    assert telemetry.log_handler not in logging.getLogger().handlers + logging.getLogger("runtime").handlers


def test_a_flood_of_log_records_is_cut_and_counted_but_loses_no_event(
    hub: RankHub, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "LOGS_KEPT", 10)
    for number in range(25):
        telemetry.log("info", str(number))
    telemetry.event("note", "after the flood")
    telemetry.start(hello())
    messages = []
    while not any(message.kind == "log" and message.logger == "runtime.telemetry" for message in messages):
        messages += hub.event_packet().messages
    assert [message.text for message in messages if message.kind == "log"][:10] == [str(n) for n in range(10)]
    assert [message.text for message in messages if message.kind == "event"] == ["after the flood"]
    assert "15 log records" in messages[-1].text


# ---- commands --------------------------------------------------------------------------------------------------------
def test_commands_arrive_once_and_in_order(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    hub.event("hello")
    commands = [Command(id=f"c{number}", name="pause", number=number) for number in (1, 2, 3)]
    for command in (*commands, *commands):
        hub.send(command)
    hub.send(Command(id="end", name="resume", number=9))
    until(telemetry.inbox.waiting)
    taken = []
    while not taken or taken[-1].id != "end":
        taken += telemetry.inbox.take()
    assert taken[:-1] == commands


def test_a_waiting_rank_hears_a_command(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello(telemetry_hz=0.5))
    hub.event("hello")
    hub.send(Command(id="a", name="set", number=1, arguments={"lr_factor": 0.5}))
    start = time.monotonic()
    command = telemetry.inbox.next(DEADLINE_S)
    assert command is not None and command.arguments == {"lr_factor": 0.5}
    assert time.monotonic() - start < patient(1), "commands don't wait for the next tick"


def test_frames_that_are_not_ours_are_reported_once_and_harm_nothing(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    hub.event("hello")
    hub.send_raw(b"not json")
    hub.send_raw(b"not json")
    hub.send_raw(b'{"kind":"dance"}')  # a newer hub's word: ignored
    hub.send(Command(id="a", name="pause", number=1))
    assert "not JSON" in hub.event("log").text
    assert telemetry.inbox.next(DEADLINE_S) is not None
    telemetry.event("note", "after")
    assert [message.kind for message in hub.event_packet().messages] == ["event"]


# ---- rate and memory -------------------------------------------------------------------------------------------------
def test_the_rate_can_change(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello(telemetry_hz=0.5))
    assert telemetry.hz == 0.5
    hub.packet()
    telemetry.hz = 100.0
    event = hub.event("event")
    assert (event.what, event.data) == ("telemetry_hz", {"telemetry_hz": 100.0})
    start = time.monotonic()
    for _ in range(10):
        hub.packet()
    assert time.monotonic() - start < patient(10), "at 0.5 Hz this takes 20 s"
    telemetry.hz = 20.0
    hub.event("event")
    hub.packet()
    stamps = [hub.packet().sent_ns for _ in range(6)]
    assert (stamps[-1] - stamps[0]) / 1e9 > 4 / 20


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1001])
def test_an_impossible_rate_is_refused(telemetry: Telemetry, value: float) -> None:
    with pytest.raises(ValueError, match="telemetry_hz: expected"):
        telemetry.hz = value


def test_memory_is_measured_each_second_and_soon_after_a_change(hub: RankHub, telemetry: Telemetry) -> None:
    calls: list[float] = []

    def measure() -> Memory:
        calls.append(time.monotonic())
        return memory(rss_bytes=len(calls))

    telemetry.memory_source = measure
    telemetry.start(hello(telemetry_hz=0.5))
    until(lambda: len(calls) == 1)
    telemetry.memory_changed()  # by itself the next tick, at 0.5 Hz, comes after 2 s
    until(lambda: len(calls) == 2)
    assert calls[1] - calls[0] < 1.5
    telemetry.hz = 100.0
    hub.message("memory", lambda message: message.rss_bytes == 4)
    assert min(later - earlier for earlier, later in pairwise(calls[1:])) >= 0.99


def test_memory_changed_without_a_source_costs_one_tick(telemetry: Telemetry) -> None:
    telemetry.start(hello(telemetry_hz=0.5))
    telemetry.memory_changed()
    until(lambda: not telemetry._memory_due)


def test_a_failing_memory_source_is_reported_once(hub: RankHub, telemetry: Telemetry) -> None:
    def measure() -> Memory:
        raise RuntimeError("driver gone")

    telemetry.memory_source = measure
    telemetry.start(hello(telemetry_hz=20.0))
    assert hub.event("log").text == "memory can't be measured: RuntimeError: driver gone"
    for _ in range(3):
        telemetry.memory_changed()
        until(lambda: not telemetry._memory_due)
    telemetry.event("note", "after")
    assert [message.kind for message in hub.event_packet().messages] == ["event"]


# ---- the end ---------------------------------------------------------------------------------------------------------
def test_a_forked_child_closes_and_says_nothing(hub: RankHub, telemetry: Telemetry) -> None:
    """os.fork() in a script, and an exit that runs what the parent has registered."""
    supervisor = subprocess.Popen(["sleep", "60"])
    watch = SupervisorWatch(supervisor.pid, lambda: None, grace_s=60)
    watch.start()
    telemetry.start(hello())
    hub.event("hello")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            telemetry.goodbye("failed", 1, "the child's")
            telemetry.close()
            watch.stop()
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    telemetry.event("still", "here")
    assert hub.event("event").what == "still"
    hub.message("heartbeat")
    assert not watch.gone and watch._thread.is_alive()
    watch.stop()
    supervisor.kill()
    supervisor.wait()


def test_an_error_of_megabytes_stays_in_the_rank(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello())
    telemetry.event("long", "event " + "x" * 2**20)
    event = hub.event("event")
    telemetry.goodbye("failed", 3, "Traceback\nValueError: start " + "7, " * 2**20 + " the end")
    goodbye = hub.event("goodbye")
    assert len(event.text) < 20_000 and event.text.startswith("event xxx")
    first, last = goodbye.error.splitlines()
    assert first == "Traceback" and last.startswith("ValueError: start 7,") and last.endswith(" the end")
    assert len(last) < 1_200 and "characters left out" in last


def test_the_last_step_and_the_first_goodbye_arrive(hub: RankHub, telemetry: Telemetry) -> None:
    telemetry.start(hello(telemetry_hz=0.5))
    hub.packet()
    telemetry.step(step_result(step=20))
    telemetry.goodbye("failed", 20, "RuntimeError: out of memory")
    telemetry.goodbye("stopped", 21)
    telemetry.close()
    assert hub.message("step").step == 20
    goodbye = hub.event("goodbye")
    assert (goodbye.outcome, goodbye.step, goodbye.error) == ("failed", 20, "RuntimeError: out of memory")
    assert hub.no_more_events()


def test_nothing_is_left_after_close(hub: RankHub, telemetry: Telemetry) -> None:
    tasks, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    telemetry.start(hello())
    hub.event("hello")
    assert len(os.listdir("/proc/self/task")) > tasks
    telemetry.close()
    telemetry.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("zerotop")]
    until(lambda: len(os.listdir("/proc/self/task")) == tasks)
    until(lambda: len(os.listdir("/proc/self/fd")) <= files + 1)  # the hub's end of the connection may go later
    telemetry.enter("forward")
    telemetry.event("late", "after the close")  # the training thread may still call: no effect, no error


def test_close_without_a_hub_takes_no_longer_than_allowed(telemetry: Telemetry) -> None:
    telemetry.start(hello())
    for number in range(3000):
        telemetry.event("note", str(number))
    telemetry.goodbye("finished", 1)
    start = time.monotonic()
    telemetry.close(0.5)
    assert time.monotonic() - start < patient(1.5)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("zerotop")]


def test_a_socket_path_that_is_too_long_is_said_before_anything_starts(tmp_path: Path) -> None:
    telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(tmp_path / ("x" * 120)))
    with pytest.raises(TelemetryError, match="107 characters"):
        telemetry.start(hello())
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("zerotop")]
    telemetry.close()


def test_a_message_too_large_for_the_hub_is_told_and_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the hub would disconnect the rank, which would send it again, without end."""
    monkeypatch.setattr(outbox_module, "PACKET_BYTES", 10_000)
    outbox = outbox_module.Outbox(0, 1)

    def event(text: str, size: int = 1) -> Event:
        return Event(rank=0, what="note", text=text, data={"a": "x" * size}, wall_s=0)

    outbox.add([event("first"), event("large", 20_000), *(event(f"{number}", 2000) for number in range(10))])
    texts, seqs = [], []
    while (frame := outbox.next_frame()) is not None:
        assert len(frame) <= 10_000
        packet = decode_packet(frame)
        seqs.append(packet.seq)
        texts += [message.text for message in packet.messages]  # type: ignore[union-attr]
        outbox.sent()
    assert texts[0] == "first" and "a message of kind event could not be sent: it has 20," in texts[1]
    assert texts[2:] == [str(number) for number in range(10)]
    assert seqs == list(range(1, len(seqs) + 1))
