"""`zerotop export`: which checkpoint it means, what it does to folders, damaged checkpoints, and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.checkpoint.format.manifest import read_manifest, record_of
from runtime.wire.messages import RunStatus
from tests.harness.fakerun import write_run
from tests.harness.waiting import patient, until
from tests.numerics.models import make
from tests.numerics.test_export import export, save, trained
from tests.numerics.training import config
from zerotop.cli import main
from zerotop.launch.child import child_process


def save_steps(folder: str, steps: list[int]) -> None:
    from runtime.checkpoint import step_tag

    engine = trained(config(0, 1, 0.0), make("flatland"))
    for step in steps:
        engine.global_steps = step
        engine.save_checkpoint(folder, step_tag(step))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_run_is_found_by_name_and_step(ranks, tmp_path, home, capfd, export_here):
    run = write_run(home, "q1", Path("/nowhere"), RunStatus(name="q1", state="finished"))
    ranks(1).run(save_steps, str(run / "checkpoints"), [20, 100])
    elsewhere = write_run(home, "q2", Path("/nowhere"), RunStatus(name="q2", state="finished"))
    (elsewhere / "resolved.json").write_text(json.dumps({"zerotop": {"checkpoint": {"folder": str(tmp_path / "far")}}}))
    ranks(1).run(save_steps, str(tmp_path / "far" / "q2"), [7])
    for number, (words, step) in enumerate(
        [("q1", 100), ("q1/step-20", 20), ("q1/step-00000020/", 20), (run, 100), (run / "checkpoints", 100), ("q2", 7)]
    ):
        export(words, tmp_path / f"out-{number}", "--json")
        assert json.loads(capfd.readouterr().out)["step"] == step, words
    for words, message in [
        (["q1/step-21"], "run q1 has no checkpoint step-21"),
        (["q3"], "q3 is not a folder, and there is no run called 'q3'. Runs: q"),
        ([str(tmp_path)], "no complete checkpoint"),
        ([str(run / "run.json")], "is a file"),
    ]:
        assert main(["export", *words, str(tmp_path / "new")]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_overwriting_replaces_an_exported_model_and_nothing_else(ranks, tmp_path, capfd, monkeypatch, export_here):
    ranks(1).run(save_steps, str(tmp_path / "c"), [1])
    out = export(tmp_path / "c", tmp_path / "out", "--shard-size", "512B")
    before = sorted(path.name for path in out.iterdir())
    words = ["export", str(tmp_path / "c"), str(out)]
    assert main(words) == 2
    assert "is not empty: choose another folder, or replace this one with --overwrite" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == before
    assert main([*words, "--overwrite"]) == 0
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    (out / "thesis.tex").write_text("ten years of work")
    capfd.readouterr()
    assert main([*words, "--overwrite"]) == 2
    assert "holds thesis.tex, which is not part of an exported model" in capfd.readouterr().err
    inside = str(tmp_path / "c" / "step-00000001" / "out")
    assert main(["export", str(tmp_path / "c"), inside]) == 2
    assert "inside the checkpoint" in capfd.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(tmp_path / "c"), "."]) == 2
    assert "the current folder" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "here", "out"]


@pytest.fixture
def checkpoint(ranks, tmp_path):
    ranks(2).run(save, str(tmp_path / "c"), config(2, 1, 0.0), "plain")
    return tmp_path / "c" / "global_step2"


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "a checkpoint without its manifest"),
        (lambda path: _truncate(path / "manifest.json"), "manifest.json is damaged"),
        (lambda path: (path / "tensors.json").unlink(), "is damaged: tensors.json is missing"),
        (lambda path: _truncate(path / "tensors.json"), "is damaged"),
        (lambda path: (path / "__1_0.distcp").unlink(), "is damaged: __1_0.distcp is missing"),
        (lambda path: _truncate(path / "__0_0.distcp"), "bytes, expected"),
        (lambda path: (path / "__0_0.distcp").write_bytes(bytes(2**20)), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(checkpoint, tmp_path, capfd, export_here, damage, message):
    damage(checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--json"]) == 2
    captured = capfd.readouterr()
    assert message in json.loads(captured.out)["error"]
    assert captured.err.startswith("zerotop: ") and len(captured.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def rewrite(checkpoint: Path, index: dict[str, Any]) -> None:
    """As if it had been written so."""
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, "tensors.json": record_of(checkpoint / "tensors.json")}
    (checkpoint / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).sealed())


def test_a_parameter_that_the_description_lacks_is_an_error(checkpoint, tmp_path, capfd, export_here):
    index = json.loads((checkpoint / "tensors.json").read_bytes())
    weight = index["tensors"].pop("param.norm.weight")
    rewrite(checkpoint, index)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "it lacks param.norm.weight" in capfd.readouterr().err
    index["tensors"]["param.norm.weight"] = weight
    parts = index["tensors"]["param.head.weight"]["parts"]
    assert len(parts) == 2
    parts.pop()
    rewrite(checkpoint, index)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "the parts of param.head.weight have gaps or overlap" in capfd.readouterr().err


def test_the_command_itself_loads_no_torch(checkpoint, tmp_path):
    program = "import sys; from zerotop.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = ["export", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *words], capture_output=True, text=True, timeout=patient(90)
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bad_values_are_usage_errors(checkpoint, tmp_path, capfd):
    out = str(tmp_path / "out")
    assert main(["export", str(checkpoint), out, "--shard-size", "5"]) == 2
    assert "--shard-size: expected a size with a unit" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(checkpoint), str(tmp_path / "file")]) == 2
    assert "file is a file: expected an empty or new folder" in capfd.readouterr().err


def test_no_room_on_the_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    from runtime.export import __main__ as process
    from runtime.export import target

    monkeypatch.setattr(target.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    words = SimpleNamespace(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        dtype="auto",
        shard_bytes=1000,
        overwrite=False,
        merge=False,
        base=None,
    )
    with pytest.raises(OSError, match=r"not enough disk space .* needed, 4.00 KiB free"):
        process.export(words)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_the_system_refuses_is_one_line_and_exit_code_1(checkpoint, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert main(["export", str(checkpoint), str(tmp_path / "file" / "out")]) == 1
    message = capfd.readouterr().err
    assert len(message.splitlines()) == 1 and str(tmp_path / "file") in message


SLOW = """
import sys, time
from safetensors.torch import save_file
import runtime.export.huggingface as module
from runtime.export.__main__ import main

