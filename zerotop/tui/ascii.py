"""Plain ASCII in place of every sign: for terminals and locales without UTF-8, and for whoever prefers it."""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "ZEROTOP_ASCII"
OLD_TERMINALS = frozenset({"linux", "vt100", "vt102", "vt220", "dumb"})
_SIGNS = {
    "─━╌┄┈═╴╶╸╺": "-",
    "│┃║╎▌▐▏▎": "|",
    "╭╮╰╯┌┐└┘├┤┬┴┼╔╗╚╝╠╣╦╩╬╒╕╘╛┏┓┗┛": "+",
    "█▉▊▋▇▆": "#",
    "▓▅▄": "*",
    "▒▃▍": "+",
    "░▂▁·": ".",
    "╱": "/",
    "╲": "\\",
    "●◉": "o",
    "○◌": ".",
    "◐◧": "c",
    "◆◇": "*",
    "▲△": "!",
    "▼▽▾": "v",
    "▶▸→": ">",
    "◀←": "<",
    "↑": "^",
    "↓": "v",
    "✔☑": "+",
    "✖×⌧": "x",
    "■▪": "#",
    "□☐": "o",
    "↻⟳": "@",
    "‖": '"',
    "❄": "*",
    "⊘": "0",
    "…": "~",
    "–—−": "-",
    "“”": '"',
    "‘’": "'",
    "≤": "<",
    "≥": ">",
    "≈": "~",
    "°": "o",
    "µ": "u",
    "↵⏎": "/",
    "é": "e",
}


def ascii_table() -> Mapping[int, str]:
    """For str.translate: each sign of the screen -> one ASCII character, so that nothing moves."""
    table = {ord(sign): plain for signs, plain in _SIGNS.items() for sign in signs}
    for bits in range(256):
        table[0x2800 + bits] = _braille(bits)
    return table


def _braille(bits: int) -> str:
    """Dots in the upper half become a quote, those in the lower half a full stop, many of both a denser sign."""
    upper = (bits & 0x1B).bit_count()  # the two rows above
    lower = (bits & 0xE4).bit_count()
    if not bits:
        return " "
    if not lower:
        return "'"
    if not upper:
        return "." if lower < 3 else "_"
    return ":" if upper + lower < 5 else "#"


class Plain(dict[int, str]):
    """A table that also replaces what it does not know by a question mark."""

    def __missing__(self, code: int) -> str:
        if code < 128:
            raise LookupError  # str.translate keeps the character
        return "?"


def wants_ascii(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ZEROTOP_ASCII asks for it, or the terminal is known not to show UTF-8: by a locale with another encoding,
    or because it is the Linux console or older. An unset locale, or C as in many containers, says nothing."""
    given = environment.get(VARIABLE, "").strip().lower()
    if given:
        return given not in {"0", "no", "false", "off"}
    locale = next((environment[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(name)), "")
    _, _, encoding = locale.partition(".")
    other = bool(encoding) and encoding.lower().replace("-", "").split("@")[0] != "utf8"
    return other or environment.get("TERM", "") in OLD_TERMINALS
