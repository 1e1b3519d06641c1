"""Commands under `zerotop run`: one that fails is started again only if the config says so, and one that trains several
times is seen each time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import Event
from runtime.wire.rundir import read_status
from tests.harness.runs import StartedRun, end_runs
from zerotop.commands.run import OutputPrinter
from zerotop.launch.start import start_wrapped

FAILS = """
import os
from runtime.telemetry import watch
watcher = watch()
attempt = os.environ["ZEROTOP_ATTEMPT"]
for step in range(1, 4):
    watcher.step_ended()
    print("attempt", attempt, "step", step, flush=True)
if attempt == "1":
    raise ValueError("a bad batch")
print("attempt 2 ends")
"""
TRAINS_AGAIN = """
import math
from runtime.telemetry import watch
from runtime.telemetry.watching import Trainer, start_watching
first = start_watching(Trainer("a"), replaces=True)
first.step_ended()
again = start_watching(Trainer("b", start_step=4), replaces=True)  # the first one failed, and was not closed
assert first.closed
again.step_ended()
again.close()
last = watch(start_step=8)  # the explicit line, after a training that has ended
last.log(loss=math.nan)
last.step_ended()
try:
    watch()
except TypeError as error:
    print(error)
"""
STOPS = """
import time
from pathlib import Path
from runtime.telemetry import watch

def save():
    Path("saved").write_text(str(watcher.step))
    return Path("saved").resolve()

watcher = watch(save=save)
while not watcher.should_stop:
    watcher.step_ended()
    time.sleep(0.02)
"""
StartWrapped = Callable[..., StartedRun]


@pytest.fixture
def start_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartWrapped]:
    """`start_script(text, "zerotop.restarts.limit=1")`: a wrapped run of a script without ranks."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    runs: list[StartedRun] = []

    def begin(text: str, *overrides: str) -> StartedRun:
        script = tmp_path / "train.py"
        script.write_text(text)
        entry = start_wrapped([sys.executable, str(script)], overrides=overrides)
        runs.append(StartedRun(entry, tmp_path / "no-pids"))
        return runs[-1]

    yield begin
    end_runs(runs)


def test_a_command_that_fails_is_not_started_again(start_script: StartWrapped) -> None:
    run = start_script(FAILS)
    run.see_end("failed")
    status = read_status(run.path)
    assert (status.attempt, status.restarts, status.step) == (1, 0, 3)
    assert "a bad batch" in status.reason and "restarted" not in status.reason
    assert not run.entry.logs(2).exists()


def test_with_a_limit_it_is_and_all_its_output_is_printed_in_order(
    start_script: StartWrapped, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_script(FAILS, "zerotop.restarts.limit=1")
    printer = OutputPrinter(run.entry)
    printer(at_end=False)
    run.see_end("finished")  # both attempts, between two looks
    printer(at_end=True)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("attempt")]
    assert steps == [f"attempt {attempt} step {step}" for attempt in (1, 2) for step in (1, 2, 3)] + ["attempt 2 ends"]
    assert any("ValueError: a bad batch" in line for line in lines[: lines.index("attempt 2 step 1")])


def test_a_process_that_trains_again_is_seen_to_its_end(start_script: StartWrapped) -> None:
    """The hub knows one connection of a rank: each watch takes over that of the one before."""
    run = start_script(TRAINS_AGAIN)
    run.see(lambda source: source.connection == "ended", "the end")
    run.see_end("finished")
    state = run.source.state
    assert state.hello is not None and state.hello.trainer.startswith("torch") and state.hello.start_step == 8
    assert state.ranks[0].goodbye is not None and state.ranks[0].goodbye.step == 9
    assert ("not finite", 0, 9) in [(e.what, e.rank, e.step) for e in state.events if isinstance(e, Event)]
    assert "this process is watched already" in (run.entry.logs() / "launcher.log").read_text()


def test_a_stop_saves_before_the_loop_ends(
    start_script: StartWrapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = start_script(STOPS)
    run.see(lambda source: source.state.step > 2, "steps")
    assert run.command("stop").ack.state == "applied"
    status = run.see_end("stopped")
    assert status.wrapped and status.step == status.last_checkpoint_step == int((tmp_path / "saved").read_text())
