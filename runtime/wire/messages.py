"""Every message of the protocol, as one tagged union on `kind`.

Three channels carry them, with different guarantees:

- telemetry (a rank's PUB to the hub): `Phases`, `StepResult`, `Memory`, `Collectives`, `Heartbeat`. May be
  dropped; gaps show in `Packet.seq`.
- events (a rank's DEALER to the hub's ROUTER): `Hello`, `LogRecord`, `Event`, `CheckpointSaved`, `DataReport`,
  `Evaluation`, `Ack`, `Goodbye`.
  Numbered by `Packet.seq`, asked for again with `Resend`; never lost while both ends live. In the other direction the
  same pair carries `Command`, numbered by the hub, `Resend` and `FlightRequest`.
- screens (the hub's XPUB): first a `Snapshot`, then all of the above as they arrive, except `Ack`, and the hub's own
  `RunStatus`, `NodeStats`, `Verdict`, `TimeReport` and `CommandRecord`.
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


class Message(BaseModel):
    """The base of all messages: immutable, and tolerant of unknown fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


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
    offloaded: dict[Category, Count] = {}
    pinned_bytes: Count = 0
    pinned_requested_bytes: Count = 0
    rss_bytes: Count
    rss_parts: dict[Word, Count] = {}
    """What the RSS consists of beside the ledger: libraries, mapped_files, imports, activations, allocator, rest
    (runtime/host/rss_parts.py). Empty where /proc or malloc does not say."""
    untouched_bytes: Count = 0
    """What the parts and the ledger count beyond the RSS: pages that nothing has written to yet."""
    major_faults: Count | None = None
    """Page faults of this process that had to read from disk or swap, since its start."""
    peak_bytes: dict[PhaseName, Count] = {}
    """Largest memory since the start of the attempt, by the phase in which it was reached: in torch's tensors on a GPU,
    else of the RSS."""
    activation_bytes: dict[PhaseName, Count] = {}
    """Most memory beyond the ledger since the start of the attempt, by phase: on a GPU at any time of it, on a CPU at
    its end."""
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


class Collectives(Message):
    """Finished collectives, in issue order: (seq, op, bytes, issue_ns, end_ns, duration_us, wait_us).

    seq counts a rank's collectives from 1; all ranks issue in one order, so equal seq means the same collective.
    duration runs from the later of its issue and the previous completion, to its completion; wait is the part for which
    the training thread was blocked. `group` names the process group; seq counts per group.
    """

    kind: Literal["collectives"] = "collectives"
    rank: RankNumber
    step: Step
    group: Name = "world"
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
    entered_bytes: Count | None = None
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
    started_wall_s: WallSeconds | None = None
    ended_wall_s: WallSeconds | None = None


class GpuStats(Message):
    """One GPU as reported by NVML. None: not supported by the GPU or the driver, unless `no_permission` or
    `stale_fields` names the field."""

    index: Count
    uuid: Name
    name: Name
    lost: bool = False
    """The driver has lost the GPU (fallen off the bus); nothing else is known then."""
    mig: bool = False
    """Partitioned into MIG instances: most figures do not exist for the whole GPU."""
    used_bytes: Count | None = None
    total_bytes: Count | None = None
    utilization_percent: Finite | None = None
    """Share of the time in which a kernel ran: 100 also for one that keeps a single SM busy, or waits for a peer."""
    sm_activity_percent: Finite | None = None
    """Share of the SMs that were busy, mean over the last second (GPM, from Hopper on); so are the next two."""
    tensor_activity_percent: Finite | None = None
    """Share of the time in which tensor cores were busy."""
    dram_activity_percent: Finite | None = None
    """Share of the memory bandwidth that was used."""
    power_w: Finite | None = None
    power_limit_w: Finite | None = None
    energy_j: Finite | None = None
    """Energy since the driver was loaded."""
    temperature_c: Finite | None = None
    slowdown_temperature_c: Finite | None = None
    """Where the hardware lowers the clocks."""
    sm_clock_mhz: Finite | None = None
    max_sm_clock_mhz: Finite | None = None
    memory_clock_mhz: Finite | None = None
    max_memory_clock_mhz: Finite | None = None
    clock_reasons: list[Name] = Field(default_factory=list)
    """Why the clocks are below their maximum, in words: "power cap", "hot (hardware)", ... Idleness is not listed."""
    pcie_generation: Count | None = None
    max_pcie_generation: Count | None = None
    """The highest that this GPU can use in this machine."""
    pcie_width: Count | None = None
    max_pcie_width: Count | None = None
    pcie_tx_bytes_per_s: Finite | None = None
    """From the GPU; rx: to the GPU."""
    pcie_rx_bytes_per_s: Finite | None = None
    nvlink_tx_bytes_per_s: Finite | None = None
    """All links together."""
    nvlink_rx_bytes_per_s: Finite | None = None
    links: list[Name] = Field(default_factory=list)
    """How it reaches each GPU of the node, by index, in the words of `nvidia-smi topo -m`: X itself, NV18 (18 NVLinks),
    PIX, PXB, PHB, NODE, SYS; empty if not known."""
    ecc_corrected: Count | None = None
    """ECC errors of the memory since the driver was loaded."""
    ecc_uncorrected: Count | None = None
    remapped_rows: Count | None = None
    """Rows of memory replaced by spare ones."""
    row_remap_pending: bool = False
    """A row waits for a reset of the GPU to be replaced."""
    row_remap_failed: bool = False
    no_permission: list[Name] = Field(default_factory=list)
    """Fields that the user of the run may not read."""
    stale_fields: list[Name] = Field(default_factory=list)
    """Fields that are missing because the driver has not answered for `stale_s`."""
    stale_s: Finite | None = None


