"""How a run's end is told from what is left: goodbyes, exit codes, logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.wire.messages import Goodbye
from zerotop.runs.outcome import Evidence, Outcome, decide

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
    (tmp_path / "torchrun.log").write_text(log)
    said = {word.rank: word for word in goodbyes}
    return decide(Evidence(2, launcher_exit, tmp_path, said, **changes))  # type: ignore[arg-type]


def test_good_ends(tmp_path: Path) -> None:
    assert end(tmp_path, 0, goodbye(0, "finished"), goodbye(1, "finished")).state == "finished"
    assert end(tmp_path, 0, goodbye(0, "stopped"), goodbye(1, "stopped")).state == "stopped"
    assert end(tmp_path, 0).state == "finished"  # a script without telemetry
    assert end(tmp_path, 0, stopping=True).state == "stopped"
    assert end(tmp_path, -9, abort_reason="aborted by me") == Outcome("aborted", "aborted by me", -9)


def test_a_stop_gives_its_reason(tmp_path: Path) -> None:
    assert end(tmp_path, 0, goodbye(0, "stopped", error="the supervisor is gone")).reason == "the supervisor is gone"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "SIGKILL (out of memory?)"),
        (-11, "SIGSEGV (a crash in native code)"),
        (-7, "SIGBUS (out of shared memory?)"),
    ],
)
def test_a_killed_rank_is_the_cause_and_not_the_peers_that_lost_it(tmp_path: Path, code: int, words: str) -> None:
    complaint = goodbye(0, "failed", error="RuntimeError: Connection closed by peer", wall_s=0.5)
    (tmp_path / "rank-1.log").write_text("its last line\n")
    found = end(tmp_path, 1, complaint, log=TORCHRUN.format(code=code, rank=1))
    assert found == Outcome("failed", f"rank 1 was killed by {words}", code, 1, "its last line")


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
