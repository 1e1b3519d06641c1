"""What commands print: JSON documents, aligned tables, and errors.

All output goes through `show`, `say` or `print_json`, which keep it from controlling the terminal.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from zerotop.clean import clean

SERVED_VARIABLE = "ZEROTOP_SERVED"
"""Set for the processes that draw the screen into a browser."""


def is_served() -> bool:
    """Whether the screen of this process is drawn into a browser (zerotop web)."""
    return os.environ.get(SERVED_VARIABLE) == "1"


def can_draw() -> bool:
    """Whether there is something to draw a screen on: a terminal, or a browser."""
    return is_served() or (sys.stdin.isatty() and sys.stdout.isatty())


class CommandError(Exception):
    """One clear message for the user: what was expected, what came, what to do. Ends the program with `exit_code`.

    2: bad usage, an unknown run, a bad value; nothing was done. 1: a command was rejected or could not be carried out.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def print_json(document: Any) -> None:
    """One JSON document to stdout. NaN and infinities become null; characters that would control a terminal are
    escaped."""
    text = json.dumps(finite(document), indent=1, allow_nan=False, ensure_ascii=False)
    print(text if text.isascii() else _UNPRINTABLE.sub(_escaped, text), flush=True)


_UNPRINTABLE = re.compile(r"[^\n -~]")


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]


def finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def show(text: str, *, to_stderr: bool = False, coloured: bool = False) -> None:
    """Lines for the user, cleaned of what would control the terminal. `coloured`: colour sequences in it are ours,
    and stay."""
    parts = _COLOUR.split(text) if coloured else [text]
    shown = "".join(part if index % 2 else clean(part) for index, part in enumerate(parts))
    print(shown, file=sys.stderr if to_stderr else sys.stdout, flush=True)


_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def say(text: str) -> None:
    """A diagnostic or progress line to stderr; stdout has only answers."""
    show(text, to_stderr=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns aligned by padding; those whose index is in `right` are right-aligned."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in [header, *rows])


def with_exit_code(reason: str, code: int | None) -> str:
    """The reason of a failure with its exit code, unless the reason already names that or the signal."""
    if code is None or code == 0 or re.search(rf"\bSIG[A-Z]+|\bsignal \d+|\bexit\D*{code}\b", reason):
        return reason
    return f"{reason} (exit {code})"
