"""The settings that are in force in a run, and where each of them came from."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.config.knobs import KNOBS, KnobValue
from zerotop.state.run import RunState


@dataclass(frozen=True)
class SettingValue:
    """`step`, `who` and `wall_s` are those of the command that set it; `step` is None for a value from the start."""

    value: KnobValue
    step: int | None = None
    who: str = ""
    wall_s: float = 0.0


def setting_values(state: RunState) -> dict[str, SettingValue]:
    """The value of each knob: that of the start of the attempt, or of the newest `set` that was applied since."""
    hello = state.hello
    values = {name: SettingValue(value) for name, value in (hello.knobs if hello else {}).items() if name in KNOBS}
    since = hello.wall_s if hello else 0.0
    for record in state.commands.values():
        ack = record.ack
        if record.command.name == "set" and ack.state == "applied" and ack.wall_s >= since:
            for name, value in record.command.arguments.items():
                if name in KNOBS:
                    values[name] = SettingValue(value, ack.step or 0, record.command.who, ack.wall_s)
    return values


def known_values(state: RunState) -> dict[str, KnobValue]:
    """The value of each knob alone."""
    return {name: found.value for name, found in setting_values(state).items()}
