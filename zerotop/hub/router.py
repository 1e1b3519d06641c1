"""Commands: checked, numbered, recorded, forwarded to the ranks, and answered. Holds no socket; the hub gives it ways
to speak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.config.knobs import KnobError, get_knob, parse_knob
from runtime.wire.messages import LIVE_STATES, Ack, Command, CommandRecord, RunStateName
from zerotop.state.run import RunState

REMEMBERED = 1000
"""Commands whose answers are kept, so that a repeated id is answered again and not acted on again."""
IDS_REMEMBERED = 20_000
"""Of older commands at least the ids: one that comes again is refused. (More than a rank's inbox remembers: it would
neither act on such a command nor answer it.)"""
OPEN_AT_MOST = 64
"""Commands that wait for a step boundary."""
ASKERS_KEPT = 16

LONGEST_DEADLINE_S = 7 * 86400

_OUTLIVE_RANKS = frozenset({"checkpoint", "set", "stop", "abort"})

Asker = bytes
"""A screen's ZeroMQ identity; b"" for the supervisor itself."""


@dataclass
class _Case:
    command: Command
    acks: list[Ack] = field(default_factory=list)
    askers: set[Asker] = field(default_factory=set)

    @property
    def open(self) -> bool:
        return not any(ack.state in ("applied", "rejected") for ack in self.acks)

    @property
    def applied(self) -> bool:
        return any(ack.state == "applied" for ack in self.acks)


