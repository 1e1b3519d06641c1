"""How a run's end is told from what is left: goodbyes, exit codes, logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.wire.messages import Goodbye
from zerotop.diagnose.evidence import FailureEvidence, MemoryRemedies, SystemEvidence
from zerotop.diagnose.oomkill import CGROUP, MACHINE, Count, HostMemory
from zerotop.diagnose.outcome import Outcome, decide

TORCHRUN = """\
E1123 09:25:29.894000 12324 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) \
local_rank: {rank} (pid: 12329) of binary: /usr/bin/python
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
runtime FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 77)
Root Cause (first observed failure):
[0]:
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 12329)
============================================================
"""


def goodbye(rank: int, outcome: str, step: int = 10, error: str = "", wall_s: float = 1.0) -> Goodbye:
    return Goodbye.model_validate({"rank": rank, "outcome": outcome, "step": step, "error": error, "wall_s": wall_s})


def end(tmp_path: Path, launcher_exit: int | None, *goodbyes: Goodbye, log: str = "", **changes: object) -> Outcome:
    (tmp_path / "launcher.log").write_text(log)
    said = {word.rank: word for word in goodbyes}
    return decide(FailureEvidence(2, launcher_exit, tmp_path, goodbyes=said, **changes))  # type: ignore[arg-type]


def test_good_ends(tmp_path: Path) -> None:
    assert end(tmp_path, 0, goodbye(0, "finished"), goodbye(1, "finished")).state == "finished"
    assert end(tmp_path, 0, goodbye(0, "stopped"), goodbye(1, "stopped")).state == "stopped"
    assert end(tmp_path, 0).state == "finished"  # a script without telemetry
    assert end(tmp_path, 0, stopping=True).state == "stopped"
    assert end(tmp_path, -9, abort_reason="aborted by me") == Outcome("aborted", "aborted by me", -9)


def test_a_stop_gives_its_reason(tmp_path: Path) -> None:
    assert end(tmp_path, 0, goodbye(0, "stopped", error="the supervisor is gone")).reason == "the supervisor is gone"


def seen(**memory: object) -> SystemEvidence:
    remedies = MemoryRemedies(("1. do this", "2. or that"), "this (saves about 1 GiB)")
    return SystemEvidence(HostMemory(**memory), remedies=remedies)  # type: ignore[arg-type]


CALM = seen(counts=(Count(CGROUP, 3, 3),), shared_bytes=(64 << 20, 0))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "SIGKILL (not by the kernel's OOM killer)"),
        (-11, "SIGSEGV (segmentation fault in native code)"),
        (-7, "SIGBUS (bus error: memory-mapped data is missing, or /dev/shm is full); /dev/shm has 64.0 MiB, 0 B free"),
        (-6, "SIGABRT (native code aborted)"),
        (-4, "SIGILL (illegal instruction: native code built for another CPU)"),
        (-8, "SIGFPE (integer division by zero in native code)"),
        (-1, "SIGHUP (its terminal was closed)"),
        (-35, "signal 35"),
    ],
)
def test_a_killed_rank_is_the_cause_and_not_the_peers_that_lost_it(tmp_path: Path, code: int, words: str) -> None:
    complaint = goodbye(0, "failed", error="RuntimeError: Connection closed by peer", wall_s=0.5)
    (tmp_path / "rank-1.log").write_text("its last line\n")
    found = end(tmp_path, 1, complaint, log=TORCHRUN.format(code=code, rank=1), system=CALM)
    assert (found.reason, found.failed_rank, found.exit_code) == (f"rank 1 was killed by {words}", 1, code)
    assert found.error == "its last line"


def test_a_rank_that_ended_by_sigterm_where_nobody_else_failed(tmp_path: Path) -> None:
    found = end(tmp_path, 1, exit_codes={1: -15})
    assert found.reason == "rank 1 was killed by SIGTERM (from a batch system or kill)"


def test_a_kill_for_lack_of_memory_is_told_with_the_evidence_and_what_to_change(tmp_path: Path) -> None:
    log = TORCHRUN.format(code=-9, rank=1)
    (tmp_path / "rank-1.log").write_text("".join(f"line {number}\n" for number in range(100)))
    held = {"rank_rss_bytes": {0: 5 << 30, 1: 6 << 30}, "total_bytes": 12 << 30}
    found = end(tmp_path, 1, log=log, system=seen(counts=(Count(CGROUP, 0, 1),), **held))
    assert found.reason == (
        "rank 1 was killed by SIGKILL: the kernel ran out of memory (oom_kill of the cgroup 0 -> 1); "
        "ranks held 11.0 GiB of 12.0 GiB; try this (saves about 1 GiB)"
    )
    assert found.cause == "rank 1 was killed by SIGKILL"  # equal each time, for restarts
    lines = found.error.splitlines()
    assert len(lines) == 30 and lines[-2:] == ["  1. do this", "  2. or that"] and "line 99" in lines
    elsewhere = end(tmp_path, 1, log=log, system=seen(counts=(Count(MACHINE, 0, 1),)))
    assert "the kernel killed a process for lack of memory (oom_kill of this machine 0 -> 1)" in elsewhere.reason
    named = end(tmp_path, 1, log=log, system=seen(named={1: "the kernel's log: killed process 7"}))
    assert "SIGKILL: the kernel ran out of memory (the kernel's log: killed process 7)" in named.reason


def test_where_the_kernel_says_nothing_nothing_is_claimed(tmp_path: Path) -> None:
    for account in (None, SystemEvidence()):
        found = end(tmp_path, 1, log=TORCHRUN.format(code=-9, rank=1), system=account)
        assert found.reason.endswith("SIGKILL (perhaps by the kernel's OOM killer: its records can't be read here)")


def test_a_killed_process_of_a_data_loader_is_told_with_the_evidence(tmp_path: Path) -> None:
    error = "Traceback\nRuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. "
    log = TORCHRUN.format(code=1, rank=1)
    calm = end(tmp_path, 1, goodbye(1, "failed", error=error), log=log, system=CALM)
    assert calm.reason.endswith("is killed by signal: Killed.")
    found = end(tmp_path, 1, goodbye(1, "failed", error=error), log=log, system=seen(counts=(Count(CGROUP, 0, 1),)))
    assert "Killed.: the kernel ran out of memory (oom_kill of the cgroup 0 -> 1)" in found.reason


def test_a_killed_torchrun_is_told_with_the_evidence(tmp_path: Path) -> None:
    found = end(tmp_path, -9, system=seen(counts=(Count(CGROUP, 0, 1),)))
    assert found.reason.startswith("torchrun was killed by SIGKILL; the kernel ran out of memory")


def test_a_gpus_error_shortly_before_is_mentioned(tmp_path: Path) -> None:
    error = "Traceback\nRuntimeError: CUDA error: unspecified launch failure"
    account = SystemEvidence(xids={1: "GPU 1: XID 79: the GPU has fallen off the bus; reboot"})
    found = end(tmp_path, 1, goodbye(1, "failed", error=error), system=account)
    assert found.reason == (
        "rank 1 failed after step 10: RuntimeError: CUDA error: unspecified launch failure; "
        "GPU 1: XID 79: the GPU has fallen off the bus; reboot"
    )
    assert "XID" not in end(tmp_path, 1, goodbye(0, "failed", error=error), system=account).reason


CRASH = """\
step 3
Fatal Python error: Segmentation fault

