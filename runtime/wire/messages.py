"""The protocol: its messages, as one tagged union on `kind`. Those of nodes, of fine-tuning and of the hub's judgement
stand in node.py, finetuning.py and judgement.py.

Three channels carry them, with different guarantees:

- telemetry (a rank's PUB to the hub): `Phases`, `StepResult`, `Memory`, `Collectives`, `Heartbeat`. May be
  dropped; gaps show in `Packet.seq`.
- events (a rank's DEALER to the hub's ROUTER): `Hello`, `LogRecord`, `Event`, `CheckpointSaved`, `DataReport`,
  `Evaluation`, `Ack`, `Goodbye`.
  Numbered by `Packet.seq`, asked for again with `Resend`; never lost while both ends live. In the other direction the
  same pair carries `Command`, numbered by the hub, `Resend` and `FlightRequest`.
- screens (the hub's XPUB): first a `Snapshot`, then all of the above as they arrive, except `Ack`, and the hub's own
  `RunStatus`, `NodeStats`, `Verdict`, `Alert`, `TimeReport` and `CommandRecord`.
- commands (a screen's DEALER to the hub's ROUTER): `Command`, in this direction only. The answer is the
  `CommandRecord` with the command's id on the screens channel. A command without one is sent again.

Field names have units. `*_ns` are CLOCK_MONOTONIC nanoseconds of the sender's node (comparable on one node
only); `*_wall_s` are Unix seconds. Older readers ignore unknown fields, and skip messages of an unknown kind or with
values out of bounds (bounds.py, codec.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter

from runtime.wire.base import Message
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
from runtime.wire.finetuning import DataReport, Evaluation
from runtime.wire.judgement import Alert, TimeReport, Verdict
from runtime.wire.node import NodeStats

PROTOCOL = 1
"""Version of the protocol, incremented when an old reader would misread a message; other versions are refused."""

PhaseName = Literal[
    "idle", "data", "forward", "backward", "reduce", "gather", "offload", "step", "checkpoint", "paused", "eval", "init"
]
CommandName = Literal["pause", "resume", "checkpoint", "stop", "abort", "set", "stacks", "profile", "memory-snapshot"]
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


class PlannedMemory(Message):
    """What runtime/plan computes for the model and layout of a run, in bytes per rank unless stated."""

    device_bytes: dict[Word, Count]
    """On the rank's device, by the plan's categories."""
    shape_known: bool
    """Whether activations and logits are part of it."""
    saved_bytes: Int64
    """What this layout saves on the device against plain data parallelism; negative if it costs more."""
    comparison: Text
    """One sentence about that."""
    checkpoint_bytes: Count = 0
    """Host memory of the copy from which checkpoints are written."""
    checkpoint_slots_bytes: Count = 0
    """Host memory with which they are written piece by piece instead."""
    build_bytes: Count = 0
    """Host memory that rank 0 holds while the model is built, which a restart does again."""
    consolidated_bytes: Count = 0
    """Host memory of rank 0 for all weights in the model's precision (save_16bit_model)."""
    export_bytes: Count = 0
    """Host memory of `zerotop export`, a process of its own."""
    evaluation_bytes: Count = 0
    """On the rank's device, what an evaluation holds beyond the states; 0 in a run without evaluations."""
    evaluation_interval: Step = 0
    """Optimizer steps between two evaluations."""


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
    model_flops_per_token: Finite | None = None
    """FLOPs of forward and backward per token, without recomputation (runtime/plan/flops.py); None: not known."""
    hardware_flops_per_token: Finite | None = None
    """The same with the recomputation of activation checkpointing."""
    peak_flops: Finite | None = None
    """Peak FLOPs per second of this rank's device in the run's precision; None: not known."""
    peak_note: Text = ""
    """Where the peak comes from, or why it is not known."""
    knobs: Data = Field(default_factory=dict)  # every knob's value at the start of the attempt
    planned: PlannedMemory | None = None
    trainer: Text = ""
    """Name and version of a trainer that is not ours; empty: ours."""
    counts_steps: bool = True
    """Whether it reports steps and phases; else only that it lives, and how far its collectives have come."""
    impossible: dict[Word, Text] = Field(default_factory=dict)
    """Command -> why this trainer can't obey it."""
    watch_line: Text = ""
    """The line of code that would show its steps; empty: it shows them, or this is not known."""


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
    phase_wait_ms: dict[Word, Finite] = Field(default_factory=dict)
    """`wait_ms` by the phase in which the training thread waited."""
    skipped: bool = False
    loss_scale: Finite | None = None
    """Factor on the loss in this step; None unless the precision is fp16."""
    skipped_steps: Step = 0
    """Optimizer steps skipped so far in the training, including this one."""
    end_ns: Int64


