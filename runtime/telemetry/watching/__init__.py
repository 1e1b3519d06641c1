"""Telemetry and commands for trainers that are not ours. Torch-free at import: a script that watches has loaded torch
itself.

watch.py has the one line that a script calls; joining.py connects the process to its run; watcher.py counts steps and
phases; control.py obeys commands; the others look at what torch and DeepSpeed hold: hooks.py (phases), held.py (memory
by category), collectives.py (torch's Flight Recorder), deepspeed.py (the parts of its engine). versions.py
has the versions that are supported.
"""

from runtime.telemetry.watching.control import Controls
from runtime.telemetry.watching.introduction import Trainer
from runtime.telemetry.watching.joining import WatchError, current_watcher, start_watching
from runtime.telemetry.watching.watch import inner_optimizer, precision_of, watch
from runtime.telemetry.watching.watcher import Watcher

__all__ = [
    "Controls",
    "Trainer",
    "WatchError",
    "Watcher",
    "current_watcher",
    "inner_optimizer",
    "precision_of",
    "start_watching",
    "watch",
]
