"""Reads a config as JSON or Hjson with the line number of every key, and applies --set overrides."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from . import hjson
from .errors import ConfigError, Origin, Path, dotted, shown

_MAX_BYTES = 16 * 2**20  # a config is a few kB; this is someone's data or checkpoint
_TOO_DEEP = f"nested more than {hjson.MAX_DEPTH} deep, so it cannot be a config file"
_BASE64 = re.compile(r"[A-Za-z0-9_+/-]+={0,2}")
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]:,]|-?Infinity|NaN')


def read(source: str | FilePath | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Origin]:
    """The raw config with the overrides applied, and where each key came from. Raises ConfigError."""
    is_file = False
    if isinstance(source, Mapping):
        raw: dict[str, Any] = copy.deepcopy(dict(source))
        name, lines = "config", dict[Path, int]()
    elif (text := _from_base64(source)) is not None:
        name = "config"
        raw, lines = _parse(text, name)
    else:
        is_file = True
        name = str(source)
        raw, lines = _parse(_read_text(FilePath(source), name), name)
    taken = _apply(raw, overrides)
    return raw, Origin(name=name, is_file=is_file, lines=lines, overrides=taken)


def _from_base64(source: str | FilePath) -> str | None:
    """The text of a config in base64, as accelerate passes it to its ranks; None if `source` is a path."""
    if not isinstance(source, str) or not _BASE64.fullmatch(source):
        return None
    try:
        text = base64.urlsafe_b64decode(source).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    return text if text.lstrip().startswith("{") else None


def _read_text(path: FilePath, name: str) -> str:
    try:
        if path.is_dir():
            inside = sorted(entry.name for entry in path.glob("*.json"))
            hint = f"; it contains {', '.join(inside[:5])}" if inside else ""
            raise ConfigError(f"expected a JSON file, got a directory{hint}", name)
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except ValueError as error:
        raise ConfigError(f"not a path: {error}", name) from None
    except FileNotFoundError:
        raise ConfigError("no such file", name) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", name) from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"larger than {_MAX_BYTES // 2**20} MiB, so it cannot be a config file", name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})", name) from None


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Path, int]]:
    if not text.strip():
        raise ConfigError("the file is empty; expected a JSON object, for example {}", name)
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raw, lines, problems = _parse_hjson(text, name, error)
    except RecursionError:
        raise ConfigError(_TOO_DEEP, name) from None
    except ValueError as error:  # a number with thousands of digits
        raise ConfigError(f"not usable: {error}", name) from None
    else:
        lines, problems = _scan(text)
    if problems:
        raise ConfigError(problems, name)
    if not isinstance(raw, dict):
        raise ConfigError(f"expected a JSON object at the top, {{...}}, got {shown(raw)}", name)
    return raw, lines


def _parse_hjson(text: str, name: str, error: json.JSONDecodeError) -> hjson.Parsed:
    """Parse text that is not JSON as Hjson. If it is neither, report the error of the parser that got further."""
    try:
        return hjson.parse(text)
    except hjson.HjsonError as other:
        length = len(text.rstrip())
        if min(other.position, length) > min(error.pos, length):
            raise ConfigError(_not_json(text, other.position, other.message), name) from None
        raise ConfigError(_not_json(text, error.pos, error.msg), name) from None


def _not_json(text: str, position: int, message: str) -> str:
    """The parser's message with the offending line and a caret under the column."""
    # What is missing at the end is missing after the last thing that is there, not in the empty line below it.
    at = min(position, len(text.rstrip()))
    line_number = text.count("\n", 0, at) + 1
    line_start = text.rfind("\n", 0, at) + 1
    line = text[line_start:].split("\n", 1)[0].rstrip()
    column = at - line_start + 1
    start = max(0, column - 60)
    excerpt = line[start : start + 100].replace("\t", " ")
    hint = " (the file ends here)" if at < position or at == len(text.rstrip()) else ""
    if re.match(r"(True|False|None)\b", text[position:].lstrip()) and "JSON writes" not in message:
        hint = " (JSON writes true, false and null)"
    pointer = " " * (column - 1 - start) + "^"
    return f"not JSON: line {line_number}, column {column}: {message}{hint}\n{excerpt}\n{pointer}"


def _scan(text: str) -> tuple[dict[Path, int], list[str]]:
    """Line of every key of a JSON text that parses, and what Python's parser lets through: duplicate keys, NaN."""
    lines: dict[Path, int] = {}
    problems: list[str] = []
    stack: list[str | None] = []  # per open bracket the key inside it that is being read; None in a list
    line, at, word = 1, 0, ""
    for token in _TOKEN.finditer(text):
        line += text.count("\n", at, token.start())
        at = token.start()
        symbol = token.group()
        if symbol[0] == '"':
            word = symbol
        elif symbol == ":":
            stack[-1] = json.loads(word)
            path = tuple(key for key in stack if key is not None)
            if None in stack:
                continue  # objects inside lists have no path of their own
            if path in lines:
                problems.append(f"line {line}: {dotted(path)} is given twice (first on line {lines[path]})")
            lines.setdefault(path, line)
        elif symbol in "{[":
            stack.append("" if symbol == "{" else None)
            if len(stack) > hjson.MAX_DEPTH:
                return lines, [f"line {line}: {_TOO_DEEP}"]
        elif symbol in "}]":
            stack.pop()
        elif symbol != ",":
            path = tuple(key for key in stack if key)
            problems.append(f"line {line}: {dotted(path)}: {symbol} is not a JSON number; expected a finite one")
    return lines, problems


def _apply(raw: dict[str, Any], overrides: Sequence[str]) -> dict[Path, str]:
    """Set each `dotted.key=value` in `raw`; returns which override gave which key its value."""
    taken: dict[Path, str] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            problems.append(f"--set {override}: expected key=value, for example zerotop.train.steps=50")
            continue
        place = raw
        for depth, part in enumerate(path[:-1], 1):
            # `"zero_optimization": true` is an old spelling of stage 1; a key set inside it makes it an object.
            below = place.get(part)
            if below is None or (isinstance(below, bool) and path[:depth] == ("zero_optimization",)):
                below = place[part] = {} if below is None else {"stage": int(below)}
            if not isinstance(below, dict):
                problems.append(f"--set {override}: {dotted(path[:depth])} is {shown(below)}, not an object")
                break
            place = below
        else:
            place[path[-1]] = _value(text)
            taken[path] = override
    if problems:
        raise ConfigError(problems)
    return taken


def _value(text: str) -> Any:
    """JSON where it parses as JSON, else the text itself: steps=50 is a number, type=AdamW a string."""
    try:
        return json.loads(text, parse_constant=lambda word: word)
    except (ValueError, RecursionError):
        return text
