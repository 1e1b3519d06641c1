"""Makes text from ranks, logs, configs, peers and exceptions safe to print.

A terminal obeys what it is sent: escape sequences move the cursor, set the title or fill the clipboard, and characters
that change the direction of text (U+202E) or have no width make a line look different from what it is. Nothing that
zerotop did not write itself reaches a terminal without passing through `clean`.
"""

from __future__ import annotations

import re

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|[\]P^_X][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # OSC, DCS, PM, APC, SOS, to their end or the line's
    r"|[^\n])?"
)
_SPACES = "\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\u2028\u2029"
_TO_SPACE = dict.fromkeys(map(ord, _SPACES), " ")
_NO_CHARACTER = re.compile(r"[\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]|[\U000f0000-\U0010ffff]")


def clean(text: str) -> str:
    """`text` with only line ends and printable characters: without escape sequences, control and format characters.

    A carriage return restarts its line, as in a progress bar. What is not a character (a lone surrogate of a file name
    that is not UTF-8, private use) becomes U+FFFD.
    """
    if text.isprintable():
        return text
    text = _ESCAPES.sub("", text.expandtabs(4).replace("\r\n", "\n"))
    return "\n".join(_clean_line(line) for line in text.split("\n"))


def clean_line(text: str) -> str:
    """The same in one line: line ends become spaces."""
    return text if text.isprintable() else clean(text).replace("\n", " ")


def _clean_line(line: str) -> str:
    line = line.rstrip("\r").rsplit("\r", 1)[-1]
    if line.isprintable():
        return line
    line = _NO_CHARACTER.sub("\ufffd", line.translate(_TO_SPACE))
    return line if line.isprintable() else "".join(filter(str.isprintable, line))
