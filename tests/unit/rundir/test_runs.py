"""Run directories, names, folders for sockets, and the command line of ranks."""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import RunFile, boot_id, write_json
from zerotop.launch import devices, torchrun
from zerotop.launch.start import start_run
from zerotop.rundir import paths
from zerotop.rundir.directory import effective_status, find_run, list_runs, make_run_folder
from zerotop.rundir.logs import cap_logs
from zerotop.rundir.names import check_name, generate_name
from zerotop.rundir.paths import RunError, lock_sockets, make_private_folder, make_sockets_folder, remove_sockets


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def make_run(name: str = "q1", state: str = "running", **changes: object) -> Path:
    """A run directory as if a supervisor, this very process by default, were behind it."""
    me = psutil.Process()
    values: dict[str, object] = {
        "name": name, "created_wall_s": time.time(), "attempt": 1, "host": socket.gethostname(), "boot_id": boot_id(),
        "nproc": 2,
        "supervisor_pid": me.pid, "supervisor_start": me.create_time(), "device": "cpu", "config_path": "/c.json",
        "config_folder": "/", "sockets": "/tmp/none",
    }  # fmt: skip
    folder = make_run_folder(name)
    write_json(folder / "run.json", RunFile.model_validate(values | changes))
    write_json(folder / "state.json", RunStatus.model_validate({"name": name, "state": state, "attempt": 1, "step": 7}))
    return folder


# ---- places ----------------------------------------------------------------------------------------------------------
def test_the_state_home_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert paths.runs_home() == tmp_path / "state" / "zerotop" / "runs"
    monkeypatch.setenv("HOME", "/home/someone")
    for useless in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", useless)
        assert paths.runs_home() == Path("/home/someone/.local/state/zerotop/runs")


def test_a_link_in_place_of_a_private_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RunError, match="not a plain directory"):
        make_private_folder(tmp_path / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(RunError, match="belongs to user id 12345"):
        make_private_folder(tmp_path / "theirs")


def test_a_folder_that_others_can_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    assert stat.S_IMODE(make_private_folder(tmp_path / "open").stat().st_mode) == 0o700


def test_a_folder_that_can_not_be_made_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"can't create .*Not a directory"):
        make_run_folder("q1")


def test_sockets_of_dead_runs_are_swept_and_living_ones_kept() -> None:
    living, dead = make_sockets_folder(), make_sockets_folder()
    lock = lock_sockets(living)
    os.close(lock_sockets(dead))
    fresh = make_sockets_folder()
    try:
        assert living.exists() and not dead.exists()
        assert len(str(fresh / "telemetry")) < paths.SOCKET_PATH_LIMIT
        with pytest.raises(RunError, match="in use by another supervisor"):
            lock_sockets(living)
    finally:
        os.close(lock)
        remove_sockets(living)
        remove_sockets(fresh)
    assert not living.exists()


def test_only_our_own_sockets_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    remove_sockets(tmp_path / "kept")
    assert (tmp_path / "kept").exists()


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["q1", "llama-7b.v2_x", "0", "a" * 40])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "Q1", "a/b", "..", "-x", "a b", "a" * 41, "é", "x\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(RunError, match="a-z 0-9"):
        check_name(name)


def test_generated_names_are_good_and_free() -> None:
    taken: set[str] = set()
    for _ in range(300):
        name = check_name(generate_name(taken))
        assert name not in taken
        taken.add(name)


# ---- finding ---------------------------------------------------------------------------------------------------------
def test_no_runs_at_all_is_said() -> None:
    assert list_runs() == []
    with pytest.raises(RunError, match="There are no runs yet"):
        find_run()
    with pytest.raises(RunError, match="no run called 'q9'"):
        find_run("q9")


def test_the_newest_live_run_is_the_default() -> None:
    make_run("old", created_wall_s=1.0)
    make_run("new", created_wall_s=2.0)
    make_run("ended", "finished", created_wall_s=3.0)
    assert find_run().name == "new"
    assert [entry.name for entry in list_runs()] == ["ended", "new", "old"]
    with pytest.raises(RunError, match=r"Runs: ended \(finished\), new \(running\), old \(running\)"):
        find_run("q9")
    with pytest.raises(RunError, match="run ended is over"):
        find_run("ended", live_only=True)


