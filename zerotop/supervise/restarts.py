"""Whether a failed attempt is followed by another one: not beyond the limit of the config, and not if it would fail
the same way again."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.config.zerotop import RestartsConfig
from zerotop.diagnose.evidence import FailureEvidence
from zerotop.diagnose.outcome import Outcome
from zerotop.format import duration_text

_REFUSED_EXIT = 2
"""Exit code of a rank that rejects its config, model or data."""
_FIGURE = re.compile(r"\b\d+[dhm] \d+[hms]\b|\b\d+ s\b|0x[0-9a-fA-F]+|(?<!rank )\b\d+(\.\d+)*")
_RANK = re.compile(r"\brank \d")
AGAIN_THE_SAME = "another attempt would end the same way"


@dataclass(frozen=True)
class Failure:
    """What the decision about a restart needs to know of a failed attempt."""

    text: str
    step: int | None
    """The last finished optimizer step; None if the attempt finished none."""
    exit_code: int | None = None
    by_signal: bool = False
    raised: bool = False
    """A rank ended by a Python exception or with its own exit code, or torchrun failed before there was a rank."""
    fatal: bool = False
    repeats: bool = False
    """The cause is the script or its data, so another attempt would end the same way."""
    rank: int | None = None
    hung: bool = False
    """The supervisor ended the ranks, because none of them made progress."""
    scripts_own: bool = False
    """The script never called initialize(), so zerotop can't continue it."""

    @classmethod
    def of(cls, outcome: Outcome, seen: FailureEvidence) -> Failure:
        """The failure that `outcome` describes."""
        rank, code = outcome.failed_rank, outcome.exit_code
        goodbye = seen.goodbyes.get(rank) if rank is not None else None
        # The failing rank knows best; one that was killed does not say, and others were at the same step.
        done = [goodbye.step] if goodbye else [*seen.steps.values(), *(word.step for word in seen.goodbyes.values())]
        step = max((step for step in done if step > seen.start_step), default=None)
        from_outside = code is not None and code < 0 and goodbye is None
        if seen.failure is not None:
            raised = False
        elif rank is not None:
            raised = not from_outside
        else:
            raised = not from_outside and not seen.spoke
        return cls(
            outcome.cause or outcome.reason,
            step,
            code,
            by_signal=from_outside,
            raised=raised,
            fatal=goodbye is not None and goodbye.fatal,
            repeats=outcome.repeats,
            rank=rank,
            hung=seen.failure is not None and not outcome.repeats,
            scripts_own=seen.silent_script,
        )


class Restarts:
    """Counts restarts and decides about the next one. `now` is a monotonic clock."""

    def __init__(self, config: RestartsConfig, now: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.total = 0
        self._now = now
        self._times: deque[float] = deque()
        self._before: Failure | None = None

    def refusal(self, failure: Failure, *, stop_asked: bool = False, stuck: int = 0) -> str | None:
        """Why there is no restart, as text to follow the reason of the failure; empty if that says it all; None: there
        is one.

        `stuck` processes of the failed attempt could not be killed.
        """
        before, self._before = self._before, failure
        if self.config.limit == 0:
            return ""
        if stop_asked:
            return "not restarted, because a stop was requested"
        if stuck:
            return f"not restarted, because {stuck} of its processes can't be killed"
        if failure.fatal or failure.repeats or failure.exit_code == _REFUSED_EXIT:
            return AGAIN_THE_SAME
        if failure.scripts_own:
            return "not restarted, because the script never called runtime.initialize()"
        if failure.raised and failure.step is None:
            return f"no step was finished before it, so {AGAIN_THE_SAME}"
        if before is not None and _is_same(before, failure):
            return f"the same failure at the same step twice in a row: {AGAIN_THE_SAME}"
        if self._used() >= self.config.limit:
            limit, window = self.config.limit, duration_text(60 * self.config.window_minutes)
            return f"not restarted: the limit of {limit} restart{'s' * (limit > 1)} within {window} is reached"
        return None

    def count(self) -> str:
        """Count a restart; returns its number as "restart 1 of 3"."""
        self._times.append(self._now())
        self.total += 1
        return f"restart {len(self._times)} of {self.config.limit}"

    def _used(self) -> int:
        """Restarts that still count against the limit."""
        while self._times and self._now() - self._times[0] > 60 * self.config.window_minutes:
            self._times.popleft()
        return len(self._times)


def _is_same(before: Failure, failure: Failure) -> bool:
    """Whether two failures are the same. A rank killed before its first step does not count: the cause may be
    outside. Nor does a hang in which no rank keeps the others waiting: a disk or a busy machine may be the cause."""
    if failure.hung and not _RANK.search(failure.text):
        return False
    if (before.step, _outline(before.text)) != (failure.step, _outline(failure.text)):
        return False
    # An exception that all ranks raise is reported of whichever was first.
    if before.rank != failure.rank and not (before.raised and failure.raised):
        return False
    return not (failure.by_signal and failure.step is None)


def _outline(text: str) -> str:
    """The text without what differs between two occurrences of one error: addresses, process ids, sizes, times."""
    return _FIGURE.sub("#", text)
