"""Nothing that a rank, a config or another box says may steer the terminal that a command prints on."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.wire.messages import RunStatus
from tests.harness import ROOT
from tests.harness.fakerun import write_run
from zerotop.clean import clean, clean_line
from zerotop.cli import main

ZEROTOP = ROOT / "zerotop"
STEERING = "\x1b]52;c;b3du\x07\x1bPq\x1b\\\x1b[2Jbad\x9b31m \u202eevil\u200b \x85\x08\x00end"


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b[];m\x07\r\n\t\x9b\u202e"))))
def test_only_printable_characters_and_line_ends_come_through(text: str) -> None:
    shown = clean(text)
    assert shown.replace("\n", "").isprintable() and clean(shown) == shown
    assert clean_line(text).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, é, 漢字", "plain, é, 漢字"),
        ("\x1b]0;never ended\nnext", "\nnext"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\u00a0b\u2028c", "a b c"),
        ("name \udcff of a file", "name \ufffd of a file"),
        ("user\u202egnp.exe\u200b", "usergnp.exe"),
        ("1%\r2%\r3%\r\ndone", "3%\ndone"),
    ],
)
def test_what_is_left(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that failed with an exception that tries to steer the terminal, and such a log."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    status = RunStatus(name="q1", state="failed", reason=f"rank 0: {STEERING}", error=f"Traceback\n{STEERING}")
    run = write_run(tmp_path, "q1", Path("/nowhere"), status)
    log = run / "logs" / "1" / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"{STEERING}\n")
    return run


@pytest.mark.parametrize("words", [["ls"], ["status"], ["pause", "q1"], ["logs"]], ids=" ".join)
def test_no_command_sends_it_to_a_terminal(
    words: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main(words)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "evil" in shown and "b3du" not in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_a_pipe_gets_the_logs_as_the_ranks_wrote_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["logs"])
    assert capsys.readouterr().out == f"{STEERING}\n"


def test_json_says_everything_in_printable_characters(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "--json"])
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and json.loads(shown)["reason"] == f"rank 0: {STEERING}"


def test_every_line_for_people_goes_through_the_cleaning_functions() -> None:
    """`print` and `write` by themselves only where what is printed is our own words, or is cleaned on the spot."""
    own = {"cli.py", "output.py", "logs.py", "stream.py", "run.py", "completion.py", "complete.py", "rm.py"}
    calls = [
        path.name
        for path in ZEROTOP.rglob("*.py")
        if path.parent.name not in ("supervise", "rundir", "outputs")  # their own logs
        if path.name != "end_with_supervisor.py"  # into the log of the wrapped command
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(calls) <= own


def test_a_locale_without_the_characters_is_no_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "logs" / "1" / "rank-0.log").write_text("loss → 0\n")
    written = io.BytesIO()
    ascii_only = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["logs"]) == 0
    ascii_only.flush()
    assert written.getvalue() == b"loss \\u2192 0\n"