def test_a_typo_in_a_name_gets_the_nearest_and_five_of_the_newest() -> None:
    make_run("calm-falcon", "finished", created_wall_s=1.0)
    for number in range(7):
        make_run(f"q{number}", created_wall_s=2.0 + number)
    with pytest.raises(RunError) as caught:
        find_run("Calm-falcom")
    _, _, choices = str(caught.value).partition(". ")
    assert choices.startswith("Did you mean calm-falcon? Runs: q6 (running), ")
    assert choices.endswith("q2 (running) and 3 more (zerotop ls)")
    with pytest.raises(RunError) as caught:
        find_run("unlike-any")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["../runs", "..", ".", "", "/etc"])
def test_a_name_is_no_path(name: str) -> None:
    make_run("q1")
    with pytest.raises(RunError, match="no run called"):
        find_run(name)


def test_an_existing_name_says_the_way_out() -> None:
    make_run("q1", "finished")
    with pytest.raises(RunError, match=r"run q1 exists \(finished\): --resume continues it, or choose another --name"):
        make_run_folder("q1")


def test_a_damaged_run_is_left_out_of_the_list_and_named_when_asked_for() -> None:
    folder = make_run("q1")
    (folder / "run.json").write_text("{")
    assert list_runs() == []
    with pytest.raises(RunError, match=r"can't read .*run\.json"):
        find_run("q1")


# ---- liveness --------------------------------------------------------------------------------------------------------
def status_of(**changes: object) -> RunStatus:
    folder = make_run("probe", **changes)
    from runtime.wire.rundir import read_run

    return effective_status(folder, read_run(folder))


def test_a_run_with_its_supervisor_lives() -> None:
    assert status_of().state == "running"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"supervisor_pid": 2**22 + 1}, "the supervisor died (killed?); last known step 7"),
        (
            {"supervisor_start": 1.0},
            "the supervisor died (killed?); last known step 7",
        ),  # the number was given to another
        ({"boot_id": "another boot"}, "the machine was restarted; last known step 7"),
        ({"supervisor_pid": 0, "created_wall_s": 1.0}, "its launch was interrupted before anything ran"),
    ],
)
def test_a_run_without_its_supervisor_has_failed(changes: dict[str, object], reason: str) -> None:
    status = status_of(**changes)
    assert (status.state, status.reason) == ("failed", reason)


def test_a_run_that_is_only_being_launched_is_starting() -> None:
    assert status_of(state="starting", supervisor_pid=0).state == "starting"


def test_a_run_on_another_host_is_taken_at_its_word() -> None:
    assert status_of(host="elsewhere", supervisor_pid=1).state == "running"


# ---- command line of ranks -------------------------------------------------------------------------------------------
def run_file(**changes: object) -> RunFile:
    values = {
        "name": "q1",
        "created_wall_s": 0,
        "attempt": 2,
        "host": "h",
        "boot_id": "b",
        "nproc": 2,
        "device": "cpu",
        "config_path": "c",
    }
    return RunFile.model_validate(values | {"config_folder": "/", "sockets": "/tmp/zerotop-0/abcd1234"} | changes)


def test_nothing_of_torchrun_listens_beyond_this_machine() -> None:
    words = torchrun.command(run_file(), Path("/run"))
    assert words[words.index("--rdzv-conf") + 1] == "store_type=file"
    assert words[words.index("--rdzv-endpoint") + 1] == "/tmp/zerotop-0/abcd1234/rendezvous-2"
    assert words[-2:] == ["-m", "runtime"] and "-P" in words
    # torchrun would take some of a script's arguments for abbreviations of its own: they reach ranks through run.json.
    assert torchrun.command(run_file(script=["/x/train.py", "--nproc", "1"]), Path("/run")) == words


def test_the_environment_keeps_what_the_user_set() -> None:
    base = {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "3", "NCCL_SOCKET_IFNAME": "eth7"}
    found = torchrun.environment(run_file(device="cuda"), Path("/run"), supervisor_pid=5, resume=True, base=base)
    assert found.items() >= base.items()
    assert found["ZEROTOP_RUN"] == "/run" and found["ZEROTOP_SUPERVISOR_PID"] == "5"
    assert found["ZEROTOP_ATTEMPT"] == "2" and found["ZEROTOP_RESUME"] == "1" and found["PYTHONSAFEPATH"] == "1"
    on_cpu = torchrun.environment(run_file(), Path("/run"), supervisor_pid=5, resume=False, base={})
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "" and int(on_cpu["OMP_NUM_THREADS"]) >= 1