Thread 0x00007f1 (most recent call first):
  File "publisher.py", line 1 in _run

Current thread 0x00007f2 (most recent call first):
  File "ctypes/__init__.py", line 519 in string_at
  File "mine.py", line 7 in forward

Extension modules: numpy.core._multiarray_umath, torch._C (total: 2)
"""


def test_a_crash_in_native_code_shows_the_python_stack_of_its_thread(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text(CRASH)
    found = end(tmp_path, 1, log=TORCHRUN.format(code=-11, rank=0))
    assert found.error.splitlines() == [
        "Fatal Python error: Segmentation fault",
        "Current thread 0x00007f2 (most recent call first):",
        '  File "ctypes/__init__.py", line 519 in string_at',
        '  File "mine.py", line 7 in forward',
    ]


def test_what_cpp_said_before_it_aborted_is_the_reason(tmp_path: Path) -> None:
    said = "terminate called after throwing an instance of 'std::runtime_error'\n  what():  the pool is empty\n"
    (tmp_path / "rank-0.log").write_text(said + CRASH.replace("Segmentation fault", "Aborted"))
    found = end(tmp_path, 1, log=TORCHRUN.format(code=-6, rank=0))
    assert found.reason == "rank 0 was killed by SIGABRT (the pool is empty)"


PEER = (
    "Traceback (most recent call last):\n  File 'a.py', line 1\nRuntimeError: [gloo] Connection closed by peer [::1]:2"
)
NCCL = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, unhandled system error (run with NCCL_DEBUG=INFO)
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:

"""


