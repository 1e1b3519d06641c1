"""The command line, environment and first checks of `zerotop run`, and what runs in each of its Python processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import ConfigError, Resolved, load
from runtime.wire.rundir import RunFile
from tests.harness import ROOT
from zerotop.launch import wrapped
from zerotop.rundir.paths import RunError


def run_file(words: list[str]) -> RunFile:
    return RunFile(
        name="q1",
        created_wall_s=0,
        attempt=1,
        host="a",
        boot_id="b",
        nproc=0,
        device="cpu",
        config_path="",
        config_folder="",
        wrapped=words,
        sockets="/tmp/none",
    )


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("print('hello')\n")
    return str(path)


def test_a_command_stays_what_it_is(script: str) -> None:
    assert wrapped.checked_command(["python3", script, "--lr", "1"], None) == ["python3", script, "--lr", "1"]
    assert wrapped.checked_command([script, "--lr", "1"], None) == [sys.executable, script, "--lr", "1"]


@pytest.mark.parametrize("words", [[], ["python3"]], ids=["script", "python script"])
def test_nproc_starts_torchrun(words: list[str], script: str) -> None:
    command = wrapped.checked_command([*words, script, "--lr", "1"], 4)
    assert command[0] == (words[0] if words else sys.executable)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[-3:] == [script, "--lr", "1"]
    assert command[command.index("--nproc-per-node") + 1] == "4"


@pytest.mark.parametrize(
    ("words", "nproc", "text"),
    [
        ([], None, "run needs a command"),
        (["no-such-command-here"], None, "no such command"),
        (["python3", "no-such-script.py"], None, "no such script"),
        (["torchrun", "train.py"], 2, "leave --nproc out"),
        (["train.py"], 0, "expected 1 or more"),
    ],
)
def test_what_cannot_run_is_named(words: list[str], nproc: int | None, text: str) -> None:
    with pytest.raises(RunError, match=text):
        wrapped.checked_command(words, nproc)


def test_only_our_section_of_a_config_counts() -> None:
    wrapped.refuse_trainer_keys({"zerotop": {}}, "c.json")
    with pytest.raises(ConfigError, match="optimizer: zerotop run takes only the section"):
        wrapped.refuse_trainer_keys({"optimizer": {}, "zerotop": {}}, "c.json")


def python(code: str, logs: Path, output: Path, **more: str) -> str:
    """Run code as a process of a wrapped command whose common log is launcher.log, and return that log."""
    run = logs.parents[1]
    variables = wrapped.environment(run_file([]), run, supervisor_pid=1, base={**os.environ, **more})
    with output.open("ab") as log:
        subprocess.run([sys.executable, "-c", code], env=variables, stdout=log, stderr=log, check=True)
    return output.read_text()


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "logs" / "1"
    folder.mkdir(parents=True)
    return folder


def test_a_rank_writes_to_its_own_log_and_other_processes_to_the_common_one(logs: Path) -> None:
    common = logs / "launcher.log"
    assert python("print('launcher')", logs, common) == "launcher\n"
    python("import sys; print('out'); print('err', file=sys.stderr)", logs, common, RANK="1")
    assert common.read_text() == "launcher\n"
    assert sorted((logs / "rank-1.log").read_text().splitlines()) == ["err", "out"]


def test_output_that_a_script_reads_stays_its_own(logs: Path) -> None:
    """A rank that runs a Python program and reads its output."""
    inner = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', 'print(42)']).decode())"
    python(inner, logs, logs / "launcher.log", RANK="0")
    assert (logs / "rank-0.log").read_text().split() == ["42"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ranks_that_srun_starts_have_logs_of_their_own_and_what_they_redirect_stays(logs: Path, tmp_path: Path) -> None:
    """Slurm gives its tasks pipes, and mixes what comes out of them."""
    mine, ranks = tmp_path / "mine.txt", f"{sys.executable} -c"
    step = f"""
import os, subprocess
open("/proc/self/comm", "w").write("slurmstepd")
for rank, task in enumerate(["{ranks} 'print(40)' && true", "exec {ranks} 'print(41)' > {mine}"]):
    os.environ["SLURM_PROCID"] = str(rank)
    print(subprocess.run(task, shell=True, stdout=subprocess.PIPE).stdout)
"""
    assert python(step, logs, logs / "launcher.log").split() == ["b''", "b''"]
    assert (logs / "rank-0.log").read_text() == "40\n" and mine.read_text() == "41\n"


def test_the_user_s_own_sitecustomize_still_runs(logs: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import builtins\nbuiltins.from_mine = 'mine'\n")
    assert python("print(from_mine)", logs, logs / "launcher.log", PYTHONPATH=str(own)) == "mine\n"


IMPORTS_FOR_LONG = """
import sys, time
deadline = time.monotonic() + 1.5  # three looks of the thread that waits for torch.distributed
while time.monotonic() < deadline:
    pass
seen = "runtime.telemetry" in sys.modules
"""
INITIALIZED = """
import os, sys, time, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")
sys.modules["torch.distributed"].is_initialized = lambda: True
import imports_for_long
deadline = time.monotonic() + 60
while "runtime.telemetry" not in sys.modules and time.monotonic() < deadline:
    time.sleep(0.01)
print(imports_for_long.seen, "runtime.telemetry" in sys.modules, flush=True)
os._exit(0)
"""


def test_the_heartbeat_imports_nothing_while_the_script_does(logs: Path, tmp_path: Path) -> None:
    """Both at once would give one of them a module that is not complete."""
    (tmp_path / "imports_for_long.py").write_text(IMPORTS_FOR_LONG)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    python(INITIALIZED, logs, logs / "launcher.log", RANK="0", PYTHONPATH=paths)
    assert "False True\n" in (logs / "rank-0.log").read_text()


def test_stacks_come_on_the_signal(logs: Path) -> None:
    code = "import os, signal, time\ndef busy():\n    os.kill(os.getpid(), signal.SIGUSR2)\nbusy()\nprint('alive')"
    python(code, logs, logs / "launcher.log", RANK="3")
    assert "in busy" in (logs / "stacks-rank-3.txt").read_text()
    assert (logs / "rank-3.log").read_text() == "alive\n"


def test_no_torch_and_no_pydantic_are_loaded(logs: Path) -> None:
    code = "import sys; print(sorted({'torch', 'pydantic', 'zmq', 'runtime', 'zerotop'} & set(sys.modules)))"
    assert python(code, logs, logs / "launcher.log") == "[]\n"


def test_a_command_that_is_not_there_ends_as_in_a_shell(tmp_path: Path) -> None:
    ended = subprocess.run(
        wrapped.command(run_file(["no-such-command-here"])), stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == 127
    assert ended.stderr == "zerotop: no-such-command-here: No such file or directory\n"


@pytest.mark.parametrize(
    ("given", "limit"), [([], 0), (["zerotop.restarts.window_minutes=5"], 0), (["zerotop.restarts.limit=3"], 3)]
)
def test_a_command_is_restarted_only_if_the_config_says_so(given: list[str], limit: int) -> None:
    resolved = wrapped.without_restarts(load({}, given).resolve(1, "cpu", script=True))
    assert resolved.zerotop.restarts.limit == limit
    assert Resolved.from_json(resolved.model_dump_json()).zerotop.restarts.limit == limit
