"""Other trainers on zerotop's screen: one module per trainer, which imports that trainer.

Each of them, like `watch`, does nothing outside a run of `zerotop run`. docs/watch.md shows the line to add.
"""

from runtime.telemetry import Watcher, watch

__all__ = ["Watcher", "watch"]