# ---- devices ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> object:
    def have(count: int, built: bool = True, visible: str | None = None) -> None:
        monkeypatch.setattr(devices, "count_devices", lambda: (count, "" if count else "no NVIDIA driver"))
        monkeypatch.setattr(devices, "torch_has_cuda", lambda: built)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


def test_auto_takes_what_is_there(gpus) -> None:  # type: ignore[no-untyped-def]
    gpus(4)
    assert devices.choose("auto", None) == ("cuda", 4)
    assert devices.choose("auto", 2) == ("cuda", 2)
    assert devices.choose("cpu", None) == ("cpu", min(2, os.cpu_count() or 1))
    gpus(4, visible="2,3")
    assert devices.choose("auto", None) == ("cuda", 2)
    gpus(4, visible="1,9,2")
    assert devices.visible_gpus()[0] == 1
    gpus(4, visible="GPU-1234,MIG-5678")
    assert devices.visible_gpus()[0] == 2
    gpus(4, visible="")
    assert devices.choose("auto", 2) == ("cpu", 2)
    gpus(0)
    assert devices.choose("auto", 2) == ("cpu", 2)
    gpus(4, built=False)
    assert devices.choose("auto", None) == ("cpu", min(2, os.cpu_count() or 1))


@pytest.mark.parametrize(
    ("have", "asked", "message"),
    [
        ((2,), ("auto", 3), "--nproc 3: this machine has 2 GPUs; use --nproc 2 or --device cpu"),
        ((0,), ("cuda", None), r"--device cuda: no GPU can be used here \(no NVIDIA driver\)"),
        ((2, False), ("cuda", 1), "built without CUDA"),
        ((2,), ("cpu", 0), "expected at least 1 rank"),
        ((2,), ("cpu", 10**6), "at most"),
        ((2,), ("tpu", 1), "expected auto, cpu or cuda"),
    ],
)
def test_what_a_machine_can_not_do(gpus, have, asked, message) -> None:  # type: ignore[no-untyped-def]
    gpus(*have)
    with pytest.raises(RunError, match=message):
        devices.choose(*asked)


# ---- bad launches leave nothing --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Bad Name"}, "a-z 0-9"),
        ({"resume": True}, "--resume needs --name"),
        ({"resume": True, "name": "never"}, "no run called 'never'"),
        ({"script": ["/no/such/script.py"]}, "there is no such script"),
        ({"overrides": ['zerotop.data.files=["*.nothing"]']}, "matches no file"),
        ({"overrides": ["train_batch_size=7", "gradient_accumulation_steps=2"]}, "train_batch_size"),
        ({"config_path": None}, "needs a config file"),
        ({"config_path": "/no/such.json"}, "no/such.json"),
    ],
)
def test_a_bad_launch_leaves_nothing(home: Path, arguments: dict[str, object], message: str) -> None:
    config = home / "config.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 1}')
    with pytest.raises(Exception, match=message) as caught:
        start_run(**({"config_path": config, "nproc": 2, "device": "cpu"} | arguments))  # type: ignore[arg-type]
    assert type(caught.value).__name__ in ("RunError", "ConfigError")
    assert list_runs() == [] and not list(home.glob("state/zerotop/runs/*"))


# ---- logs ------------------------------------------------------------------------------------------------------------
def test_a_full_log_is_emptied_under_its_writer_and_its_end_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "rank-0.log").open("ab", buffering=0) as writer:
        writer.write(b"a" * 50 + b"b" * 100)
        assert cap_logs(tmp_path, limit_bytes=100) == [tmp_path / "rank-0.log"]
        writer.write(b"c")
    assert (tmp_path / "rank-0.log").read_bytes() == b"c"
    assert (tmp_path / "rank-0.log.1").read_bytes() == b"b" * 100
    assert cap_logs(tmp_path, limit_bytes=100) == []


def test_the_cap_on_a_log_does_not_run_after_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is as quick as the copy: what it adds meanwhile is neither kept nor counted on."""
    log = tmp_path / "rank-0.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 2000)
        replaced = os.replace

        def and_more(source: Path, target: Path) -> None:
            writer.write(b"lost" * 100)
            replaced(source, target)

        monkeypatch.setattr(os, "replace", and_more)
        assert cap_logs(tmp_path, limit_bytes=1000) == [log]
        monkeypatch.undo()
        writer.write(b"goes on\n")
    assert (tmp_path / "rank-0.log.1").read_bytes() == b"a" * 1000
    assert log.read_bytes() == b"\nzerotop: this log was full, and 400 bytes were lost here\ngoes on\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.log", "rank-0.log.1"]
