"""Words and glyphs that several panels share."""

from __future__ import annotations

from textual.content import Content

from zerotop.clean import clean

STATES: dict[str, tuple[str, str]] = {
    "starting": ("◌", "primary"),
    "running": ("▶", "success"),
    "saving": ("◧", "primary"),
    "paused": ("‖", "warning"),
    "restarting": ("↻", "warning"),
    "stopping": ("◧", "warning"),
    "stopped": ("■", "foreground"),
    "finished": ("✔", "success"),
    "aborted": ("✖", "error"),
    "failed": ("✖", "error"),
    "stalled": ("▲", "error"),
    "unknown": ("?", "warning"),
}
"""Condition of a run -> (glyph, colour of [ui]); its name is always beside the glyph."""
MARKS: dict[str, tuple[str, str]] = {
    "checkpoint": ("C", "success"),
    "restart": ("↻", "warning"),
    "pause": ("‖", "warning"),
    "setting": ("E", "primary"),
    "trouble": ("✖", "error"),
}
"""What happened at a step -> (sign on the axis of a plot, colour of [ui])."""
SEVERITIES: dict[str, tuple[str, str, str]] = {
    "debug": ("·", "debug", "muted"),
    "info": ("●", "info", "muted"),
    "warning": ("▲", "warn", "warning"),
    "error": ("✖", "error", "error"),
    "critical": ("✖", "crit", "error"),
}
"""Severity -> (glyph, word, colour of [ui])."""


def plain(text: str) -> Content:
    """`text` for a title, a label or a toast: never markup, and nothing in it steers the terminal."""
    return Content(clean(text))


def dots(micro_step: int, micro_steps: int, most: int = 8) -> str:
    """Where a rank is in its accumulation: done ●, current ◐, to come ○; scaled down to `most` dots. micro_step 0:
    outside.
    """
    if micro_steps <= 1:
        return ""
    shown = min(micro_steps, most)
    if not 0 < micro_step <= micro_steps:
        return "○" * shown
    current = (micro_step - 1) * shown // micro_steps
    return "●" * current + "◐" + "○" * (shown - current - 1)
