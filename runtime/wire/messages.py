"""Every message of the protocol, as one tagged union on `kind`.

Three channels carry them, and each says what it may lose:

- telemetry (a rank's PUB to the hub): `Phases`, `StepResult`, `Memory`, `Collectives`, `Heartbeat`. May be dropped; a
  gap is counted by `Packet.seq`.
- events (a rank's DEALER to the hub's ROUTER): `Hello`, `LogRecord`, `Event`, `Ack`, `Goodbye`. Numbered by
  `Packet.seq`, asked for again with `Resend`; never lost while both ends live. Downwards the same pair carries
  `Command`, in the hub's numbering.
- screens (the hub's XPUB): all of the above as they arrive, and the hub's own `RunStatus`, `NodeStats`,
  `CommandRecord`; first a `Snapshot`.

Units stand in the field names. `*_ns` are CLOCK_MONOTONIC nanoseconds of the sender's node (comparable on one node
only); `*_wall_s` are Unix seconds. Older readers ignore unknown fields, and skip messages of an unknown kind (see
codec.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

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
    run: str
    attempt: int
    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    boot_id: str
    wall_s: float
    mono_ns: int
    device: str  # "cpu", "cuda:0"
    device_name: str = ""
    device_uuid: str = ""
    backend: str = ""  # "gloo", "nccl"
    config_digest: str
    model_name: str = ""
    parameters: int = 0
    stage: int
    precision: str
    micro_batch: int
    accumulation: int
    global_batch: int
    seq_len: int | None = None
    steps: int | None = None  # optimizer steps the run will take; None when a script decides
    start_step: int = 0
    torch_version: str = ""
    telemetry_hz: float = 5.0
    knobs: dict[str, Any] = Field(default_factory=dict)  # every knob's value at the start of the attempt


class Phases(Message):
    """Finished intervals since the last packet: (phase, step, micro_step (1-based, 0 outside accumulation), start_ns,
    end_ns)."""

    kind: Literal["phases"] = "phases"
    rank: int
    micro_steps: int
    spans: list[tuple[PhaseName, int, int, int, int]]


class StepResult(Message):
    """One optimizer step of one rank. loss, grad_norm are global figures (equal on all ranks); times and bytes are the
    rank's own."""

    kind: Literal["step"] = "step"
    rank: int
    step: int  # 1-based: the step that just ended
    loss: float | None
    lr: float
    grad_norm: float | None
    step_ms: float
    tokens_per_s: float | None = None  # this rank's
    samples_per_s: float | None = None
    wait_ms: float = 0.0  # exposed: the training thread stood still for communication
    comm_bytes: int = 0
    phase_ms: dict[str, float] = Field(default_factory=dict)
    skipped: bool = False
    loss_scale: float | None = None
    """Factor on the loss in this step; None unless the precision is fp16."""
    skipped_steps: int = 0
    """Steps of the whole training, this one included, that changed nothing."""
    end_ns: int


class Memory(Message):
    """Where a rank's memory is. `ledger` is exact (what the engine holds with the parameters), and `offloaded` (what it
    holds in host memory because the config says so); the device figures are the allocator's and the driver's."""

    kind: Literal["memory"] = "memory"
    rank: int
    ledger: dict[Category, int]
    offloaded: dict[Category, int] = {}
    pinned_bytes: int = 0
    pinned_requested_bytes: int = 0
    rss_bytes: int
    allocated_bytes: int | None = None  # torch's CUDA allocator; None on a CPU
    reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    device_total_bytes: int | None = None
    host_total_bytes: int
    at_ns: int


class Collectives(Message):
    """Finished collectives, in issue order: (seq, op, bytes, issue_ns, end_ns, duration_us, wait_us).

    seq counts a rank's collectives from 1; all ranks issue in one order, so equal seq means the same collective.
    duration runs from the later of its issue and the previous completion, to its completion; wait is the part for which
    the training thread stood still.
    """

    kind: Literal["collectives"] = "collectives"
    rank: int
    step: int
    records: list[tuple[int, str, int, int, int, int, int]]


class Heartbeat(Message):
    """Where a rank is right now; sent by a thread of its own, so it goes on when the training thread hangs."""

    kind: Literal["heartbeat"] = "heartbeat"
    rank: int
    phase: PhaseName
    phase_since_ns: int
    step: int  # the step being worked on (1-based)
    micro_step: int
    micro_steps: int
    entered_seq: int  # the newest collective this rank has entered
    completed_seq: int
    entered_op: str = ""
    progress_ns: int  # when the training thread last did anything that telemetry sees
    dropped: int = 0  # messages lost to a full ring since the start
    now_ns: int


class LogRecord(Message):
    kind: Literal["log"] = "log"
    rank: int | None  # None: the supervisor
    level: Literal["debug", "info", "warning", "error", "critical"]
    logger: str
    text: str
    wall_s: float


