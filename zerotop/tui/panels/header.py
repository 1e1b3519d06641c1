"""Three lines on the run as a whole: how far it is and until when, whether its loss is well and what fills the fullest
GPU, and what will happen next."""

from __future__ import annotations

from rich.cells import cell_len
from rich.style import Style

from runtime.wire.messages import LIVE_STATES
from zerotop.clean import clean_line
from zerotop.format import (
    count_text,
    digits_text,
    duration_text,
    figure_text,
    finish_text,
    ms_text,
    share_text,
    used_of,
)
from zerotop.state.efficiency import run_efficiency
from zerotop.state.losstrend import LossTrend, loss_trend
from zerotop.state.memory import SHORT_LABELS, MemoryUse, category_label
from zerotop.state.outlook import coming
from zerotop.state.progress import overdue_s
from zerotop.state.thresholds import FULL
from zerotop.tui.text import STATES
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import thin_bar
from zerotop.tui.widgets.lines import PLAIN, Panel, Row, fit
from zerotop.tui.widgets.spark import relative_range, spark

LINES = 3
BAR_LEAST, BAR_MOST = 6, 40
NORM_FROM, NORM_CELLS = 150, 16
"""From this width on, the gradient norm stands beside the loss, with its newest values as a curve."""
DIRECTIONS: dict[str, tuple[str, str]] = {
    "falling": ("▼", "success"),
    "flat": ("→", "foreground"),
    "rising": ("▲", "warning"),
    "not a number": ("✖", "error"),
    "too early": ("◌", "muted"),
}
"""Where the loss is heading -> (glyph, colour of [ui]); the word is always beside the glyph."""
Piece = list[tuple[str, Style]]


class Header(Panel):
    """Parts are ordered by importance: what does not fit is left out from the end of its line."""

    can_focus = False
    ALLOW_MAXIMIZE = False
    READS = ("step", "evaluation", "memory", "alert", "command_record")
    _trend = LossTrend("too early")
    _trend_key: object = None

    def natural_height(self, width: int) -> int:
        return LINES

    def inputs(self, view: View) -> object:
        age_s = int(view.age_s) if view.age_s >= 2 else 0
        shown = (view.condition, view.connection, view.read_only, age_s, view.earlier, int(view.wall_s))
        return super().inputs(view), shown, duration_text(_overdue_s(view) or 0.0)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        return [_progress_row(view, width), self._health_row(view, width), _next_row(view, width)][:height]

    def _health_row(self, view: View, width: int) -> Row:
        """Whether the loss is well, and what fills the fullest GPU."""
        earlier = view.earlier[0] if view.earlier else None
        series = view.state.series
        key = (series.newest, len(series), earlier)
        if key != self._trend_key:  # between two steps the trend is the same
            self._trend_key, self._trend = key, loss_trend(series, earlier)
        memory = _memory(view)
        least = sum(cell_len(text) for text, _ in memory[0]) if memory else 0
        row = _put(Row().gap(), _loss(view, self._trend, width), width - (least + 3 if least else 0))
        if memory:
            row.add(" │ ", view.palette.style("border"))
            for text, style in memory[0]:
                row.add(text, style)
            for piece in memory[1:]:  # the largest first, and none after one that does not fit
                before = row.width
                if _put(row, [piece], width, " ").width == before:
                    break
        return row


def _put(row: Row, pieces: list[Piece], width: int, gap: str = "  ") -> Row:
    """Add what fits, in order."""
    for piece in pieces:
        size = sum(cell_len(text) for text, _ in piece)
        if size and row.width + size + (len(gap) if row.width > 1 else 0) <= width:
            row.add(gap if row.width > 1 else "")
            for text, style in piece:
                row.add(text, style)
    return row


