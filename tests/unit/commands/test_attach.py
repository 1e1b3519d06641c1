"""What attach and launch say, and how they exit: without a screen, and once the user has left it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.wire.messages import LogRecord, RunStateName, RunStatus
from tests.harness.fakehub import hello, step_result
from tests.harness.fakerun import write_run
from tests.harness.finetuning import evaluation
from zerotop.commands.attach import show
from zerotop.commands.progress import follow
from zerotop.hub.recorder import Recorder
from zerotop.rundir.directory import find_run
from zerotop.source.base import Source
from zerotop.source.recorded import RecordedSource


class LeftAtOnce:
    """In the place of the screen: the user presses q as soon as it is there."""

    def __init__(
        self, source: Source, read_only: bool = False, find_earlier: object = None, host: str | None = None
    ) -> None:
        self.source = source
        self.left_by = None

    def run(self) -> None:
        self.source.poll()


@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "line"),
    [
        ("failed", "rank 1 was killed by SIGKILL", 1, "q1: failed, rank 1 was killed by SIGKILL"),
        ("aborted", "aborted by me@box:7", 1, "q1: aborted, aborted by me@box:7"),
        ("finished", "all ranks finished", 0, "q1: finished, all ranks finished"),
        ("stopped", "stopped on request", 0, "q1: stopped, stopped on request"),
        ("running", "", 0, "q1 continues (running): zerotop attach q1 opens it again"),
    ],
)
def test_the_exit_code_is_the_runs(
    state: RunStateName,
    reason: str,
    exit_code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("zerotop.tui.app.ZerotopApp", LeftAtOnce)
    source = RecordedSource(tmp_path, RunStatus(name="q1", state=state, reason=reason))
    source.start()
    assert show(source) == exit_code
    assert capsys.readouterr().err == line + "\n"


def test_lines_tell_what_ranks_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = write_run(tmp_path, "q1", Path("/nowhere"), RunStatus(name="q1", state="finished", started_wall_s=10.0))
    recorder = Recorder(run / "recording.sqlite", attempt=1)
    for level, text, wall_s in (
        ("warning", "starting from step 0", 11.0),
        ("error", "a bad batch", 12.0),
        ("info", "step 5", 13.0),
        ("warning", "of an attempt before", 9.0),
    ):
        said = {"rank": 1, "level": level, "logger": "runtime.engine", "text": text, "wall_s": wall_s}
        recorder.add("rank/1", LogRecord.model_validate(said))
    recorder.close()
    entry = find_run("q1")
    source = RecordedSource(entry.path, entry.status)
    source.start()
    assert follow(source, entry) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["rank 1: starting from step 0", "rank 1: a bad batch", "q1: finished at step 0"]


def test_lines_tell_each_evaluation_and_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = write_run(tmp_path, "q1", Path("/nowhere"), RunStatus(name="q1", state="finished", started_wall_s=10.0))
    recorder = Recorder(run / "recording.sqlite", attempt=1)
    for message in (
        hello(steps=20, world_size=1),
        evaluation(0, 3.0),
        step_result(0, 10, loss=2.5),
        evaluation(10, 2.0),
        step_result(0, 20, loss=2.25),
        evaluation(20, 2.5),
    ):
        recorder.add("rank/0", message)
    recorder.close()
    entry = find_run("q1")
    source = RecordedSource(entry.path, entry.status)
    source.start()
    assert follow(source, entry) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 10/20  loss 2.5000") and "eval" not in lines[0]
    assert lines[1].startswith("step 20/20  loss 2.2500") and lines[1].endswith("eval 2.5000 (best 2.0000 at step 10)")
    assert lines[2:] == [
        "evaluation at step 0: loss 3.0000, perplexity 20.09, the best so far",
        "evaluation at step 10: loss 2.0000, perplexity 7.389, the best so far",
        "evaluation at step 20: loss 2.5000, perplexity 12.18; best 2.0000 at step 10",
        "q1: finished at step 0",
    ]
