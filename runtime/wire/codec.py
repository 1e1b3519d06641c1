"""Encodes and decodes messages as JSON, skipping message kinds of newer senders.

[Note: what a reader accepts]
A frame is UTF-8 and nested at most 200 deep (jiter's limit, well below Python's own, so that everything decoded can be
encoded again). A frame of another protocol raises ProtocolError. Messages in a packet are decoded independently: an
unknown kind comes from a newer sender and is skipped silently, a malformed message (bounds.py) is skipped and reported.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from runtime.wire.bounds import MAX_RANKS
from runtime.wire.messages import PROTOCOL, Packet, Snapshot, down_adapter, up_adapter

_Shell = TypeVar("_Shell", Packet, Snapshot)
_RANK = re.compile(r"rank/(0|[1-9][0-9]{0,8})")


class ProtocolError(Exception):
    """A frame of another protocol version, or not of this protocol at all."""


@dataclass(frozen=True)
class Decoded(Generic[_Shell]):
    """A decoded packet or snapshot."""

    shell: _Shell
    """The packet or snapshot, with the messages that could be decoded."""
    data: dict[str, Any]
    """The JSON of the frame as received."""
    items: list[Any]
    """JSON of the messages in order, including unknown kinds but not malformed messages."""
    known: list[int]
    """Indices in `items` of the messages in `shell`."""
    malformed: list[str] = field(default_factory=list)
    """A line for each malformed message."""


def encode(message: BaseModel) -> bytes:
    """One message as compact UTF-8 JSON; unset fields are left out to keep frames small."""
    # json walks lists and dicts in C and asks only for what it does not know: four times as quick as walking here.
    text = json.dumps(message, separators=(",", ":"), allow_nan=True, ensure_ascii=False, default=_set_fields)
    return text.encode("utf-8", "replace")  # a file name that isn't UTF-8 is shown with question marks


def encode_data(data: dict[str, Any]) -> bytes:
    """Encode the JSON of a decoded frame again."""
    return json.dumps(data, separators=(",", ":"), allow_nan=True, ensure_ascii=False).encode()


def _set_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, BaseModel):
        raise TypeError(f"{type(value).__name__} cannot be encoded in a message")
    fields = {name: getattr(value, name) for name in value.model_fields_set}
    # `kind` is a default as well and must stay: the tag is what a reader goes by.
    kind = getattr(value, "kind", None)
    return fields if kind is None else {"kind": kind, **fields}


def decode_packet(frame: bytes) -> Packet:
    """Decode a packet. Raises ProtocolError for anything that is not a packet of this protocol version."""
    return read_packet(load(frame)).shell


def decode_snapshot(frame: bytes) -> Snapshot:
    """Decode a snapshot. Raises ProtocolError for anything that is not a snapshot of this protocol version."""
    return read_snapshot(load(frame)).shell


def read_packet(data: dict[str, Any]) -> Decoded[Packet]:
    """`decode_packet` for a frame that `load` has parsed, with details about skipped messages."""
    return _read(data, Packet)


def read_packet_frame(frame: bytes) -> tuple[Packet, list[str]]:
    """The packet in a frame, and a line for each malformed message: for a reader that passes no JSON on. Raises
    ProtocolError. A packet without fault is validated as it is parsed, which takes two thirds of the time."""
    try:
        packet = Packet.model_validate_json(frame)
    except ValidationError:
        packet = None
    if packet is not None and packet.protocol == PROTOCOL:
        return packet, []
    decoded = read_packet(load(frame))
    return decoded.shell, decoded.malformed


def read_snapshot(data: dict[str, Any]) -> Decoded[Snapshot]:
    """`decode_snapshot` for a frame that `load` has parsed, with details about skipped messages."""
    return _read(data, Snapshot)


def _read(data: dict[str, Any], model: type[_Shell]) -> Decoded[_Shell]:
    protocol = data.get("protocol", PROTOCOL)
    if protocol != PROTOCOL:
        version = protocol if isinstance(protocol, int) and abs(protocol) < 10**6 else "something else"
        raise ProtocolError(
            f"the run speaks protocol {version}, this zerotop speaks {PROTOCOL}: install the same version on both sides"
        )
    items = data.get("messages", [])
    if not isinstance(items, list):
        raise ProtocolError(f"malformed {model.__name__.lower()}: messages: expected a list")
    try:
        shell = model.model_validate({**data, "messages": []})
    except ValidationError as error:
        raise ProtocolError(f"malformed {model.__name__.lower()}: {_problem(error)}") from None
    kept: list[Any] = []
    messages: list[Any] = []
    known: list[int] = []
    malformed: list[str] = []
    for item in items:
        try:
            messages.append(up_adapter.validate_python(item))
            known.append(len(kept))
        except ValidationError as error:
            if not _unknown_kind(error):
                kind = item.get("kind") if isinstance(item, dict) else None
                name = f"{kind} message" if isinstance(kind, str) else "message"  # of a known kind, or of none
                malformed.append(f"malformed {name[:40]}: {_problem(error)}")
                continue
        kept.append(item)
    return Decoded(shell.model_copy(update={"messages": messages}), data, kept, known, malformed)


def decode_down(frame: bytes) -> Any:
    """Decode a `Command`, `Resend` or `FlightRequest`; None for an unknown kind."""
    return _read_one(load(frame), down_adapter)


def decode_up(frame: bytes) -> Any:
    """Decode a message outside a packet (a row of the recording); None for an unknown kind."""
    return _read_one(load(frame), up_adapter)


def _read_one(data: dict[str, Any], adapter: Any) -> Any:
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        if _unknown_kind(error):
            return None
        raise ProtocolError(f"malformed message: {_problem(error)}") from None


def load(frame: bytes) -> dict[str, Any]:
    """Parse the JSON object in a frame. Raises ProtocolError. See [Note: what a reader accepts]."""
    try:
        data = from_json(frame, allow_inf_nan=True)
    except ValueError:
        raise ProtocolError("a frame that is not JSON") from None
    if not isinstance(data, dict):
        raise ProtocolError("a frame that is not a JSON object")
    return data


def rank_of(source: str) -> int | None:
    """The rank in a packet's `source`; None if the source is not a rank."""
    match = _RANK.fullmatch(source)
    return int(match[1]) if match and int(match[1]) < MAX_RANKS else None


def _unknown_kind(error: ValidationError) -> bool:
    return any(problem["type"] == "union_tag_invalid" for problem in error.errors(include_input=False))


def _problem(error: ValidationError) -> str:
    """The first validation error and its location, without the value, which may be of any size."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"][:6])
    return f"{where}: {first['msg'][:200]}" if where else first["msg"][:200]
