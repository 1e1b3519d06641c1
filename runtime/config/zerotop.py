"""The `zerotop` section, with settings that DeepSpeed has no keys for. DeepSpeed ignores it, so one file serves
both."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ..wire.bounds import MAX_STEPS
from .finetune import DataConfig, EvaluationConfig, LoraConfig, ModelConfig
from .knobs import KNOBS
from .outputs import Alerts, Notifications, PrometheusConfig, Writers
from .section import Flag, Int, Num, Section, Text, Texts

DEFAULT_PRESET = "gpt-small"
DEFAULT_STEPS = 200

LogLevel = Literal["debug", "info", "warning", "error"]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class TrainConfig(Section):
    """Number of steps and seed of the built-in trainer."""

    steps: Annotated[Int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Optimizer steps. Unset: 200 in the built-in trainer, unknown with a script, which decides itself."""

    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, data order and dropout."""


class CheckpointConfig(Section):
    """When checkpoints are made and how many are kept."""

    interval: Annotated[Int, Field(ge=KNOBS["checkpoint_interval"].min, le=KNOBS["checkpoint_interval"].max)] = 500
    """Optimizer steps between two automatic checkpoints; 0 makes none (the command `checkpoint` still does)."""

    minutes: Annotated[Num, Field(ge=KNOBS["checkpoint_minutes"].min, le=KNOBS["checkpoint_minutes"].max)] = 0.0
    """Minutes between two automatic checkpoints, in addition to `interval`: whichever comes first; 0 makes none by
    time."""

    keep: Annotated[Int, Field(ge=KNOBS["checkpoints_kept"].min, le=KNOBS["checkpoints_kept"].max)] = 2
    """Number of newest complete checkpoints to keep on disk."""

    keep_every: Annotated[Int, Field(ge=0)] = 0
    """Keep every so many-th checkpoint of the run for good, in addition to the newest; 0: none."""

    folder: Text | None = None
    """Where checkpoints go, in a folder named like the run; relative to the folder of the config file. Unset: the run's
    own directory."""


class RestartsConfig(Section):
    """What happens when a rank dies or hangs: the supervisor starts all ranks again from the newest complete
    checkpoint."""

    limit: Annotated[Int, Field(ge=0, le=1000)] = 3
    """Restarts within the window, after which the run has failed; 0: the first failure ends it, as under `zerotop run`
    unless this is set."""

    window_minutes: Annotated[Num, Field(gt=0)] = 60.0
    """Minutes that a restart counts against the limit."""

    on_hang: Flag = False
    """Whether a run that hangs is restarted too. The stacks of all ranks are saved either way."""


class TelemetryConfig(Section):
    """Telemetry that ranks send to the screen."""

    enabled: Flag = True
    """Whether ranks publish telemetry. Commands work either way."""

    hz: Annotated[Num, Field(ge=KNOBS["telemetry_hz"].min, le=KNOBS["telemetry_hz"].max)] = 5.0
    """Packets per second that each rank sends at most. The screen draws four times a second, and what telemetry costs
    grows with this rate (benchmarks/results/telemetry.md)."""

    peak_tflops: Annotated[Num, Field(gt=0)] | None = None
    """Peak dense TFLOPS of one device in the run's precision, of which the MFU is a share. Unset: from a table of GPUs
    (runtime/plan/peaks.py); of other devices, and of CPUs, no MFU is shown."""


class OffloadConfig(Section):
    """How offloaded optimizer states are updated. It matters where zero_optimization.offload_optimizer is on."""

    update: Annotated[Literal["cpu", "gpu", "auto"], BeforeValidator(_lower)] = "auto"
    """What updates them. `cpu`: CPU threads. `gpu`: the GPU, through which they are streamed in chunks. `auto`: both,
    with shares measured at the start so that they finish together; on a CPU the CPU."""

    overlap: Flag = True
    """Whether the update overlaps the next forward, which waits only for the unit that it needs. The results are
    bitwise the same either way."""

    vram_reserve_gib: Annotated[Num, Field(ge=0)] | None = None
    """GiB of VRAM to leave free after the model, its gradients and its largest buffers are placed; the rest is filled
    with optimizer states. Unset: only zero_optimization.offload_optimizer.ratio decides which states remain on the
    GPU."""

    chunk_mib: Annotated[Num, Field(gt=0, le=4096)] = 64
    """MiB of states per chunk that is streamed through the GPU."""


class LogConfig(Section):
    """Logging."""

    level: Annotated[LogLevel, BeforeValidator(_lower)] = "info"
    """Lowest level of log records that ranks send and write."""

    interval: Annotated[Int, Field(ge=KNOBS["log_interval"].min, le=KNOBS["log_interval"].max)] = 10
    """Optimizer steps between two progress lines."""


class ZerotopConfig(Section):
    """The `zerotop` section."""

    model: ModelConfig = ModelConfig()
    """The built-in trainer's model."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model's own weights. Unset: the whole model is trained."""
    data: DataConfig = DataConfig()
    """The built-in trainer's data and tokenizer."""
    evaluation: EvaluationConfig | None = None
    """Evaluation on held-out data, and samples of what the model writes. Unset: none."""
    train: TrainConfig = TrainConfig()
    """Steps and seed of the built-in trainer."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are made and how many are kept."""
    restarts: RestartsConfig = RestartsConfig()
    """When failed runs are restarted."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Telemetry that ranks send."""
    log: LogConfig = LogConfig()
    """Logging."""
    offload: OffloadConfig = OffloadConfig()
    """How offloaded optimizer states are updated."""
    prometheus: PrometheusConfig | None = None
    """An HTTP endpoint for Prometheus. Unset: none."""
    writers: Writers = ()
    """Experiment trackers that get the figures of every step: TensorBoard, W&B, MLflow, trackio."""
    alerts: Alerts = ()
    """Rules, such as "loss > 10 for 30s"."""
    notify: Notifications = ()
    """Webhooks and commands that are told when an alert fires, or the run hangs, fails or finishes."""

    accumulate: Literal["ranges", "local"] = "ranges"
    """How stages 2 and 3 accumulate gradients. `ranges`: reduce-scatter at each micro-step and accumulate the shard.
    `local`: accumulate unsharded gradients and reduce once at the boundary: less communication, more memory."""

    buffer_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the model's floating-point buffers. Unset: each keeps its own, whatever the precision of the parameters
    (rotary tables and running statistics lose too much in 16 bits)."""

    optimizer_state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of AdamW's moments. `bf16` rounds them stochastically and halves their memory; the results then differ
    from fp32's by that rounding."""

    units: Texts | None = None
    """Names of the modules that become units, as `named_modules()` gives them; `*` matches anything
    (`transformer.h.*`). Unset: the children of the largest repeated ModuleList."""
