"""A rank's side of telemetry and commands. Torch-free, so that tests and other trainers can use it."""

from runtime.process.parent import die_with_parent
from runtime.telemetry.handler import TelemetryHandler
from runtime.telemetry.inbox import Inbox
from runtime.telemetry.null import NullTelemetry
from runtime.telemetry.publisher import Telemetry, TelemetryError
from runtime.telemetry.stacks import allow_tracing, register_stacks
from runtime.telemetry.watching import Controls, Watcher, WatchError, watch

__all__ = [
    "Controls",
    "Inbox",
    "NullTelemetry",
    "Telemetry",
    "TelemetryError",
    "TelemetryHandler",
    "WatchError",
    "Watcher",
    "allow_tracing",
    "die_with_parent",
    "register_stacks",
    "watch",
]
