"""Each trainer with its one line: what the screen sees, which commands it obeys, and that its losses stay what they
are, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import Event
from tests.harness.runs import StartedRun
from tests.integrations.conftest import RunScript, losses
from zerotop.diagnose.hang import HANG_VARIABLE
from zerotop.source.live import LiveSource
from zerotop.state.run import RunState

STEPS = 6
pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Case:
    script: str
    package: str
    """Without it the test is skipped: `make test-integrations` has all of them."""
    trainer: str
    phases: frozenset[str]
    nproc: int = 2
    environment: tuple[tuple[str, str], ...] = ()
    logs_norm: bool = False

    def __str__(self) -> str:
        return "-".join([self.script.removesuffix(".py"), *(value for _, value in self.environment)])


LOOP = frozenset({"data", "forward", "backward", "step"})
CASES = (
    Case("ddp.py", "torch", "torch", LOOP | {"reduce"}),
    Case("fsdp2.py", "torch", "torch", LOOP | {"reduce"}),
    Case("transformers_trainer.py", "transformers", "transformers", LOOP | {"reduce", "eval"}, logs_norm=True),
    Case("accelerate_loop.py", "accelerate", "torch", LOOP | {"reduce"}),
    Case("lightning_trainer.py", "pytorch_lightning", "Lightning", LOOP | {"eval"}),
    Case("trl_sft.py", "trl", "transformers", LOOP | {"reduce"}, logs_norm=True),
    Case("deepspeed_engine.py", "deepspeed", "DeepSpeed", LOOP, environment=(("STAGE", "2"),), logs_norm=True),
    Case("deepspeed_engine.py", "deepspeed", "DeepSpeed", LOOP, environment=(("STAGE", "3"),), logs_norm=True),
)


def _phases(run: StartedRun) -> set[str]:
    return {span[0] for rank in run.source.state.ranks.values() for span in rank.spans}


def _marked(case: Case) -> Any:
    """DDP is slow here, as the tests of commands, memory and hangs below train with it, and Accelerate, whose loop is
    DDP's and whose Accelerator the Trainer's has inside."""
    return pytest.param(case, marks=pytest.mark.slow) if case.script in ("ddp.py", "accelerate_loop.py") else case


@pytest.mark.parametrize("case", [_marked(case) for case in CASES], ids=str)
def test_what_is_seen_and_that_losses_stay(case: Case, run_script: RunScript) -> None:
    if importlib.util.find_spec(case.package) is None:
        pytest.skip(f"{case.package} is not installed")
    environment = dict(case.environment)
    plain = run_script(case.script, case.nproc, WATCH=0, STEPS=STEPS, **environment)
    plain.see_end("finished", deadline_s=80)
    run = run_script(case.script, case.nproc, STEPS=STEPS, SLOW_MS=25, **environment)
    run.see(lambda source: source.connection == "ended", "the end", deadline_s=80)
    run.see_end("finished")

    assert losses(run) == losses(plain)
    state = run.source.state
    hello = state.hello
    assert hello is not None and hello.trainer.startswith(case.trainer) and hello.world_size == case.nproc
    assert hello.accumulation == 2
    assert sorted(state.ranks) == list(range(case.nproc))
    assert state.step == STEPS
    assert case.phases <= _phases(run)
    newest = state.ranks[0].step
    assert newest is not None and newest.loss is not None and newest.lr > 0
    assert (newest.grad_norm is not None) == case.logs_norm
    assert newest.samples_per_s and newest.tokens_per_s
    memory = state.ranks[0].memory
    assert memory is not None and memory.ledger["parameters"] > 0
    held = {name for name, value in memory.ledger.items() if value}
    assert "optimizer" in held | ({"optimizer"} if case.script == "deepspeed_engine.py" else set())
    goodbye = state.ranks[0].goodbye
    assert goodbye is not None and goodbye.outcome == "finished"
    if case.script == "fsdp2.py":
        _see_collectives_of_fsdp2(state)


def _see_collectives_of_fsdp2(state: RunState) -> None:
    """Shards are gathered in forward and again in backward, of the root in forward only. Gloo has no reduce-scatter:
    FSDP2 all-reduces whole gradients with it."""
    block = 32 * 64 + 64 + 64 * 32 + 32
    root = 64 * 32 + 64 * 32 + 64
    expected = {
        ("all_gather", 2 * block, 8, None),  # bytes of what a rank gives: half of the elements, 4 bytes each
        ("all_gather", 2 * root, 2, None),
        ("all_reduce", 4 * block, 4, None),
        ("all_reduce", 4 * root, 2, None),
    }
    for rank in state.ranks.values():
        assert set(rank.counted) == expected
        assert {span[2] for span in rank.spans if span[0] == "reduce"} == {1, 2}
    assert [one.op for one in state.waits.meetings] == ["end of backward"] * 2 * STEPS


def test_collectives_are_those_that_a_rank_issues_and_each_has_a_log(run_script: RunScript) -> None:
    """Under no_sync nothing is reduced in the first micro-step, and nothing waits there."""
    run = run_script("ddp.py", STEPS=STEPS, SLOW_MS=25, NO_SYNC=1)
    run.see(lambda source: source.connection == "ended", "the end", deadline_s=80)
    run.see_end("finished")
    state = run.source.state
    assert state.hello is not None
    for rank in state.ranks.values():
        assert rank.counted == [("all_reduce", 4 * state.hello.parameters, 1, None)]
        assert {span[2] for span in rank.spans if span[0] == "reduce"} == {2}
    assert [(one.op, one.bytes) for one in state.waits.meetings] == [("end of backward", 0)] * STEPS
    assert {meeting.step for meeting in state.waits.meetings} == set(range(1, STEPS + 1))
    logs = run.entry.logs()
    texts = [(logs / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert all(text.count("LOSSES") == 1 for text in texts) and texts[0] != texts[1]
    assert "LOSSES" not in (logs / "launcher.log").read_text()


def see_memory(run: StartedRun, sharded: bool) -> None:
    """Each of two ranks holds all parameters, gradients and AdamW's states in fp32; of FSDP2's DTensors the local part
    counts, which is half of them."""
    run.see(
        lambda source: (
            len(source.state.ranks) == 2
            and all(r.memory and r.memory.ledger.get("optimizer", 0) for r in source.state.ranks.values())
        ),
        "optimizer states in memory",
        deadline_s=60,
    )
    hello = run.source.state.hello
    assert hello is not None
    held = 4 * hello.parameters // (2 if sharded else 1)
    tensors = 2 + 2 * 4 + 1  # embedding and head with its bias, and the two linear layers of each block
    for rank in run.source.state.ranks.values():
        assert rank.memory is not None
        ledger = rank.memory.ledger
        assert ledger["parameters"] == held
        assert ledger["gradients"] == (held if sharded else pytest.approx(held, rel=0.01))  # DDP's buckets are padded
        assert ledger["optimizer"] == 2 * held + 4 * tensors  # and a step counter per parameter


def test_memory_is_what_ranks_hold_and_commands_apply_at_one_step_of_all(run_script: RunScript) -> None:
    run = run_script("ddp.py", STEPS=100_000, SLOW_MS=5)
    run.see_step(2, deadline_s=60)
    see_memory(run, sharded=False)
    paused = run.command("pause")
    assert paused.ack.state == "applied"
    run.see_state("paused")
    run.see(lambda source: all(r.phase == "paused" for r in source.state.ranks.values()), "both ranks paused")
    steps = {rank.current_step for rank in run.source.state.ranks.values()}
    assert steps == {paused.ack.step}
    saved = run.command("checkpoint")
    assert saved.ack.state == "applied" and str(saved.ack.result["path"]).endswith("model.pt")
    assert run.command("resume").ack.state == "applied"
    before = run.source.state.ranks[0].step
    assert before is not None
    factor = run.command("set", lr_factor=0.5)
    assert factor.ack.state == "applied" and factor.ack.step is not None
    run.see_step(factor.ack.step + 1)
    after = run.source.state.ranks[0].step
    assert after is not None and after.lr == pytest.approx(before.lr / 2)
    refused = run.command("profile", ranks=[0], steps=1)
    assert refused.ack.state == "rejected" and "not possible with this trainer" in refused.ack.reason
    bounds = run.command("set", checkpoint_interval=5)
    assert bounds.ack.state == "rejected" and "lr_factor" in bounds.ack.reason
    assert run.command("stop").ack.state == "applied"
    assert run.see_end("stopped").reason == "stopped on request"


OBEYING = (
    Case("fsdp2.py", "torch", "torch", LOOP),
    Case("lightning_trainer.py", "pytorch_lightning", "Lightning", LOOP),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
        if case.script in ("accelerate_loop.py", "trl_sft.py") or ("STAGE", "2") in case.environment
    ),
)


@pytest.mark.parametrize("case", OBEYING, ids=str)
def test_commands_of_each_trainer(case: Case, run_script: RunScript) -> None:
    """On two ranks: it stands still while it is paused, trains with another learning rate, saves, and stops after a
    save."""
    if importlib.util.find_spec(case.package) is None:
        pytest.skip(f"{case.package} is not installed")
    run = run_script(case.script, STEPS=100_000, SLOW_MS=5, **dict(case.environment))
    run.see_step(2, deadline_s=90)
    paused = run.command("pause")
    assert paused.ack.state == "applied"
    ranks = run.source.state.ranks.values()
    run.see(lambda source: len(ranks) == 2 and all(rank.phase == "paused" for rank in ranks), "both ranks paused")
    since_ns = max(rank.heard_ns for rank in ranks)
    run.see(lambda source: all(rank.heard_ns > since_ns + 1_000_000_000 for rank in ranks), "a second of the pause")
    assert {(rank.phase, rank.current_step) for rank in ranks} == {("paused", paused.ack.step)}
    if case.script == "fsdp2.py":
        see_memory(run, sharded=True)
    assert run.command("resume").ack.state == "applied"

    before = run.source.state.ranks[0].step
    assert before is not None
    factor = run.command("set", lr_factor=0.5)
    assert factor.ack.state == "applied" and factor.ack.step is not None
    run.see_step(factor.ack.step + 2)
    after = run.source.state.ranks[0].step
    assert after is not None and after.lr == pytest.approx(before.lr / 2, rel=0.05)  # a schedule may lower it, too

    interval = run.command("set", log_interval=3)
    possible = case.trainer in ("Lightning", "transformers")
    assert (interval.ack.state == "applied") == possible, interval.ack.reason
    saved = run.command("checkpoint")
    assert saved.ack.state == "applied"
    path = Path(saved.ack.result["path"])
    assert path.exists()
    assert run.command("stop").ack.state == "applied"
    status = run.see_end("stopped", deadline_s=40)
    assert status.reason == "stopped on request" and status.last_checkpoint_step == status.step
    if case.trainer == "Lightning":
        assert path.name == f"step={saved.ack.step}.ckpt" and (path.parent / f"step={status.step}.ckpt").is_file()


LAUNCHERS = {
    "torchrun": ("ddp.py", "torch", "torch.distributed.run --standalone --nproc-per-node 2"),
    # --multi_gpu stands for several processes here: with --cpu accelerate starts one, unless there is MPI.
    "accelerate launch": (
        "accelerate_loop.py",
        "accelerate",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        " --dynamo_backend no --main_process_port 0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_ranks_of_the_command_s_own_launcher(name: str, run_script: RunScript) -> None:
    """Under `zerotop run` without --nproc: each rank reports, has a log, and obeys; the launcher's output is kept."""
    script, package, words = LAUNCHERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run = run_script(script, None, launcher=(sys.executable, "-m", *words.split()), STEPS=100_000, SLOW_MS=5)
    run.see_step(2, deadline_s=90)
    state = run.source.state
    assert sorted(state.ranks) == [0, 1] and state.hello is not None and state.hello.world_size == 2
    saved = run.command("checkpoint")
    assert saved.ack.state == "applied" and Path(saved.ack.result["path"]).exists()
    assert run.command("stop").ack.state == "applied"
    status = run.see_end("stopped", deadline_s=40)
    assert status.reason == "stopped on request" and status.last_checkpoint_step == status.step
    logs = run.entry.logs()
    assert all("LOSSES" in (logs / f"rank-{rank}.log").read_text() for rank in range(2))
    assert (logs / "launcher.log").exists()


