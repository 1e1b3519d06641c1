"""Where a run is started: names, folders, disks and variables that are not as they should be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import RunFile, read_status
from tests.harness.waiting import patient
from zerotop import cli
from zerotop.launch import start as launching
from zerotop.launch import torchrun
from zerotop.rundir import executable, paths, statusfile
from zerotop.rundir.paths import make_sockets_folder, remove_sockets

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a config and a script, and a state home in it that is not there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"train_micro_batch_size_per_gpu": 1}')
    (tmp_path / "script.py").write_text("")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a launch that nothing came of."""
    assert cli.main(["launch", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("zerotop: ")
    return captured.err


@pytest.mark.parametrize("place", [(executable, "replace_text"), (launching, "write_json"), (launching, "take_new")])
def test_a_full_disk_is_one_line_and_leaves_no_run(home, capsys, monkeypatch, place) -> None:
    def full(*_: object, **__: object) -> None:
        raise NO_SPACE

    monkeypatch.setattr(*place, full)
    assert "No space left on device" in refused(capsys, "config.json", "--device", "cpu", "--name", "q1")
    assert not (home / "state" / "zerotop" / "runs" / "q1").exists()


def test_a_state_home_that_can_not_be_made(home, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "script.py" / "state"))
    told = refused(capsys, "config.json", "--device", "cpu")
    assert "Not a directory" in told and "set XDG_STATE_HOME to a folder" in told


def test_a_working_directory_that_is_gone(home, capsys) -> None:
    gone = home / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        assert "the working directory is gone" in refused(capsys, str(home / "config.json"), "--device", "cpu")
    finally:
        os.chdir(home)


@pytest.mark.parametrize("what", ["the config", "the script"])
def test_a_name_that_is_not_utf8(home, capsys, what) -> None:
    name = os.fsdecode(b"caf\xe9.py")
    os.link("script.py" if what == "the script" else "config.json", name)
    words = ["config.json", "--device", "cpu", "--", name] if what == "the script" else [name]
    assert f"{what}: expected a name in UTF-8, got caf\\xe9.py" in refused(capsys, *words)


def test_an_ascii_locale_takes_names_in_utf8(home) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "zerotop", "launch", "config.json", "--device", "cpu", "--", "nicht da ü.py"]
    done = subprocess.run(
        command, env=ascii_only, capture_output=True, text=True, encoding="utf-8", timeout=patient(60)
    )
    assert done.returncode == 2 and "nicht da ü.py: there is no such script" in done.stderr


@pytest.mark.parametrize("taken", ["a file", "a link"])
def test_a_sockets_home_that_is_somebody_elses_is_led_around(short_folder, monkeypatch, taken) -> None:
    usual = short_folder / "zerotop-7"
    monkeypatch.setattr(paths, "sockets_home", lambda: usual)
    usual.touch() if taken == "a file" else usual.symlink_to("/")
    folder = make_sockets_folder()
    assert folder.parent.parent == short_folder and folder.parent.name.startswith("zerotop-7-")
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    remove_sockets(folder)
    assert list(short_folder.iterdir()) == [usual]


def test_what_is_removed_as_sockets_lies_in_a_sockets_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paths, "sockets_home", lambda: tmp_path / "zerotop-7")
    other = tmp_path / "zerotop-70" / "folder"
    other.mkdir(parents=True)
    remove_sockets(other)
    assert other.exists()


def test_another_launchers_variables_do_not_reach_the_ranks(tmp_path) -> None:
    run = RunFile(
        name="q1", created_wall_s=0, attempt=1, host="a", boot_id="b", nproc=2, device="cpu", config_path="",
        config_folder="", sockets=str(tmp_path),
    )  # fmt: skip
    ranks = "RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    options = "PET_NNODES PET_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_ERROR_FILE"
    foreign = dict.fromkeys(f"{ranks} {options}".split(), "7")
    kept = {"OMP_NUM_THREADS": "3", "MY_RANK": "1", "PETS": "cat"}
    found = torchrun.environment(run, tmp_path, supervisor_pid=1, resume=False, base={**foreign, **kept})
    assert not foreign.keys() & found.keys()
    assert kept.items() <= found.items()


def test_a_status_that_finds_no_room_for_another_file_is_written_over_the_old_one(tmp_path, monkeypatch) -> None:
    long = RunStatus(name="q1", state="running", reason="r" * 300)
    statusfile.write_status(tmp_path, long)

    def no_inode(*_: object) -> None:
        raise NO_SPACE

    monkeypatch.setattr(statusfile, "write_json", no_inode)
    end = RunStatus(name="q1", state="failed", error="e" * 5000)
    statusfile.write_status(tmp_path, end)
    assert read_status(tmp_path) == end
    statusfile.write_status(tmp_path, end.model_copy(update={"error": ""}))
    assert read_status(tmp_path).error == ""
    with pytest.raises(OSError, match="No space"):
        statusfile.write_status(tmp_path / "nowhere", end)