def save_and_wait(content, path, metadata):
    save_file(content, path, metadata=metadata)
    print("written", file=sys.stderr, flush=True)
    time.sleep(600)

module.save_file = save_and_wait
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_export_leaves_nothing(checkpoint, tmp_path, number):
    words = [str(checkpoint), str(tmp_path / "out"), "--shard-bytes", "1000"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "written\n"
        assert (tmp_path / ".out.partial").is_dir()
        child.send_signal(number)
        output, rest = child.communicate(timeout=patient(60))
    assert (child.returncode, output, rest) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_export_left_does_not_hinder_the_next_and_two_at_once_do(checkpoint, tmp_path, capfd):
    words = [str(checkpoint), str(tmp_path / "out"), "--shard-bytes", "1000"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "written\n"
        assert main(["export", *words[:2]]) == 2
        assert ".out.partial is being written by another export" in capfd.readouterr().err
        child.kill()
    assert list((tmp_path / ".out.partial").iterdir())
    out = export(*words[:2])
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out"]


LATE = """
import sys, time
if "runtime.export" in sys.orig_argv:
    time.sleep(600)
"""


def test_ctrl_c_ends_the_command_and_its_process(checkpoint, tmp_path, tmp_path_factory):
    """As from a terminal, the command alone gets it. Its child is still starting."""
    import psutil

    late = tmp_path_factory.mktemp("late")
    (late / "sitecustomize.py").write_text(LATE)
    words = ["export", str(checkpoint), str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "zerotop", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(late)},
    ) as command:
        watched = psutil.Process(command.pid)
        until(lambda: bool(watched.children()), "the export's process")
        child = watched.children()[0]
        command.send_signal(signal.SIGINT)
        output, errors = command.communicate(timeout=patient(60))
    assert not child.is_running()
    assert (command.returncode, output, errors) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_ctrl_c_while_its_process_is_started_ends_that_too(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("zerotop.launch.child.subprocess.Popen", Interrupted)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(KeyboardInterrupt), child_process(command, dict(os.environ)):
        pass
    assert [process.returncode for process in started] == [-signal.SIGTERM]
