"""What `zerotop profile` has beside the other control commands: steps and ranks, and waiting for the merged file."""

from __future__ import annotations

import argparse
from typing import Any

from runtime.wire.messages import CommandRecord, Event
from runtime.wire.profile import DEFAULT_RANKS, DEFAULT_STEPS, DONE, MAX_STEPS, check_profile
from zerotop.output import CommandError, say
from zerotop.source.base import Source


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --steps, --ranks and --wait."""

    parser.add_argument(
        "--steps",
        type=int,
        default=DEFAULT_STEPS,
        metavar="N",
        help=f"optimizer steps, 1 to {MAX_STEPS}; default: {DEFAULT_STEPS}",
    )
    parser.add_argument(
        "--ranks",
        metavar="0,3",
        help=f"the ranks to profile; default: all, of more than {DEFAULT_RANKS} the first ones",
    )
    parser.add_argument("--wait", action="store_true", help="return when the file is there, and print its path")


def profile_arguments(steps: int, ranks: str | None, world_size: int) -> dict[str, Any]:
    """The arguments of the command `profile`. Raises CommandError."""

    chosen: dict[str, Any] = {"steps": steps}
    if ranks is not None:
        words = ranks.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise CommandError(f"profile: --ranks: expected numbers such as 0,3, got {ranks!r}")
        chosen["ranks"] = [int(word) for word in words]
    found, problem = check_profile(chosen, world_size)
    if problem:
        raise CommandError(problem.replace("steps:", "--steps:").replace("ranks:", "--ranks:"))
    return found


def wait_for_file(source: Source, record: CommandRecord) -> CommandRecord:
    """Wait for the event that names the merged file. Returns the record with the file's path in its result, or as
    rejected if there is none."""

    say(f"profiling since step {record.ack.step}...")
    while True:
        source.poll()
        for event in source.state.events:
            if isinstance(event, Event) and event.what == DONE and event.data.get("id") == record.command.id:
                path = event.data.get("path")
                state = {"result": record.ack.result | {"path": path}} if path else {"state": "rejected"}
                ack = record.ack.model_copy(update={**state, "reason": str(event.data.get("problem", ""))})
                return record.model_copy(update={"ack": ack})
        if source.connection == "ended":
            ack = record.ack.model_copy(
                update={"state": "rejected", "reason": "the run ended before the file was there"}
            )
            return record.model_copy(update={"ack": ack})
        source.wait(0.05)
