"""What the CPU that tests run on is good at."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _multiplies_bf16() -> bool:
    try:
        return "_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


BF16_IF_QUICK: dict[str, Any] = {"bf16": {"enabled": True}} if _multiplies_bf16() else {}
"""A part of a config: bf16, or fp32 where torch multiplies bf16 by a way around that is 20 times as slow (a step of the
smallest preset takes a second there). For tests of whole runs, whose subject is not the precision."""
