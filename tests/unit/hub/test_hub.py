"""The hub on real sockets, in this process: lost and repeated event packets, and what late screens see."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import zmq

from runtime.wire.base import Message
from runtime.wire.codec import decode_down, decode_packet, decode_snapshot
from runtime.wire.messages import Ack, CheckpointSaved, Command, CommandRecord, Event, Packet, Resend
from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC
from tests.harness.fakehub import step_result
from tests.harness.finetuning import evaluation
from tests.harness.hubbench import Bench, beat, heard, packet
from tests.harness.waiting import until_async
from zerotop.state.events import record_text


@pytest_asyncio.fixture
async def bench(short_folder: Path) -> AsyncIterator[Bench]:
    made = Bench(short_folder)
    yield made
    await made.close()


async def test_lost_events_are_asked_for_and_put_in_their_place(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    for seq in (1, 4, 5):
        await rank.send(packet(seq))
    asked = decode_down((await heard(rank))[-1])
    assert isinstance(asked, Resend) and asked.first_seq == 2
    for seq in (2, 3, 4, 5):
        await rank.send(packet(seq))
    await until_async(lambda: len(bench.event_texts()) == 5)
    assert bench.event_texts() == [f"event {seq}" for seq in range(1, 6)]


async def test_events_that_nobody_has_any_more_do_not_hold_up_the_rest(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1))
    # 2 and 3 fell out of the rank's memory
    await until_async(lambda: "event 4" in bench.event_texts(), between=lambda: rank.send(packet(4)))
    assert "rank 0 lost its event packets 2 to 3" in bench.event_texts()
    await rank.send(packet(5))
    await until_async(lambda: bench.event_texts()[-1] == "event 5")


async def test_another_attempt_s_packets_are_not_ours(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1, attempt=7))
    await rank.send(packet(1))
    await until_async(lambda: bench.event_texts() == ["event 1"])


async def test_the_run_is_running_once_its_ranks_train(bench: Bench) -> None:
    telemetry = bench.connect(zmq.PUB, "telemetry")
    seq = 0

    async def tell_until(phase: str, condition: Callable[[], bool]) -> None:
        async def tell() -> None:
            nonlocal seq
            seq += 1
            await telemetry.send(packet(seq, beat(phase)))

        await until_async(condition, between=tell)

    await tell_until("init", lambda: 0 in bench.hub.state.ranks)
    assert bench.statuses == ["starting"]
    await tell_until("forward", lambda: bench.statuses[-1] == "running")
    assert bench.hub.state.state_name == "running"


async def test_a_snapshot_and_the_packets_after_it_leave_no_gap(bench: Bench) -> None:
    bench.hub.event("note", "before")
    screen = bench.connect(zmq.SUB, "screens")
    screen.subscribe(LIVE_TOPIC)
    screen.subscribe(SNAPSHOT_TOPIC + b"me")
    live: list[Packet] = []
    while (frames := await heard(screen))[0] == LIVE_TOPIC:
        live.append(decode_packet(frames[1]))
    assert frames[0] == SNAPSHOT_TOPIC + b"me"
    snapshot = decode_snapshot(frames[1])
    assert [message.text for message in snapshot.messages if isinstance(message, Event)] == ["before"]
    assert all(packet.hub_seq <= snapshot.hub_seq for packet in live)
    bench.hub.event("note", "after")
    topic, frame = await heard(screen)
    after = decode_packet(frame)
    assert topic == LIVE_TOPIC and after.hub_seq == snapshot.hub_seq + 1 and after.arrival_ns > 0
    other = bench.connect(zmq.SUB, "screens")
    other.subscribe(SNAPSHOT_TOPIC + b"you")
    topic, frame = await heard(other)
    assert topic == SNAPSHOT_TOPIC + b"you" and decode_snapshot(frame).hub_seq == after.hub_seq


async def test_fields_of_a_newer_rank_pass_through_unread(bench: Bench) -> None:
    screen = bench.connect(zmq.SUB, "screens")
    screen.subscribe(LIVE_TOPIC)
    screen.subscribe(SNAPSHOT_TOPIC + b"me")
    await heard(screen)  # the subscription is there
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1)[:-1] + b',"new":{"field":1}}')
    while b'"new":{"field":1}' not in (frame := (await heard(screen))[1]):
        continue
    assert decode_packet(frame).hub_seq > 0


async def test_a_fault_in_one_message_does_not_make_the_hub_deaf(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench.hub.state.apply_packet

    def stumble(packet: Packet) -> bool:
        if packet.source == "rank/0" and packet.seq == 2:
            raise ZeroDivisionError("a fault of ours")
        return whole(packet)

    monkeypatch.setattr(bench.hub.state, "apply_packet", stumble)
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    for seq in (1, 2, 3):
        await rank.send(packet(seq))
    await until_async(lambda: "event 3" in bench.event_texts())
    assert any("a fault of ours" in text for text in bench.event_texts())
    assert "ZeroDivisionError" in capsys.readouterr().err


async def test_a_new_attempt_speaks_on_channels_of_its_own(bench: Bench) -> None:
    old = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    for seq in (1, 2, 3):
        await old.send(packet(seq))
    await until_async(lambda: len(bench.event_texts()) == 3)
    bench.hub.command(Command(id="c1", name="checkpoint"))
    bench.hub.command(Command(id="p1", name="pause"))
    bench.hub.begin_attempt(bench.run.model_copy(update={"attempt": 2}), state="restarting")
    assert (bench.hub.status.attempt, bench.hub.status.state) == (2, "restarting")
    assert bench.hub.state.commands["p1"].ack.reason == "the ranks restarted"
    new = bench.connect(zmq.DEALER, "ranks", b"rank/0/2")
    await old.send(packet(4))  # still on its way when the rank died
    await new.send(packet(1, attempt=2))  # numbered from 1 again
    told = decode_down((await heard(new))[-1])
    assert isinstance(told, Command) and told.id == "c1"
    await until_async(lambda: len(bench.event_texts()) == 4)
    assert bench.event_texts() == ["event 1", "event 2", "event 3", "event 1"]
    assert bench.hub.state.ranks.keys() == {0}


async def test_new_ranks_are_told_what_the_old_ones_had_been_told(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1))
    await until_async(lambda: bool(bench.event_texts()))
    bench.hub.set_status(state="running")
    bench.hub.command(Command(id="s1", name="set", arguments={"log_interval": 2}))
    bench.hub.command(Command(id="p1", name="pause", arguments={"release": True}))
    for seq, identity in ((2, "s1"), (3, "p1")):
        await rank.send(packet(seq, Ack(id=identity, state="applied", step=5, rank=0)))
    await until_async(lambda: bench.hub.status.state == "paused")
    for attempt in (2, 3):  # the ranks of attempt 2 die before they have taken anything up
        bench.hub.begin_attempt(bench.run.model_copy(update={"attempt": attempt}), state="restarting")
        waiting = [(command.name, command.arguments) for command in bench.hub.router.open_commands()]
        assert waiting == [("set", {"log_interval": 2}), ("pause", {"release": True})]


async def test_an_answer_is_published_as_the_commands_record_and_in_no_other_way(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1))
    await until_async(lambda: bool(bench.event_texts()))
    screen = bench.connect(zmq.SUB, "screens")
    screen.subscribe(LIVE_TOPIC)
    screen.subscribe(SNAPSHOT_TOPIC + b"me")
    await heard(screen)  # the subscription is there
    bench.hub.command(Command(id="c1", name="checkpoint"))
    note = Event(rank=0, what="x", text="beside the ack", wall_s=0)
    await rank.send(packet(2, Ack(id="c1", state="applied", step=5, rank=0)))
    await rank.send(packet(3, Ack(id="unknown", state="applied", step=5, rank=0), note))
    shown: list[Message] = []
    while note not in shown:
        shown += decode_packet((await heard(screen))[1]).messages
    states = [message.ack.state for message in shown if isinstance(message, CommandRecord)]
    assert states == ["accepted", "applied"] and not any(isinstance(message, Ack) for message in shown)
    assert bench.hub.state.ranks[0].packets_lost == 0  # an empty packet is a packet


async def test_a_saved_checkpoint_is_in_the_status_and_among_the_events(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    saved = CheckpointSaved(rank=0, step=40, path="/x/step-40", seconds=1.25, blocked_ms=12.0, wall_s=0)
    await rank.send(packet(1, saved))
    await until_async(lambda: bench.hub.status.last_checkpoint_step == 40)
    assert list(bench.hub.state.events) == [saved]
    assert record_text(saved) == "checkpoint at step 40 saved in 1.25 s (training waited 12.0 ms)"


async def test_a_stop_that_is_rejected_leaves_the_run_paused(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1))
    await until_async(lambda: bool(bench.event_texts()))
    bench.hub.set_status(state="paused")
    bench.hub.command(Command(id="s1", name="stop"))
    assert bench.hub.status.state == "stopping"
    await rank.send(packet(2, Ack(id="s1", state="rejected", reason="its memory is in use", step=5, rank=0)))
    await until_async(lambda: bench.hub.status.state == "paused")
    assert bench.hub.status.reason == "its memory is in use"
    bench.hub.command(Command(id="s2", name="stop"))  # when the memory is free again
    assert bench.hub.status.state == "stopping"


async def test_curves_of_attempts_under_earlier_supervisors_are_in_the_snapshot(short_folder: Path) -> None:
    bench = Bench(short_folder, earlier=[step_result(0, 20), evaluation(0), evaluation(20)])
    try:
        messages = decode_snapshot(bench.hub.encoded_snapshot()).messages
    finally:
        await bench.close()
    assert [message for message in messages if message.kind in ("step", "evaluation")] == [
        step_result(0, 20),
        evaluation(0),
        evaluation(20),
    ]
