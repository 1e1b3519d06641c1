"""The verdict, the first line of the screen: that the run is healthy, or what is wrong and what to do."""

from __future__ import annotations

import math
import re
import textwrap

from runtime.wire.messages import RunStatus
from zerotop.clean import clean
from zerotop.format import duration_text, figure_text, perplexity_text, rate_text
from zerotop.output import with_exit_code
from zerotop.state.abilities import is_wrapped
from zerotop.state.evaluations import perplexity
from zerotop.tui.text import STATES
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Band, Row

ERROR_LINES, ERROR_CHARACTERS = 6, 4000
ERROR_FROM, ERROR_FROM_BOXED = 22, 25
"""A screen must be higher than this to show lines of the error: eight ranks, the next commands and two events come
first, without boxes and with them."""
SUMMARY_FROM = 32
"""Below this height a failure leaves out the result, which the header and the summary have, too."""


class VerdictLine(Band):
    """The verdicts, and the last lines of an error."""

    lines: tuple[tuple[str, str], ...] = ()
    _of: object = None
    """What the lines were made of."""

    def inputs(self, view: View) -> object:
        return self.lines

    def notice(self, view: View) -> None:
        live = (view.verdict, view.condition, view.connection, view.stale, view.state.status)
        result = view.state.revision(("status", "step", "evaluation")) if view.ended else None
        of = (live, result, self.screen.size, self.lines_reserved)
        if of != self._of:
            self._of = of
            self._take_lines(view)

    def _take_lines(self, view: View) -> None:
        width = max(20, (self.screen.size.width or 80) - 3)
        lines: list[tuple[str, str]] = []
        height = self.screen.size.height
        found = verdicts(view)
        if view.ended and len(found) > 1 and height < SUMMARY_FROM:
            del found[1:]
        for glyph, text, colour in found:
            for i, piece in enumerate(textwrap.wrap(text, width - 2)[:2] or [""]):
                lines.append((f"{glyph if not i else ' '} {piece}", colour))
        unwatched = view.verdict is not None and view.verdict.what == "unwatched"  # it stays, and little else is shown
        if not view.ended and not unwatched:
            lines = _cut(lines, self.lines_reserved, width)
        status = view.state.status
        if status is not None and status.error:
            above = ERROR_FROM if self.screen.has_class("-lined") else ERROR_FROM_BOXED
            room = min(ERROR_LINES, max(0, height - above - len(lines) + 1))
            lines += [(f"  {piece}", "error") for piece in error_lines(status, room, width - 2)]
        if tuple(lines) != self.lines:
            self.lines = tuple(lines)
            self.take(len(lines))

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        return [
            Row().gap().add(text, view.palette.style(colour, bold=not i)) for i, (text, colour) in enumerate(self.lines)
        ]


def error_lines(status: RunStatus, room: int, width: int) -> list[str]:
    """The last lines of the error, without what the verdict has said, and where the others are."""
    lines = clean((status.error or "")[-ERROR_CHARACTERS:]).rstrip().splitlines()
    if lines and lines[-1].strip() and lines[-1].strip() in clean(status.reason or ""):
        lines.pop()
    shown = lines[len(lines) - min(room, len(lines)) :]
    hint = f"↑ {len(lines) - len(shown)} more: 6, then e opens the log"
    if 0 < len(shown) < len(lines) and len(shown[0]) + 3 + len(hint) <= width:
        shown[0] = f"{shown[0]:<{width - len(hint)}}{hint}"
    return shown


def _cut(lines: list[tuple[str, str]], room: int, width: int) -> list[tuple[str, str]]:
    """The first `room` lines, the last of them with an ellipsis if its sentence goes on."""
    if room and len(lines) > room and lines[room][0].startswith("  "):
        text, colour = lines[room - 1]
        return [*lines[: room - 1], (text[: width - 2].rstrip() + " …", colour)]
    return lines[: max(1, room)]


