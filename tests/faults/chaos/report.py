"""What a call of chaos says, and keeps."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from benchmarks.context import markdown, measured_on, table


class Report:
    """Lines as they come, and how often each kind of fault struck."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._lines: list[str] = []

    def say(self, text: str) -> None:
        self._print(f"{time.strftime('%H:%M:%S')} {text}")

    def end(self, wrong: list[str], count: str) -> None:
        """All that went wrong again, and the count as the last line."""
        for text in (*wrong, count):
            self._print(text)

    def write(self, path: Path) -> None:
        """As Markdown: the count, the kinds, every line."""
        rows = [[kind, str(times)] for kind, times in self.kinds.most_common()]
        lines = "\n".join(self._lines)
        body = f"{self._lines[-1]}\n\n{table(['fault', 'times'], rows, pipes=True)}\n\n```\n{lines}\n```"
        context = measured_on("tests.faults.chaos", ("torch",))
        path.write_text(markdown("Chaos: faults at random moments into real two-rank runs", context, body))

    def _print(self, line: str) -> None:
        self._lines.append(line)
        print(line, flush=True)
