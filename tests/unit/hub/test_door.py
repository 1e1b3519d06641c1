"""What the hub does not take: messages that are not a rank's to send, bad bytes, and floods of good ones."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import zmq

from runtime.telemetry.link import Link
from runtime.wire.codec import decode_packet, decode_snapshot, encode
from runtime.wire.messages import Command, Event, LogRecord, Packet, RunStatus
from runtime.wire.node import NodeStats
from runtime.wire.rundir import LIVE_TOPIC, SNAPSHOT_TOPIC, Sockets
from tests.harness.finetuning import data_report, evaluation
from tests.harness.hubbench import Bench, beat, heard, packet
from tests.harness.waiting import until_async
from zerotop.hub import hub as module
from zerotop.hub.admission import LOGS_AT_ONCE, REPORTS_AT_ONCE
from zerotop.hub.router import OPEN_AT_MOST
from zerotop.source.live import LiveSource


@pytest_asyncio.fixture
async def bench(short_folder: Path) -> AsyncIterator[Bench]:
    made = Bench(short_folder, nproc=2)
    yield made
    await made.close()


def raw(seq: int, messages: list[Any], **changes: Any) -> bytes:
    shell = {"kind": "packet", "source": "rank/0", "attempt": 1, "seq": seq, "sent_ns": 0, "messages": messages}
    return json.dumps({**shell, **changes}).encode()


def note(**changes: Any) -> dict[str, Any]:
    return {"kind": "event", "rank": 0, "what": "note", "text": "sound", "wall_s": 1.0, **changes}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": nested(17)}, "more than 16 lists and objects inside each other"),
        ({"data": {"a": 10**30}}, "does not fit in 64 bits"),
        ({"wall_s": 2.0**63}, "wall_s"),
        ({"wall_s": float("nan")}, "wall_s"),
        ({"step": 10**400}, "step"),
        ({"rank": 2**31}, "rank"),
        ({"rank": 1}, "in the name of rank 1"),
        ({"rank": None}, "in the name of the run"),
        (RunStatus(name="q1", state="failed").model_dump(), "'status', which ranks do not send here"),
        (beat().model_dump(), "'heartbeat', which ranks do not send here"),
    ],
)
async def test_a_bad_message_is_left_out_and_the_others_arrive(
    bench: Bench, changes: dict[str, Any], complaint: str
) -> None:
    if "data" in changes and not isinstance(changes["data"], dict):
        changes = {"data": {"a": changes["data"]}}
    screen = bench.connect(zmq.SUB, "screens")
    screen.subscribe(LIVE_TOPIC)
    screen.subscribe(SNAPSHOT_TOPIC + b"me")
    await heard(screen)  # the subscription is there
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(raw(1, [note(text="before"), note(text="bad", **changes), note(text="after")]))
    while not (seen := _events_of_a_rank(decode_packet((await heard(screen))[1]))):
        continue
    assert seen == ["before", "after"]
    told = bench.event_texts()
    assert any(complaint in text for text in told), told
    assert bench.hub.status.state == "starting" and bench.hub.state.ranks.keys() <= {0}


def _events_of_a_rank(packet: Packet) -> list[str]:
    return [m.text for m in packet.messages if isinstance(m, Event)] if packet.source.startswith("rank/") else []


@pytest.mark.parametrize(
    "frame",
    [
        raw(1, [note()]).decode().encode("utf-16"),
        b'{"a":' * 900 + b"1" + b"}" * 900,
        raw(1, [note(data={"a": "@"})]).replace(b'"@"', b"[" * 250 + b"1" + b"]" * 250),
        raw(1, [note()], source="rank/\u00b2"),
        raw(1, [note()], source="rank/2"),
        raw(1, [note()], source="supervisor"),
        raw(1, [note()], source="rank/1"),  # on the connection of rank 0
        raw(1, {}),  # type: ignore[arg-type]
        raw(10**400, [note()]),
        b"\xff\xfe",
        b"",
    ],
    ids=range(11),
)
async def test_a_frame_that_is_not_a_ranks_is_refused_and_told(bench: Bench, frame: bytes) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(frame)
    await until_async(lambda: bench.hub.refused > 0)
    await rank.send(packet(1))
    await until_async(lambda: "event 1" in bench.event_texts())
    assert decode_snapshot(bench.hub.encoded_snapshot()).messages


async def test_data_as_deep_as_it_may_be_can_be_shown_to_screens(bench: Bench) -> None:
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    for seq, depth in enumerate((1, 5, 14), 1):
        await rank.send(raw(seq, [note(data={"a": nested(depth)})]))
    await until_async(lambda: len(bench.event_texts()) == 3)
    messages = decode_snapshot(bench.hub.encoded_snapshot()).messages
    assert [m.data for m in messages if isinstance(m, Event)] == [{"a": nested(depth)} for depth in (1, 5, 14)]


async def test_a_number_far_ahead_does_not_silence_the_rank(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESEND_S", 0.0)
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    await rank.send(packet(1))
    for _ in range(5):  # somebody else's: asked for what is missing before it, and in the end believed
        await rank.send(packet(10**9))
    await until_async(lambda: f"event {10**9}" in bench.event_texts())
    for seq in (2, 3, 4):
        await rank.send(packet(seq))
    await until_async(lambda: bench.event_texts()[-1] == "event 4")
    assert [text for text in bench.event_texts() if len(text) == 7] == [f"event {seq}" for seq in (1, 2, 3, 4)]


async def test_a_flood_of_log_records_is_bounded_and_its_number_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zerotop.hub.limits.TOLD_EVERY_S", 0.0)
    rank = bench.connect(zmq.DEALER, "ranks", b"rank/0/1")
    recorded: list[Any] = []
    monkeypatch.setattr(bench.recorder, "add", lambda source, message: recorded.append(message))
    sent = 5 * int(LOGS_AT_ONCE)
    records = [LogRecord(rank=0, level="info", logger="l", text="spam", wall_s=1.0)] * 100
    for seq in range(1, sent // 100 + 1):
        await rank.send(packet(seq, *records))
    await rank.send(packet(sent // 100 + 1, Event(rank=0, what="note", text="the last", wall_s=1.0)))
    await until_async(lambda: "the last" in bench.event_texts())
    kept = sum(isinstance(m, LogRecord) and m.text == "spam" for m in recorded)
    assert LOGS_AT_ONCE <= kept < sent / 2
    assert bench.hub.refused == sent - kept
    await until_async(
        lambda: any("log records came too fast" in text and "more)" in text for text in bench.event_texts())
    )


async def test_of_a_flood_of_commands_a_bounded_part_is_answered(bench: Bench) -> None:
    bench.hub.set_status(state="running")
    asker = bench.connect(zmq.DEALER, "commands")
    for number in range(600):
        await asker.send(encode(Command(id=f"c{number}", name="set", arguments={"log_interval": 1})))
    await until_async(lambda: any("commands came too fast" in text for text in bench.event_texts()))
    records = bench.hub.state.commands
    assert 0 < len([record for record in records.values() if record.ack.state == "accepted"]) <= OPEN_AT_MOST
    assert len(records) < 200
    stop = Command(id="stop", name="stop")
    other = bench.connect(zmq.DEALER, "commands")
    # One that comes while the flood is on is sent again.
    await until_async(lambda: "stop" in records, "an answer to the stop", between=lambda: other.send(encode(stop)))
    assert records["stop"].ack.state == "accepted"


async def test_a_frame_that_is_too_large_ends_only_its_senders_connection(bench: Bench) -> None:
    bench.hub.set_status(state="running")
    asker = bench.connect(zmq.DEALER, "commands")
    await asker.send(b"x" * (2**18 + 1))
    other = bench.connect(zmq.DEALER, "commands")
    await other.send(encode(Command(id="c", name="checkpoint")))
    await until_async(lambda: "c" in bench.hub.state.commands)
    assert bench.hub.state.commands["c"].ack.state == "accepted"
    assert not any("unreadable" in text for text in bench.event_texts())


async def test_a_hub_that_falls_behind_skips_telemetry(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEHIND_S", 0.05)
    old = Packet(source="rank/0", attempt=1, seq=1, sent_ns=time.monotonic_ns() - 10**9, messages=[beat()])

    def hears() -> bool:
        before = bench.hub.refused
        bench.hub._from_telemetry([encode(old)])
        return bench.hub.refused == before

    assert hears()  # after a standstill, what has waited is taken
    await asyncio.sleep(0.06)
    assert not hears()
    new = old.model_copy(update={"sent_ns": time.monotonic_ns(), "seq": 2})
    bench.hub._from_telemetry([encode(new)])
    assert hears()


async def test_a_rank_that_is_not_the_runs_node_changes_nothing(bench: Bench) -> None:
    """Of telemetry, too, only what ranks measure is taken."""
    telemetry = bench.connect(zmq.PUB, "telemetry")
    stats = NodeStats(
        host="h", cpu_percent=1, cpu_count=1, load_1m=1, ram_used_bytes=1, ram_total_bytes=1, at_ns=1, wall_s=1
    )

    def heard_of_rank_0() -> bool:
        rank = bench.hub.state.ranks.get(0)
        return rank is not None and rank.heartbeat is not None

    await until_async(heard_of_rank_0, between=lambda: telemetry.send(packet(1, stats, beat())))
    assert not bench.hub.state.nodes


async def test_no_socket_of_a_run_sends_heartbeats(bench: Bench) -> None:
    """A heartbeat on a connection whose peer left while the queue was full makes libzmq abort the process."""
    sockets = Sockets(bench.run.sockets)
    link = Link(sockets, 0, 1, lambda text: None)
    source = LiveSource(sockets)
    source.start()
    try:
        ends = [socket for _, socket in bench.hub._named_sockets()]
        ends += [link._dealer, link._publisher, source._screens, source._commands]  # type: ignore[list-item]
        assert [socket.getsockopt(zmq.HEARTBEAT_IVL) for socket in ends] == [0] * 8
    finally:
        source.close()
        link.close(0)


async def test_only_rank_0_reports_on_data_and_not_too_fast(bench: Bench) -> None:
    for number in (0, 1):
        rank = bench.connect(zmq.DEALER, "ranks", f"rank/{number}/1".encode())
        report = data_report(rows=7168 + number).model_dump(mode="json")
        result = evaluation(5 + number, rank=number).model_dump(mode="json")
        await rank.send(raw(1, [report, result], source=f"rank/{number}"))
        await until_async(
            lambda number=number: bench.hub.state.evaluations.newest == evaluation(5 + number, rank=number)
        )
    assert bench.hub.state.data == {"train": data_report()}
    assert any("'data_report', which only rank 0 sends" in text for text in bench.event_texts())
    flood = [evaluation(step).model_dump(mode="json") for step in range(10, 10 + 2 * int(REPORTS_AT_ONCE))]
    await rank.send(raw(2, [{**item, "rank": 1} for item in flood], source="rank/1"))
    await until_async(lambda: any("data reports and evaluations came too fast" in text for text in bench.event_texts()))
    assert REPORTS_AT_ONCE / 2 < len(bench.hub.state.evaluations) < 2 * REPORTS_AT_ONCE
