"""Every message of the protocol, as one tagged union on `kind`.

Three channels carry them, and each says what it may lose:

- telemetry (a rank's PUB to the hub): `Phases`, `StepResult`, `Memory`, `Collectives`, `Heartbeat`. May be dropped; a
  gap is counted by `Packet.seq`.
- events (a rank's DEALER to the hub's ROUTER): `Hello`, `LogRecord`, `Event`, `CheckpointSaved`, `Ack`, `Goodbye`.
  Numbered by `Packet.seq`, asked for again with `Resend`; never lost while both ends live. Downwards the same pair
  carries `Command`, in the hub's numbering.
- screens (the hub's XPUB): all of the above as they arrive, except `Ack`, and the hub's own `RunStatus`, `NodeStats`,
  `CommandRecord`; first a `Snapshot`.
- commands (a screen's DEALER to the hub's ROUTER): `Command`, in this direction only. The answer is the
  `CommandRecord` with the command's id on the screens channel. A command without one is sent again.

Units stand in the field names. `*_ns` are CLOCK_MONOTONIC nanoseconds of the sender's node (comparable on one node
only); `*_wall_s` are Unix seconds. Older readers ignore unknown fields, and skip messages of an unknown kind or with
values out of bounds (bounds.py, codec.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from runtime.wire.bounds import (
    Count,
    Data,
    Finite,
    Identity,
    Int64,
    MicroStep,
    Name,
    Pid,
    RankNumber,
    Step,
    Text,
    WallSeconds,
    Word,
    WorldSize,
)

PROTOCOL = 1
"""Raised when an old reader would misread a message; a hello with another number is refused with a message that says
so."""

PhaseName = Literal[
    "idle", "data", "forward", "backward", "reduce", "gather", "offload", "step", "checkpoint", "paused", "eval", "init"
]
CommandName = Literal["pause", "resume", "checkpoint", "stop", "abort", "set", "stacks"]
RunStateName = Literal[
    "starting", "running", "paused", "restarting", "stopping", "stopped", "finished", "aborted", "failed"
]
LIVE_STATES: frozenset[str] = frozenset({"starting", "running", "paused", "restarting", "stopping"})
Category = Literal["parameters", "gradients", "optimizer", "masters", "buffers", "communication", "snapshot"]
"""What a persistent byte of a rank is used for. masters: fp32 copies of 16-bit parameters; communication: gather and
reduce buffers; snapshot: the copy from which checkpoints are written."""


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Hello(Message):
    """A rank introduces itself, once per attempt, and again when the hub asks."""

    kind: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    run: Name
    attempt: Count
    rank: RankNumber
    local_rank: RankNumber
    world_size: WorldSize
    host: Name
    pid: Pid
    boot_id: Name
    wall_s: WallSeconds
    mono_ns: Count
    device: Name  # "cpu", "cuda:0"
    device_name: Name = ""
    device_uuid: Name = ""
    backend: Name = ""  # "gloo", "nccl"
    config_digest: Name
    model_name: Name = ""
    parameters: Count = 0
    stage: Int64
    precision: Name
    micro_batch: Count
    accumulation: MicroStep
    global_batch: Count
    seq_len: Count | None = None
    steps: Step | None = None  # optimizer steps the run will take; None when a script decides
    start_step: Step = 0
    torch_version: Name = ""
    telemetry_hz: Finite = 5.0
    knobs: Data = Field(default_factory=dict)  # every knob's value at the start of the attempt


class Phases(Message):
    """Finished intervals since the last packet: (phase, step, micro_step (1-based, 0 outside accumulation), start_ns,
    end_ns)."""

    kind: Literal["phases"] = "phases"
    rank: RankNumber
    micro_steps: MicroStep
    spans: list[tuple[PhaseName, Step, MicroStep, Int64, Int64]]


class StepResult(Message):
    """One optimizer step of one rank. loss, grad_norm are global figures (equal on all ranks); times and bytes are the
    rank's own."""

    kind: Literal["step"] = "step"
    rank: RankNumber
    step: Step  # 1-based: the step that just ended
    loss: float | None
    lr: float
    grad_norm: float | None
    step_ms: Finite
    tokens_per_s: Finite | None = None  # this rank's
    samples_per_s: Finite | None = None
    wait_ms: Finite = 0.0  # exposed: the training thread stood still for communication
    comm_bytes: Count = 0
    phase_ms: dict[Word, Finite] = Field(default_factory=dict)
    skipped: bool = False
    loss_scale: Finite | None = None
    """Factor on the loss in this step; None unless the precision is fp16."""
    skipped_steps: Step = 0
    """Steps of the whole training, this one included, that changed nothing."""
    end_ns: Int64