class CommandRouter:
    """Every command ends in exactly one of applied and rejected, also when the run ends first.

    `answer(asker, ack)` tells one screen; `forward(command)` tells all ranks; `publish(record)` tells everyone and the
    recording;
    `abort(command)` ends the run without its ranks' help; the supervisor then calls `finish`. `stacks(command)` looks
    at the ranks from outside, for they may be stuck; the supervisor then calls `complete`.
    """

    def __init__(
        self,
        state: RunState,
        *,
        answer: Callable[[Asker, Ack], None],
        forward: Callable[[Command], None],
        publish: Callable[[CommandRecord], None],
        abort: Callable[[Command], None],
        stacks: Callable[[Command], None],
    ) -> None:
        self._state = state
        self._answer = answer
        self._forward = forward
        self._publish = publish
        # What does not wait for a step boundary, and never reaches the ranks.
        self._outside = {"abort": abort, "stacks": stacks}
        self._cases: dict[str, _Case] = {}
        self._open: dict[str, _Case] = {}
        """Of `_cases`, in the same order, those without a final answer."""
        self._forgotten: dict[str, None] = {}
        self._number = 0
        self._before_ranks = 0
        """The newest number when the ranks that run now were started."""

    # ---- from screens ----------------------------------------------------------------------------------------------
    def submit(self, command: Command, asker: Asker = b"") -> bool:
        """Accept (True) or reject `command`. The same id again gets the same answers again, and acts once."""
        known = self._cases.get(command.id)
        if known is not None:
            if len(known.askers) < ASKERS_KEPT:
                known.askers.add(asker)
            for ack in known.acks:
                self._answer(asker, ack)
            return False
        if command.id in self._forgotten:
            reason = "this command was given before; its answer is not kept any more"
            self._answer(asker, Ack(id=command.id, state="rejected", reason=reason, wall_s=time.time()))
            return False
        arguments, refusal = self._check(command)
        if not refusal:
            self._number += 1
        numbered = command.model_copy(
            update={
                "arguments": arguments,
                "number": 0 if refusal else self._number,
                "wall_s": command.wall_s or time.time(),
            }
        )
        case = self._cases[command.id] = self._open[command.id] = _Case(numbered, askers={asker})
        self._forget()
        if refusal:
            self._tell(case, "rejected", reason=refusal)
            return False
        self._tell(case, "accepted")
        self._outside.get(command.name, self._forward)(numbered)
        return True

    def _check(self, command: Command) -> tuple[dict[str, Any], str]:
        """The arguments in the ranks' own types, and why the command can't be accepted ("": it can)."""
        state = self._state.state_name
        if state not in LIVE_STATES:
            return command.arguments, f"the run is over ({state})"
        if command.name == "stacks":
            return _without_arguments(command)
        waiting = {case.command.name for case in self._open.values()}
        if "abort" in waiting:
            return command.arguments, "the run is being aborted"
        if command.name == "abort":
            return _without_arguments(command)
        hastens = command.name == "stop" and "deadline_s" in command.arguments and not self._has_deadline()
        if ("stop" in waiting or state == "stopping") and not hastens:
            return command.arguments, "the run is stopping already (abort ends it at once)"
        if len(self._open) >= OPEN_AT_MOST and command.name != "stop":
            return command.arguments, f"{len(self._open)} commands wait for a step boundary already"
        match command.name:
            case "pause" if "pause" in waiting:
                return command.arguments, "a pause is waiting for a step boundary already"
            case "pause" if state == "paused" and "resume" not in waiting:
                return command.arguments, "the run is paused already"
            case "resume" if state != "paused" and "pause" not in waiting:
                return command.arguments, f"the run is not paused ({state})"
            case "resume" if "resume" in waiting:
                return command.arguments, "a resume is on its way already"
            case "set":
                return _knobs(command.arguments)
            case "stop" if command.arguments.keys() == {"deadline_s"}:
                return _deadline(command.arguments)
            case "pause" if command.arguments.keys() == {"release"} and command.arguments["release"] in (True, False):
                return command.arguments, ""
        return _without_arguments(command)

    def _has_deadline(self) -> bool:
        """Whether a stop is open that must end within some time; a second one adds nothing."""
        return any(c.open and c.command.name == "stop" and c.command.arguments for c in self._cases.values())

    # ---- from ranks and the supervisor -----------------------------------------------------------------------------
    def hear(self, ack: Ack) -> Command | None:
        """Rank 0's word on a command; relayed to whoever asked. Returns the command, None for one that nobody here
        knows. `accepted` comes from a rank that has taken the command up, and says what it does about it."""
        case = self._cases.get(ack.id)
        if case is None or not case.open:
            return None
        self._keep(case, ack.model_copy(update={"number": case.command.number, "wall_s": ack.wall_s or time.time()}))
        return case.command

    def complete(self, identity: str, *, result: dict[str, Any] | None = None, reason: str = "") -> None:
        """The supervisor's word on a command that it carried out itself: applied with `result`, or rejected for
        `reason`. Does nothing when the run has ended meanwhile, and the command with it."""
        case = self._cases.get(identity)
        if case is None or not case.open:
            return
        if reason:
            self._tell(case, "rejected", reason=reason)
        else:
            self._tell(case, "applied", step=self._state.step, result=result or {})

    def finish(self, state: RunStateName, step: int) -> None:
        """The run is over: answer what is still open."""
        for case in list(self._open.values()):
            name = case.command.name
            if (name, state) in (("stop", "stopped"), ("abort", "aborted")):
                self._tell(case, "applied", step=step)
            elif name == "abort":
                self._tell(case, "rejected", reason=f"the run ended by itself first ({state})")
            else:
                self._tell(case, "rejected", reason="the run ended before it could be applied")

    def ranks_restart(self) -> None:
        """The ranks that were given commands are gone. What still makes sense goes to the next ones, which the hub
        tells when they speak; the rest is answered. A stop or an abort ends the run instead, and is left to `finish`.
        """
        self._before_ranks = self._number
        for case in list(self._open.values()):
            if case.command.name not in _OUTLIVE_RANKS:
                self._tell(case, "rejected", reason="the ranks restarted")

    def is_open(self, *names: str) -> bool:
        """Whether a command of one of these names was accepted and has no final answer yet."""
        return any(case.command.name in names for case in self._open.values())

    def settings_in_force(self) -> dict[str, Any]:
        """What was `set` and applied, less what an open `set` will change: new ranks start with the config's values."""
        values: dict[str, Any] = {}
        changing: set[str] = set()
        for case in self._cases.values():
            if case.command.name == "set" and case.open:
                changing |= case.command.arguments.keys()
            elif case.command.name == "set" and case.applied:
                values |= case.command.arguments
        return {name: value for name, value in values.items() if name not in changing}

    def newest(self, name: str) -> Command | None:
        """The newest command of this name that was applied, or is open still."""
        found = (case for case in reversed(self._cases.values()) if case.command.name == name)
        return next((case.command for case in found if case.open or case.applied), None)

    def open_commands(self, above: int = 0) -> list[Command]:
        """Accepted commands for ranks that have a number above `above` and no final answer yet, in order."""
        return [
            case.command
            for case in self._open.values()
            if case.command.number > above and case.command.name not in self._outside
        ]

    def commands_for_new_rank(self) -> list[Command]:
        """What a rank that speaks for the first time must be told, in order: what is open, and what other ranks were
        quicker to answer. It knows by the numbers what it has already heard from them."""
        return [
            case.command
            for case in self._cases.values()
            if case.command.name not in self._outside and (case.open or case.command.number > self._before_ranks)
        ]

    # ---- inside ----------------------------------------------------------------------------------------------------
    def _tell(
        self,
        case: _Case,
        state: str,
        *,
        step: int | None = None,
        reason: str = "",
        result: dict[str, Any] | None = None,
    ) -> None:
        now = time.time()
        fields = {
            "id": case.command.id,
            "number": case.command.number,
            "state": state,
            "step": step,
            "reason": reason,
            "result": result,
            "wall_s": now,
        }
        self._keep(case, Ack.model_validate({key: value for key, value in fields.items() if value is not None}))

    def _keep(self, case: _Case, ack: Ack) -> None:
        case.acks = [known for known in case.acks if known.state != ack.state] + [ack]
        if not case.open:
            self._open.pop(ack.id, None)
        for asker in case.askers:
            self._answer(asker, ack)
        self._publish(CommandRecord(command=case.command, ack=ack))

    def _forget(self) -> None:
        for old in list(self._cases)[: max(0, len(self._cases) - REMEMBERED)]:
            if not self._cases[old].open:
                del self._cases[old]
                self._forgotten[old] = None
        while len(self._forgotten) > IDS_REMEMBERED:
            del self._forgotten[next(iter(self._forgotten))]


def _without_arguments(command: Command) -> tuple[dict[str, Any], str]:
    if command.arguments:
        return command.arguments, f"{command.name} takes no arguments, got {', '.join(command.arguments)}"
    return {}, ""


def _deadline(arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    seconds = arguments["deadline_s"]
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= LONGEST_DEADLINE_S:
        return arguments, ""
    return arguments, f"stop: deadline_s: expected seconds from 0 to {LONGEST_DEADLINE_S}, got {seconds!r}"


def _knobs(arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    if not arguments:
        return arguments, "set needs a setting and a value, such as log_interval=1"
    try:
        return {
            name: parse_knob(name, value) if isinstance(value, str) else get_knob(name).check(value)
            for name, value in arguments.items()
        }, ""
    except KnobError as error:
        return arguments, str(error)