class Event(Message):
    """Something worth a line in the event pane: what is a stable word ("checkpoint", "resumed", "overflow",
    "not finite", "exit", ...)."""

    kind: Literal["event"] = "event"
    rank: int | None
    what: str
    text: str
    severity: Literal["info", "warning", "error"] = "info"
    step: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    wall_s: float


class Command(Message):
    """`id` is the sender's (the same id twice acts once); `number` is the hub's, 0 until it has been accepted."""

    kind: Literal["command"] = "command"
    id: str
    name: CommandName
    arguments: dict[str, Any] = Field(default_factory=dict)
    who: str = ""
    number: int = 0
    wall_s: float = 0.0


class Ack(Message):
    """accepted (by the hub) -> applied at `step` (by rank 0) | rejected: `reason`; `result` e.g. the checkpoint's
    path. Rank 0 may say accepted again, with what it does about the command as `reason`."""

    kind: Literal["ack"] = "ack"
    id: str
    number: int = 0
    state: Literal["accepted", "applied", "rejected"]
    step: int | None = None
    reason: str = ""
    result: dict[str, Any] = Field(default_factory=dict)
    rank: int | None = None
    wall_s: float = 0.0


class CommandRecord(Message):
    """A command and the newest answer to it, as the hub keeps it."""

    kind: Literal["command_record"] = "command_record"
    command: Command
    ack: Ack


class Goodbye(Message):
    """A rank's last word: why it leaves. error holds the traceback's last lines when it leaves on an exception."""

    kind: Literal["goodbye"] = "goodbye"
    rank: int
    outcome: Literal["finished", "stopped", "aborted", "failed"]
    step: int
    error: str = ""
    fatal: bool = False
    """Another attempt would end the same way: the config, the data or the training itself is at fault."""
    culprit: int | None = None
    """The rank whose doing it is, where this one knows that it is another's, or its own alone."""
    wall_s: float


class RunStatus(Message):
    """The supervisor's word on the run as a whole; also the content of state.json in the run directory."""

    kind: Literal["status"] = "status"
    name: str
    state: RunStateName
    attempt: int = 0
    step: int = 0
    reason: str = ""  # one line for people: why it is in this state
    exit_code: int | None = None
    failed_rank: int | None = None
    error: str = ""  # last lines of the failing rank's traceback
    last_checkpoint_step: int | None = None
    restarts: int = 0
    """Attempts that the supervisor started by itself since the launch."""
    restart_reason: str = ""
    """Why the last one was needed: one line for people."""
    lost_steps: int = 0
    """Steps that the last restart takes again: those after the checkpoint that it went on from."""
    laggard_rank: int | None = None
    """The rank that the others lose time to, step after step."""
    laggard: str = ""
    """The same as one line for people."""
    started_wall_s: float | None = None
    ended_wall_s: float | None = None


class GpuStats(Message):
    """One device as NVML sees it. None: the driver answers NotSupported."""

    index: int
    uuid: str
    name: str
    used_bytes: int | None = None
    total_bytes: int | None = None
    utilization_percent: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    clock_reasons: list[str] = Field(default_factory=list)


class NodeStats(Message):
    """One node, sampled by its probe once a second. `gpus` is None when NVML is not there (then `gpu_note` says
    why)."""

    kind: Literal["node"] = "node"
    host: str
    cpu_percent: float
    cpu_count: int
    load_1m: float
    ram_used_bytes: int
    ram_total_bytes: int
    swap_used_bytes: int = 0
    rank_rss_bytes: dict[int, int] = Field(default_factory=dict)
    rank_cpu_percent: dict[int, float] = Field(default_factory=dict)
    run_rss_bytes: int = 0  # every process of the run on this node
    gpus: list[GpuStats] | None = None
    gpu_note: str = ""
    at_ns: int
    wall_s: float


class Resend(Message):
    """The hub asks a rank for its events again, from packet number `first_seq` on."""

    kind: Literal["resend"] = "resend"
    first_seq: int


Up = Annotated[
    Hello
    | Phases
    | StepResult
    | Memory
    | Collectives
    | Heartbeat
    | LogRecord
    | Event
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
    source: str
    attempt: int
    seq: int
    sent_ns: int
    arrival_ns: int = 0
    hub_seq: int = 0
    messages: list[Up]


class Snapshot(Message):
    """The whole state at once for a late screen: apply `messages` in order, then packets with hub_seq > `hub_seq`."""

    kind: Literal["snapshot"] = "snapshot"
    protocol: int = PROTOCOL
    hub_seq: int
    now_ns: int
    wall_s: float
    heard_ns: dict[int, int] = Field(default_factory=dict)
    """When the hub last heard from each rank, on its own clock."""
    messages: list[Up]


up_adapter: TypeAdapter[Any] = TypeAdapter(Up)
down_adapter: TypeAdapter[Any] = TypeAdapter(Down)
