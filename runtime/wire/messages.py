"""Every message of the protocol, as one tagged union on `kind`.

Three channels carry them, with different guarantees:

- telemetry (a rank's PUB to the hub): `Phases`, `StepResult`, `Memory`, `Collectives`, `Heartbeat`. May be
  dropped; gaps show in `Packet.seq`.
- events (a rank's DEALER to the hub's ROUTER): `Hello`, `LogRecord`, `Event`, `CheckpointSaved`, `DataReport`,
  `Evaluation`, `Ack`, `Goodbye`.
  Numbered by `Packet.seq`, asked for again with `Resend`; never lost while both ends live. In the other direction the
  same pair carries `Command`, numbered by the hub.
- screens (the hub's XPUB): first a `Snapshot`, then all of the above as they arrive, except `Ack`, and the hub's own
  `RunStatus`, `NodeStats` and `CommandRecord`.
- commands (a screen's DEALER to the hub's ROUTER): `Command`, in this direction only. The answer is the
  `CommandRecord` with the command's id on the screens channel. A command without one is sent again.

Field names have units. `*_ns` are CLOCK_MONOTONIC nanoseconds of the sender's node (comparable on one node
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
"""Version of the protocol, incremented when an old reader would misread a message; other versions are refused."""

PhaseName = Literal[
    "idle", "data", "forward", "backward", "reduce", "gather", "offload", "step", "checkpoint", "paused", "eval", "init"
]
CommandName = Literal["pause", "resume", "checkpoint", "stop", "abort", "set", "stacks"]
RunStateName = Literal[
    "starting", "running", "paused", "restarting", "stopping", "stopped", "finished", "aborted", "failed"
]
LIVE_STATES: frozenset[str] = frozenset({"starting", "running", "paused", "restarting", "stopping"})
"""States of a run that has not ended."""
Category = Literal[
    "parameters", "gradients", "optimizer", "masters", "buffers", "communication", "snapshot", "activations"
]
"""Purpose of a rank's persistent memory. masters: fp32 master weights of 16-bit parameters; communication: buffers for
all-gather and reduce-scatter; snapshot: the copy from which checkpoints are written; activations: host memory for
offloaded ones."""


class Message(BaseModel):
    """The base of all messages: immutable, and tolerant of unknown fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Hello(Message):
    """A rank's introduction, sent once per attempt, and again on the hub's request."""

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
    """Phases finished since the last packet: (phase, step, micro_step (1-based, 0 outside accumulation), start_ns,
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
    """Optimizer steps skipped so far in the training, including this one."""
    end_ns: Int64


class Memory(Message):
    """A rank's memory. `ledger` (what the engine holds on its device) and `offloaded` (what it holds in host memory
    because of offload) are exact; the device figures come from the allocator and the driver."""

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
    the training thread was blocked.
    """

    kind: Literal["collectives"] = "collectives"
    rank: RankNumber
    step: Step
    records: list[tuple[Count, Word, Count, Int64, Int64, Int64, Int64]]


class Heartbeat(Message):
    """A rank's current position, sent by a separate thread, which continues when the training thread hangs."""

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
    """A log record of a rank or the supervisor."""

    kind: Literal["log"] = "log"
    rank: RankNumber | None  # None: the supervisor
    level: Literal["debug", "info", "warning", "error", "critical"]
    logger: Name
    text: Text
    wall_s: WallSeconds


class Event(Message):
    """An entry of the event pane. `what` is a stable keyword ("resumed", "overflow", "not finite", "exit", ...)."""

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


class TokenRun(Message):
    """Neighbouring tokens of a sample that are alike, as text. A special token is a run of its own, with its name as
    text."""

    text: Text
    trained: bool
    """Whether the loss counts them."""
    special: bool = False
    edge: bool = False
    """Whether a packed sequence's next document begins here."""


class DataSample(Message):
    """One sequence as the model sees it, shortened to what a screen can show."""

    source: Text
    """File and row, or rows of a packed sequence."""
    tokens: Count
    trained: Count
    runs: list[TokenRun]
    left_out: Count = 0
    """Tokens at the end that `runs` leave out."""