class Memory(Message):
    """A rank's memory. `ledger` (what the engine holds on its device) and `offloaded` (what it holds in host memory
    because of offload) are exact; the device figures come from the allocator and the driver, those of the process from
    the kernel and malloc."""

    kind: Literal["memory"] = "memory"
    rank: RankNumber
    ledger: dict[Category, Count]
    offloaded: dict[Category, Count] = Field(default_factory=dict)
    pinned_bytes: Count = 0
    pinned_requested_bytes: Count = 0
    rss_bytes: Count
    rss_parts: dict[Word, Count] = Field(default_factory=dict)
    """What the RSS consists of beside the ledger: libraries, mapped_files, imports, activations, allocator, rest
    (runtime/host/rss_parts.py). Empty where /proc or malloc does not say."""
    untouched_bytes: Count = 0
    """What the parts and the ledger count beyond the RSS: pages that nothing has written to yet."""
    major_faults: Count | None = None
    """Page faults of this process that had to read from disk or swap, since its start."""
    peak_bytes: dict[PhaseName, Count] = Field(default_factory=dict)
    """Largest memory since the start of the attempt, by the phase in which it was reached: in torch's tensors on a GPU,
    else of the RSS."""
    activation_bytes: dict[PhaseName, Count] = Field(default_factory=dict)
    """Most memory beyond the ledger since the start of the attempt, by phase: on a GPU at any time of it, on a CPU at
    its end."""
    unit_activations: dict[Name, tuple[Count, Count]] = Field(default_factory=dict)
    """Kind of unit (its name with `*` for numbers) -> how many units, and the bytes that their forwards in one
    micro-step left for backward, in the newest step in which that was measured."""
    logits_bytes: Count = 0
    """Of the activations: logits and what cross-entropy makes of them, as the losses of the built-in models count
    them."""
    logits_peak_bytes: Count = 0
    """The most of them at a time since the start of the attempt."""
    allocated_bytes: Count | None = None  # torch's CUDA allocator; None on a CPU
    reserved_bytes: Count | None = None
    alloc_retries: Count | None = None
    """How often the allocator had to free its cache because an allocation failed, since the start."""
    inactive_split_bytes: Count | None = None
    """Free pieces of blocks of which another piece is in use: the allocator can't return them."""
    device_used_bytes: Count | None = None
    device_total_bytes: Count | None = None
    host_total_bytes: Count
    at_ns: Int64


CountedCollectives = tuple[Word, Count, Count, Finite | None]
"""(op, input bytes of one, how many, their mean duration in ms if torch has measured it)."""


class Collectives(Message):
    """Finished collectives, in issue order: (seq, op, bytes, issue_ns, end_ns, duration_us, wait_us).

    seq counts a rank's collectives from 1; all ranks issue in one order, so equal seq means the same collective.
    duration runs from the later of its issue and the previous completion, to its completion; wait is the part for which
    the training thread was blocked. `group` names the process group; seq counts per group.

    A trainer that is not ours has `counted` instead: all collectives of the step, without the times of single ones.
    """

    kind: Literal["collectives"] = "collectives"
    rank: RankNumber
    step: Step
    group: Name = "world"
    records: list[tuple[Count, Word, Count, Int64, Int64, Int64, Int64]]
    counted: list[CountedCollectives] = Field(default_factory=list)


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
    entered_bytes: Count | None = None
    progress_ns: Int64  # when the training thread last did anything that telemetry sees
    compiling: bool = False
    """Whether torch.compile compiles just now."""
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
    wrapped: bool = False
    """Whether the run is a command of the user's own, started by `zerotop run`."""
    attempt: Count = 0
    step: Step = 0
    reason: Text = ""  # one line for people: why it is in this state
    doing: Text = ""
    """What rank 0 is doing while the run starts: "loading weights: 43%"."""
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
    started_wall_s: WallSeconds | None = None
    ended_wall_s: WallSeconds | None = None


class Resend(Message):
    """The hub's request that a rank resend its events from packet number `first_seq` on."""

    kind: Literal["resend"] = "resend"
    first_seq: Count


class FlightRequest(Message):
    """The hub's request that a rank write its Flight Recorder to evidence-`number` of the attempt's folder, at once and
    not at a step boundary: the training thread may hang."""

    kind: Literal["flight_request"] = "flight_request"
    number: Annotated[int, Field(ge=1, le=1_000_000)]


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
    | CommandRecord
    | Verdict
    | Alert
    | TimeReport,
    Field(discriminator="kind"),
]
"""Messages that flow towards screens."""
Down = Annotated[Command | Resend | FlightRequest, Field(discriminator="kind")]
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


def message_kinds() -> tuple[str, ...]:
    """The kinds of messages that screens get."""
    models = [model for model in get_args(get_args(Up)[0]) if model is not Ack]
    return tuple(sorted(str(model.model_fields["kind"].default) for model in models))
