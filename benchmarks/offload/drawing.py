"""A trace as a picture for people, and as a file for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from benchmarks.offload.tracing import Event

COLOURS = {
    "forward": "#4c9be8",
    "backward": "#2f6fb0",
    "update": "#e8a33d",
    "wait": "#d1495b",
    "step": "#7a7f87",
}
LANES = ("training", "update")
WIDTH, LEFT, LANE, GAP, TOP = 1100, 90, 44, 14, 34


def as_svg(events: Sequence[Event], title: str) -> str:
    """Both threads on one time axis, from the launch of an update on."""
    begin, end = min(e.start_ns for e in events), max(e.end_ns for e in events)
    scale = (WIDTH - LEFT - 12) / (end - begin)
    height = TOP + len(LANES) * (LANE + GAP) + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="14" fill="#20242a">{escape(title)}</text>',
    ]
    for row, lane in enumerate(LANES):
        y = TOP + row * (LANE + GAP)
        parts.append(f'<text x="12" y="{y + LANE / 2 + 4}" fill="#20242a">{lane}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 12}" height="{LANE}" fill="#f1f3f5"/>')
        for event in sorted((e for e in events if e.lane == lane), key=lambda e: e.start_ns - e.end_ns):
            x, width = LEFT + (event.start_ns - begin) * scale, (event.end_ns - event.start_ns) * scale
            if width < 0.3:
                continue
            told = f"{event.kind} {event.name} {(event.end_ns - event.start_ns) / 1e6:.1f} ms"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.6, 0.4):.1f}" height="{LANE}" '
                f'fill="{COLOURS[event.kind]}"><title>{escape(told)}</title></rect>'
            )
            short = event.name.rpartition(".")[2] or event.kind
            if width > 7.5 * len(short) + 4:
                middle, line = x + width / 2, y + LANE / 2 + 4
                parts.append(
                    f'<text x="{middle:.1f}" y="{line}" fill="#ffffff" text-anchor="middle">{escape(short)}</text>'
                )
    y = TOP + len(LANES) * (LANE + GAP)
    for tick in range(6):
        x = LEFT + (WIDTH - LEFT - 12) * tick / 5
        ms = (end - begin) / 1e6 * tick / 5
        anchor = "end" if tick == 5 else "middle"
        parts.append(f'<text x="{x:.0f}" y="{y + 8}" fill="#5b626b" text-anchor="{anchor}">{ms:.0f} ms</text>')
    for index, (kind, colour) in enumerate(COLOURS.items()):
        x = LEFT + index * 120
        parts.append(f'<rect x="{x}" y="{y + 24}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 36}" fill="#20242a">{kind}</text>')
    return "\n".join([*parts, "</svg>", ""])


def as_perfetto(events: Sequence[Event]) -> str:
    """The trace event format: one complete event ("X") each, times in microseconds."""
    begin = min(e.start_ns for e in events)
    threads = [
        {"ph": "M", "pid": 0, "tid": index, "name": "thread_name", "args": {"name": lane}}
        for index, lane in enumerate(LANES)
    ]
    spans = [
        {
            "ph": "X",
            "pid": 0,
            "tid": LANES.index(event.lane),
            "name": f"{event.kind} {event.name}".strip(),
            "cat": event.kind,
            "ts": (event.start_ns - begin) / 1e3,
            "dur": (event.end_ns - event.start_ns) / 1e3,
        }
        for event in events
    ]
    return json.dumps({"traceEvents": [*threads, *spans]})
