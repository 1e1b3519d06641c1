"""A plan in the terminal: a bar per layout, its bytes by category, and what it means. Readable without colour."""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from runtime.plan import CATEGORIES, EXACT, Layout
from runtime.plan.decoder import DecoderShape
from runtime.plan.estimate import LAYERS_ON_DEVICE, logits_bytes
from runtime.plan.workload import ELEMENT_BYTES, Workload
from zerotop.format import bytes_text, count_text, short_bytes_text
from zerotop.output import table

ESTIMATED = tuple(category for category in CATEGORIES if category not in (*EXACT, "buffers"))

_GLYPHS = {
    "parameters": ("█", "34"),
    "gradients": ("▓", "33"),
    "masters": ("▒", "35"),
    "optimizer": ("░", "36"),
    "buffers": ("▚", "31"),
    "activations": ("∷", "32"),
    "logits": ("=", "32"),
    "temporary": ("~", "32"),
    "context": ("·", "90"),
}
"""Category -> glyph and SGR colour."""

_ASCII = dict(zip(CATEGORIES, "PGMObalt.", strict=True))
_NARROWEST, _WIDEST = 60, 120


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` most like `word`, or None."""
    return next(iter(difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.5)), None)


def render(
    workload: Workload,
    layouts: Sequence[Layout],
    chosen: Layout | None,
    advice: Sequence[str],
    notes: Sequence[str],
    vram_bytes: int | None,
) -> str:
    """The whole answer as lines, at most as wide as the terminal."""
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((100, 24)).columns))
    paint = _Paint()
    parts = [
        _heading(workload),
        _bars(layouts, chosen, vram_bytes, width, paint),
        _legend(width, paint),
        _figures(layouts, width),
    ]
    marks = [(f"{paint.bullet} ", text) for text in advice] + [
        ("- ", text) for text in [*_assumptions(workload), *notes]
    ]
    wrapped = [textwrap.fill(text, width, initial_indent=mark, subsequent_indent="  ") for mark, text in marks]
    return "\n\n".join([*parts, "\n".join(wrapped[: len(advice)]), "\n".join(wrapped[len(advice) :])])


def _heading(workload: Workload) -> str:
    kind = "GPU" if workload.device == "cuda" else "rank"
    gpus = f"{workload.world_size} {kind}{'s' if workload.world_size > 1 else ''}"
    if workload.device == "cpu":
        gpus += " on the CPU"
    batch = f"micro-batch {workload.micro_batch} x {workload.seq_len} tokens, {workload.accumulation} micro-step"
    count = count_text(workload.parameters)
    if workload.shape_guessed:
        what = f"A model of {count} parameters"
    else:
        what = f"{workload.name}: {count} parameters ({workload.parameters:,}) in {len(workload.units)} units"
    if workload.frozen:
        what += f", of which {count_text(workload.trained_parameters)} are trained"
    return (
        f"{what}, {workload.precision}\n{gpus}, {batch}{'s' if workload.accumulation > 1 else ''}. Memory per {kind}:"
    )


class _Paint:
    """Colour only on a terminal that wants it; plain letters where the encoding has no block characters."""

    def __init__(self) -> None:
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        try:
            "".join(glyph for glyph, _ in _GLYPHS.values()).encode(encoding)
            self.blocks = True
        except (UnicodeEncodeError, LookupError):
            self.blocks = False

    def run(self, category: str, cells: int) -> str:
        glyph, colour = _GLYPHS[category]
        text = (glyph if self.blocks else _ASCII[category]) * cells
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and text else text

    @property
    def bullet(self) -> str:
        return "•" if self.blocks else "*"

    @property
    def limit(self) -> str:
        return "│" if self.blocks else "|"


def _bars(layouts: Sequence[Layout], chosen: Layout | None, vram_bytes: int | None, width: int, paint: _Paint) -> str:
    names = [f"{'>' if layout == chosen else ' '} {layout.label}" for layout in layouts]
    name_width = max(map(len, names))
    room = width - name_width - 12
    scale = max(max(layout.gpu_bytes for layout in layouts), vram_bytes or 0)
    limit = None if vram_bytes is None else min(room - 1, round(room * vram_bytes / scale))
    lines = []
    for name, layout in zip(names, layouts, strict=True):
        bar = _bar(layout, scale, room, limit, paint)
        lines.append(f"{name:<{name_width}} {bytes_text(layout.gpu_bytes):>9}  {bar}".rstrip())
    if vram_bytes is not None and limit is not None:
        size = f"VRAM {bytes_text(vram_bytes)}"
        mark = f"{size} {paint.limit}".rjust(limit + 1) if limit > len(size) else " " * limit + f"{paint.limit} {size}"
        lines.append(" " * (name_width + 12) + mark)
    return "\n".join(lines)


def _bar(layout: Layout, scale: int, room: int, limit: int | None, paint: _Paint) -> str:
    """One bar. Its cells come from rounding the running sum, so that the bar's length is right as a whole."""
    cells: list[str] = []
    seen = 0
    for category in CATEGORIES:
        seen += layout.gpu[category]
        cells += [category] * (round(room * seen / scale) - len(cells))
    if limit is None:
        return _join(cells, paint)
    before, after = cells[:limit], cells[limit + 1 :]
    gap = " " * (limit - len(before))
    return _join(before, paint) + gap + paint.limit + _join(after, paint)


def _join(cells: Sequence[str], paint: _Paint) -> str:
    return "".join(paint.run(category, cells.count(category)) for category in CATEGORIES)


def _legend(width: int, paint: _Paint) -> str:
    entries = [
        (len(category) + 4, f"{paint.run(category, 1)} {'~' if category in ESTIMATED else ''}{category}")
        for category in CATEGORIES
    ]
    lines, line, used = [], list[str](), 0
    for size, entry in entries:
        if used + size > width:
            lines.append("  ".join(line))
            line, used = [], 0
        line.append(entry)
        used += size + 1
    return "\n".join([*lines, "  ".join([*line, "(~ estimated)"])])


def _figures(layouts: Sequence[Layout], width: int) -> str:
    """Bytes by category; in a narrow terminal what no stage changes is left to the bars."""
    short = {"parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "~activ"}
    short["logits"] = "~logits"
    shown = CATEGORIES[:5] if width < 118 else CATEGORIES[:7]
    header = ["", *(short.get(category, category) for category in shown), "host RAM", "sent/step"]
    rows = [
        [
            layout.label,
            *(_cell(layout.gpu[category]) for category in shown),
            _cell(layout.host_bytes),
            _cell(layout.sent_bytes),
        ]
        for layout in layouts
    ]
    return table(header, rows, right=range(1, len(header)))


def _cell(size_bytes: int) -> str:
    """Short, to keep eight columns in a terminal of 80."""
    return short_bytes_text(size_bytes)


def _assumptions(workload: Workload) -> list[str]:
    on_gpus = workload.device == "cuda"
    where = "Host RAM: all ranks on one node, without the processes themselves."
    if not on_gpus:
        where = "The processes themselves (Python, torch, its libraries) come on top."
    cast = f", and autocast's {workload.precision} copy of the weights (buffers)"
    frozen = f"; frozen ones are in {workload.precision}" if workload.frozen else ""
    return [
        f"K, M, G are 2^10, 2^20, 2^30 bytes. Sent: per {'GPU' if on_gpus else 'rank'} and optimizer step, ring "
        f"collectives. {where}",
        "Data parallel is torch's DDP with fp32 parameters, 16 bytes each with Adam, gradient_as_bucket_view=True"
        f"{'' if workload.precision == 'fp32' else cast}{frozen}.",
        f"Gradients accumulate in {workload.grad_accum_dtype}{_kept_whole(workload)}. "
        f"Activations are for {_attention(workload)} {_checkpointing(workload)}.",
        *_finetuning(workload),
    ]


def _attention(workload: Workload) -> str:
    if isinstance(workload.shape, DecoderShape) and workload.shape.attention != "fused":
        return (
            "fused attention with a mask, as packing has,"
            if workload.shape.attention == "masked"
            else "eager attention"
        )
    return "fused attention"


def _finetuning(workload: Workload) -> Iterator[str]:
    """What holds for Hugging Face models."""
    if workload.frozen:
        yield (
            f"{count_text(workload.frozen_parameters)} parameters are frozen: they have no gradients, masters or "
            "optimizer states, and stage 3 shards them, too."
        )
    if workload.chunked_loss:
        yield (
            "Cross-entropy is computed in chunks, so that logits never exist as a whole. A model that changes its "
            f"logits in a way of its own falls back to whole ones{_whole_logits(workload)}, with a warning before the "
            "first step."
        )
    if workload.moment_bytes < 4:
        yield "Moments are in bf16 (zerotop.optimizer_state_dtype)."


def _whole_logits(workload: Workload) -> str:
    if workload.shape is None:
        return ""
    element = ELEMENT_BYTES[workload.precision]
    return f" of {bytes_text(logits_bytes(workload.shape, workload.micro_batch, workload.seq_len, element))}"


def _kept_whole(workload: Workload) -> str:
    return ', whole until the boundary (zerotop.accumulate "local")' if workload.accumulate_locally else ""


def _checkpointing(workload: Workload) -> str:
    if workload.segments is None or workload.shape is None:
        offloaded = workload.offload_activations and workload.device == "cuda" and workload.shape is not None
        kept = f", of {LAYERS_ON_DEVICE} blocks at a time; the others' are in host memory" if offloaded else ""
        return f"without activation checkpointing{kept}"
    groups = min(workload.segments, workload.shape.layers)
    moved = (workload.inputs_on_host or workload.offload_activations) and workload.device == "cuda"
    on_host = ", whose inputs wait in host memory" if moved else ""
    return f"with activation checkpointing of {groups} group{'s' if groups > 1 else ''} of layers{on_host}"
