"""tools/gpu_check.sh, the one run on a GPU box: without a GPU it says so, and a step that fails stops no other."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="no bash")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def check(tmp_path: Path, nvidia_smi: str, python: str, **settings: str) -> tuple[int, dict[str, str]]:
    """Run the script with a made-up nvidia-smi and Python. Returns its exit code and each step's outcome."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/nvidia-smi", nvidia_smi)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **settings}
    environment["PYTHON"] = str(program(tmp_path / "python", python))
    done = subprocess.run([ROOT / "tools/gpu_check.sh", tmp_path / "out"], env=environment, capture_output=True)
    lines = (tmp_path / "out/summary.txt").read_text().splitlines()
    return done.returncode, {line.split()[0]: " ".join(line.split()[1:-2]) for line in lines}


def test_without_a_gpu_every_step_says_so(tmp_path: Path) -> None:
    code, outcomes = check(tmp_path, "echo 'no devices were found'; exit 9", "exit 1")
    assert code == 3 and len(outcomes) >= 14 and set(outcomes.values()) == {"no GPU"}
    tests = {f"test-{path.stem.removeprefix('test_')}" for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert tests <= set(outcomes)  # every file of tests/gpu has its step


def test_a_step_that_fails_stops_no_other_and_keeps_what_it_printed(tmp_path: Path) -> None:
    fails = 'echo "saw $*"; case "$*" in *test_arena*) exit 7;; esac'
    steps = "test-arena test-engine adam"
    code, outcomes = check(tmp_path, "echo 'GPU 0: made up'", fails, ONLY=steps)
    assert code == 1
    assert outcomes == {"test-arena": "failed (7)", "test-engine": "passed", "adam": "passed"}
    assert "saw -m pytest" in (tmp_path / "out/test-arena.log").read_text()


def test_what_the_time_does_not_suffice_for_is_named(tmp_path: Path) -> None:
    code, outcomes = check(tmp_path, "echo 'GPU 0: made up'", "exit 0", ONLY="test-arena adam", BUDGET_S="5")
    assert code == 1 and outcomes == {"test-arena": "not reached", "adam": "not reached"}
