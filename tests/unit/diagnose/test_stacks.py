"""Stacks of real processes: who is asked, who answers, what the kernel says of the rest; and the text made of it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import Command, Heartbeat, RunStatus
from tests.harness.waiting import until
from zerotop.diagnose.collecting import next_number
from zerotop.diagnose.frames import ThreadStack, parse
from zerotop.diagnose.stacks import ANSWER_S, RankStacks, ask, find_ranks
from zerotop.diagnose.stacks_report import ANSWER_BYTES, StackTaker, _save
from zerotop.diagnose.stacks_text import stacks_text
from zerotop.state.run import RunState

DUMP = """Thread 0x00007f078ffff6c0 (most recent call first):
  File "/lib/threading.py", line 331 in wait
  File "/lib/threading.py", line 1002 in _bootstrap

Current thread 0x00007f07c61d7b80 (most recent call first):
  File "/x/train.py", line 13 in step
  File "/x/train.py", line 27 in <module>
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., psutil.Process]]:
    """`child(rank, body)`: a Python process that is ready when it has written a line."""
    started: list[subprocess.Popen[str]] = []

    def begin(rank: int, body: str, registers: bool = True) -> psutil.Process:
        register = f"from runtime.telemetry import register_stacks; register_stacks(Path({str(tmp_path)!r}), {rank})"
        code = f"import os, signal, time\nfrom pathlib import Path\n{register if registers else ''}\n{body}"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RANK": str(rank), "ZEROTOP_RUN": str(tmp_path)},
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return psutil.Process(process.pid)

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


SLEEPS = "def hangs_in_c():\n    print('ready', flush=True)\n    time.sleep(3600)\nhangs_in_c()"
READS = "ends = os.pipe()\ndef reads():\n    print('ready', flush=True)\n    os.read(ends[0], 1)\nreads()"


def until_status(process: psutil.Process, status: str) -> None:
    until(lambda: process.status() == status, lambda: f"{status} of {process}")


def functions(answer: RankStacks) -> list[str]:
    return [frame.rpartition(" in ")[2] for frame in answer.threads[0].frames]


