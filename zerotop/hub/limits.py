"""Rate limits of the hub, and the count of what it did not take."""

from __future__ import annotations

import time
from collections.abc import Hashable

BUCKETS_KEPT = 1000
TOLD_EVERY_S = 30.0
TEXTS_KEPT = 100
_OTHERS = "messages that could not be read"


class TokenBucket:
    """A rate limit: `burst` at once, then `per_s` per second."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether one more is within the limit now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Limiter:
    """A limit for each peer and one for all of them, so that a peer gains nothing by reconnecting."""

    def __init__(self, each: tuple[float, float], together: tuple[float, float]) -> None:
        """`each` and `together` are (per second, burst)."""
        self._each = each
        self._together = TokenBucket(*together)
        self._buckets: dict[Hashable, TokenBucket] = {}

    def take(self, peer: Hashable) -> bool:
        """Whether one more from `peer` is within the limits now."""
        bucket = self._buckets.pop(peer, None) or TokenBucket(*self._each)
        self._buckets[peer] = bucket  # the newest last
        while len(self._buckets) > BUCKETS_KEPT:
            del self._buckets[next(iter(self._buckets))]
        return bucket.take() and self._together.take()


class Losses:
    """Counts what was rejected or dropped. The first of a kind is reported at once, then their number every
    TOLD_EVERY_S."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._told_at: dict[str, float] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """How many so far."""
        return self._total

    def note(self, text: str) -> str | None:
        """Count one. Returns the text to report now, if any."""
        self._total += 1
        if text not in self._told_at and len(self._told_at) >= TEXTS_KEPT:
            text = _OTHERS
        if text in self._told_at:
            self._counts[text] = self._counts.get(text, 0) + 1
            return None
        self._told_at[text] = time.monotonic()
        return text

    def due(self) -> list[str]:
        """The texts to report now about repeated losses."""
        now = time.monotonic()
        texts = []
        for text, count in list(self._counts.items()):
            if now - self._told_at[text] >= TOLD_EVERY_S:
                del self._counts[text]
                self._told_at[text] = now
                texts.append(f"{text} ({count:,} more)")
        return texts
