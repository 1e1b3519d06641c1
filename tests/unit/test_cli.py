"""The command line as such: help, usage errors, what it loads, bad input in every command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from tests.harness import ROOT
from tests.harness.fakerun import write_run
from tests.harness.waiting import patient
from zerotop.cli import main
from zerotop.commands.table import COMMANDS, command_parser

FOR_PEOPLE = [name for name, (_, line) in COMMANDS.items() if line]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def loaded_by(*words: str) -> set[str]:
    """The modules that a call of `zerotop WORDS...` has loaded when it ends."""
    program = (
        "import sys\nfrom zerotop.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=patient(60)
    )
    return set(done.stderr.rsplit("loaded: ", 1)[1].split())


def test_help_loads_next_to_nothing() -> None:
    loaded = loaded_by("--help")
    assert not loaded & {"torch", "textual", "zmq", "pydantic", "psutil", "numpy"}


@pytest.mark.parametrize("words", [["ls", "--json"], ["status"], ["pause"], ["doctor", "--json"]], ids=" ".join)
def test_no_command_loads_torch_and_none_but_attach_the_screen(words: list[str], home: Path) -> None:
    assert not loaded_by(*words) & {"torch", "textual"}


def test_help_is_quick() -> None:
    def taken_s(*words: str) -> float:
        """Of the processor: a busy machine must not decide this."""
        before = os.times()
        subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=patient(60))
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Against a bare interpreter's start, the best of some.
    bare_s = min(taken_s("-c", "pass") for _ in range(5))
    help_s = min(taken_s("-m", "zerotop", "--help") for _ in range(5))
    assert help_s < bare_s + 0.25


@pytest.mark.parametrize("command", FOR_PEOPLE)
def test_every_command_of_the_help_has_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: zerotop {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *FOR_PEOPLE])
def test_every_help_has_examples_that_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*([command] if command else []), "--help"])
    _, mark, text = capsys.readouterr().out.partition("examples:\n")
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("zerotop")]
    assert mark and (examples or "zerotop completion" in text)
    assert not command or any(example.split()[1:2] == [command] for example in examples) or command == "completion"
    for example in examples:
        words = re.split(r"\s{2,}| \| | && | > ", example)[0]  # what follows two blanks explains it
        words = shlex.split(words.replace("[", "").replace("]", ""))[1:]
        if command and words[0] == command:  # others may stand beside it
            own, _, _ = " ".join(words).partition(" -- ")
            command_parser(command).parse_args(shlex.split(own)[1:])


def test_help_names_every_command_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command}" in shown for command in FOR_PEOPLE)
    assert "resolve" not in shown


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: zerotop" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("zerotop ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attahc"], "no command 'attahc'. Did you mean attach?"),
        (["xyz"], "no command 'xyz'. zerotop --help lists them."),
        (["status", "nope"], "there is no run called 'nope'. Runs: done (finished), dead (failed)"),
        (["status", "../etc"], "there is no run called '../etc'"),
        (["logs", "nope"], "there is no run called 'nope'"),
        (["pause", "nope"], "there is no run called 'nope'"),
        (["attach", "nope"], "there is no run called 'nope'"),
        (["attach", "done"], "attach draws a screen and needs a terminal"),
        (["attach"], "attach draws a screen and needs a terminal"),
        (["checkpoint"], "no run is live"),
        (["set", "done"], "expected KEY=VALUE after the run"),
        (["set", "done", "log_interval"], "expected KEY=VALUE, such as log_interval=10, got 'log_interval'"),
        (["set", "done", "lr_factor=1", "lr_factor=2"], "lr_factor is given twice"),
        (["status", "a@b@c:d"], "'a@b@c:d' is not a target: expected RUN, user@host or user@host:RUN"),
        (["status", "@"], "is not a target"),
        (["ls", "--", "-oProxyCommand=x"], "'-oProxyCommand=x' is not a host"),
        (["status", "-oProxyCommand=x@host"], None),
        (["logs", "done"], "done (finished) has no logs"),
        (["export", "nope", "out"], "nope is not a folder, and there is no run called 'nope'"),
        (["export", "done", "out"], "run done has no complete checkpoint in "),
        (["export", "done/step-3", "out"], "run done has no checkpoint step-3 in "),
        (["export", "done", "out", "--shard-size", "big"], "--shard-size: 'big' is not a size"),
        (["export", "done"], None),
        (["export", "done", "out", "--dtype", "int8"], None),
        (["logs", "done", "--rank", "x"], None),
        (["pause", "done", "--timeout", "-1"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(words: list[str], message: str | None, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    ended = {"attempt": 1, "step": 200}
    done = RunStatus(name="done", state="finished", reason="all 200 steps are done", started_wall_s=now, **ended)
    write_run(home, "done", Path("/nowhere"), done)
    # A live state whose supervisor is gone.
    dead = RunStatus(name="dead", state="running", started_wall_s=now - 999, **ended)
    write_run(home, "dead", Path("/nowhere"), dead, supervisor_pid=2**22 + 1, created_wall_s=now - 999)
    try:
        exit_code = main(words)
    except SystemExit as exit:  # argparse's own refusals
        assert message is None
        exit_code = exit.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert exit_code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert (message or "usage: zerotop") in captured.err


def test_json_asked_for_is_json_also_for_errors(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "nope", "--json"]) == 2
    captured = capsys.readouterr()
    assert "no run called 'nope'" in json.loads(captured.out)["error"]
    assert captured.err.startswith("zerotop: there is no run")
    assert main(["logs", "-f", "--json"]) == 2
    assert "-f has no end" in json.loads(capsys.readouterr().out)["error"]


def test_a_live_run_without_a_terminal_is_not_attached_to(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(home, "q1", Path("/nowhere"), RunStatus(name="q1", state="running"))
    assert main(["attach", "q1"]) == 2
    assert "needs a terminal" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(home: Path) -> None:
    run = write_run(home, "q1", Path("/nowhere"), RunStatus(name="q1", state="finished"))
    (run / "logs" / "1").mkdir(parents=True)
    (run / "logs" / "1" / "rank-0.log").write_text("line\n" * 200_000)
    command = f"{sys.executable} -m zerotop logs q1 | head -1"
    environment = {**os.environ, "XDG_STATE_HOME": str(home)}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patient(60)
    )
    assert (done.stdout, done.stderr) == ("line\n", "")