@pytest.mark.parametrize(("body", "where"), [(SLEEPS, "hangs_in_c"), (READS, "reads")])
def test_a_process_that_hangs_in_native_code_answers_each_time(
    body: str, where: str, child: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    process = child(0, body)
    for _ in range(2):
        answer = ask({0: process}, {}, tmp_path)[0]
        assert functions(answer) == [where, "<module>"] and answer.trouble == "" and answer.pid == process.pid
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    assert stat.S_IMODE((tmp_path / "stacks-rank-0.txt").stat().st_mode) == 0o600


def test_a_stopped_process_is_told_apart_and_not_asked(child: Callable[..., psutil.Process], tmp_path: Path) -> None:
    processes = {rank: child(rank, SLEEPS) for rank in (0, 1)}
    processes[1].suspend()
    until_status(processes[1], psutil.STATUS_STOPPED)  # the kernel stops it when it next runs
    began = time.monotonic()
    answers = ask(processes, {}, tmp_path)
    assert time.monotonic() - began < ANSWER_S  # nobody waits for an answer that can't come
    assert functions(answers[0]) == ["hangs_in_c", "<module>"]
    assert (answers[1].host, answers[1].trouble, answers[1].threads) == ("stopped by a signal",) * 2 + ((),)
    processes[1].resume()
    assert (tmp_path / "stacks-rank-1.txt").read_text() == ""


def test_a_process_without_a_handler_is_not_killed(child: Callable[..., psutil.Process], tmp_path: Path) -> None:
    process = child(0, SLEEPS, registers=False)
    answer = ask({0: process}, {}, tmp_path)[0]
    assert answer.trouble == "it has not installed its handler for SIGUSR2 yet" and answer.threads == ()
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_process_that_does_not_answer_is_waited_for_no_longer_than_that(
    child: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    own = "signal.signal(signal.SIGUSR2, lambda *_: None)\n" + SLEEPS
    answer = ask({0: child(0, own, registers=False)}, {}, tmp_path, deadline_s=0.3)[0]
    assert answer.trouble == "does not answer (sleeping)"


def test_a_handler_that_is_there_already_stays(child: Callable[..., psutil.Process], tmp_path: Path) -> None:
    body = (
        "signal.signal(signal.SIGUSR2, lambda *_: print('mine', flush=True))\n"
        f"from runtime.telemetry import register_stacks\nassert not register_stacks(Path({str(tmp_path)!r}), 0)\n"
        + SLEEPS
    )
    child(0, body, registers=False)
    assert not (tmp_path / "stacks-rank-0.txt").exists()


def test_processes_that_are_gone_or_ended_say_so(child: Callable[..., psutil.Process], tmp_path: Path) -> None:
    process = child(0, "print('ready', flush=True)")
    until_status(process, psutil.STATUS_ZOMBIE)
    answers = ask({0: process, 1: None}, {1: 4711}, tmp_path)
    assert answers[0].trouble == "ended, not collected by torchrun"
    assert (answers[1].trouble, answers[1].pid) == ("gone", 4711)


def test_ranks_are_found_by_their_hello_or_their_environment(
    child: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    forks = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
    first, second = child(0, SLEEPS), child(1, forks + SLEEPS)
    try:
        assert find_ranks(tmp_path, 3, {0: first.pid}) == {0: first, 1: second, 2: None}
        assert find_ranks(tmp_path, 2, {}) == {0: first, 1: second}
        stranger = os.getppid()
        assert find_ranks(tmp_path, 1, {0: stranger}) == {0: None}  # a number that is none of ours any more
        assert find_ranks(tmp_path / "other", 2, {}) == {0: None, 1: None}
    finally:
        for grandchild in second.children():
            grandchild.kill()


# ---- the text --------------------------------------------------------------------------------------------------------
def test_a_dump_is_read_with_the_training_thread_first() -> None:
    main, other = parse(DUMP)
    assert main.main and main.frames[0] == '  File "/x/train.py", line 13 in step'
    assert not other.main and len(other.frames) == 2
    assert parse("") == ()
    assert [t.main for t in parse(DUMP.replace("Current thread", "Thread"))] == [True, False]


def rank_of(rank: int, *frames: str, threads: int = 1) -> RankStacks:
    others = (ThreadStack(False, ("telemetry",)),) * (threads - 1)
    return RankStacks(rank, 100 + rank, "sleeping", (ThreadStack(True, frames), *others))


@pytest.mark.parametrize(
    ("frames", "compiling"),
    [
        (["/x/torch/_dynamo/eval_frame.py", "/x/train.py"], False),  # stands there whenever compiled code runs
        (["/x/torch/_inductor/compile_fx.py", "/x/torch/_dynamo/eval_frame.py", "/x/train.py"], True),
        (["/x/torch/_dynamo/convert_frame.py", "/x/train.py"], True),
        (["/x/triton/compiler/compiler.py", "/x/triton/runtime/jit.py"], True),
        (["/x/triton/runtime/jit.py", "/x/torch/_inductor/output_code.py"], False),
        (["/x/train.py"], False),
    ],
)
def test_compiling_is_told_from_running_compiled_code(frames: list[str], compiling: bool) -> None:
    lines = [f'  File "{name}", line 1 in f' for name in frames]
    assert rank_of(0, *lines).compiling is compiling
    beside = RankStacks(0, 1, "sleeping", (ThreadStack(True, ("x",)), ThreadStack(False, tuple(lines))))
    assert not beside.compiling


def test_equal_stacks_stand_once_under_their_ranks() -> None:
    ranks = {rank: rank_of(rank, "  wait", "  train", threads=3) for rank in range(8)}
    ranks[1] = rank_of(1, "  sleep", "  train")
    state = RunState()
    state.apply(
        Heartbeat(
            rank=1, phase="backward", phase_since_ns=0, step=11, micro_step=3, micro_steps=4, entered_seq=811,
            completed_seq=811, entered_op="all_reduce", progress_ns=0, now_ns=0,
        )
    )  # fmt: skip
    text = stacks_text(ranks, state)
    assert text.count("  wait") == 1 and text.count("telemetry") == 1
    assert "ranks 0, 2-7, training thread (innermost call first):\n  wait\n  train\n" in text
    assert "rank 1, training thread (innermost call first):\n  sleep\n" in text
    assert "ranks 0, 2-7, another thread" in text
    place = "step 11, backward, micro-step 3/4, last collective 811 (all_reduce), completed"
    assert f"rank 1: pid 101, sleeping, {place}\n" in text
    assert "rank 0: pid 100, sleeping, nothing heard yet\n" in text


def test_files_are_numbered_and_private(tmp_path: Path) -> None:
    (tmp_path / "stacks-rank-7.txt").touch()
    assert [_save(tmp_path, "x", next_number(tmp_path)).name for _ in range(2)] == ["stacks-1.txt", "stacks-2.txt"]
    assert stat.S_IMODE((tmp_path / "stacks-1.txt").stat().st_mode) == 0o600


class OneHub:
    """As much of a hub as the taker asks for."""

    def __init__(self) -> None:
        self.status = RunStatus(name="q1", state="running", attempt=3)
        self.state = RunState()
        self.state.apply(self.status)
        self.router = self
        self.completed: list[tuple[str, dict[str, str]]] = []

    def complete(self, identity: str, *, result: dict[str, str]) -> None:
        self.completed.append((identity, result))


async def test_the_command_is_answered_with_a_path_and_a_bounded_text(tmp_path: Path) -> None:
    (tmp_path / "logs" / "3").mkdir(parents=True)
    hub = OneHub()
    taker = StackTaker(tmp_path, 1, hub)  # type: ignore[arg-type]
    await taker.answer(Command(id="c1", name="stacks"))
    ((identity, result),) = hub.completed
    assert identity == "c1" and result["path"] == "logs/3/stacks-1.txt"
    assert result["text"] == (tmp_path / result["path"]).read_text()
    assert "running at step 0; rank 0: gone" in result["text"]
    taker.nproc = 2000
    await taker.answer(Command(id="c2", name="stacks"))
    text = hub.completed[1][1]["text"]
    assert len(text) < ANSWER_BYTES + 100 and text.endswith("\n... the rest is in logs/3/stacks-2.txt\n")


async def test_a_text_that_can_not_be_saved_is_given_all_the_same(tmp_path: Path) -> None:
    hub = OneHub()
    await StackTaker(tmp_path, 1, hub).answer(Command(id="c1", name="stacks"))  # type: ignore[arg-type]
    result = hub.completed[0][1]
    assert result["path"] == "" and result["text"].startswith("(not saved: ") and "rank 0: no process" in result["text"]
