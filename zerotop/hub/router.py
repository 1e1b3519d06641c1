"""Commands: checked, numbered, forwarded to the ranks, and every change of their state published. Holds no socket: the
hub passes functions that send."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from runtime.config.knobs import KnobError, get_knob, parse_knob
from runtime.wire.bounds import MAX_RANKS, MOST_SNAPSHOT_STEPS
from runtime.wire.messages import LIVE_STATES, Ack, Command, CommandName, CommandRecord, RunStateName
from runtime.wire.profile import check_profile, ranks_text
from zerotop.state.abilities import NO_RANK
from zerotop.state.run import RunState

REMEMBERED = 1000
"""Commands whose state is kept, so that a repeated id is answered again and not carried out again."""
IDS_REMEMBERED = 20_000
"""Of older commands only the ids are kept: one that comes again is rejected. (More than a rank's inbox remembers, which
would neither act on such a command nor answer it.)"""
OPEN_AT_MOST = 64
"""Limit on commands that wait for a step boundary."""
LONGEST_DEADLINE_S = 7 * 86400

_OUTLIVE_RANKS = frozenset({"checkpoint", "set", "stop", "abort"})


@dataclass
class _Case:
    """A command and its newest state."""

    command: Command
    ack: Ack | None = None

    @property
    def open(self) -> bool:
        return self.ack is None or self.ack.state == "accepted"

    @property
    def applied(self) -> bool:
        return self.ack is not None and self.ack.state == "applied"


class CommandRouter:
    """Every command ends in exactly one of applied and rejected, also when the run ends first.

    `forward(command)` sends to all ranks; `publish(record)` to every screen and the recording, which is the only way in
    which a command is answered. `abort(command)` ends the run without the help of its ranks; the supervisor then calls
    `finish`. `stacks(command)` looks at the ranks from outside, because they may be stuck; the supervisor then calls
    `complete`. `wrapped`: the ranks belong to a trainer that is not ours, which may not obey every command.
    """

    def __init__(
        self,
        state: RunState,
        *,
        forward: Callable[[Command], None],
        publish: Callable[[CommandRecord], None],
        abort: Callable[[Command], None],
        stacks: Callable[[Command], None],
        wrapped: bool = False,
    ) -> None:
        self._state = state
        self._wrapped = wrapped
        self._forward = forward
        self._publish = publish
        # Commands that do not wait for a step boundary and are never sent to the ranks.
        self._outside = {"abort": abort, "stacks": stacks}
        self._cases: dict[str, _Case] = {}
        self._open: dict[str, _Case] = {}
        """Those of `_cases`, in the same order, that are neither applied nor rejected."""
        self._forgotten: dict[str, None] = {}
        self._number = 0
        self._before_ranks = 0
        """The newest number at the time when the current ranks were started."""

    # ---- from screens ----------------------------------------------------------------------------------------------
    def submit(self, command: Command) -> bool:
        """Accept (True) or reject `command`. The same id again is answered again and carried out once."""
        known = self._cases.get(command.id)
        if known is not None:
            if known.ack is not None:
                self._publish(CommandRecord(command=known.command, ack=known.ack))
            return False
        if command.id in self._forgotten:
            reason = "this command was given before, and its answer is no longer kept"
            ack = Ack(id=command.id, state="rejected", reason=reason, wall_s=time.time())
            self._publish(CommandRecord(command=command, ack=ack))
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
        case = self._cases[command.id] = self._open[command.id] = _Case(numbered)
        self._forget()
        if refusal:
            self._tell(case, "rejected", reason=refusal)
            return False
        self._tell(case, "accepted")
        if command.name != "stop" or not self._impossible("stop", ask_trainer=True):
            self._outside.get(command.name, self._forward)(numbered)
        return True

    def _check(self, command: Command) -> tuple[dict[str, Any], str]:
        """The arguments in the ranks' types, and why the command is rejected (empty: it is accepted)."""
        state = self._state.state_name
        if command.name not in get_args(CommandName):
            return command.arguments, f"{command.name[:40]!r} is not a command that this run knows"
        if state not in LIVE_STATES:
            return command.arguments, f"the run is over ({state})"
        if command.name == "stacks":
            return _stacks(command)
        waiting = {case.command.name for case in self._open.values()}
        if "abort" in waiting:
            return command.arguments, "the run is being aborted"
        if command.name == "abort":
            return _without_arguments(command)
        if why := self._impossible(command.name):
            return command.arguments, why
        hastens = command.name == "stop" and "deadline_s" in command.arguments and not self._has_deadline()
        if ("stop" in waiting or state == "stopping") and not hastens:
            return command.arguments, "the run is stopping already (abort ends it at once)"
        if len(self._open) >= OPEN_AT_MOST and command.name != "stop":
            return command.arguments, f"{len(self._open)} commands are waiting for a step boundary already"
        match command.name:
            case "pause" if "pause" in waiting:
                return command.arguments, "a pause is waiting for a step boundary already"
            case "pause" if state == "paused" and "resume" not in waiting:
                return command.arguments, "the run is paused already"
            case "resume" if state != "paused" and "pause" not in waiting:
                return command.arguments, f"the run is not paused ({state})"
            case "resume" if "resume" in waiting:
                return command.arguments, "a resume is waiting for the ranks already"
            case "profile":
                return self._profile(command, waiting)
            case "set":
                return _knobs(command.arguments)
            case "stop" if command.arguments.keys() == {"deadline_s"}:
                return _deadline(command.arguments)
            case "memory-snapshot" if command.arguments:
                return _steps(command.arguments)
            case "pause" if command.arguments.keys() == {"release"} and command.arguments["release"] in (True, False):
                return command.arguments, ""
        return _without_arguments(command)

    def _impossible(self, name: str, ask_trainer: bool = False) -> str:
        """Why the trainer can't obey this command; empty if it can. A stop is never impossible for the run: without the
        trainer (ask_trainer: can it?) its command gets a SIGTERM."""
        if name == "stop" and not ask_trainer:
            return ""
        if (hello := self._state.hello) is not None:
            return hello.impossible.get(name, "")
        return NO_RANK if self._wrapped else ""

    def _profile(self, command: Command, waiting: set[str]) -> tuple[dict[str, Any], str]:
        """Whether the chosen ranks take steps that can be profiled."""
        arguments, refusal = check_profile(command.arguments, self._state.world_size)
        if refusal:
            return arguments, refusal
        if "profile" in waiting:
            return arguments, "a profile is waiting for a step boundary already"
        if "pause" in waiting or (self._state.state_name == "paused" and "resume" not in waiting):
            return arguments, "the run is paused and takes no steps: resume it, and profile then"
        gone = [rank for rank in arguments["ranks"] if (seen := self._state.ranks.get(rank)) and seen.goodbye]
        return arguments, f"{ranks_text(gone)} of the run has ended" if gone else ""

    def _has_deadline(self) -> bool:
        """Whether a stop with a deadline is open; a second one would change nothing."""
        return any(c.open and c.command.name == "stop" and c.command.arguments for c in self._cases.values())

    # ---- from ranks and the supervisor -----------------------------------------------------------------------------
    def hear(self, ack: Ack) -> Command | None:
        """Publish the state that rank 0 reports of a command. Returns the command, or None if it is not an open one.
        `accepted` comes from a rank that has begun with the command, and says what it does."""
        case = self._cases.get(ack.id)
        if case is None or not case.open:
            return None
        self._keep(case, ack.model_copy(update={"number": case.command.number, "wall_s": ack.wall_s or time.time()}))
        return case.command

    def complete(self, identity: str, *, result: dict[str, Any] | None = None, reason: str = "") -> None:
        """The supervisor has carried out a command itself: applied with `result`, or rejected for `reason`. Does
        nothing if the run has ended meanwhile."""
        case = self._cases.get(identity)
        if case is None or not case.open:
            return
        if reason:
            self._tell(case, "rejected", reason=reason)
        else:
            self._tell(case, "applied", step=self._state.step, result=result or {})

    def finish(self, state: RunStateName, step: int) -> None:
        """The run has ended: give every open command its final state."""
        for case in list(self._open.values()):
            name = case.command.name
            if (name, state) in (("stop", "stopped"), ("abort", "aborted")):
                self._tell(case, "applied", step=step)
            elif name == "abort":
                self._tell(case, "rejected", reason=f"the run ended by itself first ({state})")
            else:
                self._tell(case, "rejected", reason="the run ended before it could be applied")

    def ranks_restart(self) -> None:
        """The ranks that had received commands are gone. Commands that still make sense go to the next ranks when
        these connect; the others are rejected. A stop or an abort ends the run, so it is left to `finish`."""
        self._before_ranks = self._number
        for case in list(self._open.values()):
            if case.command.name not in _OUTLIVE_RANKS:
                self._tell(case, "rejected", reason="the ranks restarted")

    def is_open(self, *names: str) -> bool:
        """Whether a command of one of these names is accepted and not applied yet."""
        return any(case.command.name in names for case in self._open.values())

    def settings_in_force(self) -> dict[str, Any]:
        """Settings that were applied, except those that an open `set` will change: new ranks start with the values
        of the config."""
        values: dict[str, Any] = {}
        changing: set[str] = set()
        for case in self._cases.values():
            if case.command.name == "set" and case.open:
                changing |= case.command.arguments.keys()
            elif case.command.name == "set" and case.applied:
                values |= case.command.arguments
        return {name: value for name, value in values.items() if name not in changing}

    def newest(self, name: str) -> Command | None:
        """The newest command of this name that is open or applied."""
        found = (case for case in reversed(self._cases.values()) if case.command.name == name)
        return next((case.command for case in found if case.open or case.applied), None)

    def open_commands(self, above: int = 0) -> list[Command]:
        """Accepted commands for ranks, with numbers above `above`, that are not applied yet, in order."""
        return [
            case.command
            for case in self._open.values()
            if case.command.number > above and case.command.name not in self._outside
        ]

    def commands_for_new_rank(self) -> list[Command]:
        """The commands to send to a rank that connects: the open ones, and those that other ranks have already
        answered. By their numbers it knows which of them it has."""
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
        case.ack = ack
        if not case.open:
            self._open.pop(ack.id, None)
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


