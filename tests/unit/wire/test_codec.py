"""The protocol's codec: what a reader takes, what it skips, and what values may be."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from runtime.config import ConfigError, load
from runtime.wire.bounds import NAME_KEPT, TEXT_KEPT
from runtime.wire.codec import (
    ProtocolError,
    decode_packet,
    decode_snapshot,
    decode_up,
    encode,
    rank_of,
    read_packet,
    read_packet_frame,
)
from runtime.wire.codec import (
    load as load_frame,
)
from runtime.wire.messages import Ack, Event, Hello, LogRecord, Memory, Packet, Snapshot, StepResult
from runtime.wire.node import NodeStats
from tests.harness.fakehub import hello, step_result


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wall_s", float("nan")),
        ("wall_s", float("inf")),
        ("wall_s", 2.0**63),
        ("wall_s", -1.0),
        ("world_size", 2_000_000_000),
        ("world_size", 0),
        ("rank", -1),
        ("pid", 0),
        ("pid", 2**31),
        ("accumulation", 2**31),
        ("steps", 10**401),
        ("parameters", 10**400),
        ("mono_ns", 2**63),
        ("telemetry_hz", float("nan")),
        ("knobs", {"a": 10**400}),
    ],
)
def test_values_that_no_screen_could_show_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Hello.model_validate({**hello().model_dump(), field: value})


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None, -1e308])
def test_a_loss_may_be_any_float(loss: float | None) -> None:
    back = decode_up(encode(step_result(loss=loss)))
    assert isinstance(back, StepResult)
    assert back.loss == loss or (loss != loss and back.loss != back.loss)


def test_texts_have_an_end_and_keep_how_they_began_and_ended() -> None:
    record = LogRecord(rank=0, level="info", logger="l" * 10_000, text="a" * 10**7 + "the end", wall_s=0)
    assert len(record.text) < TEXT_KEPT + 100 and len(record.logger) < NAME_KEPT + 10
    assert record.text.startswith("aaa") and record.text.endswith("the end")
    assert "characters left out" in record.text


def test_what_utf_8_cannot_carry_is_shown_with_question_marks() -> None:
    event = Event(rank=0, what="x", text="caf\udce9", data={"path": "/caf\udce9"}, wall_s=0)
    back = decode_up(encode(event))
    assert (back.text, back.data) == ("caf?", {"path": "/caf?"})


def test_a_reader_skips_what_it_does_not_know_and_tells_what_it_cannot_read() -> None:
    good = json.loads(encode(step_result(step=3)))
    items = [{"kind": "new in version 9", "x": 1}, {**good, "step": 10**30}, {**good, "new": 1}, 5, {"kind": "step"}]
    shell = json.loads(encode(Packet(source="rank/0", attempt=1, seq=1, sent_ns=0, messages=[])))
    decoded = read_packet({**shell, "messages": items})
    assert [message.step for message in decoded.shell.messages] == [3]  # type: ignore[union-attr]
    assert decoded.items == [items[0], items[2]] and decoded.known == [1]
    assert len(decoded.malformed) == 3 and "step.step: Input should be less" in decoded.malformed[0]
    snapshot = {"kind": "snapshot", "hub_seq": 1, "now_ns": 1, "wall_s": 1.0, "messages": items}
    assert len(decode_snapshot(json.dumps(snapshot).encode()).messages) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None])
def test_a_frame_is_read_at_once_as_it_is_in_two_passes(loss: float | None) -> None:
    good = json.loads(encode(step_result(step=3))) | {"loss": loss}
    shell = json.loads(encode(Packet(source="rank/0", attempt=1, seq=1, sent_ns=0, messages=[])))
    for items in ([good], [good, {"kind": "new in version 9"}], [good, {**good, "step": 10**30}], [5]):
        packet, malformed = read_packet_frame(json.dumps({**shell, "messages": items}).encode())
        decoded = read_packet({**shell, "messages": items})
        assert repr(packet) == repr(decoded.shell) and malformed == decoded.malformed


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"null",
        b"\xff\xfe",
        '{"kind":"ack"}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"a":"\\ud800"}',
        b'{"a":' * 250 + b"1" + b"}" * 250,
        b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=range(9),
)
def test_frames_that_are_not_ours_are_protocol_errors(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        load_frame(frame)
    for decode in (decode_packet, decode_snapshot, decode_up):
        with pytest.raises(ProtocolError):
            decode(frame)


@pytest.mark.parametrize("protocol", [2, 1e400, "1", None, [], 10**400])
def test_another_protocol_version_is_told(protocol: Any) -> None:
    with pytest.raises(ProtocolError, match="install the same version"):
        read_packet({"protocol": protocol, "source": "rank/0", "attempt": 1, "seq": 1, "sent_ns": 0, "messages": []})


@pytest.mark.parametrize(
    ("source", "rank"),
    [
        ("rank/0", 0), ("rank/12", 12), ("rank/²", None), ("rank/٣", None), ("rank/-1", None), ("rank/01", None),
        ("rank/", None), ("rank/1/2", None), ("supervisor", None), ("rank/999999999", None), ("rank/1\n", None),
    ],
)  # fmt: skip
def test_the_rank_of_a_source(source: str, rank: int | None) -> None:
    assert rank_of(source) == rank


def test_a_packet_reads_back_equal() -> None:
    said = [hello(), step_result(), Ack(id="a", state="applied", result={"path": "/x", "list": [1, [2.5, None]]})]
    packet = Packet(source="rank/0", attempt=1, seq=7, sent_ns=5, messages=said)
    assert decode_packet(encode(packet)) == packet
    assert read_packet_frame(encode(packet)) == (packet, [])
    snapshot = Snapshot(hub_seq=1, now_ns=2, wall_s=3.0, heard_ns={0: 4}, messages=said)
    assert decode_snapshot(encode(snapshot)) == snapshot


@pytest.mark.parametrize("path", ["zerotop.train.steps", "train_micro_batch_size_per_gpu", "zerotop.data.seq_len"])
def test_a_config_with_a_number_beyond_64_bits_is_refused_by_its_key(path: str) -> None:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    *sections, key = path.split(".")
    inner = config
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[key] = 10**401
    with pytest.raises(ConfigError, match=path):
        load(config)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Memory, "rss_parts", {"imports": -1}),
        (Memory, "rss_parts", {"imports": 2**63}),
        (Memory, "rss_parts", {"x" * 300: 1}),
        (Memory, "peak_bytes", {"lunch": 1}),
        (Memory, "untouched_bytes", -1),
        (Memory, "alloc_retries", -1),
        (NodeStats, "memory_pressure_percent", float("nan")),
        (NodeStats, "swap_in_bytes_per_s", float("inf")),
        (NodeStats, "cgroup_limit_bytes", -1),
    ],
)
def test_figures_of_memory_out_of_bounds_are_malformed(kind: Any, field: str, value: Any) -> None:
    known = {"rank": 0, "ledger": {}, "rss_bytes": 1, "host_total_bytes": 1, "at_ns": 0, "host": "a", "wall_s": 0}
    known |= {"cpu_percent": 0, "cpu_count": 1, "load_1m": 0, "ram_used_bytes": 0, "ram_total_bytes": 1}
    old = kind(**known)  # what a rank or a probe of an older version sends
    assert getattr(old, field) in ({}, 0, None)
    with pytest.raises(ValidationError):
        kind(**(known | {field: value}))
