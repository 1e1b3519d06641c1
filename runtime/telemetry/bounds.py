"""Shortens texts that are sent to the hub: an exception's message may contain a whole batch, and every screen,
state.json and the recording would get it. The rank's log file has the full text."""

from __future__ import annotations

LINE_KEPT = 1_000
"""Most characters of one line of an error."""
ERROR_KEPT = 16_000
"""Most characters of an error, an event or a log record."""
_END_SHARE = 0.25


def shortened(text: str, limit: int) -> str:
    """The beginning and the end of `text`, with at most about `limit` characters."""
    if len(text) <= limit:
        return text
    end = int(limit * _END_SHARE)
    left_out = len(text) - limit
    return f"{text[: limit - end]} ... ({left_out:,} characters left out) ... {text[len(text) - end :]}"


def shortened_error(text: str) -> str:
    """`text` with each line shortened to LINE_KEPT and all of it to ERROR_KEPT."""
    return shortened("\n".join(shortened(line, LINE_KEPT) for line in text.splitlines()), ERROR_KEPT)
