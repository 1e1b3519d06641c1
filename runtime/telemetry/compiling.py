"""Whether torch.compile compiles just now. A recompilation in the middle of a run takes seconds to minutes, in which
nothing else moves."""

from __future__ import annotations

import sys
from time import monotonic_ns
from typing import Any


class Compilations:
    """Follows the compilations of this process through the callbacks of torch._dynamo, once something else has imported
    it. `active` stays False where torch has no such callbacks.

    One that begins before the first `look` after that import is not seen.
    """

    def __init__(self) -> None:
        self.active = False
        self.changed_ns = 0
        """When one began or ended last: both are progress."""

    def look(self) -> None:
        """Follow torch._dynamo, if it has been imported by now."""
        handler = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
        callbacks = getattr(handler, "start_callbacks", None)
        # torch._dynamo.reset() removes all callbacks.
        if not isinstance(callbacks, list) or self._begun in callbacks:
            return
        try:
            handler.register_end_callback(self._ended)  # type: ignore[union-attr]
            handler.register_start_callback(self._begun)  # type: ignore[union-attr]
        except (AttributeError, TypeError):  # another version
            return

    # Called by the thread that compiles; torch counts nested and parallel compilations as one.
    def _begun(self, *_: Any) -> None:
        self.active, self.changed_ns = True, monotonic_ns()

    def _ended(self, *_: Any) -> None:
        self.active, self.changed_ns = False, monotonic_ns()