def verdicts(view: View) -> list[tuple[str, str, str]]:
    """(glyph, text, colour of [ui]), worst first."""
    found: list[tuple[str, str, str]] = []
    status = view.state.status
    if status is not None and status.state == "failed":
        found.append(("✖", f"the run failed: {_failure(status)}", "error"))
    elif status is not None and status.state == "aborted":
        found.append(("✖", f"the run was aborted{': ' + status.reason if status.reason else ''}", "error"))
    if view.ended:
        found.append(("■", summary(view), "foreground"))
        return found
    if view.condition.name == "unknown":
        found.append(("?", view.condition.text, "warning"))
        return found
    verdict = view.verdict
    if verdict is None:
        # A hub of an older version, or one that has only just begun.
        text = view.condition.text or ("waiting for the first verdict" if view.connection == "live" else "")
        return [("◌", text, STATES[view.condition.name][1])] if text else []
    glyph, colour = _SIGNS.get(verdict.what, _SEVERITY_SIGNS[verdict.severity])
    if view.stale and verdict.severity == "info":
        colour = "muted"
    found.append((glyph, verdict.text, colour))
    if verdict.advice and (verdict.severity != "info" or verdict.what == "unwatched"):
        found.append(("→", verdict.advice, "foreground"))
    return found


_SIGNS = {
    "healthy": ("✔", "success"),
    "unwatched": ("·", "muted"),
    "starting": ("◌", "primary"),
    "paused": STATES["paused"],
    "checkpoint": ("◧", "primary"),
    "evaluation": ("◧", "primary"),
    "compiling": ("◧", "primary"),
    "offload-bound": ("●", "success"),
}
_SEVERITY_SIGNS = {"info": ("●", "foreground"), "warning": ("▲", "warning"), "error": ("✖", "error")}
"""Verdict -> (glyph, colour of [ui])."""


def summary(view: View) -> str:
    """The result of a run that has ended, as far as it is known."""
    state, status = view.state, view.state.status
    points = list(state.series)
    facts: list[str] = []
    if status is not None and status.started_wall_s is not None and status.ended_wall_s is not None:
        facts.append(f"ended after {duration_text(status.ended_wall_s - status.started_wall_s)}")
    losses = [(point.loss, point.step) for point in points if point.loss is not None and math.isfinite(point.loss)]
    if losses:
        best, step = min(losses)
        facts.append(f"loss {figure_text(losses[-1][0])}, best {figure_text(best)} at step {step}")
    if (newest := state.evaluations.newest) is not None and (lowest := state.evaluations.best) is not None:
        ppl = perplexity_text(perplexity(lowest.loss))
        facts.append(
            f"evaluation {figure_text(newest.loss)}, best {figure_text(lowest.loss)} (perplexity {ppl}) "
            f"at step {lowest.step}"
        )
    timed = [point for point in points if point.tokens_per_s is not None]
    if took_ms := sum(point.step_ms for point in timed):
        tokens_ms = sum((point.tokens_per_s or 0.0) * point.step_ms for point in timed)
        facts.append(f"{rate_text(tokens_ms / took_ms * max(1, state.world_size))} on average")
    saved = status.last_checkpoint_step if status else None
    facts.append(f"newest checkpoint: step {saved}" if saved is not None else "no checkpoint")
    if status is not None and status.state != "finished" and saved is not None and not is_wrapped(state):
        facts.append(f"continue with: zerotop launch --resume --name {status.name}")
    return " · ".join(facts)


def _failure(status: RunStatus) -> str:
    """Which rank, why, and the exit code, each of them once: the reason may name the rank, and a signal is the code."""
    reason = status.reason or "no reason given"
    named = status.failed_rank is None or re.search(rf"\brank {status.failed_rank}\b", reason)
    return ("" if named else f"rank {status.failed_rank}: ") + with_exit_code(reason, status.exit_code)
