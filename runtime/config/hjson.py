"""Hjson (hjson.github.io), in which DeepSpeed reads its configs: JSON for people, with comments (#, //, /* */), keys
and strings without quotes, 'single' and '''several-line''' strings, and line ends or a last comma where JSON wants a
comma or none. Each key's line is kept.

Stricter than Hjson in two things that are slips in a config: a string without quotes may not hold punctuation of JSON's
(in Hjson `type: AdamW, lr: 1` is one string), and nothing may be said twice.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from .errors import Path, dotted

MAX_DEPTH = 64
"""Maximum nesting of objects and lists."""

_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"')
_SINGLE = re.compile(r"'(?:\\.|[^'\\\n])*'")
_SEVERAL = re.compile(r"'''(.*?)'''", re.DOTALL)
_BARE_KEY = re.compile(r"[^\s{}\[\]:,\"'#/]+")
_PLAIN = re.compile(
    r"(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)(?=[ \t]*(?:[,}\]\r\n#]|//|/\*|$))"
)
_TO_LINE_END = re.compile(r"[^\r\n]*")
_PUNCTUATION = re.compile(r"[{}\[\],:\"]")


class HjsonError(ValueError):
    """Text that is not Hjson; `position` is the offset of the error."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.message, self.position = message, position


class Parsed(NamedTuple):
    """The result of `parse`."""

    value: Any
    """The parsed document."""
    lines: dict[Path, int]
    """Line number of every key, from 1."""
    problems: list[str]
    """One message per key that is given twice."""


def parse(text: str) -> Parsed:
    """Parse `text` as Hjson. Raises HjsonError."""
    reader = _Reader(text)
    return Parsed(reader.root(), reader.lines, reader.problems)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        self.problems: list[str] = []
        self._path: list[str | None] = []  # None: inside a list, where keys have no path of their own

    def root(self) -> Any:
        self._space()
        if self._next() in ("{", "["):
            value = self._value()
        else:
            value = self._object(end="")  # the outermost braces may be left out
        self._space()
        if self.at < len(self.text):
            raise self._wrong("Expecting nothing more")
        return value

    # ---- small steps -------------------------------------------------------------------------------------------------
    def _wrong(self, message: str, at: int | None = None) -> HjsonError:
        return HjsonError(message, self.at if at is None else at)

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _space(self) -> bool:
        """Skip white space and comments. Returns whether they contain a line end."""
        found = _SPACE.match(self.text, self.at)
        assert found is not None  # it matches nothing, too
        self.at = found.end()
        return "\n" in found.group()

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    # ---- values ------------------------------------------------------------------------------------------------------
    def _value(self) -> Any:
        symbol = self._next()
        if symbol in ("{", "["):
            if len(self._path) >= MAX_DEPTH:
                raise self._wrong(f"nested more than {MAX_DEPTH} deep")
            self.at += 1
            return self._object(end="}") if symbol == "{" else self._list()
        if symbol == '"' or symbol == "'":
            return self._string()
        plain = self._take(_PLAIN)
        return json.loads(plain) if plain is not None else self._without_quotes()

    def _string(self) -> str:
        start = self.at
        if (several := _SEVERAL.match(self.text, self.at)) is not None:
            self.at = several.end()
            return several.group(1).strip("\n")
        token = self._take(_QUOTED if self._next() == '"' else _SINGLE)
        if token is None:
            raise self._wrong("Unterminated string")
        if token[0] == "'":
            token = '"' + token[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
        try:
            return str(json.loads(token))
        except json.JSONDecodeError as error:
            raise self._wrong(error.msg, start) from None

    def _without_quotes(self) -> str:
        start = self.at
        word = (self._take(_TO_LINE_END) or "").strip()
        if not word or word[0] in ",:}]":
            raise self._wrong("Expecting value", start)
        if re.match(r"(True|False|None)\b", word):
            raise self._wrong("Expecting value (JSON writes true, false and null)", start)
        if (inside := _PUNCTUATION.search(word)) is not None:
            raise self._wrong(
                f"A string without quotes goes to the end of its line and may not hold {inside.group()}; put it in "
                "double quotes",
                start,
            )
        return word

    def _list(self) -> list[Any]:
        items: list[Any] = []
        self._path.append(None)
        while True:
            self._space()
            if self._next() == "]":
                self.at += 1
                self._path.pop()
                return items
            items.append(self._value())
            self._between("]")

    def _object(self, end: str) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while True:
            self._space()
            if self._next() == end:  # at the end of the text both are ""
                self.at += len(end)
                return members
            key = self._key()
            self._space()
            self._path.append(key)
            members[key] = self._value()
            self._path.pop()
            self._between(end)

    def _key(self) -> str:
        start = self.at
        key = self._string() if self._next() in ('"', "'") and self._next() else self._take(_BARE_KEY)
        if key is None:
            raise self._wrong("Expecting a key")
        self._note(key, start)
        self._space()
        if self._next() != ":":
            raise self._wrong("Expecting ':' delimiter")
        self.at += 1
        return key

    def _note(self, key: str, at: int) -> None:
        if None in self._path:
            return
        path = (*(part for part in self._path if part is not None), key)
        line = self.text.count("\n", 0, at) + 1
        if path in self.lines:
            self.problems.append(f"line {line}: {dotted(path)} is given twice (first on line {self.lines[path]})")
        self.lines.setdefault(path, line)

    def _between(self, end: str) -> None:
        """Skip the separator after a member: a comma, a line end, or the end of its object or list."""
        new_line = self._space()
        if self._next() == ",":
            self.at += 1
        elif not new_line and self._next() != end:
            raise self._wrong("Expecting ',' delimiter")