class BusyProcess(Message):
    """A process outside the run that uses the node's CPUs."""

    pid: Pid
    name: Name
    cpu_percent: Finite


class NodeStats(Message):
    """One node, sampled by its probe once a second. `gpus` is None without NVML (`gpu_note` says why)."""

    kind: Literal["node"] = "node"
    host: Name
    cpu_percent: Finite
    cpu_count: Count
    load_1m: Finite
    ram_used_bytes: Count
    ram_total_bytes: Count
    ram_available_bytes: Count | None = None
    """What can be had without swapping (MemAvailable), and not more than the control group leaves."""
    cgroup_limit_bytes: Count | None = None
    """The limit of the control group that has least left; None without one."""
    cgroup_used_bytes: Count | None = None
    """What is used of it, without page cache."""
    page_cache_bytes: Count | None = None
    shared_memory_bytes: Count | None = None
    """tmpfs and shared memory of the whole node."""
    memory_pressure_percent: Finite | None = None
    """Share of the last 10 s in which some process waited for memory (PSI, some avg10)."""
    swap_used_bytes: Count = 0
    swap_in_bytes_per_s: Finite | None = None
    swap_out_bytes_per_s: Finite | None = None
    rank_rss_bytes: dict[RankNumber, Count] = Field(default_factory=dict)
    rank_cpu_percent: dict[RankNumber, Finite] = Field(default_factory=dict)
    rank_process: dict[RankNumber, Name] = Field(default_factory=dict)
    """State of each rank's process as psutil names it ("running", "sleeping", "stopped", "disk-sleep", "zombie"), or
    "gone"."""
    rank_run_delay_percent: dict[RankNumber, Finite] = Field(default_factory=dict)
    """Share of the time in which the rank's main thread was ready to run and no CPU was free; absent where the kernel
    does not say."""
    busy: list[BusyProcess] = Field(default_factory=list)
    """The processes outside the run that use the most CPU time, at most three, busiest first."""
    run_rss_bytes: Count = 0  # every process of the run on this node
    gpus: list[GpuStats] | None = None
    gpu_note: Text = ""
    at_ns: Int64
    wall_s: WallSeconds


class Verdict(Message):
    """The hub's judgement on the run, sent when it changes: what is wrong, or that nothing is."""

    kind: Literal["verdict"] = "verdict"
    what: Name
    """A stable keyword: "healthy", "straggler", "hang"... See zerotop/verdict/finding.py."""
    severity: Literal["info", "warning", "error"] = "info"
    ranks: list[RankNumber] = Field(default_factory=list)
    """The ranks that cause it; empty if none can be named."""
    text: Text
    """One sentence with its figures."""
    advice: Text = ""
    """What to do next, one sentence."""
    facts: Data = Field(default_factory=dict)
    """The figures behind the text, with units in their names."""
    step: Step | None = None
    since_wall_s: WallSeconds = 0.0


class TransferKind(BaseModel):
    """The transfers of one operation and size of buffer. Bus bandwidth as in nccl-tests."""

    op: Word
    bytes: Count
    count: Count
    first_us: Finite | None = None
    """Median of the first ones after the warm-up."""
    now_us: Finite | None = None
    """Median of the newest ones."""
    best_us: Finite | None = None
    bus_bytes_per_s: Finite | None = None
    best_bus_bytes_per_s: Finite | None = None


class TimeReport(Message):
    """Where the time of the recent steps went, as the hub has found by comparing the ranks. Sent every few seconds."""

    kind: Literal["time_report"] = "time_report"
    steps: Count
    """How many steps the means are over."""
    parts_ms: dict[RankNumber, dict[Word, Finite]] = Field(default_factory=dict)
    """Rank -> part of the step -> milliseconds per step; the parts sum to the step (zerotop/state/breakdown.py)."""
    transfers: list[TransferKind] = Field(default_factory=list)
    """The operations and sizes with the most bytes, at most 32."""


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
