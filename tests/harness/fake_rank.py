"""A run without torch: fake ranks that speak the real protocol, and a launcher that behaves as torchrun does.

    python tests/harness/fake_rank.py --ranks 2

starts the ranks (give it as RunFile.command); each rank is this script again, with RANK set. The environment says how
they behave: FAKE_STEPS (default 1000000), FAKE_START (0), FAKE_STEP_S (0.02), FAKE_CRASH="RANK:STEP" (raises there),
FAKE_HANG="RANK:STEP" (stands still there, as in a collective), FAKE_MEET=FOLDER (ranks wait for each other at every
step, as in a collective, through files there; they then answer SIGUSR2 with their stacks too, as with FAKE_STACKS=1;
to be paused at different steps is no good for them), FAKE_IGNORE_TERM=1,
FAKE_CHILD=1 (every rank starts a sleeping child in a session of its own), FAKE_LATE_S (seconds before telemetry
starts), FAKE_EVERY=N (rank 0 makes a checkpoint every N steps; under ZEROTOP_RESUME=1 the ranks go on from the newest
one in the run directory, if there is any), FAKE_FATAL=1 (what raises says that another attempt would end the same way),
FAKE_GPU=1 (each rank says that it is on the GPU of its number, one of harness/fake_nvml), FAKE_PIDS (a file to which
every process adds its pid).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.telemetry import Telemetry, register_stacks, stopsignal
from runtime.wire.messages import Ack, Command, Hello, Memory, StepResult
from runtime.wire.rundir import ATTEMPT_VARIABLE, RESUME_VARIABLE, RUN_VARIABLE, boot_id, read_run

MICRO_STEPS = 2


def setting(name: str, default: str = "") -> str:
    return os.environ.get(f"FAKE_{name}", default)


def note_pid() -> None:
    if setting("PIDS"):
        with open(setting("PIDS"), "a") as file:
            file.write(f"{os.getpid()}\n")


# ---- the launcher ----------------------------------------------------------------------------------------------------
def launch(ranks: int) -> int:
    """Start the ranks in sessions of their own; when one fails, TERM the others and say so in torchrun's words."""
    note_pid()
    children: dict[int, subprocess.Popen[bytes]] = {}
    for rank in range(ranks):
        variables = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        log = open(Path(os.environ[RUN_VARIABLE]) / "logs" / os.environ[ATTEMPT_VARIABLE] / f"rank-{rank}.log", "ab")  # noqa: SIM115
        children[rank] = subprocess.Popen(
            [sys.executable, __file__], env=variables, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    while True:
        codes = {rank: child.poll() for rank, child in children.items()}
        failed = [rank for rank, code in codes.items() if code]
        if failed:
            rank = failed[0]
            print(
                f"failed (exitcode: {codes[rank]}) local_rank: {rank} (pid: {children[rank].pid}) of binary: python",
                flush=True,
            )
            for child in children.values():
                child.terminate()
            for child in children.values():
                child.wait()
            return 1
        if all(code == 0 for code in codes.values()):
            return 0
        time.sleep(0.02)


# ---- one rank --------------------------------------------------------------------------------------------------------
class FakeRank:
    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.run = read_run(Path(os.environ[RUN_VARIABLE]))
        self.steps = int(setting("STEPS", "1000000"))
        self.step_s = float(setting("STEP_S", "0.02"))
        self.folder = Path(os.environ[RUN_VARIABLE]) / "checkpoints"
        self.step = self.first_step()
        self.paused = False
        self.stopping = False
        self.seq = 0
        telemetry = Telemetry.from_environment(self.rank)
        assert isinstance(telemetry, Telemetry)
        self.telemetry = telemetry

    def first_step(self) -> int:
        saved = [int(path.name.split("-")[1]) for path in self.folder.glob("step-*")]
        return max(saved) if saved and os.environ[RESUME_VARIABLE] == "1" else int(setting("START", "0"))

    def save(self) -> dict[str, Any]:
        result = {"path": f"checkpoints/step-{self.step}", "step": self.step}
        if self.rank == 0:
            (self.folder / f"step-{self.step}").mkdir(parents=True, exist_ok=True)
            self.telemetry.checkpoint_saved(self.step, str(result["path"]), seconds=0.1, blocked_ms=0.0)
        return result

    def hello(self) -> Hello:
        return Hello(
            run=self.run.name,
            attempt=self.run.attempt,
            rank=self.rank,
            local_rank=self.rank,
            world_size=self.world_size,
            host=self.run.host,
            pid=os.getpid(),
            boot_id=boot_id(),
            wall_s=time.time(),
            mono_ns=time.monotonic_ns(),
            device=f"cuda:{self.rank}" if setting("GPU") else "cpu",
            device_uuid=f"GPU-00000000-0000-0000-0000-{self.rank:012}" if setting("GPU") else "",
            backend="gloo",
            config_digest="fake",
            stage=2,
            precision="fp32",
            micro_batch=1,
            accumulation=MICRO_STEPS,
            global_batch=MICRO_STEPS * self.world_size,
            steps=self.steps,
            start_step=self.step,
            telemetry_hz=20.0,
        )

    def memory(self) -> Memory:
        return Memory(
            rank=self.rank,
            ledger={"parameters": 4000, "gradients": 2000, "optimizer": 8000},
            rss_bytes=10**7,
            allocated_bytes=10**9 if setting("GPU") else None,
            device_total_bytes=150 * 10**9 if setting("GPU") else None,
            host_total_bytes=10**9,
            at_ns=time.monotonic_ns(),
        )

    def train(self) -> Literal["finished", "stopped"]:
        """The outcome for the goodbye."""
        self.telemetry.memory_source = self.memory
        self.telemetry.start(self.hello())
        while self.step < self.steps:
            self.one_step()
            self.boundary()
            if (every := int(setting("EVERY", "0"))) and self.step % every == 0:
                self.save()
            if self.stopping or self.telemetry.inbox.orphaned:
                return "stopped"
        return "finished"

    def one_step(self) -> None:
        begin = time.monotonic_ns()
        number = self.step + 1
        for micro_step in range(1, MICRO_STEPS + 1):
            self.telemetry.enter("forward", number, micro_step)
            time.sleep(self.step_s / 4)
            self.telemetry.enter("backward", number, micro_step)
            time.sleep(self.step_s / 4)
        if setting("CRASH") == f"{self.rank}:{number}":
            raise RuntimeError(f"rank {self.rank} breaks at step {number} as it was told")
        if setting("HANG") == f"{self.rank}:{number}":
            while True:
                time.sleep(3600)
        if setting("MEET"):
            self.meet(Path(setting("MEET")), number)
        self.telemetry.enter("step", number, 0)
        self.step = number
        end = time.monotonic_ns()
        self.telemetry.step(
            StepResult(
                rank=self.rank,
                step=number,
                loss=5.0 / number,
                lr=1e-3,
                grad_norm=1.0,
                step_ms=(end - begin) / 1e6,
                tokens_per_s=1000.0,
                end_ns=end,
            )
        )

    def meet(self, folder: Path, number: int) -> None:
        begin = time.monotonic_ns()
        seq = self.telemetry.issued("all_reduce", 8)
        (folder / f"{number}-{self.rank}").touch()
        while not all((folder / f"{number}-{rank}").exists() for rank in range(self.world_size)):
            time.sleep(0.005)
        self.telemetry.completed(seq, "all_reduce", 8, begin, time.monotonic_ns(), 0)

    def boundary(self) -> None:
        """Apply what has come. The fake ranks share no collective, so each applies on its own; rank 0 answers."""
        for command in self.telemetry.inbox.take():
            self.apply(command)
        while self.paused and not self.stopping and not self.telemetry.inbox.orphaned:
            self.telemetry.enter("paused", self.step + 1, 0)
            next_command = self.telemetry.inbox.next(0.5)
            if next_command is not None:
                self.apply(next_command)

    def apply(self, command: Command) -> None:
        result: dict[str, Any] = {}
        match command.name:
            case "pause":
                self.paused = True
            case "resume":
                self.paused = False
            case "stop":
                self.stopping = True
            case "checkpoint":
                result = self.save()
            case "set":
                result = command.arguments
        if self.rank == 0:
            self.telemetry.ack(
                Ack(id=command.id, number=command.number, state="applied", step=self.step, result=result)
            )


def run_rank() -> int:
    note_pid()
    stopsignal.listen()
    if setting("IGNORE_TERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if setting("CHILD"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
        with open(setting("PIDS"), "a") as file:
            file.write(f"{child.pid}\n")
    if setting("MEET") or setting("STACKS"):
        register_stacks(Path(os.environ[RUN_VARIABLE]) / "logs" / os.environ[ATTEMPT_VARIABLE], int(os.environ["RANK"]))
    time.sleep(float(setting("LATE_S", "0")))
    rank = FakeRank()
    try:
        outcome = rank.train()
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        rank.telemetry.goodbye("failed", rank.step, text, fatal=bool(setting("FATAL")))
        rank.telemetry.close()
        return 1
    rank.telemetry.goodbye(outcome, rank.step)
    rank.telemetry.close()
    return 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(run_rank())
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    sys.exit(launch(parser.parse_args().ranks))