class Memory(Message):
    """Where a rank's memory is. `ledger` is exact (what the engine holds with the parameters), and `offloaded` (what it
    holds in host memory because the config says so); the device figures are the allocator's and the driver's."""

    kind: Literal["memory"] = "memory"
    rank: RankNumber
    ledger: dict[Category, Count]
    offloaded: dict[Category, Count] = {}
    pinned_bytes: Count = 0
    pinned_requested_bytes: Count = 0
    rss_bytes: Count
    allocated_bytes: Count | None = None  # torch's CUDA allocator; None on a CPU
    reserved_bytes: Count | None = None
    device_used_bytes: Count | None = None
    device_total_bytes: Count | None = None
    host_total_bytes: Count
    at_ns: Int64


class Collectives(Message):
    """Finished collectives, in issue order: (seq, op, bytes, issue_ns, end_ns, duration_us, wait_us).

    seq counts a rank's collectives from 1; all ranks issue in one order, so equal seq means the same collective.
    duration runs from the later of its issue and the previous completion, to its completion; wait is the part for which
    the training thread stood still.
    """

    kind: Literal["collectives"] = "collectives"
    rank: RankNumber
    step: Step
    records: list[tuple[Count, Word, Count, Int64, Int64, Int64, Int64]]


class Heartbeat(Message):
    """Where a rank is right now; sent by a thread of its own, so it goes on when the training thread hangs."""

    kind: Literal["heartbeat"] = "heartbeat"
    rank: RankNumber
    phase: PhaseName
    phase_since_ns: Int64
    step: Step  # the step being worked on (1-based)
    micro_step: MicroStep
    micro_steps: MicroStep
    entered_seq: Count  # the newest collective this rank has entered
    completed_seq: Count
    entered_op: Name = ""
    progress_ns: Int64  # when the training thread last did anything that telemetry sees
    dropped: Count = 0  # messages lost to a full ring since the start
    now_ns: Int64


class LogRecord(Message):
    kind: Literal["log"] = "log"
    rank: RankNumber | None  # None: the supervisor
    level: Literal["debug", "info", "warning", "error", "critical"]
    logger: Name
    text: Text
    wall_s: WallSeconds


class Event(Message):
    """Something worth a line in the event pane. `what` is a stable word, such as "resumed", "overflow" or "exit"."""

    kind: Literal["event"] = "event"
    rank: RankNumber | None
    what: Name
    text: Text
    severity: Literal["info", "warning", "error"] = "info"
    step: Step | None = None
    data: Data = Field(default_factory=dict)
    wall_s: WallSeconds


class CheckpointSaved(Message):
    """A checkpoint is complete on disk. Rank 0 sends it."""

    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    rank: RankNumber
    step: Step
    path: Text
    seconds: Finite  # from the copy of the first state to the rename
    blocked_ms: Finite  # the part of it for which training waited
    wall_s: WallSeconds


class Command(Message):
    """A request to the run. `id` is the sender's: the same id twice acts once. `number` is the hub's, 0 until it has
    accepted the command."""

    kind: Literal["command"] = "command"
    id: Identity
    name: Word  # a `CommandName`; the hub rejects others, which a newer screen may know
    arguments: Data = Field(default_factory=dict)
    who: Name = ""
    number: Count = 0
    wall_s: WallSeconds = 0.0


class Ack(Message):
    """The state of a command: accepted by the hub, then either applied at `step` or rejected for `reason`. `result` is
    what it came to, such as a checkpoint's path. From rank 0 it goes to the hub and no further; `accepted` then means
    that rank 0 works on the command, and `reason` says what it does."""

    kind: Literal["ack"] = "ack"
    id: Identity
    number: Count = 0
    state: Literal["accepted", "applied", "rejected"]
    step: Step | None = None
    reason: Text = ""
    result: Data = Field(default_factory=dict)
    rank: RankNumber | None = None
    wall_s: WallSeconds = 0.0


class CommandRecord(Message):
    """A command and its newest state. The hub publishes one at every change: the only answer to a command."""

    kind: Literal["command_record"] = "command_record"
    command: Command
    ack: Ack


