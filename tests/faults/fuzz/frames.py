"""Frames that no rank and no screen would send: valid messages of every kind with values changed, and plain garbage."""

from __future__ import annotations

import json
import random
from typing import Any

_NS, _WALL = 10**12, 1.7e9

KINDS: dict[str, dict[str, Any]] = {
    "hello": {
        "run": "q1", "attempt": 1, "rank": 0, "local_rank": 0, "world_size": 2, "host": "h", "pid": 1, "boot_id": "b",
        "wall_s": _WALL, "mono_ns": _NS, "device": "cpu", "config_digest": "d", "stage": 2, "precision": "fp32",
        "micro_batch": 1, "accumulation": 2, "global_batch": 4, "steps": 100, "knobs": {"a": 1},
    },
    "phases": {"rank": 0, "micro_steps": 2, "spans": [["forward", 5, 1, _NS - 1000, _NS]]},
    "step": {
        "rank": 0, "step": 5, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "step_ms": 10.0, "tokens_per_s": 100.0,
        "phase_ms": {"forward": 1.0}, "end_ns": _NS,
    },
    "memory": {
        "rank": 0, "ledger": {"parameters": 1}, "offloaded": {"masters": 1}, "rss_bytes": 10, "host_total_bytes": 100,
        "at_ns": _NS,
    },
    "collectives": {"rank": 0, "step": 5, "records": [[7, "all_reduce", 8, _NS - 1000, _NS, 10, 5]]},
    "heartbeat": {
        "rank": 0, "phase": "forward", "phase_since_ns": _NS, "step": 5, "micro_step": 1, "micro_steps": 2,
        "entered_seq": 1, "completed_seq": 1, "progress_ns": _NS, "now_ns": _NS,
    },
    "log": {"rank": 0, "level": "info", "logger": "l", "text": "hello", "wall_s": _WALL},
    "event": {"rank": 0, "what": "note", "text": "t", "step": 5, "data": {"a": 1}, "wall_s": _WALL},
    "checkpoint_saved": {"rank": 0, "step": 5, "path": "/c", "seconds": 1.0, "blocked_ms": 1.0, "wall_s": _WALL},
    "data_report": {
        "role": "train", "files": ["a.jsonl"], "format": "messages", "train_on": "assistant", "rows": 5, "samples": 4,
        "dropped": {"no assistant turn": 1}, "tokens": 90, "trained_tokens": 30, "seq_len": 64, "sequences": 2,
        "packed": True, "lengths": [[16, 1], [32, 3]], "examples": [
            {"source": "row 1", "tokens": 9, "trained": 3, "runs": [{"text": "hi", "trained": True, "edge": True}]}
        ],
    },
    "evaluation": {
        "rank": 0, "step": 5, "loss": 2.0, "tokens": 30, "best": True, "best_step": 5, "wall_s": _WALL,
        "generations": [{"prompt": "p", "text": "t", "tokens": 1}],
    },
    "ack": {"id": "nobody's", "number": 1, "state": "applied", "step": 5, "rank": 0, "wall_s": _WALL},
    "goodbye": {"rank": 0, "outcome": "finished", "step": 5, "wall_s": _WALL},
    "status": {"name": "q1", "state": "failed", "attempt": 1, "step": 5},
    "node": {
        "host": "h", "cpu_percent": 5.0, "cpu_count": 2, "load_1m": 1.0, "ram_used_bytes": 1, "ram_total_bytes": 10,
        "rank_rss_bytes": {"0": 1}, "gpus": None, "at_ns": _NS, "wall_s": _WALL,
    },
    "command_record": {
        "command": {"kind": "command", "id": "c", "name": "pause"},
        "ack": {"kind": "ack", "id": "c", "state": "accepted"},
    },
    "resend": {"first_seq": 1},
}  # fmt: skip
"""One message of each kind that a run knows, but for commands: a sound one would rightly act."""

_TEXTS = [
    "", "x", "5", "\x1b[2J\x1b]0;owned\x07", "\u202eevil", "\u200b\ufeff", "\ud800", "a\x00b", "[/bad",
    "[@click=app.quit]x",
    "A" * 5000, "\u0301" * 300, "rank/\u00b2", "../../etc/passwd", "'; DROP TABLE messages; --",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**100, int("9" * 4000), 1e308, float("nan"), float("-inf"), 1.5,
    [], {}, [1], {"a": 1}, [[]], {"kind": "status"}, *_TEXTS,
]  # fmt: skip


class Frames:
    """An endless supply for one socket, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._seq = 0

    def packet(self) -> bytes:
        """A packet of some rank, with up to three messages."""
        r = self._random
        if r.random() < 0.1:
            return self.garbage()
        kinds = r.choices(list(KINDS), k=r.randrange(4))
        self._seq = r.choice([self._seq + 1] * 8 + [1, self._seq + 10, 10**9])
        packet = {
            "kind": "packet", "protocol": 1, "source": "rank/0", "attempt": 1, "seq": self._seq, "sent_ns": 0,
            "messages": [self._message(kind) for kind in kinds],
        }  # fmt: skip
        return _encoded(self._changed(packet) if r.random() < 0.2 else packet)

    def command(self) -> bytes:
        """Something for the commands' socket; never a sound command."""
        r = self._random
        if r.random() < 0.2:
            return self.garbage()
        kind = r.choice(list(KINDS))
        named = {"kind": "command", "id": r.choice(_VALUES), "name": r.choice(_TEXTS), "arguments": r.choice(_VALUES)}
        return _encoded(named if r.random() < 0.5 else self._message(kind))

    def subscription(self) -> bytes:
        """Something for the screens' socket."""
        r = self._random
        topic = r.choice([b"live", b"snapshot/", b"snapshot/%d" % r.randrange(100), r.randbytes(r.randrange(1, 300))])
        return r.choice([b"\x01", b"\x00", b"\x02", b""]) + topic

    def garbage(self) -> bytes:
        r = self._random
        nested = r.randrange(1, 3000)
        return r.choice(
            [
                b"", b"null", r.randbytes(nested), b"{" * nested, b"[" * nested,
                b'{"a":' * nested + b"1" + b"}" * nested,
                b"9" * nested, b"\x80\x05.", b"{}", b"[]", b'{"messages": 5}', b'{"protocol": 1e400, "messages": []}',
                b"\xef\xbb\xbf{}", '{"kind":"packet"}'.encode("utf-16"), b"\xff\xfe\x80",
            ]
        )  # fmt: skip

    def _message(self, kind: str) -> dict[str, Any]:
        message = {"kind": kind, **KINDS[kind]}
        for _ in range(self._random.choice((0, 1, 1, 2, 3))):
            message = self._changed(message)
        return message

    def _changed(self, message: dict[str, Any]) -> dict[str, Any]:
        r = self._random
        message = dict(message)
        name = r.choice([*message, "extra", ""])
        if r.random() < 0.1:
            message.pop(name, None)
        elif r.random() < 0.05:
            message[name] = _nested(r.randrange(300))
        else:
            message[name] = r.choice(_VALUES)
        return message


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
