"""note, rm, config, completion: what they say, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import write_json
from tests.harness import ROOT
from tests.harness.fakerun import write_run
from tests.harness.waiting import patient
from zerotop.cli import main
from zerotop.commands.completion import SCRIPTS, candidates
from zerotop.rundir.lock import take


@pytest.fixture
def ended(home: Path) -> Path:
    """The run q1, which is over, with a checkpoint."""
    run = write_run(home, "q1", home, RunStatus(name="q1", state="finished", attempt=1, step=40))
    write_json(run / "resolved.json", {"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "zerotop": {}, "notes": []})
    saved = run / "checkpoints" / "step-00000040"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"format": 1, "step": 40}))
    (saved / "weights").write_bytes(os.urandom(100_000))
    return run


# ---- note ------------------------------------------------------------------------------------------------------------
def test_notes_are_kept_listed_and_shown_by_ls(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["note", "q1"]) == 0
    assert "there are no notes with q1" in capsys.readouterr().err
    assert main(["note", "q1", "lr", "halved\x1b[31m"]) == 0 and main(["note", "q1", "again"]) == 0
    capsys.readouterr()
    assert main(["note", "q1", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)
    assert [note["text"] for note in notes] == ["lr halved\x1b[31m", "again"] and "@" in notes[0]["who"]
    assert main(["note", "q1"]) == 0
    text = capsys.readouterr().out
    assert "lr halved" in text and "\x1b" not in text  # nothing in a note steers the terminal
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("again")
    assert (ended / "notes.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("text", "message"), [("  ", "the note is empty"), ("x" * 2001, "2,001 characters")])
def test_a_note_that_cannot_be_kept(ended: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    assert main(["note", "q1", text]) == 2
    assert message in capsys.readouterr().err and not (ended / "notes.jsonl").exists()


# ---- rm --------------------------------------------------------------------------------------------------------------
def test_rm_says_what_it_deletes_and_deletes_it(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "q1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "q1 (finished at step 40)" in text and str(ended) in text and ended.exists()
    assert main(["rm", "q1"]) == 2  # no terminal to ask on
    assert "zerotop rm RUN --yes" in capsys.readouterr().err and ended.exists()
    assert main(["rm", "q1", "--yes", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"][0]["bytes"] > 100_000 and not ended.exists()


def test_rm_keeps_live_runs_and_those_in_use(ended: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = write_run(home, "q2", home, RunStatus(name="q2", state="running", attempt=1))
    assert main(["rm", "q1", "q2", "--yes"]) == 2
    assert "run q2 is running, nothing was deleted" in capsys.readouterr().err and ended.exists() and live.exists()
    lock = take(ended)
    assert lock is not None
    try:
        assert main(["rm", "q1", "--yes"]) == 1
    finally:
        os.close(lock)
    assert "in use by another process" in capsys.readouterr().err and ended.exists()
    assert main(["rm", "nobody"]) == 2


def test_rm_leaves_checkpoints_elsewhere_unless_asked(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere" / "q1"
    elsewhere.parent.mkdir()
    shutil.move(ended / "checkpoints", elsewhere)
    write_json(ended / "resolved.json", {"zerotop": {"checkpoint": {"folder": str(elsewhere.parent)}}})
    assert main(["rm", "q1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"keep    {elsewhere}" in text
    assert main(["rm", "q1", "--yes", "--checkpoints"]) == 0
    assert not elsewhere.exists() and not ended.exists() and elsewhere.parent.exists()


def test_rm_of_a_branch_counts_only_what_is_freed(ended: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    branch = write_run(home, "b", home, RunStatus(name="b", state="finished", attempt=1))
    shutil.copytree(ended / "checkpoints", branch / "checkpoints", copy_function=os.link)
    assert main(["rm", "b", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["bytes"] < 100_000
    assert main(["rm", "b", "--yes"]) == 0
    assert (ended / "checkpoints" / "step-00000040" / "weights").stat().st_size == 100_000


# ---- config ----------------------------------------------------------------------------------------------------------
def test_config_shows_settings_and_what_is_wrong_with_them(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "config" / "zerotop"
    folder.mkdir(parents=True)
    (folder / "keys.toml").write_text('pause = "f8"\nnonsense = "x"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("ZEROTOP_THEME", "pink")
    assert main(["config", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["keys"]["pause"] == "f8" and document["changed_keys"] == ["pause"]
    assert document["runs"] == str(home / "zerotop" / "runs") and document["theme"] == "dark"
    assert any("pink: no such theme" in problem for problem in document["problems"])
    assert any("nonsense" in problem for problem in document["problems"])
    assert main(["config"]) == 0
    text = capsys.readouterr().out
    assert "pause = f8" in text and str(folder / "keys.toml") in text and "problem: " in text


def test_config_of_a_run(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "q1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "optimizer.lr = 0.1",
        "optimizer.betas = [0.9, 0.95]",
        "zerotop = {}",
    ]
    assert main(["config", "q1", "optimizer.lr"]) == 0
    assert capsys.readouterr().out == "optimizer.lr = 0.1\n"
    assert main(["config", "q1", "optimizer.lrr"]) == 2
    assert "has no key 'optimizer.lrr'; optimizer has lr, betas" in capsys.readouterr().err


# ---- completion ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["co"], ["compare", "config", "completion"]),
        (["replay", ""], ["q1"]),
        (["replay", "q1", ""], []),
        (["compare", "q1", "q"], ["q1"]),
        (["rm", "q1", ""], ["q1"]),
        (["replay", "q1", "--tab"], ["--table"]),
        (["replay", "--table", ""], ["steps", "ranks"]),
        (["replay", "--csv", ""], []),  # a file: the shell's own
        (["launch", ""], []),
        (["launch", "--device", "c"], ["cpu", "cuda"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["nonsense", ""], []),
        (["launch", "x", "--", "tr"], []),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_a_shell_is_offered(ended: Path, words: list[str], expected: list[str]) -> None:
    found = candidates(words)
    assert sorted(found) == sorted(expected)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A zerotop of this source on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "zerotop"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m zerotop "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder


def test_bash_completes_with_the_script(ended: Path, on_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    script = SCRIPTS["bash"] + 'COMP_WORDS=(zerotop replay q); COMP_CWORD=2; _zerotop; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=patient(60), check=True
    )
    assert done.stdout.split() == ["q1"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_can_read_theirs(shell: str, on_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-n"], input=SCRIPTS[shell], text=True, capture_output=True, timeout=patient(60))
    assert done.returncode == 0, done.stderr


def test_completion_loads_no_screen(ended: Path) -> None:
    program = "import sys\nfrom zerotop.cli import main\nmain(['complete', '--', 'replay', ''])\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=patient(60), check=True
    )
    assert done.stdout.splitlines()[0] == "q1" and not {"textual", "pydantic", "zmq"} & set(done.stdout.split())
