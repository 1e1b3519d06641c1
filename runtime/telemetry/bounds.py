"""Texts that travel: an exception's message may hold a whole batch, and every screen, state.json and the recording
would get it. The rank's log file has all of it."""

from __future__ import annotations

LINE_KEPT = 1_000
"""Characters of one line of an error."""
ERROR_KEPT = 16_000
"""Characters of an error, and of anything else that a rank says."""
_END_SHARE = 0.25


def shortened(text: str, limit: int) -> str:
    """`text` with at most about `limit` characters: its start, which says what it is, and its end."""
    if len(text) <= limit:
        return text
    end = int(limit * _END_SHARE)
    left_out = len(text) - limit
    return f"{text[: limit - end]} ... ({left_out:,} characters left out) ... {text[len(text) - end :]}"


def shortened_error(text: str) -> str:
    """Line by line, so that a long line takes no other's place; then as a whole."""
    return shortened("\n".join(shortened(line, LINE_KEPT) for line in text.splitlines()), ERROR_KEPT)
