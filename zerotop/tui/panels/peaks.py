"""The peaks of a rank's memory by phase, what the plan said, and what will need memory next."""

from __future__ import annotations

import textwrap

from rich.cells import cell_len
from rich.style import Style

from runtime.wire.messages import Memory, PlannedMemory
from zerotop.format import bytes_text, share_text
from zerotop.state.forecast import forecast
from zerotop.state.memory import category_label, memory_use, planned_peak
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import meter
from zerotop.tui.widgets.lines import PLAIN, Panel, Row

NAME, BYTES = 15, 10


class PeakPanel(Panel, can_focus=True):
    """The largest memory in each phase, on one scale with the planned peak."""

    READS = ("memory",)
    rank = 0

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")

    def accept(self, view: View) -> None:
        self.entitle(f"peaks of rank {self.rank} by phase")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette, muted = view.palette, view.palette.style("muted")
        rank = view.state.ranks.get(self.rank)
        memory = rank.memory if rank is not None else None
        if rank is None or memory is None or not memory.peak_bytes:
            text = "no peak yet: the first one comes with the first step"
            return [Row().add(line, muted) for line in textwrap.wrap(text, max(20, width))]
        plan = rank.hello.planned if rank.hello is not None else None
        planned = planned_peak(memory, plan)
        scale = max([*memory.peak_bytes.values(), planned or 0])
        bar = max(6, width - NAME - BYTES)
        rows = []
        for phase, size in sorted(memory.peak_bytes.items(), key=lambda one: -one[1]):
            rows.append(_bar(view, phase, size, scale, bar, palette.phase_text(phase)))
        if planned:
            row = _bar(view, "plan", planned, scale, bar, palette.style("accent"))
            actual = max(size for phase, size in memory.peak_bytes.items() if phase != "init" or len(rows) == 1)
            rows.append(row)
            text = f"the largest is {share_text(actual, planned)} of the planned peak"
            rows += [Row().add(line, muted) for line in textwrap.wrap(text, max(20, width))]
        if memory.activation_bytes:
            most = sorted(memory.activation_bytes.items(), key=lambda one: -one[1])
            text = " · ".join(f"{phase} {bytes_text(size)}" for phase, size in most if size)
            rows += [Row().add(line, muted) for line in textwrap.wrap(f"activations: {text}", max(20, width))]
        return (rows + _units(view, memory, width))[:height]


def _units(view: View, memory: Memory, width: int) -> list[Row]:
    """The activations that each kind of unit keeps for backward, against the most of all."""
    kinds = sorted(((size, kind, count) for kind, (count, size) in memory.unit_activations.items()), reverse=True)
    if not kinds:
        return []
    style = view.palette.phase_text("forward")
    rows = [Row().add("activations of a micro-step by unit:", view.palette.style("muted"))]
    names = [f"{count} {kind}" if count > 1 else kind for _, kind, count in kinds]
    longest = min(max(NAME, *(cell_len(name) + 1 for name in names)), width // 2)
    bar = max(6, width - longest - BYTES)
    most = max([kinds[0][0], *memory.activation_bytes.values()])
    for name, (size, _, _) in zip(names, kinds, strict=True):
        rows.append(_bar(view, name, size, most, bar, style, longest))
    return rows


def _bar(view: View, name: str, size: int, scale: int, width: int, style: Style, name_width: int = NAME) -> Row:
    row = (
        Row()
        .cell(name, name_width, PLAIN)
        .extend(meter(size / max(1, scale), width, style, view.palette.style("border")))
    )
    return row.cell(bytes_text(size), BYTES, PLAIN, right=True)


class PlanPanel(Panel, can_focus=True):
    """Each category as planned and as it is, and the next peaks of the run."""

    READS = ("memory", "node", "step", "evaluation", "command_record")
    rank = 0

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")

    def accept(self, view: View) -> None:
        self.entitle(f"planned and actual, rank {self.rank} · what comes next")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette, muted = view.palette, view.palette.style("muted")
        rank = view.state.ranks.get(self.rank)
        plan = rank.hello.planned if rank is not None and rank.hello is not None else None
        rows: list[Row] = []
        if rank is not None and rank.memory is not None and plan is not None:
            rows += _compared(view, rank.memory, plan)
            if plan.comparison:
                rows += [Row().add(line, muted) for line in textwrap.wrap(plan.comparison, max(20, width))]
        else:
            text = "no plan: the run has a script of its own, or has not begun"
            rows += [Row().add(line, muted) for line in textwrap.wrap(text, max(20, width))]
        needs = forecast(view.state)
        for need in needs:
            style = palette.style("warning", bold=True) if need.short else PLAIN if need.certain else muted
            sign = "▲" if need.short else "→" if need.certain else "·"
            for number, line in enumerate(textwrap.wrap(need.text, max(20, width - 2))):
                rows.append(Row().add(f"{sign} " if not number else "  ", style).add(line, style))
        if not needs and not view.ended:
            text = "→ nothing that needs more memory is known to come"
            rows += [Row().add(line, muted) for line in textwrap.wrap(text, max(20, width))]
        return rows[:height]


def _compared(view: View, memory: Memory, plan: PlannedMemory) -> list[Row]:
    """Category, planned, actual. Activations are what was largest; the plan's logits and temporary gradients belong to
    them."""
    muted = view.palette.style("muted")
    actual = dict(memory_use(memory).parts)
    actual["buffers"] = actual.get("buffers", 0) + actual.pop("communication", 0)  # one category of the plan
    planned = {str(name): size for name, size in plan.device_bytes.items()}
    if plan.shape_known:
        extra = planned.pop("logits", 0) + planned.pop("temporary", 0)
        planned["activations"] = planned.get("activations", 0) + extra
        if memory.activation_bytes:
            actual["activations"] = max(memory.activation_bytes.values())
    rows = [
        Row().cell("", NAME).cell("planned", BYTES, muted, right=True).gap().cell("actual", BYTES, muted, right=True)
    ]
    for name in planned:
        if name == "context" or (not planned[name] and not actual.get(name)):
            continue
        is_now = actual.get(name, 0)
        over = planned[name] and is_now > 1.1 * planned[name]
        style = view.palette.style("warning") if over else PLAIN
        row = Row().cell(category_label(name), NAME).cell(bytes_text(planned[name]), BYTES, muted, right=True)
        rows.append(row.gap().cell(bytes_text(is_now), BYTES, style, right=True))
        if planned[name]:
            rows[-1].cell(share_text(is_now, planned[name]), 7, muted, right=True)
    return rows
