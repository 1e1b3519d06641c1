"""The settings that are in force in a run."""

from __future__ import annotations

from runtime.config.knobs import KNOBS, KnobValue
from zerotop.state.run import RunState


def known_values(state: RunState) -> dict[str, KnobValue]:
    """The value of each knob: that of the start of the attempt, or of the newest `set` that was applied since."""
    hello = state.hello
    values: dict[str, KnobValue] = dict(hello.knobs) if hello else {}
    since = hello.wall_s if hello else 0.0
    for record in state.commands.values():
        if record.command.name == "set" and record.ack.state == "applied" and record.ack.wall_s >= since:
            values |= {name: value for name, value in record.command.arguments.items() if name in KNOBS}
    return values
