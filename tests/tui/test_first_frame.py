"""What stands on the terminal before the screen does, and that the terminal is given back if the screen never comes."""

from __future__ import annotations

import sys

import pytest

from runtime.wire.messages import RunStatus
from tests.harness.fakehub import FakeHub
from tests.harness.terminal import ALTERNATE_SCREEN, Terminal
from zerotop.tui.first_frame import frame_text

PREPARE = """
import os, signal
from runtime.wire.messages import RunStatus
from zerotop.tui.first_frame import first_frame
with first_frame(RunStatus(name="q1", state="running", step=77)):
    {what}
"""


def lines(status: RunStatus, width: int) -> list[str]:
    text = frame_text(status, width)
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[0m"):
        text = text.replace(code, "")
    return text.split("\r\n")


def test_the_name_the_state_and_the_step():
    assert lines(RunStatus(name="q1", state="running", step=77), 80) == [
        " q1    running  step 77",
        " opening the screen",
    ]
    assert lines(RunStatus(name="q1", state="starting"), 80)[0] == " q1    starting"


def test_a_long_name_is_cut_as_in_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROTOP_ASCII", "0")
    assert lines(RunStatus(name="solid-birch-17", state="running"), 80)[0].startswith(" solid-bir…    running")
    monkeypatch.setenv("ZEROTOP_ASCII", "1")
    assert lines(RunStatus(name="solid-birch-17", state="running"), 80)[0].startswith(" solid-bir~    running")


@pytest.mark.parametrize("width", [1, 8, 20, 40])
def test_a_frame_is_no_wider_than_its_terminal(width):
    shown = lines(RunStatus(name="n" * 64, state="running", step=10**9), width)
    assert all(len(line) <= max(width, 12) for line in shown)  # eight characters of the name are always there


def test_the_frame_comes_before_the_screen_which_takes_its_terminal_over(hub: FakeHub):
    terminal = Terminal([sys.executable, "-m", "zerotop", "attach", "q1"])
    try:
        terminal.read_until(lambda: "step 77 of 200" in terminal.shown)
        first = terminal.raw.index(b"opening the screen")
        assert b"q1" in terminal.raw[:first] and b"running" in terminal.raw[:first]
        assert terminal.raw.startswith(ALTERNATE_SCREEN[0])
        assert "opening the screen" not in "\n".join(terminal.shown.splitlines()[-36:])
        terminal.type("q")
        assert terminal.read_to_the_end() == 0
        assert not terminal.in_alternate_screen
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("what", "exit_code"),
    [
        ("raise SystemExit(2)", 2),
        ("1 / 0", 1),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("os.kill(os.getpid(), signal.SIGHUP)", 129),
    ],
)
def test_a_screen_that_never_comes_gives_the_terminal_back(what, exit_code):
    terminal = Terminal([sys.executable, "-c", PREPARE.format(what=what)])
    try:
        assert terminal.read_to_the_end() == exit_code
        assert b"opening the screen" in terminal.raw
        assert not terminal.in_alternate_screen and b"\x1b[?25h" in terminal.raw
    finally:
        terminal.close()
