"""Two lines on the run as a whole: what it is, its state and its progress."""

from __future__ import annotations

from rich.style import Style

from runtime.wire.messages import LIVE_STATES
from zerotop.clean import clean_line
from zerotop.format import count_text, duration_text, figure_text, ms_text
from zerotop.state.efficiency import run_efficiency
from zerotop.tui.text import STATES
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import thin_bar
from zerotop.tui.widgets.lines import PLAIN, Panel, Row


class Header(Panel):
    """Parts are ordered by importance: what does not fit is left out from the end of its line."""

    can_focus = False
    ALLOW_MAXIMIZE = False

    def natural_height(self, width: int) -> int:
        return 2

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        return [self._identity(view, width), self._progress(view, width)][:height]

    def _identity(self, view: View, width: int) -> Row:
        state, palette = view.state, view.palette
        muted = palette.style("muted")
        now = view.condition.name
        glyph, colour = STATES[now]
        row = Row().gap()
        name = state.status.name if state.status else state.hello.run if state.hello else "…"
        right, right_style = _connection(view)
        room = width - len(right) - 3
        row.add(name, palette.style("primary", bold=True)).gap(2)
        row.add(f"{glyph} {now}", palette.style(colour, bold=True))
        if view.frozen:
            badge = f" ❄ VIEW FROZEN at step {view.progress.step} · f follows again "
            row.gap(2).add(badge, palette.style("accent", bold=True, reverse=True))
        if alerts := _alerts(view, room - row.width - 3):
            row.gap(2).add(alerts, palette.style(view.state.firing()[0].severity, bold=True))
        facts = _facts(view)
        if facts and _why(view) and 20 <= room - row.width - 3 < len(facts[0]):
            facts[0] = facts[0][: room - row.width - 4] + "…"  # most of a reason is better than none
        for text in facts:
            if row.width + 3 + len(text) <= room:
                row.add("  ", muted).add(text, muted if view.stale else PLAIN)
        return row.to(width - len(right) - 1).add(right, right_style)

    def _progress(self, view: View, width: int) -> Row:
        palette, done = view.palette, view.progress
        muted, plain = palette.style("muted"), (palette.style("muted") if view.stale else PLAIN)
        row = Row().gap()
        if done.steps is None:
            row.add("step ", muted).add(f"{done.step}", plain)
        else:
            row.add("step ", muted).add(f"{done.step}", Style(bold=True)).add(f" of {done.steps}", plain)
        share = done.share
        tail = _figures(view)
        fixed = row.width + (7 if share is not None else 0)
        room = width - fixed - 2
        shown: list[tuple[str, str]] = []
        least_bar = 12 if share is not None else 0
        for label, value in tail:
            cost = len(label) + len(value) + 3
            if cost <= room - least_bar:
                shown.append((label, value))
                room -= cost
        if share is not None:
            bar = max(0, min(room, width // 3))
            colour = "muted" if view.stale else STATES[view.condition.name][1]
            row.gap().extend(thin_bar(share, bar, palette.style(colour), palette.style("border")))
            row.add(f" {share:>4.0%}", plain)
        for label, value in shown:
            row.gap(2).add(f"{label} ", muted).add(value, plain)
        return row


def _alerts(view: View, room: int) -> str:
    """The alerts that fire, the worst by name, as far as there is room; the events have the rest."""
    firing = [] if view.ended else view.state.firing()
    if not firing:
        return ""
    more = f" and {len(firing) - 1} more" if len(firing) > 1 else ""
    first = f"▲ alert: {firing[0].name}"
    names = (f"{first}: {firing[0].text}{more}", f"{first}{more}", f"▲ {len(firing)} alert{'s' * (len(firing) > 1)}")
    return next((clean_line(text) for text in names if len(text) <= room), "▲" if room > 0 else "")


def _connection(view: View) -> tuple[str, Style]:
    palette = view.palette
    if view.connection == "replay":
        return "replay", palette.style("accent", bold=True)
    if view.connection == "ended" or view.condition.name not in {*LIVE_STATES, "stalled", "unknown"}:
        return "run ended", palette.style("muted")
    age = duration_text(view.age_s) if view.age_s >= 2 else ""
    if view.connection == "live":
        if view.stale:
            return f"▲ no data for {age}", palette.style("warning", bold=True)
        return f"● live{' · ' + age if age else ''}" + (" · read-only" if view.read_only else ""), palette.style(
            "success"
        )
    glyph, colour = ("◌", "primary") if view.connection == "connecting" else ("▲", "warning")
    return f"{glyph} {view.connection}{' · data ' + age + ' old' if age else ''}", palette.style(colour, bold=True)


def _facts(view: View) -> list[str]:
    hello, status = view.state.hello, view.state.status
    facts: list[str] = []
    if hello is not None:
        model = f"{hello.model_name} {count_text(hello.parameters)}" if hello.parameters else hello.model_name
        layout = f"ZeRO-{hello.stage}" if hello.stage else "ZeRO-0 (data parallel)"
        facts += [model.strip(), hello.trainer or layout, hello.precision]
        facts.append(f"{hello.world_size} rank{'s' if hello.world_size != 1 else ''}")
        if hello.micro_batch:
            parts = f"{hello.world_size} × {hello.micro_batch} × {hello.accumulation}"
            facts.append(f"batch {hello.global_batch} = {parts}")
        if hello.seq_len:
            facts.append(f"seq {hello.seq_len}")
        if hello.backend:
            facts.append(hello.backend)
    if status is not None and status.restarts and status.state == "running":
        facts.append(f"restarted: {status.restart_reason}")
    if reason := _why(view):
        facts.insert(0, reason)
    return [fact for fact in facts if fact]


def _why(view: View) -> str:
    """The reason of the run's state, where the verdict line does not give it."""
    status = view.state.status
    told = {"running", "failed", "aborted"}
    return status.reason if status is not None and not view.frozen and status.state not in told else ""


def _figures(view: View) -> list[tuple[str, str]]:
    state, done, status = view.state, view.progress, view.state.status
    figures: list[tuple[str, str]] = []
    if done.eta_s is not None and view.condition.moving and not view.stale:
        figures.append(("ETA", duration_text(done.eta_s)))
    newest = list(state.series)[-1:]
    figures.append(("loss", figure_text(state.loss)))
    figures.append(("tokens/s", count_text(done.tokens_per_s)))
    if (mfu := run_efficiency(state).mfu) is not None:
        figures.append(("MFU", f"{mfu:.0%}"))
    attempt = status.attempt if status else 0
    if status and status.restarts:
        lost = f", {status.lost_steps} steps replayed" if status.lost_steps else ""
        figures.append(("restarts", f"{status.restarts}{lost}"))
    elif attempt > 1:
        figures.append(("attempt", str(attempt)))
    saved = status.last_checkpoint_step if status else None
    figures.append(("checkpoint", f"step {saved}" if saved is not None else "none yet"))
    if newest:
        figures += [
            ("step time", ms_text(done.step_ms)),
            ("lr", figure_text(newest[0].lr)),
            ("norm", figure_text(newest[0].grad_norm)),
        ]
        if newest[0].loss_scale:
            figures.append(("scale", f"{newest[0].loss_scale:g}"))
        if newest[0].skipped_steps:
            figures.append(("skipped", f"{newest[0].skipped_steps} steps"))
    return figures
