"""JSON on the wire: encode a packet, decode it again, and skip what a newer sender says in words we don't know.

[Note: what a reader takes]
A frame is UTF-8 and nests at most 200 deep (jiter's limit, well below Python's own, so that whatever was decoded can be
encoded again). A frame that is not ours raises ProtocolError. Inside a packet of our protocol version every message
stands alone: an unknown kind is a newer sender's and is skipped silently, a malformed one (bounds.py) is skipped and
told.
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
    """The other side speaks another protocol version, or something that is not ours at all."""


@dataclass(frozen=True)
class Decoded(Generic[_Shell]):
    """A packet or snapshot, with the messages that could be read."""

    shell: _Shell
    data: dict[str, Any]
    """The frame's JSON as it came."""
    items: list[Any]
    """Of `data`: the messages that were read, in order, and those of kinds that we don't know."""
    known: list[int]
    """Which of `items` the shell's messages are."""
    malformed: list[str] = field(default_factory=list)
    """One line for each message that was skipped because it could not be read."""


def encode(message: BaseModel) -> bytes:
    """One message as compact UTF-8 JSON; defaults are left out, so that a frame stays small."""
    # json walks lists and dicts in C and asks only for what it does not know: four times as quick as walking here.
    text = json.dumps(message, separators=(",", ":"), allow_nan=True, ensure_ascii=False, default=_set_fields)
    return text.encode("utf-8", "replace")  # a file name that isn't UTF-8 is shown with question marks


def encode_data(data: dict[str, Any]) -> bytes:
    """The JSON of a frame that was decoded, again."""
    return json.dumps(data, separators=(",", ":"), allow_nan=True, ensure_ascii=False).encode()


def _set_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, BaseModel):
        raise TypeError(f"a {type(value).__name__} has no place in a message")
    fields = {name: getattr(value, name) for name in value.model_fields_set}
    # `kind` is a default as well and must stay: the tag is what a reader goes by.
    kind = getattr(value, "kind", None)
    return fields if kind is None else {"kind": kind, **fields}


def decode_packet(frame: bytes) -> Packet:
    """Raises ProtocolError for anything that is not a packet of our protocol version."""
    return read_packet(load(frame)).shell


def decode_snapshot(frame: bytes) -> Snapshot:
    """Raises ProtocolError for anything that is not a snapshot of our protocol version."""
    return read_snapshot(load(frame)).shell


def read_packet(data: dict[str, Any]) -> Decoded[Packet]:
    """As `decode_packet`, for a frame that was loaded, and with what was skipped."""
    return _read(data, Packet)


def read_snapshot(data: dict[str, Any]) -> Decoded[Snapshot]:
    """As `decode_snapshot`, for a frame that was loaded, and with what was skipped."""
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
    """A `Command` or `Resend`; None for a kind we don't know."""
    return _read_one(load(frame), down_adapter)


def decode_up(frame: bytes) -> Any:
    """One bare message (a stored row of the recording); None for a kind we don't know."""
    return _read_one(load(frame), up_adapter)


def _read_one(data: dict[str, Any], adapter: Any) -> Any:
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        if _unknown_kind(error):
            return None
        raise ProtocolError(f"malformed message: {_problem(error)}") from None


def load(frame: bytes) -> dict[str, Any]:
    """The JSON object in a frame. Raises ProtocolError. See the note."""
    try:
        data = from_json(frame, allow_inf_nan=True)
    except ValueError:
        raise ProtocolError("a frame that is not JSON") from None
    if not isinstance(data, dict):
        raise ProtocolError("a frame that is not a JSON object")
    return data


def rank_of(source: str) -> int | None:
    """The rank that a packet's `source` names, None for everything else that can speak."""
    match = _RANK.fullmatch(source)
    return int(match[1]) if match and int(match[1]) < MAX_RANKS else None


def _unknown_kind(error: ValidationError) -> bool:
    return any(problem["type"] == "union_tag_invalid" for problem in error.errors(include_input=False))


def _problem(error: ValidationError) -> str:
    """The first thing that is wrong, where it is, and never the value itself: it may be of any size."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"][:6])
    return f"{where}: {first['msg'][:200]}" if where else first["msg"][:200]
