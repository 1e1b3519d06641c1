"""Real ranks under the real supervisor: commands land at one step, a resumed run repeats itself bit for bit, and
whatever is killed takes the whole run with it and leaves an honest state."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from runtime.checkpoint.format.manifest import read_manifest
from runtime.wire.messages import Hello, StepResult
from runtime.wire.rundir import read_run, read_status
from tests.harness.cpu import BF16_IF_QUICK
from tests.harness.runs import StartedRun
from tests.harness.waiting import until
from zerotop.hub.recorder import read_messages
from zerotop.rundir.directory import read_entry

pytestmark = pytest.mark.timeout(240)
STEPS = 90
START_DEADLINE_S = 60.0

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
    **BF16_IF_QUICK,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zerotop": {
        "model": {"preset": "gpt-tiny"},
        "data": {"seq_len": 16, "files": ["text.txt"]},
        "train": {"steps": STEPS},
        "checkpoint": {"interval": 0},
    },
}

SCRIPT = """
import os, sys, torch
import runtime as deepspeed

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
engine, optimizer, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters())
for step in range(int(sys.argv[1])):
    if step == 5 and "crash" in sys.argv and os.environ["RANK"] == "1":
        raise ValueError("the script's own mistake")
    loss = engine(torch.randn(4, 8, dtype=net[0].weight.dtype)).square().mean()
    engine.backward(loss)
    engine.step()
"""

WORKERS = """
import torch
import runtime as deepspeed

torch.manual_seed(0)
net = torch.nn.Linear(8, 1)
engine, *_ = deepspeed.initialize(model=net)
for batch in torch.utils.data.DataLoader(torch.randn(400_000, 8), batch_size=4, num_workers=2):
    engine.backward(engine(batch.to(net.weight.dtype)).square().mean())
    engine.step()
"""


@pytest.fixture
def launch(launch_real: Callable[..., StartedRun]) -> Callable[..., StartedRun]:
    """`launch(name=..., ...)`: start_run() with a small real config, watched by a screen's source."""
    return partial(launch_real, CONFIG)


def descendants(run: StartedRun) -> list[psutil.Process]:
    return psutil.Process(read_run(run.path).supervisor_pid).children(recursive=True)


def see_training(run: StartedRun, step: int = 2, attempt: int = 1) -> None:
    run.see_step(step, attempt, START_DEADLINE_S)


def trains_again(run: StartedRun, restarts: int) -> bool:
    status = read_status(run.path)
    return status.restarts == restarts and status.state in ("running", "finished")


def see_end(run: StartedRun, name: str) -> None:
    run.see_end(name, START_DEADLINE_S)


def losses(path: Path) -> dict[int, float | None]:
    """Step -> loss as rank 0 reported it; of a step taken twice, the last."""
    return {m.step: m.loss for m in read_messages(path) if isinstance(m, StepResult) and m.rank == 0}


def test_a_run_that_is_steered_killed_stopped_and_resumed_repeats_itself_bit_for_bit(launch):
    """Commands land at one step of all ranks; kill -9 of a rank loses no step for good (of torchrun, see the chaos
    tests); a stop is resumed."""
    whole = launch(name="whole")
    whole.see(lambda source: source.state.status.doing == "importing torch", "what the start is at")
    run = launch(name="broken", overrides=["zerotop.log.interval=3"])
    see_training(run)
    paused = run.command("pause").ack
    assert paused.state == "applied" and paused.step is not None
    ranks = [psutil.Process(run.pid_of_rank(rank)) for rank in (0, 1)]
    assert run.command("set", log_interval="1").ack.step == paused.step
    saved = run.command("checkpoint").ack
    assert (saved.state, saved.step) == ("applied", paused.step) and Path(saved.result["path"]).is_dir()
    before = [sum(process.cpu_times()[:2]) for process in ranks]
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 2, "two seconds of pause")
    used = max(sum(p.cpu_times()[:2]) - b for p, b in zip(ranks, before, strict=True))
    assert used < 1.0, "a paused rank spins"  # telemetry is in it; a spinning rank takes all of 2 s
    assert run.command("resume").ack.step == paused.step

    see_training(run, saved.step + 2)
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    until(lambda: trains_again(run, 1), "the restart", START_DEADLINE_S)
    status = read_status(run.path)
    assert status.restart_reason.startswith("rank 1 was killed by SIGKILL") and status.lost_steps >= 2

    see_training(run, saved.step + 1, 2)
    stopped = run.command("stop").ack
    assert stopped.state == "applied" and stopped.step > saved.step
    see_end(run, "stopped")
    again = launch(name="broken", resume=True, overrides=["zerotop.log.interval=3"])
    see_end(again, "finished")
    see_end(whole, "finished")
    found, expected = losses(run.path), losses(whole.path)
    assert found.items() <= expected.items()
    assert found.keys() == set(range(1, STEPS + 1))
    final = read_status(run.path)
    assert final.doing == ""
    assert (final.step, final.attempt, final.last_checkpoint_step) == (STEPS, 3, stopped.step)
    hellos = [message for message in read_messages(run.path) if isinstance(message, Hello)]
    assert {(hello.attempt, hello.start_step) for hello in hellos} == {(1, 0), (2, saved.step), (3, stopped.step)}