class DataReport(Message):
    """What is trained or evaluated on. Rank 0 sends it before the first step; `zerotop data --json` prints it."""

    kind: Literal["data_report"] = "data_report"
    role: Literal["train", "evaluation"]
    files: list[Text]
    """The files or data sets, at most 20, and then how many more."""
    format: Name
    """`messages`, `sharegpt`, `prompt-completion`, `alpaca`, `text`; several, separated by commas."""
    template: Text = ""
    """Where the chat template came from; empty without one."""
    train_on: Name
    """`assistant`, `completion` or `all`."""
    rows: Count
    samples: Count
    """Rows that became samples."""
    dropped: dict[Name, Count] = Field(default_factory=dict)
    """Rows left out, by reason."""
    set_aside: dict[Name, Count] = Field(default_factory=dict)
    """Samples of these rows that are not used here, by reason: held out to evaluate on, or more than was asked for."""
    truncated: Count = 0
    """Samples cut to seq_len."""
    truncated_tokens: Count = 0
    tokens: Count
    trained_tokens: Count
    seq_len: Count
    sequences: Count
    """Sequences per epoch: the samples, or what they are packed into."""
    packed: bool = False
    vocab_size: Count = 0
    lengths: list[tuple[Count, Count]] = Field(default_factory=list)
    """(length, samples of at most this many tokens and more than the one before): a histogram of at most 32 bins."""
    examples: list[DataSample] = Field(default_factory=list)
    notes: list[Text] = Field(default_factory=list)
    """What a person should know: recognised columns, defaults, suspicious findings."""
    seconds: Finite = 0.0
    """Time spent reading and tokenizing; 0 if it was cached."""
    complete: bool = True
    """False for streamed data: the figures are those of the first segment."""


class Generation(Message):
    """What the model wrote for one of zerotop.evaluation.prompts."""

    prompt: Text
    text: Text
    tokens: Count = 0


class Evaluation(Message):
    """One evaluation on held-out data. Rank 0 sends it."""

    kind: Literal["evaluation"] = "evaluation"
    rank: RankNumber
    step: Step
    """Optimizer steps taken before it."""
    loss: float | None
    """Mean cross-entropy per trained token, in nats; None without held-out data."""
    tokens: Count = 0
    """Trained tokens that the mean is over."""
    samples: Count = 0
    seconds: Finite = 0.0
    best: bool = False
    """Whether it is the lowest loss so far."""
    best_step: Step | None = None
    generations: list[Generation] = Field(default_factory=list)
    wall_s: WallSeconds


class Command(Message):
    """A command to the run. `id`: chosen by the sender; a repeated id has no effect. `number`: assigned by the hub, 0
    until it is accepted."""

    kind: Literal["command"] = "command"
    id: Identity
    name: Word  # a `CommandName`; the hub rejects others, which a newer screen may know
    arguments: Data = Field(default_factory=dict)
    who: Name = ""
    number: Count = 0
    wall_s: WallSeconds = 0.0


class Ack(Message):
    """The state of a command: accepted (by the hub), then applied at `step` or rejected with a `reason` (by rank 0).
    `result`: e.g. the checkpoint's path. From rank 0 it goes to the hub and no further, and accepted then says as
    `reason` what rank 0 is doing."""

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
    """A command and its latest state. The hub publishes one at every change: the only answer to a command."""

    kind: Literal["command_record"] = "command_record"
    command: Command
    ack: Ack


class Goodbye(Message):
    """A rank's last message: why it exits. error: the traceback's last lines if it exits on an exception."""

    kind: Literal["goodbye"] = "goodbye"
    rank: RankNumber
    outcome: Literal["finished", "stopped", "aborted", "failed"]
    step: Step
    error: Text = ""
    fatal: bool = False
    """Whether another attempt would fail the same way, because of config, data or the training itself."""
    culprit: RankNumber | None = None
    """The rank that caused the failure, if this rank knows."""
    wall_s: WallSeconds


class RunStatus(Message):
    """The supervisor's report on the run as a whole; also the content of state.json in the run directory."""

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
    """Automatic restarts since the launch."""
    restart_reason: Text = ""
    """Reason of the last restart, one line of text."""
    lost_steps: Step = 0
    """Optimizer steps that the last restart replays: those after the checkpoint that it resumed from."""
    laggard_rank: RankNumber | None = None
    """The rank that the other ranks keep waiting for."""
    laggard: Text = ""
    """A line of text about it."""
    started_wall_s: WallSeconds | None = None
    ended_wall_s: WallSeconds | None = None


class GpuStats(Message):
    """One GPU as reported by NVML. None: not supported by the driver."""

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
    """One node, sampled by its probe once a second. `gpus` is None without NVML (`gpu_note` says why)."""

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
    """The hub's request that a rank resend its events from packet number `first_seq` on."""

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
    | DataReport
    | Evaluation
    | Ack
    | Goodbye
    | RunStatus
    | NodeStats
    | CommandRecord,
    Field(discriminator="kind"),
]
"""Messages that flow towards screens."""
Down = Annotated[Command | Resend, Field(discriminator="kind")]
"""Messages that flow towards ranks."""


class Packet(Message):
    """One frame on a socket, with one or more messages of a source. seq counts a source's packets per channel, from 1.

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
    """The full state for a new screen: apply `messages` in order, then packets with hub_seq > `hub_seq`."""

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