@pytest.mark.parametrize(
    "complaint", [PEER, NCCL, "x\nruntime.exchange.ExchangeError: rank 1 (pid 7) is gone; this rank"]
)
def test_who_lost_a_peer_is_never_the_cause(tmp_path: Path, complaint: str) -> None:
    lost = goodbye(0, "failed", error=complaint, wall_s=1.0)
    later = goodbye(1, "failed", error="Traceback\nValueError: bad batch", wall_s=1.5)
    assert end(tmp_path, 1, lost, later).reason == "rank 1 failed after step 10: ValueError: bad batch"
    left = end(tmp_path, 1, lost, log=TORCHRUN.format(code=3, rank=1))  # without a word
    assert (left.failed_rank, left.reason) == (1, "rank 1 exited with code 3")
    (tmp_path / "rank-1.log").write_text("what():  [Rank 1] Watchdog caught collective operation timeout\n")
    first = goodbye(0, "failed", error="Traceback\nKeyError: 'x'", wall_s=1.0)
    aborted = end(tmp_path, 1, first, log=TORCHRUN.format(code=-6, rank=1))
    assert aborted.failed_rank == 0
    alone = end(tmp_path, 1, lost)
    assert alone.failed_rank == 0  # there is nobody else


def test_the_first_line_of_a_long_message_is_the_reason(tmp_path: Path) -> None:
    found = end(tmp_path, 1, goodbye(0, "failed", error=NCCL))
    assert found.reason.startswith("rank 0 failed after step 10: torch.distributed.DistBackendError: NCCL error in")
    explained = BOOM + "\nOut of memory: 2 GiB\nerror: out of GPU memory: 2 GiB; try this"
    assert end(tmp_path, 1, goodbye(0, "failed", error=explained)).reason == (
        "rank 0 failed after step 10: out of GPU memory: 2 GiB; try this"
    )


def test_among_ranks_that_raised_the_first_is_the_cause(tmp_path: Path) -> None:
    first = goodbye(1, "failed", error="Traceback\nValueError: bad batch", wall_s=1.0)
    second = goodbye(0, "failed", error="RuntimeError: Connection closed by peer", wall_s=1.2)
    found = end(tmp_path, 1, second, first, log=TORCHRUN.format(code=1, rank=0))
    assert (found.failed_rank, found.reason) == (1, "rank 1 failed after step 10: ValueError: bad batch")
    assert found.error == "Traceback\nValueError: bad batch"