# Of a rank also above, of all by the chaos tests and, with fake ranks, in test_supervisor.py.
@pytest.mark.parametrize(
    "victim",
    [pytest.param("rank", marks=pytest.mark.slow), pytest.param("torchrun", marks=pytest.mark.slow), "supervisor"],
)
def test_kill_9_of_any_process_ends_the_whole_run(launch, victim):
    run = launch(overrides=["zerotop.train.steps=100000", "zerotop.restarts.limit=0"])
    see_training(run)
    processes = descendants(run)
    target = {
        "rank": run.pid_of_rank(1),
        "torchrun": next(p.pid for p in processes if "torch.distributed.run" in " ".join(p.cmdline())),
        "supervisor": read_run(run.path).supervisor_pid,
    }[victim]
    os.kill(target, signal.SIGKILL)
    until(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes),
        "every process gone",
        START_DEADLINE_S,
    )
    until(run.all_gone, "the supervisor gone")
    status = read_entry(run.path).status
    assert status.state == "failed"
    if victim == "rank":
        assert status.failed_rank == 1 and "SIGKILL" in status.reason
    if victim == "supervisor":
        assert "supervisor" in status.reason
        # The ranks saw it go, and saved their work before they left.
        saved = [p.name for p in (run.path / "checkpoints").glob("step-*")]
        assert saved == [f"step-{status.last_checkpoint_step:08d}"] and status.step == status.last_checkpoint_step


# One rank alone is signalled in test_restart.py too, a fake one, and every process with SIGUSR1 by the chaos tests.
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        pytest.param(signal.SIGUSR1, "descendants", marks=pytest.mark.slow),
        (signal.SIGTERM, "all"),
        pytest.param(signal.SIGTERM, "a rank", marks=pytest.mark.slow),
    ],
)
def test_every_process_of_a_step_is_signalled(launch, tmp_path, number, whom):
    """As Slurm does, or a machine that is shut down: torchrun, the writers and a DataLoader's workers live on, and the
    run stops after a checkpoint."""
    script = tmp_path / "mine.py"
    script.write_text(WORKERS)
    run = launch(script=[str(script)])
    see_training(run)
    signalled = [psutil.Process(run.pid_of_rank(1))] if whom == "a rank" else descendants(run)
    if whom == "all":
        signalled.append(psutil.Process(read_run(run.path).supervisor_pid))
    for process in signalled:
        process.send_signal(number)
        if whom == "all":
            process.send_signal(signal.SIGHUP)  # as systemd does when it ends a session
    see_end(run, "stopped")
    status = read_status(run.path)
    assert status.attempt == 1 and status.last_checkpoint_step == status.step >= 2


def test_a_users_script_is_watched_and_steered_with_no_line_added(launch, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    run = launch(script=[str(script), "100000", "--nproc", "7"])  # an argument that torchrun would misread
    see_training(run)
    paused = run.command("pause").ack
    assert paused.state == "applied"
    assert run.command("checkpoint").ack.step == paused.step
    assert run.command("stop").ack.step == paused.step
    see_end(run, "stopped")


TWO = """
import torch
import runtime as deepspeed

torch.manual_seed(0)
first, second = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
engines = [deepspeed.initialize(model=model)[0] for model in (first, second)]
print("at", [engine.global_steps for engine in engines])
for _ in range(4):
    for engine in engines:
        for _ in range(2):
            inputs = torch.randn(2, 8, dtype=next(engine.module.parameters()).dtype)
            engine.backward(engine(inputs).square().mean())
            engine.step()
        engine.wait_for_checkpoint()  # else a machine under load puts off the next one, and none follows the last step
"""


def test_a_second_engine_has_checkpoints_of_its_own_and_no_voice(launch, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    for attempt, (before, after) in enumerate([(0, 4), (4, 8)], start=1):
        more = {"overrides": ["zerotop.checkpoint.interval=2"], "resume": attempt == 2}
        run = launch(name="two", nproc=1, script=[str(script)], **more)
        see_end(run, "finished")
        assert f"at [{before}, {before}]" in (run.path / "logs" / str(attempt) / "rank-0.log").read_text()
        folder = run.path / "checkpoints"
        for place, parameters in ((folder, 2), (folder / "engine-2", 4)):
            manifest = read_manifest(place / f"step-{after:08d}")
            assert len(manifest.shapes) == parameters
    hellos = [m for m in read_messages(run.path) if isinstance(m, Hello)]
    assert {hello.parameters for hello in hellos} == {72}
    assert sorted(losses(run.path)) == list(range(1, 9))


def test_a_scripts_own_error_is_shown(launch, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    run = launch(script=[str(script), "100", "crash"], overrides=["zerotop.restarts.limit=0"])
    see_end(run, "failed")
    status = read_status(run.path)
    assert status.reason.startswith("rank 1 failed ")
    assert "ValueError: the script's own mistake" in status.error
    assert status.failed_rank == 1


def test_a_script_may_leave_by_sys_exit(launch, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT + "\nimport atexit\natexit.register(print, 'left properly')\nsys.exit(0)\n")
    run = launch(nproc=1, script=[str(script), "6"])  # micro-steps: three optimizer steps
    see_end(run, "finished")
    assert read_status(run.path).step == 3
    assert "left properly" in (run.path / "logs" / "1" / "rank-0.log").read_text()


def test_a_script_that_never_speaks_is_told_apart(launch, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("print('no trainer here')")
    run = launch(nproc=1, script=[str(script)])
    see_end(run, "finished")
    assert "the script never called runtime.initialize()" in read_status(run.path).reason


def test_an_error_before_initialize_is_the_reason(launch, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("raise RuntimeError('boom')")
    run = launch(nproc=1, script=[str(script)])
    see_end(run, "failed")
    status = read_status(run.path)
    failed = f"rank {status.failed_rank} failed before its first step: RuntimeError: boom"
    assert status.reason.startswith(f"{failed}; not restarted") and status.attempt == 1
