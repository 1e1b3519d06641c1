"""py-spy on real processes, and what is said when it fails."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.harness.waiting import patient, until
from zerotop.diagnose import pyspy
from zerotop.diagnose.frames import place

PROGRAM = pyspy.find_pyspy() or ""
needs_pyspy = pytest.mark.skipif(not PROGRAM, reason="py-spy is not installed (it is in the dev extra)")
SPINS = "import itertools\ndef spin():\n    print('ready', flush=True)\n    any(itertools.repeat(False))\nspin()"


@needs_pyspy
def test_c_frames_and_the_gil_of_a_spinning_process_and_the_stack_of_a_stopped_one() -> None:
    with subprocess.Popen([sys.executable, "-c", SPINS], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            found = pyspy.dump(PROGRAM, process.pid, native=True, timeout_s=patient(30))
            assert found.trouble == "" and found.holds_gil and found.threads[0].main
            assert place(found.threads[0].frames) in ("builtin_any at <string>:4", "spin at <string>:4")
            process.send_signal(signal.SIGSTOP)
            until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "the stop")
            stopped = pyspy.dump(PROGRAM, process.pid, native=False, timeout_s=patient(30))
            assert stopped.threads[0].frames[0].endswith('File "<string>", line 4 in spin')
            assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        finally:
            process.kill()


@needs_pyspy
def test_a_process_that_is_gone_is_said() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert pyspy.dump(PROGRAM, process.pid, native=False).trouble.startswith("py-spy failed: ")


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "py-spy"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_answer_a_bad_answer_and_no_program_are_sentences(tmp_path: Path) -> None:
    slow = pyspy.dump(script(tmp_path, "exec sleep 30"), os.getpid(), native=False, timeout_s=0.2)
    assert slow.trouble == "py-spy did not finish in time (0 s)"
    bad = pyspy.dump(script(tmp_path, "echo '[{}]'"), os.getpid(), native=False)
    assert bad.trouble == "py-spy's output can't be read: KeyError: 'os_thread_id'"
    assert pyspy.dump(str(tmp_path / "none"), 1, native=False).trouble.startswith("py-spy can't be started: ")


@pytest.mark.parametrize(
    ("scope", "cure"),
    [
        ("1", "kernel.yama.ptrace_scope is 1, and the rank did not allow it"),
        ("3", "kernel.yama.ptrace_scope is 3: an administrator can set it to 1"),
        (None, "in a container it needs the capability SYS_PTRACE"),
    ],
)
def test_missing_permission_is_one_sentence_with_a_cure(
    scope: str | None, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yama = tmp_path / "ptrace_scope"
    if scope is not None:
        yama.write_text(f"{scope}\n")
    monkeypatch.setattr(pyspy, "_YAMA", yama)
    said = pyspy.why_failed("Permission Denied: Try running again with elevated permissions by going 'sudo ...'\n")
    assert said.startswith("py-spy may not read the process; ") and cure in said
    assert pyspy.why_failed("\nError: No python found\nReason: x\n") == "py-spy failed: No python found"