class Goodbye(Message):
    """A rank's last word: why it leaves. error holds the traceback's last lines when it leaves on an exception."""

    kind: Literal["goodbye"] = "goodbye"
    rank: RankNumber
    outcome: Literal["finished", "stopped", "aborted", "failed"]
    step: Step
    error: Text = ""
    fatal: bool = False
    """Another attempt would end the same way: the config, the data or the training itself is at fault."""
    culprit: RankNumber | None = None
    """The rank whose doing it is, where this one knows that it is another's, or its own alone."""
    wall_s: WallSeconds


class RunStatus(Message):
    """The supervisor's word on the run as a whole; also the content of state.json in the run directory."""

    kind: Literal["status"] = "status"
    name: Name
    state: RunStateName
    attempt: Count = 0
    step: Step = 0
    reason: Text = ""  # one line for people: why it is in this state
    exit_code: Int64 | None = None
    failed_rank: RankNumber | None = None
    error: Text = ""  # last lines of the failing rank's traceback
    last_checkpoint_step: Step | None = None
    restarts: Count = 0
    """Attempts that the supervisor started by itself since the launch."""
    restart_reason: Text = ""
    """Why the last one was needed: one line for people."""
    lost_steps: Step = 0
    """Steps that the last restart takes again: those after the checkpoint that it went on from."""
    laggard_rank: RankNumber | None = None
    """The rank that the others lose time to, step after step."""
    laggard: Text = ""
    """The same as one line for people."""
    started_wall_s: WallSeconds | None = None
    ended_wall_s: WallSeconds | None = None


class GpuStats(Message):
    """One device as NVML sees it. None: the driver answers NotSupported."""

    index: Count
    uuid: Name
    name: Name
    used_bytes: Count | None = None
    total_bytes: Count | None = None
    utilization_percent: Finite | None = None
    power_w: Finite | None = None
    power_limit_w: Finite | None = None
    temperature_c: Finite | None = None
    sm_clock_mhz: Finite | None = None
    clock_reasons: list[Name] = Field(default_factory=list)


class NodeStats(Message):
    """One node, sampled by its probe once a second. `gpus` is None when NVML is not there (then `gpu_note` says
    why)."""

    kind: Literal["node"] = "node"
    host: Name
    cpu_percent: Finite
    cpu_count: Count
    load_1m: Finite
    ram_used_bytes: Count
    ram_total_bytes: Count
    swap_used_bytes: Count = 0
    rank_rss_bytes: dict[RankNumber, Count] = Field(default_factory=dict)
    rank_cpu_percent: dict[RankNumber, Finite] = Field(default_factory=dict)
    run_rss_bytes: Count = 0  # every process of the run on this node
    gpus: list[GpuStats] | None = None
    gpu_note: Text = ""
    at_ns: Int64
    wall_s: WallSeconds


class Resend(Message):
    """The hub asks a rank for its events again, from packet number `first_seq` on."""

    kind: Literal["resend"] = "resend"
    first_seq: Count


Up = Annotated[
    Hello
    | Phases
    | StepResult
    | Memory
    | Collectives
    | Heartbeat
    | LogRecord
    | Event
    | CheckpointSaved
    | Ack
    | Goodbye
    | RunStatus
    | NodeStats
    | CommandRecord,
    Field(discriminator="kind"),
]
"""Everything that flows towards screens."""
Down = Annotated[Command | Resend, Field(discriminator="kind")]
"""Everything that flows towards ranks."""


class Packet(Message):
    """One frame on a socket: the messages that a source had ready. seq counts a source's packets per channel, from 1.

    source: "rank/3", "probe/HOST", "supervisor". The hub adds arrival_ns; hub_seq numbers what it sends to screens.
    """

    kind: Literal["packet"] = "packet"
    protocol: int = PROTOCOL
    source: Name
    attempt: Count
    seq: Count
    sent_ns: Int64
    arrival_ns: Int64 = 0
    hub_seq: Count = 0
    messages: list[Up]


class Snapshot(Message):
    """The whole state at once for a late screen: apply `messages` in order, then packets with hub_seq > `hub_seq`."""

    kind: Literal["snapshot"] = "snapshot"
    protocol: int = PROTOCOL
    hub_seq: Count
    now_ns: Int64
    wall_s: WallSeconds
    heard_ns: dict[RankNumber, Int64] = Field(default_factory=dict)
    """When the hub last heard from each rank, on its own clock."""
    messages: list[Up]


up_adapter: TypeAdapter[Any] = TypeAdapter(Up)
down_adapter: TypeAdapter[Any] = TypeAdapter(Down)