def _stacks(command: Command) -> tuple[dict[str, Any], str]:
    """`ranks`: those wanted; `native`: with C frames."""
    arguments = command.arguments
    ranks, native = arguments.get("ranks", []), arguments.get("native", False)
    if not arguments.keys() <= {"ranks", "native"}:
        return arguments, f"stacks takes ranks and native, got {', '.join(arguments)}"
    if not isinstance(native, bool) or not isinstance(ranks, list) or ("ranks" in arguments and not ranks):
        return arguments, "stacks: native: expected true or false; ranks: a list of rank numbers"
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < MAX_RANKS for rank in ranks):
        return arguments, f"stacks: ranks: expected whole numbers from 0, got {str(ranks)[:60]}"
    return arguments, ""


def _deadline(arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    seconds = arguments["deadline_s"]
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= LONGEST_DEADLINE_S:
        return arguments, ""
    return arguments, f"stop: deadline_s: expected seconds from 0 to {LONGEST_DEADLINE_S}, got {seconds!r}"


def _steps(arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    steps = arguments.get("steps")
    whole = isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= MOST_SNAPSHOT_STEPS
    if arguments.keys() == {"steps"} and whole:
        return arguments, ""
    return arguments, (
        f"memory-snapshot takes steps, a number from 1 to {MOST_SNAPSHOT_STEPS}; got "
        + ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    )


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
