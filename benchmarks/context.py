"""What a figure was measured on: the lines that stand beside every table."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository root, where every measured process is started."""


def measured_on(module: str, packages: tuple[str, ...]) -> dict[str, str]:
    """The command line, the date, and versions of `packages` as this interpreter has them.

    module: what `python -m` was given; the interpreter's own path would say nothing to a reader elsewhere.
    """
    return {
        "command": f"python -m {module} {shlex.join(sys.argv[1:])}".rstrip(),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} logical cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
    }


def markdown(title: str, context: dict[str, str], body: str) -> str:
    """A page with the command first, then what it ran on, then `body`."""
    about = "\n".join(f"- {name}: {text}" for name, text in context.items() if name != "command")
    return f"# {title}\n```\n{context['command']}\n```\n{about}\n\n{body}\n"


def table(header: list[str], rows: list[list[str]], *, pipes: bool = False) -> str:
    """Columns as wide as their widest cell, numbers to the right; with `pipes` as Markdown."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    between, edge = (" | ", "|") if pipes else ("  ", "")
    lines = [
        [cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    if pipes:
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        return "\n".join(f"{edge} {between.join(cells)} {edge}" for cells in lines)
    return "\n".join(between.join(cells).rstrip() for cells in lines)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
