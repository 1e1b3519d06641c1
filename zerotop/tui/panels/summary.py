"""The result of a run that has ended: its curve, its figures, and the next commands."""

from __future__ import annotations

import math

from rich.style import Style

from zerotop.format import (
    bytes_text,
    count_text,
    duration_text,
    energy_text,
    figure_text,
    ms_text,
    perplexity_text,
    rate_text,
)
from zerotop.state.abilities import has_our_checkpoints, is_wrapped
from zerotop.state.checkpoints import best_checkpoint
from zerotop.state.efficiency import run_efficiency
from zerotop.state.evaluations import perplexity
from zerotop.state.memory import memory_use
from zerotop.state.run import RunState
from zerotop.state.smoothing import envelope, smooth
from zerotop.tui.text import STATES
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import PLAIN, Panel, Row, fit
from zerotop.tui.widgets.plot import BEST_MARK, Curve, Look, draw_plot

FACTS_WIDTH = 66
PLOT_FROM = 90
"""Narrower than this, there is no room for a curve beside the figures."""


class SummaryPanel(Panel, can_focus=True):
    """A card worth a screenshot."""

    READS = ("step", "evaluation", "memory", "node", "checkpoint_saved")

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")

    def accept(self, view: View) -> None:
        status = view.state.status
        name = status.name if status is not None else "the run"
        glyph, _ = STATES[view.state.state_name]
        self.entitle(f"{glyph} {name} · {view.state.state_name}")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        facts = _facts(view)
        commands = _commands(view)
        muted, accent = view.palette.style("muted"), view.palette.style("accent")
        beside = width >= PLOT_FROM
        inner = FACTS_WIDTH if beside else width
        rows = [Row().cell(label, 14, muted).add(fit(text, inner - 14).rstrip(), style) for label, text, style in facts]
        rows.append(Row())
        rows += [Row().add("→ ", accent).add(fit(command, inner - 2).rstrip()) for command in commands]
        if len(rows) > height:  # the commands matter more than the last figures
            kept = len(commands)
            rows = [*rows[: max(0, height - kept)], *rows[len(rows) - kept :]][:height]
        if not beside:
            return rows
        plot = _plot(view, width - FACTS_WIDTH - 2, height)
        rows += [Row() for _ in range(height - len(rows))]
        return [row.to(FACTS_WIDTH + 2).extend(line.segments) for row, line in zip(rows, plot, strict=False)]


def _plot(view: View, width: int, height: int) -> list[Row]:
    palette = view.palette
    points = [(float(point.step), point.loss) for point in view.state.series]
    values = smooth([loss for _, loss in points])
    line = [(step, value) for (step, _), value in zip(points, values, strict=True)]
    edges = envelope([loss for _, loss in points], values)
    band = [(step, low, high) for (step, _), (low, high) in zip(points, edges, strict=True)]
    curves = [Curve(line, palette.plot("loss"), band, palette.plot_band("loss"))]
    evaluations = [(float(one.step), one.loss) for one in view.state.evaluations if one.loss is not None]
    if evaluations:
        best = view.state.evaluations.best
        at = float(best.step) if best is not None else None
        curves.append(Curve(evaluations, palette.plot("evaluation"), marked=True, best=at))
    look = Look(palette.style("muted"), palette.style("border"), palette.style("accent"))
    return draw_plot(curves, width, height, look).rows