def test_a_trainer_saves_and_stops(run_script: RunScript) -> None:
    """transformers' Trainer writes its own checkpoints, when it is asked and before it stops."""
    run = run_script("transformers_trainer.py", STEPS=100_000, SLOW_MS=5)
    run.see_step(2, deadline_s=90)
    interval = run.command("set", log_interval=20)
    assert interval.ack.state == "applied" and interval.ack.step is not None
    first = interval.ack.step
    run.see_step(first + 25)
    points = {point.step: point.loss for point in run.source.state.series}
    assert [step for step in range(first + 1, first + 21) if points[step] is not None] == [(first // 20 + 1) * 20]
    saved = run.command("checkpoint")
    assert saved.ack.state == "applied"
    path = saved.ack.result["path"]
    assert path.endswith(f"checkpoint-{saved.ack.step}")
    assert json.loads(Path(path, "trainer_state.json").read_text())["global_step"] == saved.ack.step
    assert run.command("stop").ack.state == "applied"
    status = run.see_end("stopped", deadline_s=40)
    assert status.last_checkpoint_step == status.step


def test_a_trainer_that_tries_again_is_watched_on_and_its_nan_is_told(run_script: RunScript) -> None:
    """`auto_find_batch_size` begins the training again in the same process; and a Trainer's log hides a NaN."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    run = run_script("transformers_trainer.py", None, STEPS=STEPS, OOM=2, NAN=4, SLOW_MS=25)
    run.see(lambda source: source.connection == "ended", "the end", deadline_s=80)
    run.see_end("finished")
    state = run.source.state
    told = [event for event in state.events if isinstance(event, Event) and event.what == "not finite"]
    assert [(event.rank, event.step) for event in told] == [(0, 4)] and "the loss is nan" in told[0].text
    points = {point.step: point.loss for point in state.series}
    assert points[3] is not None and math.isfinite(points[3])
    assert points[4] is not None and math.isnan(points[4])
    assert state.hello is not None and state.hello.micro_batch == 1  # half of the first one
    goodbye = state.ranks[0].goodbye
    assert goodbye is not None and (goodbye.outcome, goodbye.step) == ("finished", STEPS)


def test_a_hang_is_named_without_a_line(run_script: RunScript, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the script but torch.distributed: the rank that does not come is named, with its stack."""
    monkeypatch.setenv(HANG_VARIABLE, "3")
    run = run_script("ddp.py", STEPS=100_000, WATCH=0, HANG=40)
    run.see(lambda source: len(source.state.ranks) == 2, "both ranks", deadline_s=60)
    hello = run.source.state.hello
    assert hello is not None and not hello.counts_steps
    run.see(lambda source: _event(source, "hang"), "the hang", deadline_s=60)
    text = _event(run.source, "hang")
    assert text.startswith("rank 1 (in its script, pid ") and "rank 0 waits for it" in text
    stacks = run.command("stacks")
    assert stacks.ack.state == "applied"
    report = (run.path / stacks.ack.result["path"]).read_text()
    assert "common.py" in report and "batch" in report
    refused = run.command("pause")
    assert refused.ack.state == "rejected" and "watch()" in refused.ack.reason
    assert run.command("stop").ack.state == "applied"  # by SIGTERM
    assert run.see_end("stopped", deadline_s=40).reason == "the command was sent SIGTERM and has ended"


def _event(source: LiveSource, what: str) -> str:
    """The text of the first such event; empty if there is none."""
    return next((e.text for e in source.state.events if isinstance(e, Event) and e.what == what), "")


@pytest.mark.parametrize(
    ("stage", "resumes"), [(3, False), *(pytest.param(stage, True, marks=pytest.mark.slow) for stage in (2, 3))]
)
def test_transformers_on_our_engine_by_the_name_deepspeed(
    stage: int, resumes: bool, run_script: RunScript, tmp_path: Path
) -> None:
    """Its DeepSpeed integration with --as-deepspeed: it trains, saves, and resumes with the losses of a run without a
    break. (accelerate checks that a package deepspeed is there, and which one.)"""
    script = "transformers_deepspeed.py"
    whole = run_script(script, as_deepspeed=True, STEPS=STEPS, STAGE=stage)
    assert whole.see_end("finished", deadline_s=80).reason == "all ranks finished"
    assert "/runtime/__init__.py" in (whole.entry.logs() / "rank-0.log").read_text()
    whole.see(lambda source: source.connection == "ended", "the end")
    hello = whole.source.state.hello
    assert hello is not None and not hello.trainer and hello.stage == stage
    saved = tmp_path / "out" / "checkpoint-4"
    assert saved.is_dir()
    if resumes:
        resumed = run_script(script, as_deepspeed=True, STEPS=STEPS, STAGE=stage, RESUME=saved)
        resumed.see_end("finished", deadline_s=80)
        assert losses(resumed)[-2:] == losses(whole)[-2:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerates_deepspeed_plugin_on_our_engine(stage: int, run_script: RunScript, tmp_path: Path) -> None:
    """It trains as accelerate's loop does without a plugin, and saves its state."""
    plain = run_script("accelerate_loop.py", WATCH=0, STEPS=STEPS)
    plain.see_end("finished", deadline_s=80)
    run = run_script("accelerate_loop.py", as_deepspeed=True, WATCH=0, STEPS=STEPS, STAGE=stage)
    assert run.see_end("finished", deadline_s=80).reason == "all ranks finished"
    assert "/runtime/__init__.py" in (run.entry.logs() / "rank-0.log").read_text()
    assert [float.fromhex(one) for one in losses(run)] == pytest.approx(
        [float.fromhex(one) for one in losses(plain)], rel=1e-5
    )
    assert any((tmp_path / "out" / "state").iterdir())
