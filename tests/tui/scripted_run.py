"""A run that exists only as messages: feeds the screen without sockets, processes or torch.

python tests/tui/scripted_run.py --ranks 8 --gpu          looks at the real screen, on a terminal
python tests/tui/scripted_run.py --finetune               with data reports and evaluations
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

from runtime.wire.base import Message
from runtime.wire.messages import (
    Ack,
    CheckpointSaved,
    Collectives,
    Command,
    CommandRecord,
    Event,
    Goodbye,
    Heartbeat,
    Hello,
    LogRecord,
    Memory,
    Phases,
    RunStatus,
    StepResult,
)
from runtime.wire.node import GpuStats, NodeStats
from tests.harness.finetuning import data_report, evaluation
from zerotop.state.events import TRAINER_LOGGER
from zerotop.state.run import RunState
from zerotop.verdict.judge import Judge

MIB = 2**20
GIB = 2**30
MS = 1_000_000


GPU_FAULTS: dict[int, dict[str, Any]] = {
    1: {"sm_clock_mhz": 1200, "clock_reasons": ["power cap"], "power_w": 500, "power_limit_w": 500},
    2: {"ecc_uncorrected": 2, "ecc_corrected": 40, "remapped_rows": 1, "row_remap_pending": True},
    3: {"pcie_width": 8, "sm_clock_mhz": 1410, "clock_reasons": ["hot (hardware)"], "temperature_c": 88},
    4: {"sm_activity_percent": None, "tensor_activity_percent": None, "no_permission": ["sm_activity_percent"]},
    5: {"lost": True},
    6: {"pcie_tx_bytes_per_s": None, "stale_fields": ["pcie_tx_bytes_per_s", "ecc_corrected"], "stale_s": 12.3},
    7: {"utilization_percent": None, "power_w": None, "sm_clock_mhz": None, "temperature_c": None, "energy_j": None}
    | {"stale_fields": ["utilization_percent", "power_w", "temperature_c", "sm_clock_mhz"], "stale_s": 42.0},
}
"""Changes of `gpu_changes`, one kind for each GPU."""


class ScriptedRun:
    """A `Source` whose run moves only when told: `steps(n)`, `beat(rank)`, `accept(command)`. Its time is a number."""

    def __init__(
        self,
        ranks: int = 2,
        gpu: bool = False,
        accumulation: int = 4,
        steps: int = 200,
        seed: int = 0,
        name: str = "q1",
        finetune: bool = False,
        nodes: int = 1,
    ) -> None:
        self.name = name
        self.state = RunState()
        self.run_path: Path | None = None
        self.connection = "live"
        self.can_control = True
        self.sent: list[Command] = []
        self.closed = False
        self.age: float | None = 0.1
        self.auto_answer = False
        self.ranks, self.gpu, self.accumulation, self.total = ranks, gpu, accumulation, steps
        self.per_node = max(1, ranks // nodes)
        self.now_ns = 1_000_000_000_000
        self.wall_s = 1_790_000_000.0
        self.step = 0
        self.seq = 0
        self.number = 0
        self.slow_rank = ranks - 1
        self.finetune = finetune
        self.gpu_changes: dict[int, dict[str, Any]] = {}
        """GPU -> fields of GpuStats that differ from those of a healthy one."""
        self._random = random.Random(seed)
        self._changed = True
        self._judge, self._judged_s = Judge(), 0.0
        self._open()

    # ---- Source ----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._changed = True

    def poll(self) -> bool:
        changed, self._changed = self._changed, False
        if changed:
            self.judge()
        return changed

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s)

    def send(self, command: Command) -> None:
        self.sent.append(command)
        if self.auto_answer:
            self.accept(command)
            self.apply_command(command)

    def age_s(self) -> float | None:
        return self.age

    def close(self) -> None:
        self.closed = True

    # ---- the script ------------------------------------------------------------------------------------------------
    def say(self, *messages: Message) -> None:
        self.state.hub_now_ns = self.now_ns
        self.state.apply_all(messages, self.now_ns)
        self._changed = True

    def judge(self) -> None:
        """Publish the verdict, as the hub does; a warning is held for a second before it is one."""
        for _ in range(3):
            self._judged_s += 0.6
            found = self._judge.look(self.state, self._judged_s)
        self.state.apply(found.message(self.step, self.wall_s))

    def status(self, state: str, **more: object) -> None:
        before = self.state.status
        fields = before.model_dump(exclude={"kind"}) if before else {"name": self.name, "attempt": 1}
        self.say(RunStatus(**{**fields, "state": state, **more}))

    def _open(self) -> None:
        self.status("running", started_wall_s=self.wall_s)
        for rank in range(self.ranks):
            self.say(
                Hello(
                    run=self.name,
                    attempt=1,
                    rank=rank,
                    local_rank=rank % self.per_node,
                    world_size=self.ranks,
                    host=self._host(rank),
                    pid=4000 + rank,
                    boot_id="b",
                    wall_s=self.wall_s,
                    mono_ns=self.now_ns,
                    device=f"cuda:{rank % self.per_node}" if self.gpu else "cpu",
                    device_name="NVIDIA H200" if self.gpu else "",
                    device_uuid=f"GPU-{rank}" if self.gpu else "",
                    backend="nccl" if self.gpu else "gloo",
                    config_digest="d",
                    model_name="gpt-7b" if self.gpu else "gpt-tiny",
                    parameters=6_738_000_000 if self.gpu else 3_200_000,
                    stage=2,
                    precision="bf16",
                    micro_batch=4,
                    accumulation=self.accumulation,
                    global_batch=4 * self.accumulation * self.ranks,
                    seq_len=512,
                    steps=self.total,
                    torch_version="2.13.0",
                    knobs={"log_interval": 10, "log_level": "info", "lr_factor": 1.0, "telemetry_hz": 10.0},
                )
            )
        self.event("start", f"{self.ranks} ranks on node-a")
        self.node()
        if self.finetune:
            self.say(data_report("train"), data_report("evaluation"), evaluation(0))
        for rank in range(self.ranks):
            self.memory(rank)
            self.beat(rank, "init", 0)

    def memory(self, rank: int) -> None:
        if self.gpu:
            ledger = {
                "parameters": 13 * GIB,
                "gradients": 2 * GIB,
                "optimizer": 52 * GIB // self.ranks,
                "masters": 26 * GIB // self.ranks,
                "buffers": 40 * MIB,
                "communication": 900 * MIB,
            }
            held = sum(ledger.values())
            allocated = held + int((9 + math.sin(self.step / 3 + rank)) * GIB)
            self.say(
                Memory(
                    rank=rank,
                    ledger=ledger,
                    pinned_bytes=2 * GIB,
                    rss_bytes=5 * GIB,
                    allocated_bytes=allocated,
                    reserved_bytes=allocated + 3 * GIB,
                    device_used_bytes=allocated + 4 * GIB,
                    device_total_bytes=140 * GIB,
                    host_total_bytes=1024 * GIB,
                    at_ns=self.now_ns,
                )
            )
        else:
            ledger = {
                "parameters": 13 * MIB,
                "gradients": 13 * MIB // self.ranks,
                "optimizer": 26 * MIB // self.ranks,
                "communication": 6 * MIB,
            }
            self.say(
                Memory(
                    rank=rank,
                    ledger=ledger,
                    rss_bytes=(310 + 7 * rank) * MIB,
                    host_total_bytes=24 * GIB,
                    at_ns=self.now_ns,
                )
            )

    def _host(self, rank: int) -> str:
        return "node-a" if self.per_node == self.ranks else f"node-{rank // self.per_node}"

    def node(self) -> None:
        for first in range(0, self.ranks, self.per_node):
            self._node(range(first, min(self.ranks, first + self.per_node)))

    def _node(self, ranks: range) -> None:
        gpus = [self._gpu(rank) for rank in ranks] if self.gpu else None
        self.say(
            NodeStats(
                host=self._host(ranks[0]),
                cpu_percent=87,
                cpu_count=192 if self.gpu else 2,
                load_1m=2.1,
                ram_used_bytes=9 * GIB,
                ram_total_bytes=(1024 if self.gpu else 24) * GIB,
                rank_rss_bytes={r: (310 + 7 * r) * MIB for r in ranks},
                run_rss_bytes=900 * MIB,
                gpus=gpus,
                gpu_note="" if gpus else "NVML: no driver",
                at_ns=self.now_ns,
                wall_s=self.wall_s,
            )
        )

    def _gpu(self, rank: int) -> GpuStats:
        index = rank % min(8, self.per_node)
        who = {"index": rank % self.per_node, "uuid": f"GPU-{rank}", "name": "NVIDIA H200"}
        changes = self.gpu_changes.get(rank, {})
        if changes.get("lost"):
            return GpuStats(**who, lost=True)
        healthy: dict[str, Any] = {
            "used_bytes": 100 * GIB,
            "total_bytes": 140 * GIB,
            "utilization_percent": 97.0 - index,
            "power_w": 640.0 + index,
            "power_limit_w": 700,
            "temperature_c": 61 + index,
            "sm_clock_mhz": 1830,
            "sm_activity_percent": 81.0,
            "tensor_activity_percent": 42.0,
            "dram_activity_percent": 55.0,
            "energy_j": 1e6 + 650.0 * self.now_ns / 1e9,
            "slowdown_temperature_c": 87,
            "max_sm_clock_mhz": 1980,
            "memory_clock_mhz": 3201,
            "max_memory_clock_mhz": 3201,
            "pcie_generation": 5,
            "max_pcie_generation": 5,
            "pcie_width": 16,
            "max_pcie_width": 16,
            "pcie_tx_bytes_per_s": 2e9,
            "pcie_rx_bytes_per_s": 1e9,
            "nvlink_tx_bytes_per_s": 4e10,
            "nvlink_rx_bytes_per_s": 4e10,
            "links": ["X" if other == index else "NV18" for other in range(self.per_node)],
            "ecc_corrected": 0,
            "ecc_uncorrected": 0,
            "remapped_rows": 0,
        }
        return GpuStats(**(who | healthy | changes))

    def beat(
        self,
        rank: int,
        phase: str = "forward",
        micro: int = 1,
        *,
        entered: int | None = None,
        completed: int | None = None,
        op: str = "reduce",
        idle_ms: float = 0.0,
    ) -> None:
        entered = self.seq if entered is None else entered
        self.say(
            Heartbeat(
                rank=rank,
                phase=phase,
                phase_since_ns=self.now_ns - int(idle_ms * MS),
                step=self.step + 1,
                micro_step=micro,
                micro_steps=self.accumulation,
                entered_seq=entered,
                completed_seq=entered if completed is None else completed,
                entered_op=op,
                progress_ns=self.now_ns - int(idle_ms * MS),
                now_ns=self.now_ns,
            )
        )

    def event(
        self, what: str, text: str, severity: str = "info", rank: int | None = None, step: int | None = None
    ) -> None:
        self.say(Event(rank=rank, what=what, text=text, severity=severity, step=step, wall_s=self.wall_s))

    def log(self, text: str, level: str = "info", rank: int | None = 0, logger: str = "runtime") -> None:
        self.say(LogRecord(rank=rank, level=level, logger=logger, text=text, wall_s=self.wall_s))

    def steps(self, count: int, step_ms: float = 400.0) -> None:
        for _ in range(count):
            self._step(step_ms)

    def _step(self, step_ms: float) -> None:
        self.step += 1
        begin = self.now_ns
        loss = 2.2 + 3.4 * math.exp(-self.step / 45) + self._random.uniform(-0.06, 0.06)
        micro_ns = int(step_ms * 0.8 * MS / self.accumulation)
        for rank in range(self.ranks):
            spans, at = [], begin
            for micro in range(1, self.accumulation + 1):
                for phase, share in (("data", 0.04), ("forward", 0.34), ("backward", 0.62)):
                    spans.append((phase, self.step, micro, at, at + int(micro_ns * share)))
                    at += int(micro_ns * share)
            for phase, share in (("reduce", 0.09), ("step", 0.08), ("gather", 0.03)):
                spans.append((phase, self.step, 0, at, at + int(step_ms * share * MS)))
                at += int(step_ms * share * MS)
            last = rank == self.slow_rank
            wait_ms = (0.03 if last else 0.09) * step_ms
            records = []
            for k in range(4):
                duration = 900 + self._random.randint(0, 200) + (0 if last else 12_000)
                records.append((self.seq + k + 1, "reduce" if k < 3 else "gather", 6 * MIB, at, at, duration, duration))
            self.say(
                Phases(rank=rank, micro_steps=self.accumulation, spans=spans),
                Collectives(rank=rank, step=self.step, records=records),
                StepResult(
                    rank=rank,
                    step=self.step,
                    loss=loss,
                    lr=3e-4 * min(1, self.step / 20),
                    grad_norm=1.1 + self._random.uniform(-0.3, 0.5),
                    step_ms=step_ms * self._random.uniform(0.95, 1.05),
                    tokens_per_s=4 * 512 * self.accumulation / step_ms * 1000,
                    wait_ms=wait_ms,
                    comm_bytes=24 * MIB,
                    phase_ms={
                        "data": 0.032 * step_ms,
                        "forward": (0.272 + (0.04 if last else 0.0)) * step_ms,
                        "backward": 0.496 * step_ms,
                        "reduce": (0.09 - (0.04 if last else 0.0)) * step_ms,
                        "step": 0.08 * step_ms,
                        "gather": 0.03 * step_ms,
                    },
                    phase_wait_ms={"reduce": wait_ms * 2 / 3, "gather": wait_ms / 3},
                    end_ns=at,
                ),
            )
        self.seq += 4
        self.now_ns = begin + int(step_ms * MS)
        self.wall_s += step_ms / 1000
        for rank in range(self.ranks):
            self.memory(rank)
            self.beat(rank, "forward", 1)
        if self.step % 10 == 0:
            self.log(f"step {self.step}/{self.total} loss {loss:.3f} {step_ms:.0f} ms", logger=TRAINER_LOGGER)
        if self.finetune and self.step % 25 == 0:
            self.say(evaluation(self.step))
        if self.step % 50 == 0:
            saved = {"step": self.step, "path": f"checkpoints/step-{self.step}", "seconds": 0.4, "blocked_ms": 12.0}
            self.say(CheckpointSaved(rank=0, wall_s=self.wall_s, **saved))
            self.status("running", last_checkpoint_step=self.step)

    def silence(self, seconds: float) -> None:
        """Time goes by on the hub, and nothing happens."""
        self.now_ns += int(seconds * 1e9)
        self.state.hub_now_ns = self.now_ns
        self._changed = True

    # ---- commands --------------------------------------------------------------------------------------------------
    def accept(self, command: Command) -> None:
        self.number += 1
        numbered = command.model_copy(update={"number": self.number})
        self.say(CommandRecord(command=numbered, ack=Ack(id=command.id, number=self.number, state="accepted")))

    def apply_command(self, command: Command) -> None:
        result = {"path": f"checkpoints/step-{self.step}"} if command.name == "checkpoint" else {}
        ack = Ack(id=command.id, number=self.number, state="applied", wall_s=self.wall_s, step=self.step, result=result)
        self.say(CommandRecord(command=command.model_copy(update={"number": self.number}), ack=ack))
        if command.name in {"pause", "resume", "stop"}:
            self.status({"pause": "paused", "resume": "running", "stop": "stopped"}[command.name])

    def reject(self, command: Command, reason: str) -> None:
        ack = Ack(id=command.id, number=self.number, state="rejected", reason=reason)
        self.say(CommandRecord(command=command, ack=ack))

    def fail(self, rank: int, error: str) -> None:
        self.say(Goodbye(rank=rank, outcome="failed", step=self.step, error=error, wall_s=self.wall_s))
        self.status("failed", reason=error.strip().splitlines()[-1], failed_rank=rank, error=error, exit_code=1)


class LiveScriptedRun(ScriptedRun):
    """The same in real time: one step per `step_ms`, heartbeats in between; commands act at the next step."""

    def __init__(self, *args: int, step_ms: float = 1000.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.step_ms = step_ms
        self._begun = time.monotonic()
        self.steps(60, step_ms)
        self._pending: list[Command] = []

    def send(self, command: Command) -> None:
        super().send(command)
        self.accept(command)
        self._pending.append(command)

    def poll(self) -> bool:
        elapsed_ms = (time.monotonic() - self._begun) * 1000
        if self.state.state_name == "running" and elapsed_ms < self.step_ms:
            micro = min(self.accumulation, 1 + int(elapsed_ms / (self.step_ms * 0.8) * self.accumulation))
            phase = (
                "reduce" if elapsed_ms > 0.8 * self.step_ms else "backward" if int(elapsed_ms / 70) % 2 else "forward"
            )
            self.now_ns += 250 * MS
            for rank in range(self.ranks):
                self.beat(rank, phase, 0 if phase == "reduce" else micro)
        elif self.state.state_name in {"running", "paused"}:
            for command in self._pending:
                self.apply_command(command)
            self._pending.clear()
            self._begun = time.monotonic()
            if self.state.state_name == "running":
                self.steps(1, self.step_ms)
                self.node()
            else:
                self.now_ns += 250 * MS
                for rank in range(self.ranks):
                    self.beat(rank, "paused", 0)
        return super().poll()


def main() -> None:
    from zerotop.tui.app import ZerotopApp

    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--step-ms", type=float, default=1000)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--gpu-faults", action="store_true", help="with --gpu: GPUs that throttle, break and are lost")
    given = parser.parse_args()
    run = LiveScriptedRun(
        ranks=given.ranks, gpu=given.gpu, step_ms=given.step_ms, steps=2000, finetune=given.finetune, nodes=given.nodes
    )
    if given.gpu_faults:
        run.gpu_changes = GPU_FAULTS
    print(ZerotopApp(run, read_only=given.read_only).run())


if __name__ == "__main__":
    main()
