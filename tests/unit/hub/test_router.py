"""The command router by itself: numbers, refusals, repeated ids, and an answer for everything."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from runtime.wire.messages import Ack, Command, CommandRecord, Goodbye, RunStatus
from tests.harness.fakehub import hello
from zerotop.hub.router import NO_RANK, OPEN_AT_MOST, REMEMBERED, CommandRouter
from zerotop.state.run import RunState


@dataclass
class Desk:
    """A router with its outlets written down."""

    state: RunState = field(default_factory=RunState)
    forwarded: list[Command] = field(default_factory=list)
    published: list[CommandRecord] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.set("running")
        self.router = CommandRouter(
            self.state,
            forward=self.forwarded.append,
            publish=self.published.append,
            abort=lambda command: self.aborted.append(command.id),
            stacks=lambda command: self.stacks.append(command.id),
        )

    def set(self, state: str) -> None:
        self.state.apply(RunStatus.model_validate({"name": "q1", "state": state}))

    def ask(self, name: str, identity: str = "", **arguments: object) -> tuple[str, str]:
        """The newest answer: (state, reason)."""
        command = Command.model_validate(
            {"id": identity or f"{name}{len(self.published)}", "name": name, "arguments": arguments}
        )
        self.router.submit(command)
        return self.answer

    @property
    def answer(self) -> tuple[str, str]:
        return self.published[-1].ack.state, self.published[-1].ack.reason

    def applied(self, number: int, step: int = 5) -> Command | None:
        command = next(command for command in self.forwarded if command.number == number)
        return self.router.hear(Ack(id=command.id, number=number, state="applied", step=step, rank=0))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_accepted_commands_are_numbered_from_one_without_holes(desk: Desk) -> None:
    assert desk.ask("checkpoint") == ("accepted", "")
    assert desk.ask("set", nonsense=1)[0] == "rejected"
    assert desk.ask("pause") == ("accepted", "")
    assert [(command.name, command.number) for command in desk.forwarded] == [("checkpoint", 1), ("pause", 2)]
    assert [record.ack.state for record in desk.published] == ["accepted", "rejected", "accepted"]


def test_an_applied_command_is_published(desk: Desk) -> None:
    desk.ask("checkpoint")
    command = desk.applied(1, step=17)
    assert command is not None and command.name == "checkpoint"
    assert desk.answer == ("applied", "")
    assert desk.published[-1].ack.step == 17 and desk.published[-1].ack.number == 1
    assert desk.router.open_commands() == []


def test_the_same_id_acts_once_and_is_answered_every_time(desk: Desk) -> None:
    assert desk.ask("checkpoint", identity="x") == desk.ask("checkpoint", identity="x") == ("accepted", "")
    assert len(desk.forwarded) == 1
    desk.applied(1)
    assert desk.ask("checkpoint", identity="x") == ("applied", "")
    assert len(desk.forwarded) == 1 and {record.command.number for record in desk.published} == {1}


@pytest.mark.parametrize(
    ("state", "name", "arguments", "reason"),
    [
        ("running", "dance", {}, "'dance' is not a command that this run knows"),
        ("finished", "pause", {}, "the run is over (finished)"),
        ("failed", "abort", {}, "the run is over (failed)"),
        ("failed", "stacks", {}, "the run is over (failed)"),
        ("paused", "pause", {}, "the run is paused already"),
        ("running", "resume", {}, "the run is not paused (running)"),
        ("stopping", "checkpoint", {}, "the run is stopping already (abort ends it at once)"),
        ("running", "pause", {"now": 1}, "pause takes no arguments, got now"),
        ("running", "abort", {"now": 1}, "abort takes no arguments, got now"),
        ("running", "memory-snapshot", {"steps": 0}, "a number from 1 to 1000; got steps=0"),
        ("running", "memory-snapshot", {"step": 3}, "a number from 1 to 1000; got step=3"),
        ("running", "set", {}, "set needs a setting and a value"),
        ("running", "set", {"log_interval": "soon"}, "a whole number from 1"),
        ("running", "set", {"log_interval": 0}, "a whole number from 1"),
        ("running", "set", {"log_intervall": "1"}, "Did you mean log_interval?"),
    ],
)
def test_refusals_say_why(desk: Desk, state: str, name: str, arguments: dict[str, object], reason: str) -> None:
    desk.set(state)
    verdict, why = desk.ask(name, **arguments)
    assert verdict == "rejected" and reason in why
    assert desk.forwarded == [] and desk.aborted == []


def test_values_reach_the_ranks_in_their_own_types(desk: Desk) -> None:
    desk.ask("set", log_interval="3", lr_factor="0.5", log_level="DEBUG")
    assert desk.forwarded[0].arguments == {"log_interval": 3, "lr_factor": 0.5, "log_level": "debug"}


def test_what_waits_counts_as_done_for_what_comes_next(desk: Desk) -> None:
    desk.ask("pause")
    assert desk.ask("pause")[1] == "a pause is waiting for a step boundary already"
    assert desk.ask("resume")[0] == "accepted"  # it will be paused by then
    assert desk.ask("resume")[1] == "a resume is waiting for the ranks already"
    desk.set("paused")
    assert desk.ask("stop")[0] == "accepted"
    assert desk.ask("checkpoint")[1] == "the run is stopping already (abort ends it at once)"
    assert desk.ask("abort")[0] == "accepted"
    assert desk.ask("abort")[1] == "the run is being aborted"


def test_a_batch_systems_signal_gives_a_stop_that_waits_a_deadline_once(desk: Desk) -> None:
    refusal = ("rejected", "the run is stopping already (abort ends it at once)")
    assert desk.ask("stop", deadline_s=-1)[0] == desk.ask("stop", deadline_s="soon")[0] == "rejected"
    assert desk.ask("stop") == ("accepted", "")
    desk.set("stopping")
    assert desk.ask("stop") == desk.ask("checkpoint") == refusal
    assert desk.ask("stop", deadline_s=60) == ("accepted", "")
    assert desk.ask("stop", deadline_s=60) == refusal
    desk.router.finish("stopped", 7)
    assert [record.ack.state for record in desk.published[-2:]] == ["applied", "applied"]


def test_a_rank_says_what_it_does_about_a_command_before_it_is_done(desk: Desk) -> None:
    desk.ask("checkpoint")
    writing = Ack(id=desk.forwarded[0].id, state="accepted", reason="the checkpoint of step 5 is being written", rank=0)
    desk.router.hear(writing)
    assert desk.answer == ("accepted", "the checkpoint of step 5 is being written")
    assert desk.router.is_open("checkpoint")
    desk.applied(1)
    assert desk.answer == ("applied", "") and desk.router.hear(writing.model_copy()) is None
    assert desk.answer[0] == "applied"


def test_a_paused_run_with_a_resume_on_its_way_can_be_paused_again(desk: Desk) -> None:
    desk.set("paused")
    desk.ask("resume")
    assert desk.ask("pause")[0] == "accepted"


def test_abort_is_not_for_ranks(desk: Desk) -> None:
    desk.ask("abort", identity="end")
    assert desk.aborted == ["end"] and desk.forwarded == [] and desk.router.open_commands() == []


@pytest.mark.parametrize("state", ["starting", "running", "paused", "restarting", "stopping"])
def test_stacks_are_taken_in_every_live_state_and_without_the_ranks(desk: Desk, state: str) -> None:
    desk.set(state)
    assert desk.ask("stacks", identity="s") == ("accepted", "")
    assert desk.stacks == ["s"] and desk.forwarded == [] and desk.router.open_commands() == []
    desk.router.complete("s", result={"path": "logs/1/stacks-1.txt"})
    assert desk.answer[0] == "applied"
    assert desk.published[-1].ack.result == {"path": "logs/1/stacks-1.txt"}
    count = len(desk.published)
    desk.router.complete("s", reason="twice")
    assert len(desk.published) == count


def test_ranks_that_come_late_are_not_told_of_stacks(desk: Desk) -> None:
    """They would answer that they know no such command, and that answer would stand."""
    desk.ask("stacks", identity="s")
    desk.ask("checkpoint")
    assert [command.name for command in desk.router.commands_for_new_rank()] == ["checkpoint"]
    desk.router.complete("s", result={})
    assert [command.name for command in desk.router.commands_for_new_rank()] == ["checkpoint"]


def test_stacks_while_a_stop_or_an_abort_waits_and_why_they_may_fail(desk: Desk) -> None:
    desk.ask("stop")
    desk.ask("abort")
    assert desk.ask("stacks", identity="s")[0] == "accepted"
    desk.router.complete("s", reason="no such process")
    assert desk.answer == ("rejected", "no such process")
    assert desk.ask("stacks", rank=1) == ("rejected", "stacks takes ranks and native, got rank")
    assert desk.ask("stacks", ranks=[0, -1]) == (
        "rejected",
        "stacks: ranks: expected whole numbers from 0, got [0, -1]",
    )
    assert desk.ask("stacks", ranks=[])[0] == "rejected" and desk.ask("stacks", native=1)[0] == "rejected"
    assert desk.ask("stacks", ranks=[1], native=True)[0] == "accepted"


@pytest.mark.parametrize(
    ("end", "name", "verdict"),
    [
        ("stopped", "stop", "applied"),
        ("aborted", "abort", "applied"),
        ("aborted", "stop", "rejected"),
        ("finished", "checkpoint", "rejected"),
        ("finished", "abort", "rejected"),
        ("failed", "stop", "rejected"),
        ("failed", "stacks", "rejected"),
    ],
)
def test_the_end_answers_everything(desk: Desk, end: str, name: str, verdict: str) -> None:
    desk.ask(name)
    desk.router.finish(end, step=9)  # type: ignore[arg-type]
    assert desk.answer[0] == verdict
    assert bool(desk.answer[1]) == (verdict == "rejected")
    count = len(desk.published)
    desk.router.finish(end, step=9)  # type: ignore[arg-type]
    assert len(desk.published) == count


def test_late_ranks_are_given_what_is_open_in_order(desk: Desk) -> None:
    for name in ("checkpoint", "pause", "set"):
        desk.ask(name, **({"log_interval": 1} if name == "set" else {}))
    desk.applied(1)
    assert [command.number for command in desk.router.open_commands()] == [2, 3]
    assert [command.number for command in desk.router.open_commands(above=2)] == [3]


def test_an_answer_to_nothing_we_know_is_ignored(desk: Desk) -> None:
    assert desk.router.hear(Ack(id="stranger", state="applied", step=1)) is None
    assert desk.published == []


def test_a_million_commands_do_not_pile_up(desk: Desk) -> None:
    for number in range(1500):
        desk.ask("checkpoint", identity=f"c{number}")
        desk.applied(number + 1)
        desk.forwarded.clear()
    assert len(desk.router._cases) <= 1001


# ---- ranks that restart ----------------------------------------------------------------------------------------------
def test_ranks_that_restart_leave_no_command_without_an_answer(desk: Desk) -> None:
    for name in ("pause", "checkpoint", "stop"):
        assert desk.ask(name, identity=name)[0] == "accepted"
    desk.router.ranks_restart()
    assert desk.answer == ("rejected", "the ranks restarted")
    assert [command.name for command in desk.router.open_commands()] == ["checkpoint", "stop"]
    assert desk.router.is_open("stop", "abort") and not desk.router.is_open("pause")
    desk.router.ranks_restart()
    assert len([record for record in desk.published if record.ack.state == "rejected"]) == 1


def test_settings_in_force_are_the_newest_that_no_open_one_changes(desk: Desk) -> None:
    for number, settings in enumerate(
        [{"log_interval": 5, "telemetry_hz": 2.0}, {"log_interval": 3}, {"lr_factor": 0.5}, {"telemetry_hz": 9.0}], 1
    ):
        desk.ask("set", **settings)
        if number < 3:
            desk.applied(number)
    assert desk.router.settings_in_force() == {"log_interval": 3}  # the others wait, one of them for telemetry_hz
    desk.applied(4)
    assert desk.router.settings_in_force() == {"log_interval": 3, "telemetry_hz": 9.0}


def test_a_rank_that_speaks_late_is_told_what_others_have_answered(desk: Desk) -> None:
    desk.ask("checkpoint")
    desk.applied(1)
    desk.ask("set", log_interval=3)
    desk.ask("set", nonsense=1)  # refused: it has no number
    desk.ask("checkpoint")
    assert [command.number for command in desk.router.commands_for_new_rank()] == [1, 2, 3]
    desk.applied(3)
    desk.router.ranks_restart()
    assert [command.number for command in desk.router.commands_for_new_rank()] == [2]  # the rest is over


def test_an_id_whose_answer_was_forgotten_is_refused_and_acts_no_more(desk: Desk) -> None:
    for number in range(REMEMBERED + 1):
        desk.ask("set", f"s{number}", log_interval=1)
        desk.applied(number + 1)
    assert desk.ask("set", "s0", log_interval=1) == (
        "rejected",
        "this command was given before, and its answer is no longer kept",
    )
    assert len(desk.forwarded) == REMEMBERED + 1
    assert desk.ask("pause") == ("accepted", "")


def test_commands_that_wait_have_a_number_and_a_stop_is_always_taken(desk: Desk) -> None:
    for number in range(OPEN_AT_MOST):
        assert desk.ask("set", f"s{number}", log_interval=1) == ("accepted", "")
    assert desk.ask("checkpoint") == ("rejected", "64 commands are waiting for a step boundary already")
    assert desk.ask("stop") == ("accepted", "")
    assert desk.ask("abort") == ("accepted", "")


def test_a_final_answer_is_heard_once(desk: Desk) -> None:
    desk.ask("checkpoint")
    assert desk.applied(1) is not None
    published = len(desk.published)
    for step in range(10):
        assert desk.applied(1, step) is None
    assert len(desk.published) == published


def test_profile_has_bounds_and_one_answer(desk: Desk) -> None:
    for rank in range(2):
        desk.state.apply(hello(rank))
    assert desk.ask("profile", steps=0)[1] == "profile: steps: expected a whole number from 1 to 100, got 0"
    assert desk.ask("profile", steps=101)[0] == "rejected"
    assert desk.ask("profile", steps=True)[0] == "rejected"
    assert desk.ask("profile", ranks=[0, 2])[1] == "profile: ranks: 2: the run has ranks 0 to 1"
    assert desk.ask("profile", ranks=[])[0] == "rejected"
    assert desk.ask("profile", ranks="all")[0] == "rejected"
    assert desk.ask("profile", shapes=True)[1] == "profile: unknown argument shapes; expected steps and ranks"
    assert desk.forwarded == []
    assert desk.ask("profile") == ("accepted", "")
    assert desk.forwarded[0].arguments == {"steps": 3, "ranks": [0, 1]}
    assert desk.ask("profile", ranks=[1])[1] == "a profile is waiting for a step boundary already"
    desk.applied(1)
    assert desk.ask("profile", ranks=[1, 0, 1]) == ("accepted", "")
    assert desk.forwarded[1].arguments == {"steps": 3, "ranks": [0, 1]}
    desk.router.ranks_restart()
    assert desk.answer == ("rejected", "the ranks restarted")


def test_profile_of_a_run_that_takes_no_steps(desk: Desk) -> None:
    refusal = "the run is paused and takes no steps: resume it, and profile then"
    desk.ask("pause")
    assert desk.ask("profile") == ("rejected", refusal)
    desk.applied(1)
    desk.set("paused")
    assert desk.ask("profile") == ("rejected", refusal)
    desk.ask("resume")
    assert desk.ask("profile") == ("accepted", "")
    for rank in range(2):
        desk.state.apply(hello(rank))
    desk.state.apply(Goodbye(rank=1, outcome="failed", step=3, wall_s=0))
    desk.router.ranks_restart()
    desk.set("running")
    assert desk.ask("profile", ranks=[0, 1]) == ("rejected", "rank 1 of the run has ended")
    desk.set("failed")
    assert desk.ask("profile") == ("rejected", "the run is over (failed)")


def test_what_a_foreign_trainer_cannot_do_is_rejected_at_once(desk: Desk) -> None:
    desk.state.apply(hello(0).model_copy(update={"impossible": {"checkpoint": "not possible: no save", "stop": "no"}}))
    assert desk.ask("checkpoint") == ("rejected", "not possible: no save")
    assert desk.ask("pause") == ("accepted", "")
    assert desk.ask("stop") == ("accepted", "")  # its command is ended by a signal: the ranks are not asked
    assert [command.name for command in desk.forwarded] == ["pause"]


def test_a_wrapped_command_without_ranks_obeys_nothing_but_stop_and_abort() -> None:
    desk = Desk()
    desk.router = CommandRouter(
        desk.state,
        forward=desk.forwarded.append,
        publish=desk.published.append,
        abort=lambda command: desk.aborted.append(command.id),
        stacks=lambda command: desk.stacks.append(command.id),
        wrapped=True,
    )
    assert desk.ask("pause") == ("rejected", NO_RANK)
    assert desk.ask("stacks", "s1") == ("accepted", "")
    assert desk.ask("stop") == ("accepted", "")
    assert desk.ask("abort", "a1") == ("accepted", "")
    assert (desk.stacks, desk.aborted, desk.forwarded) == (["s1"], ["a1"], [])
