"""The part of a watch that needs no line in the script: that a rank lives, and how far its collectives have come, so
that a hang is noticed and named. `zerotop run` begins it in each rank of torch.distributed; `watch` takes it over."""

from __future__ import annotations

import logging
import sys

from runtime.process.forked import at_exit
from runtime.telemetry.publisher import Telemetry, TelemetryError, has_joined, joining
from runtime.telemetry.watching.collectives import FlightPosition
from runtime.telemetry.watching.control import Controls
from runtime.telemetry.watching.introduction import Introduction, Trainer, last_error, process_memory
from runtime.telemetry.watching.joining import find_place, join
from runtime.wire.watchlines import watch_line

NO_LINE = "the script does not call watch()"


def begin() -> None:
    """Introduce this rank, unless something else has done so. The script does not suffer if that fails."""
    try:
        _begin()
    except (TelemetryError, OSError, RuntimeError) as error:
        logging.getLogger("runtime.watch").warning(f"this rank can't report to its run: {error}")


def _begin() -> None:
    with joining:  # the script may call watch() just now
        if not has_joined():
            _join()


def _join() -> None:
    place = find_place([])
    link, run = join(place.rank)
    if not isinstance(link, Telemetry):
        return
    line = watch_line(sys.modules)
    unseen = ("checkpoint", "stop", "pause", "resume", "set")
    controls = Controls(can_pause=False, can_set=False, reasons=dict.fromkeys(unseen, f"{NO_LINE}: add {line}"))
    trainer = Trainer(name="torch.distributed", controls=controls, counts_steps=False)
    link.memory_source = lambda: process_memory(place)
    link.collective_position = FlightPosition()
    link.enter("idle")
    link.start(Introduction(place, trainer, run).hello().model_copy(update={"watch_line": line}))
    link.offer()

    def leave() -> None:
        if link.adoptable:
            error = last_error()
            link.goodbye("failed" if error else "finished", 0, error)
            link.close()

    at_exit(leave)