# ---- how far, and until when -----------------------------------------------------------------------------------------
def _progress_row(view: View, width: int) -> Row:
    palette, done = view.palette, view.progress
    muted, plain = palette.style("muted"), (palette.style("muted") if view.stale else PLAIN)
    now = "saving" if view.condition.saving else view.condition.name
    glyph, colour = STATES[now]
    right, right_style = _connection(view, width)
    state = view.state
    name = state.status.name if state.status else state.hello.run if state.hello else "…"
    row = Row().gap().add(fit(name, min(cell_len(name), max(8, width // 8))), palette.style("primary", bold=True))
    row.gap(2).add(f"{glyph} {now}", palette.style(colour, bold=True))
    room = width - cell_len(right) - 3
    if view.frozen:
        badge = f" ❄ VIEW FROZEN at step {done.step} · f follows again "
        row.gap(2).add(badge, palette.style("accent", bold=True, reverse=True))
    of = "" if done.steps is None else f" of {done.steps}"
    step: Piece = [("step ", muted), (f"{done.step}", Style(bold=True)), (of, plain)]
    finish: Piece = []
    if done.eta_s is not None and view.condition.moving and not view.stale:
        at = finish_text(view.wall_s + done.eta_s, view.wall_s)
        finish = [("done ", muted), (at, Style(bold=True)), (f" in {duration_text(done.eta_s)}", plain)]
    elif view.condition.moving and not view.stale and done.steps is not None:
        finish = [("done ", muted), ("not known yet", muted)]
    _put(row, [step], room)
    if (overdue_s := _overdue_s(view)) is not None:
        _put(row, [[(f"last step {duration_text(overdue_s)} ago", palette.style("warning"))]], room)
    rest = room - row.width - 2 - sum(cell_len(text) for text, _ in finish) - 2
    if done.share is not None and rest >= BAR_LEAST + 6:
        bar = min(BAR_MOST, rest - 6, max(BAR_LEAST, width // 5))
        fill = palette.style("muted" if view.stale else colour)
        row.gap(2).extend(thin_bar(done.share, bar, fill, palette.style("border"))).add(f" {done.share:>4.0%}", plain)
    _put(row, [finish], room)
    _put(row, _speed(view, muted, plain), room)
    return row.to(width - cell_len(right) - 1).add(right, right_style)


def _overdue_s(view: View) -> float | None:
    """Since when the newest step is overdue. While the data are old, that is what is told instead; a paused run takes
    no steps."""
    if view.stale or view.frozen or view.state.state_name != "running":
        return None
    return overdue_s(view.state, view.progress.step_ms)


def _speed(view: View, muted: Style, plain: Style) -> list[Piece]:
    done, state = view.progress, view.state
    pieces: list[Piece] = []
    if done.step_ms is not None:
        pieces.append([(f"{ms_text(done.step_ms)}/step", plain)])
    if done.tokens_per_s is not None:
        pieces.append([(f"{count_text(done.tokens_per_s)} tokens/s", plain)])
    if (mfu := run_efficiency(state).mfu) is not None:
        pieces.append([("MFU ", muted), (f"{mfu:.0%}", plain)])
    status = state.status
    if status is not None and status.started_wall_s is not None and not view.ended and view.wall_s:
        pieces.append([("up ", muted), (duration_text(max(0.0, view.wall_s - status.started_wall_s)), plain)])
    return pieces


def _connection(view: View, width: int) -> tuple[str, Style]:
    """How the screen stands to the run, and over SSH on which machine that is."""
    text, style = _state_of_connection(view, width)
    where = fit(view.host, min(cell_len(view.host), max(8, width // 6))) if view.host else ""
    return (f"{where} · {text}" if where else text), style


def _state_of_connection(view: View, width: int) -> tuple[str, Style]:
    palette = view.palette
    if view.connection == "replay":
        return "replay", palette.style("accent", bold=True)
    if view.connection == "ended" or view.condition.name not in {*LIVE_STATES, "stalled", "unknown"}:
        return "run ended", palette.style("muted")
    age = duration_text(view.age_s) if view.age_s >= 2 else ""
    lock = " · ⊘ locked, read-only" if view.read_only else ""
    if view.connection == "live":
        if view.stale:
            return f"▲ no data for {age}{lock}", palette.style("warning", bold=True)
        return f"● live{' · ' + age if age else ''}{lock}", palette.style("success")
    glyph, colour = ("◌", "primary") if view.connection == "connecting" else ("▲", "warning")
    text = f"{glyph} {view.connection}{' · data ' + age + ' old' if age else ''}{lock}"
    return fit(text, min(cell_len(text), max(12, width - 44))), palette.style(colour, bold=True)


# ---- is the loss well, and what fills the fullest GPU ----------------------------------------------------------------
def _loss(view: View, trend: LossTrend, width: int) -> list[Piece]:
    palette = view.palette
    muted, plain = palette.style("muted"), (palette.style("muted") if view.stale else PLAIN)
    if trend.newest is None:
        return [[("loss ", muted), ("none yet", muted)]]
    glyph, colour = DIRECTIONS[trend.direction]
    style = muted if view.stale else palette.style(colour, bold=colour in ("warning", "error"))
    pieces: list[Piece] = [[("loss ", muted), (figure_text(trend.newest), Style(bold=True)), (f" {glyph} ", style)]]
    pieces[0].append((trend.direction, style))
    if trend.best is not None:
        newest = trend.best_step == view.progress.step
        at = " now" if newest else f" at {trend.best_step:,}"
        pieces.append([("best ", muted), (figure_text(trend.best), plain), (at, muted)])
    if trend.per_1000 is not None and trend.direction in ("falling", "rising"):
        pieces[0].append((f" {digits_text(abs(trend.per_1000), 2)}/1000 steps", plain))
    if trend.not_finite:
        pieces.insert(1, [(f"✖ {trend.not_finite} steps not a number", palette.style("error", bold=True))])
    if accidents := _accidents(trend):
        pieces.append([(accidents, plain)])
    if trend.against is not None:
        word, tone = ("below", "success") if trend.against < 0 else ("above", "warning")
        text = f"{figure_text(abs(trend.against))} {word} {trend.against_name}"
        pieces.append([(text, muted if view.stale else palette.style(tone)), (" at this step", muted)])
    evaluation = view.state.evaluations.newest
    if evaluation is not None and evaluation.loss is not None:
        pieces.append([("evaluation ", muted), (figure_text(evaluation.loss), plain)])
    if trend.norm is not None and width >= NORM_FROM:
        pieces.append([("norm ", muted), (figure_text(trend.norm), plain)])
        if len(trend.norms) > 1:
            newest_norms = trend.norms[-NORM_CELLS:]
            pieces[-1].append((f" {spark(newest_norms, NORM_CELLS, *relative_range(newest_norms))}", plain))
    return pieces


def _accidents(trend: LossTrend) -> str:
    """How many steps were skipped, and at how many the gradient norm jumped; "" if there were none. Short, so that it
    fits at 120 columns."""
    spikes = f"{trend.spikes} norm spike{'s' * (trend.spikes > 1)}" if trend.spikes else ""
    skipped = f"{trend.skipped} skipped" if trend.skipped else ""
    return ", ".join(text for text in (skipped, spikes) if text)


def fullest(view: View) -> tuple[int, MemoryUse] | None:
    """The rank whose device is fullest; on CPUs the one with the largest process."""
    uses = view.memory_uses
    return max(uses.items(), key=lambda one: one[1].used_bytes / max(1, one[1].total_bytes), default=None)


def _memory(view: View) -> list[Piece]:
    found = fullest(view)
    if found is None:
        return []
    rank, use = found
    palette = view.palette
    muted, plain = palette.style("muted"), (palette.style("muted") if view.stale else PLAIN)
    share = use.used_bytes / max(1, use.total_bytes)
    nearly = use.on_gpu and share >= FULL and not view.stale
    what = f"fullest {'GPU' if use.on_gpu else 'rank'} {rank} "
    style = palette.style("warning", bold=True) if nearly else plain
    first: Piece = [(what, muted), (used_of(use.used_bytes, use.total_bytes), style)]
    if use.on_gpu:
        first.append((f" {share:.0%}", style))
    if nearly:
        first.append((" ▲ nearly full", style))
    largest = sorted(use.parts, key=lambda part: -part[1])
    words = [(name, share_text(count, use.used_bytes)) for name, count in largest if count >= 0.03 * use.used_bytes]
    pieces = [first]
    for name, part in words:
        label = category_label(name) if len(words) <= 5 else SHORT_LABELS.get(name, category_label(name))
        pieces.append([(f"{label} ", muted), (part, plain)])
    return pieces


def _alerts(view: View, room: int) -> str:
    """The alerts that fire, the worst by name, as far as there is room; the events have the rest."""
    firing = [] if view.ended else view.state.firing()
    if not firing:
        return ""
    more = f" and {len(firing) - 1} more" if len(firing) > 1 else ""
    first = f"▲ alert: {firing[0].name}"
    names = (f"{first}: {firing[0].text}{more}", f"{first}{more}", f"▲ {len(firing)} alert{'s' * (len(firing) > 1)}")
    return next((clean_line(text) for text in names if len(text) <= room), "▲" if room > 0 else "")


# ---- what comes next, and what the run is ----------------------------------------------------------------------------
def _next_row(view: View, width: int) -> Row:
    palette = view.palette
    muted, plain = palette.style("muted"), (palette.style("muted") if view.stale else PLAIN)
    row = Row().gap()
    why = _why(view)
    if alerts := _alerts(view, width - 2):
        row.add(alerts, palette.style(view.state.firing()[0].severity, bold=True)).gap(2)
    if why:
        row.add(fit(why, max(0, min(cell_len(why), width - row.width - 1))), plain)
    pieces: list[Piece] = []
    live = view.condition.moving and not view.stale and not view.frozen
    next_ones = coming(view.state, view.progress) if live else []
    for number, one in enumerate(next_ones):
        piece: Piece = [("next: ", muted)] if not number else []
        piece.append((one.text, plain))
        if one.seconds is not None:
            piece.append((f" ({finish_text(view.wall_s + one.seconds, view.wall_s)})", muted))
        pieces.append(piece)
    if live and not next_ones:
        pieces.append([("next: ", muted), ("nothing is scheduled", muted)])
    _put(row, pieces, width, " · " if not why else "  ")
    return _put(row, [[(text, muted if view.stale else PLAIN)] for text in _facts(view)], width)


def _facts(view: View) -> list[str]:
    hello, status, state = view.state.hello, view.state.status, view.state
    facts: list[str] = []
    if status is not None and status.restarts:
        replayed = f", {status.lost_steps} steps replayed" if status.lost_steps else ""
        facts.append(f"restarts {status.restarts}{replayed}")
    if hello is not None:
        model = f"{hello.model_name} {count_text(hello.parameters)}" if hello.parameters else hello.model_name
        layout = f"ZeRO-{hello.stage}" if hello.stage else "ZeRO-0 (data parallel)"
        facts += [model.strip(), hello.trainer or layout, hello.precision]
        facts.append(f"{hello.world_size} rank{'s' if hello.world_size != 1 else ''}")
    saved = status.last_checkpoint_step if status else None
    facts.append(f"checkpoint: step {saved}" if saved is not None else "no checkpoint yet")
    if status is not None and status.restarts and status.state == "running":
        facts.append(f"restarted: {status.restart_reason}")
    if hello is not None:
        if hello.micro_batch:
            parts = f"{hello.world_size} × {hello.micro_batch} × {hello.accumulation}"
            facts.append(f"batch {hello.global_batch} = {parts}")
        facts += [f"seq {hello.seq_len}" if hello.seq_len else "", hello.backend]
        if hosts := sorted({rank.hello.host for rank in state.ranks.values() if rank.hello is not None}):
            facts.append(f"on {hosts[0]}" if len(hosts) == 1 else f"on {len(hosts)} hosts")
    return [fact for fact in facts if fact]


def _why(view: View) -> str:
    """The reason of the run's state, where the verdict line does not give it."""
    status = view.state.status
    told = {"running", "failed", "aborted"}
    return status.reason if status is not None and not view.frozen and status.state not in told else ""