def test_a_rank_that_left_without_a_word_has_its_log_quoted(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text("\n".join(f"line {number}" for number in range(100)))
    found = end(tmp_path, 1, log=TORCHRUN.format(code=3, rank=0))
    assert (found.reason, found.exit_code, found.failed_rank) == ("rank 0 exited with code 3", 3, 0)
    assert found.error.splitlines() == [f"line {number}" for number in range(70, 100)]


BOOM = """\
2026-11-23 10:51:30,004 I runtime.engine: starting
Traceback (most recent call last):
  File "a.py", line 3, in <module>
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 5, in <module>
    raise RuntimeError("boom")
RuntimeError: boom
and a second line of it
"""


@pytest.mark.parametrize(
    ("log", "code", "steps", "reason"),
    [
        (BOOM, 1, {}, "rank 0 failed before its first step: RuntimeError: boom"),
        (BOOM, 1, {0: 7, 1: 6}, "rank 0 failed after step 7: RuntimeError: boom"),
        (BOOM, 3, {}, "rank 0 exited with code 3"),  # os._exit(3): the exception was caught
        ("error: 2 problems:\n  - one\n  - two\n", 2, {}, "rank 0 failed before its first step: 2 problems:"),
        ("just lines\nValueError: not below a traceback\n", 1, {}, "rank 0 exited with code 1"),
    ],
)
def test_an_exception_before_any_goodbye_is_read_from_the_log(
    tmp_path: Path, log: str, code: int, steps: dict[int, int], reason: str
) -> None:
    (tmp_path / "rank-0.log").write_text(log)
    found = end(tmp_path, 1, log=TORCHRUN.format(code=code, rank=0), steps=steps)
    assert (found.reason, found.exit_code) == (reason, code)
    assert found.error == log.rstrip()


def test_a_script_that_never_initialized_is_told(tmp_path: Path) -> None:
    found = end(tmp_path, 0, silent_script=True)
    assert (found.state, found.exit_code) == ("finished", 0)
    assert "the script never called runtime.initialize()" in found.reason
    assert end(tmp_path, 0, goodbye(0, "finished"), goodbye(1, "finished")).reason == "all ranks finished"


def test_a_peer_that_torchrun_ended_is_not_the_cause(tmp_path: Path) -> None:
    found = end(tmp_path, 1, log=TORCHRUN.format(code=2, rank=1), exit_codes={0: -15})
    assert found.failed_rank == 1


def test_torchrun_itself_failing_shows_its_own_words_without_its_table(tmp_path: Path) -> None:
    found = end(tmp_path, 2, log="*****\nSetting OMP_NUM_THREADS\n*****\npython: No module named torch\n")
    assert found == Outcome(
        "failed", "torchrun exited with code 2 before any rank failed", 2, None, "python: No module named torch"
    )
    assert end(tmp_path, -9).reason == "torchrun was killed by SIGKILL"
    noise = "W1123 09:56:31.908000 37 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 38 signal"
    assert end(tmp_path, 1, log=noise + "\n" + TORCHRUN.format(code=-9, rank=1)).error == ""
    no_log = end(tmp_path, 1, log=TORCHRUN.format(code=1, rank=1))
    assert "FAILED" not in no_log.error and "Failures" not in no_log.error


def test_what_the_supervisor_ended_as_failed_has_its_reason(tmp_path: Path) -> None:
    words = (goodbye(0, "stopped"), goodbye(1, "failed", error="ConnectionError: peer"))
    assert end(tmp_path, -15, *words, failure="no progress") == Outcome("failed", "no progress")
    assert end(tmp_path, -15, failure="no progress", abort_reason="aborted by me").state == "aborted"


def test_ranks_that_die_with_their_launcher_are_not_the_cause(tmp_path: Path) -> None:
    codes = {0: -9, 1: -9}
    assert end(tmp_path, -9, exit_codes=codes, launcher_killed=True).reason == "torchrun was killed by SIGKILL"
    assert end(tmp_path, -9, exit_codes={1: -9}).reason.startswith("rank 1 was killed by SIGKILL")


# ---- ranks that left before the others -------------------------------------------------------------------------------
COMPLAINT = "runtime.comm.shared_memory.ExchangeError: rank 1 (pid 77) is gone; this rank was waiting for it"
LEFT = "rank 1 ended after step 8 while the others went on: "


@pytest.mark.parametrize(
    ("word", "codes", "why"),
    [
        (goodbye(1, "finished", 8), {}, "its data is shorter, or its loop takes fewer steps"),
        (goodbye(1, "finished", 8, "SystemExit: 0"), {1: 0}, "its script called sys.exit()"),
        (None, {0: 1, 1: 0}, "its process exited with code 0"),
    ],
)
def test_a_rank_that_left_early_is_the_cause_and_not_the_peer_that_lost_it(tmp_path, word, codes, why) -> None:
    (tmp_path / "rank-1.log").write_text("its last line\n")
    words = [goodbye(0, "failed", error=COMPLAINT), *([word] if word else [])]
    found = end(tmp_path, 1, *words, log=TORCHRUN.format(code=1, rank=0), exit_codes=codes, steps={0: 8, 1: 8})
    assert (found.state, found.reason, found.failed_rank) == ("failed", LEFT + why, 1)
    assert found.repeats and found.exit_code == 0
    assert found.error.splitlines()[0] == "its last line" and "drop_last" in found.error


@pytest.mark.parametrize("error", ["ValueError: its own", "another rank is gone (Connection reset by peer)"])
def test_an_error_of_its_own_is_the_cause_also_when_others_had_finished(tmp_path, error) -> None:
    found = end(tmp_path, 1, goodbye(0, "failed", error=error), goodbye(1, "finished", 8))
    assert found.failed_rank == (0 if "own" in error else 1)


def test_a_rank_that_the_supervisor_killed_is_not_the_cause(tmp_path) -> None:
    """It was stopped by a signal, say, when the other one failed, and torchrun tells of both."""
    log = TORCHRUN.format(code=-9, rank=1)
    error = goodbye(0, "failed", error="ValueError: its own")
    assert end(tmp_path, 1, error, log=log).failed_rank == 1
    assert end(tmp_path, 1, error, log=log, ended_by_us={1}).failed_rank == 0


def test_one_error_of_all_ranks_is_no_single_ranks(tmp_path) -> None:
    words = [goodbye(rank, "failed", error="TrainingError: the norm is nan", wall_s=2 - rank) for rank in (0, 1)]
    assert end(tmp_path, 1, *words).reason == "all ranks failed after step 10: TrainingError: the norm is nan"
    told = [word.model_copy(update={"culprit": 0}) for word in words]
    found = end(tmp_path, 1, *told)
    assert (found.failed_rank, found.reason) == (0, "rank 0 failed after step 10: TrainingError: the norm is nan")


def test_a_long_error_is_cut_and_keeps_its_start_and_end(tmp_path) -> None:
    (tmp_path / "rank-1.log").write_text("Traceback (most recent call last):\nValueError: bad " + "7, " * 20_000)
    found = end(tmp_path, 1, exit_codes={1: 1})
    assert found.reason.startswith("rank 1 failed before its first step: ValueError: bad 7") and len(found.reason) < 700
    assert len(found.error) < 3000


def test_the_ends_of_a_wrapped_command(tmp_path: Path) -> None:
    assert end(tmp_path, 0, wrapped=True).reason == "the command ended with exit code 0"
    failed = end(tmp_path, 1, wrapped=True, log="Traceback (most recent call last):\n  ...\nValueError: no data\n")
    assert (failed.state, failed.exit_code) == ("failed", 1)
    assert failed.reason == "the command failed: ValueError: no data"
    assert end(tmp_path, 3, wrapped=True).reason == "it exited with code 3"
    assert end(tmp_path, -9, wrapped=True).reason == "the command was killed by SIGKILL"


def test_a_wrapped_command_that_was_sent_sigterm_has_stopped(tmp_path: Path) -> None:
    for code in (-15, 143):
        assert end(tmp_path, code, wrapped=True, stopping=True).state == "stopped"
    table = TORCHRUN.format(code=-15, rank=1).replace("exitcode  : 1 ", "exitcode  : -15 ")
    assert end(tmp_path, 1, wrapped=True, stopping=True, log=table).state == "stopped"
    raised = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15\n"
    assert end(tmp_path, 1, wrapped=True, stopping=True, log=raised).state == "stopped"
    assert end(tmp_path, 1, wrapped=True, stopping=True, log="ValueError: no data\n").state == "failed"
    assert end(tmp_path, -15, wrapped=True).state == "failed"  # nobody asked for it