def _facts(view: View) -> list[tuple[str, str, Style]]:
    """(label, text, style) of what is known."""
    state, status, palette = view.state, view.state.status, view.palette
    bold = Style(bold=True)
    facts: list[tuple[str, str, Style]] = []
    if status is not None and status.reason and status.state == "stopped":  # else the verdict says it
        facts.append(("why", status.reason, PLAIN))
    took_s = None
    if status is not None and status.started_wall_s is not None and status.ended_wall_s is not None:
        took_s = status.ended_wall_s - status.started_wall_s
        facts.append(("time", duration_text(took_s), bold))
    done = view.progress
    of = f" of {done.steps:,}" if done.steps is not None else ""
    facts.append(("trained", f"{done.step:,}{of} steps{_tokens_text(state, done.step)}", PLAIN))
    points = list(state.series)
    losses = [(point.loss, point.step) for point in points if point.loss is not None and math.isfinite(point.loss)]
    if losses:
        best, step = min(losses)
        facts.append(("loss", f"{figure_text(losses[-1][0])}, best {figure_text(best)} at step {step:,}", bold))
    newest, lowest = state.evaluations.newest, state.evaluations.best
    if newest is not None and lowest is not None:
        text = f"{figure_text(lowest.loss)} (perplexity {perplexity_text(perplexity(lowest.loss))}) at {lowest.step:,}"
        facts.append(("evaluation", f"{BEST_MARK} {text}", palette.plot("evaluation")))
    timed = [point for point in points if point.tokens_per_s is not None]
    if took_ms := sum(point.step_ms for point in timed):
        mean = sum((point.tokens_per_s or 0.0) * point.step_ms for point in timed) / took_ms * max(1, state.world_size)
        facts.append(("speed", f"{rate_text(mean)}, {ms_text(took_ms / len(timed))} a step", PLAIN))
    efficiency = run_efficiency(state)
    if efficiency.tflops is not None:
        facts.append(("efficiency", efficiency.text, PLAIN))
    energy = state.energy_use()
    if energy is not None:
        whole = energy.joules_per_step * done.step
        facts.append(("energy", f"about {energy_text(whole)}, {energy_text(energy.joules_per_step)} a step", PLAIN))
    uses = [memory_use(rank.memory) for rank in state.ranks.values() if rank.memory is not None]
    peaks = [
        max(rank.memory.peak_bytes.values(), default=0) for rank in state.ranks.values() if rank.memory is not None
    ]
    if uses:
        peak = max(max(peaks), max(use.used_bytes for use in uses))
        facts.append(("memory", f"at most {bytes_text(peak)} of {bytes_text(uses[0].total_bytes)} on a rank", PLAIN))
    saved = status.last_checkpoint_step if status is not None else None
    facts.append(("checkpoint", _checkpoint_text(state, saved), PLAIN))
    if status is not None and status.restarts:
        facts.append(("restarts", f"{status.restarts}, the last because {status.restart_reason}", PLAIN))
    return facts


def _checkpoint_text(state: RunState, saved: int | None) -> str:
    """The newest checkpoint, and the one that is worth most."""
    best = best_checkpoint(state)
    newest = f"step {saved:,}" if saved is not None else "none"
    if best is None:
        return newest
    return f"{newest}, nearest {best.of}" + (f": step {best.step:,}" if best.step != saved else "")


def _tokens_text(state: RunState, steps: int) -> str:
    """How many tokens were trained on: as many as a batch has in every step, where that is known, else as the speed of
    the steps adds up to."""
    hello = state.hello
    if hello is not None and hello.seq_len and hello.global_batch:
        return f", {count_text(steps * hello.global_batch * hello.seq_len)} tokens"
    tokens, before = 0.0, None
    for point in state.series:  # a thinned series: each point stands for the steps since the one before
        if point.tokens_per_s is not None:
            taken = point.step - before if before is not None else 1
            tokens += point.tokens_per_s * point.step_ms / 1000 * taken
        before = point.step
    return f", about {count_text(tokens * max(1, state.world_size))} tokens" if tokens else ""


def _commands(view: View) -> list[str]:
    """What to do next with the run."""
    status = view.state.status
    if status is None:
        return []
    name, saved = status.name, status.last_checkpoint_step
    found = []
    if status.state != "finished" and saved is not None and not is_wrapped(view.state):
        found.append(f"zerotop launch --resume --name {name}     continue from step {saved:,}")
    if saved is not None and has_our_checkpoints(view.state):
        best = best_checkpoint(view.state)
        which = f"{name}/step-{best.step}" if best is not None and best.step != saved else name
        found.append(f"zerotop export {which} out/     the weights as Hugging Face safetensors")
    if status.state == "failed":
        found += [
            f"zerotop logs {name} --rank {status.failed_rank or 0}",
            f"zerotop report {name}     for a bug report",
        ]
    return [*found, f"zerotop status {name} --json     all figures"]
