"""The checked config file, and its resolution into the complete settings of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from .batch import ACCUMULATION, MICRO, TRAIN, solve
from .deepspeed import (
    ActivationCheckpointingSection,
    AnyDType,
    Bf16Section,
    CheckpointSection,
    DataTypesSection,
    DType,
    Fp16Section,
    Reduction,
    ScriptLogLevel,
    ZeroSection,
)
from .errors import Findings, Path, dotted
from .finetune import DEFAULT_FINETUNE_SEQ_LEN, GPU_ATTENTION, HUB_DATA, ModelConfig
from .optimizers import DEFAULT_ADAM_LR, AdamParams, OptimizerConfig, OptimizerSection
from .resolved import Fp16Config, OffloadOptimizerConfig, OffloadParamConfig, Resolved
from .schedulers import SchedulerSection
from .section import Flag, Int, Num, Section
from .zerotop import DEFAULT_PRESET, DEFAULT_STEPS, ZerotopConfig

Device = Literal["cpu", "cuda"]
BatchSize = Annotated[Int, Field(ge=1)]


class Config(Section):
    """A checked config file, from `load`. `resolve` completes it for a number of ranks and a device."""

    train_batch_size: BatchSize | None = None
    """Samples per optimizer step, over all ranks."""
    train_micro_batch_size_per_gpu: BatchSize | None = None
    """Samples per rank and micro-step."""
    gradient_accumulation_steps: BatchSize | None = None
    """Micro-steps per optimizer step."""
    managed_gradient_accumulation: Flag = True
    """Whether engine.step() counts micro-steps. If false, every step() ends the accumulation of the backwards before
    it; each is still divided by gradient_accumulation_steps."""
    gradient_clipping: Annotated[Num, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip. Unset: 1.0, as in DeepSpeed."""
    optimizer: OptimizerSection | None = None
    """The optimizer. Unset: AdamW at 3e-4 in the built-in trainer; a script brings its own."""
    scheduler: SchedulerSection | None = None
    """The learning-rate schedule. Unset: constant."""
    fp16: Fp16Section = Fp16Section()
    """16-bit floats with loss scaling."""
    bf16: Bf16Section = Bf16Section()
    """bfloat16 with fp32 master weights."""
    zero_optimization: ZeroSection = ZeroSection()
    """ZeRO stage and offload."""
    data_types: DataTypesSection = DataTypesSection()
    """Precision of gradient accumulation."""
    communication_data_type: AnyDType | None = None
    """Precision in which gradients are reduced. Unset: the model's at stages 2 and 3, where gradients are reduced as
    each unit's backward ends, else the one in which they accumulate."""
    gradient_allreduce_op: Reduction = "mean"
    """What the gradients of the ranks become: their mean, or their sum, which is larger by the number of ranks."""
    prescale_gradients: Flag = False
    """Whether gradients are divided by the number of ranks before they are reduced, and not after."""
    gradient_predivide_factor: Annotated[Num, Field(gt=0)] = 1.0
    """What gradients are divided by before they are reduced; the mean stays the same. Not with prescale_gradients."""
    activation_checkpointing: ActivationCheckpointingSection | None = None
    """Recompute activations in backward instead of keeping them. Unset: off."""
    checkpoint: CheckpointSection = CheckpointSection()
    """DeepSpeed's checks of checkpoints that a script saves."""
    log_level: ScriptLogLevel | None = None
    """Lowest level of the records of deepspeed.utils.logger, and of the run's log unless zerotop.log.level is set."""
    dataloader_drop_last: Flag = False
    """Whether a loader that initialize() builds leaves out an incomplete last batch."""
    zerotop: ZerotopConfig = ZerotopConfig()
    """zerotop's own settings."""

    _found: Findings = PrivateAttr(default_factory=Findings)
    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def raw(self) -> dict[str, Any]:
        """The JSON object that was read, with overrides applied; loading it again gives the same settings."""
        return copy.deepcopy(self._raw)

    @property
    def origin(self) -> str:
        """The file as the user wrote it, or "config" for a dictionary."""
        return self._found.origin.name

    @property
    def folder(self) -> FilePath:
        """Base of relative paths in this config: the folder of its file, or the current folder for a dictionary."""
        origin = self._found.origin
        return FilePath(origin.name).resolve().parent if origin.is_file else FilePath.cwd()

    def refuse(self, problems: Iterable[tuple[Path, str]]) -> None:
        """Raise ConfigError if there are problems, each as (path of a key, text that continues after the key): what
        only a part of zerotop above this package can tell."""
        found = Findings(origin=self._found.origin)
        for path, text in problems:
            found.problem(path, text)
        found.raise_if_any()

    def _is_auto(self, *path: str) -> bool:
        return path in self._found.autos

    def resolve(self, world_size: int, device: Device, *, script: bool = False) -> Resolved:
        """Complete this config for `world_size` ranks on `device`; raises ConfigError with every problem at once.

        `script`: a user script provides model, data and perhaps the optimizer, so these get no defaults.
        """
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        found = Findings(origin=self._found.origin)
        notes = self._found.notes()
        batch_autos = {key for key in (TRAIN, MICRO, ACCUMULATION) if self._is_auto(key)}
        batch = solve(
            self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps,
            world_size, batch_autos, found, notes,
        )  # fmt: skip
        precision = self._precision(device, found, notes)
        zero = self.zero_optimization
        zerotop = self.zerotop if script else self._complete_zerotop(found, notes)
        optimizer = self._optimizer(script, notes)
        scheduler = None
        if self.scheduler is not None:
            scheduler = self.scheduler.resolve(
                found,
                lr=optimizer.lr if optimizer else None,
                steps=zerotop.train.steps,
                auto={path[-1] for path in self._found.autos if path[:2] == ("scheduler", "params")},
                notes=notes,
            )
        accumulate = self.data_types.grad_accum_dtype or "fp32"
        if accumulate not in ("fp32", precision):
            allowed = "fp32" if precision == "fp32" else f"fp32 or {precision}"
            found.problem(
                ("data_types", "grad_accum_dtype"),
                f": expected {allowed} when training in {precision}, got {accumulate}",
            )
        if (computes := self.data_types.param_dtype) not in (None, precision):
            found.problem(
                ("data_types", "param_dtype"), f": expected {precision}, which fp16 and bf16 ask for, got {computes}"
            )
        if self.data_types.buffer_dtype is not None and zerotop.buffer_dtype is None:
            zerotop = zerotop.model_copy(update={"buffer_dtype": self.data_types.buffer_dtype})
        if self.log_level is not None and "level" not in zerotop.log.model_fields_set:
            level = "error" if self.log_level == "critical" else self.log_level
            zerotop = zerotop.model_copy(update={"log": zerotop.log.model_copy(update={"level": level})})
        offload_param = _cpu(zero.offload_param)
        if offload_param is not None and zero.stage < 3:
            notes.append(
                f"zero_optimization.offload_param: no effect here, because the stage is {zero.stage} and only stage 3 "
                "shards parameters"
            )
            offload_param = None
        if device == "cpu" and zero.offload_optimizer is not None and zerotop.offload.update == "gpu":
            found.problem(
                ("zerotop", "offload", "update"),
                ': "gpu" needs a GPU, and this run is on the CPU. Leave it out, or write "cpu"',
            )
        if device == "cpu" and zerotop.model.path is not None and zerotop.model.attention in GPU_ATTENTION:
            found.problem(
                ("zerotop", "model", "attention"),
                f': "{zerotop.model.attention}" trains on GPUs only, and this run is on the CPU. Leave it out, or '
                'write "sdpa" or "eager"',
            )
        if self.prescale_gradients and self.gradient_predivide_factor != 1.0:
            found.problem(
                ("gradient_predivide_factor",),
                ": prescale_gradients divides by the number of ranks already; leave one of them out",
            )
        notes += self._filled_autos(optimizer)
        found.raise_if_any()
        assert batch is not None  # a missing batch was recorded as a problem
        return Resolved(
            world_size=world_size,
            device=device,
            micro_batch=batch.micro,
            accumulation=batch.accumulation,
            global_batch=batch.total,
            stage=zero.stage,
            precision=precision,
            grad_accum_dtype=accumulate,
            communication_data_type=self.communication_data_type,
            gradient_allreduce_op=self.gradient_allreduce_op,
            prescale_gradients=self.prescale_gradients,
            gradient_predivide_factor=self.gradient_predivide_factor,
            persistence_threshold=zero.stage3_param_persistence_threshold,
            activation_checkpointing=self.activation_checkpointing,
            tag_validation=self.checkpoint.tag_validation,
            managed_accumulation=self.managed_gradient_accumulation,
            gradient_clipping=self.gradient_clipping,
            optimizer=optimizer,
            scheduler=scheduler,
            fp16=Fp16Config(**self.fp16.model_dump(exclude={"enabled"})),
            offload_optimizer=OffloadOptimizerConfig(**kept) if (kept := _cpu(zero.offload_optimizer)) else None,
            offload_param=OffloadParamConfig(**offload_param) if offload_param else None,
            log_level=self.log_level,
            dataloader_drop_last=self.dataloader_drop_last,
            zerotop=zerotop,
            notes=tuple(notes),
        )

    def _precision(self, device: Device, found: Findings, notes: list[str]) -> DType:
        if self.fp16.enabled:
            if device == "cpu":
                found.problem(
                    ("fp16", "enabled"),
                    ': fp16 needs a GPU and this run is on the CPU. Write "bf16": {"enabled": true} instead of fp16',
                )
            return "fp16"
        if self.bf16.enabled:
            return "bf16"
        asked = [key for key in ("bf16", "fp16") if self._is_auto(key, "enabled")]
        if not asked:
            return "fp32"
        refused = "bf16" not in asked and "enabled" in self.bf16.model_fields_set
        precision: DType = "bf16" if device == "cuda" and not refused else "fp32"
        why = "on the CPU" if device == "cpu" else "as bf16.enabled is false" if refused else "on a GPU"
        notes.append(f"{', '.join(f'{key}.enabled' for key in asked)}: auto, {precision} {why}")
        return precision

    def _optimizer(self, script: bool, notes: list[str]) -> OptimizerConfig | None:
        if self.optimizer is None:
            if script:
                return None
            notes.append(f"optimizer: AdamW with lr {DEFAULT_ADAM_LR:g}, as there is no optimizer section")
            return OptimizerConfig(type="AdamW", lr=DEFAULT_ADAM_LR, adam_w_mode=True)
        params = self.optimizer.params
        resolved = self.optimizer.resolve(self._is_auto("optimizer", "params", "lr"))
        if "lr" not in params.model_fields_set:
            notes.append(f"optimizer.params.lr: {resolved.lr:g}, the default")
        if isinstance(params, AdamParams) and self.optimizer.type == "Adam" and resolved.weight_decay > 0:
            how = "decays weights directly, as AdamW" if resolved.adam_w_mode else "decays weights through the gradient"
            if "adam_w_mode" not in params.model_fields_set:
                notes.append(f"optimizer.type: Adam {how} does and DeepSpeed too; adam_w_mode false means L2 instead")
        return resolved

    def _complete_zerotop(self, found: Findings, notes: list[str]) -> ZerotopConfig:
        """The zerotop section with defaults for the built-in trainer: model, data and number of steps."""
        zerotop = self.zerotop
        if zerotop.model.path is not None:
            zerotop = self._complete_finetuning(found, notes)
        else:
            self._refuse_without_path(found)
        if zerotop.model.path is None and zerotop.model.preset is None:
            notes.append(f"zerotop.model: the built-in {DEFAULT_PRESET}, as there is neither a model nor a script")
            zerotop = zerotop.model_copy(update={"model": zerotop.model.model_copy(update={"preset": DEFAULT_PRESET})})
        if not zerotop.data.files and zerotop.model.path is None:
            notes.append("zerotop.data.files: the source text of Python's standard library, as no files are given")
        if zerotop.train.steps is None:
            notes.append(f"zerotop.train.steps: {DEFAULT_STEPS}, the default")
            zerotop = zerotop.model_copy(update={"train": zerotop.train.model_copy(update={"steps": DEFAULT_STEPS})})
        return zerotop

    def _refuse_without_path(self, found: Findings) -> None:
        """Record settings that the built-in GPT does not have."""
        zerotop = self.zerotop
        keys: list[Path] = [
            ("zerotop", "model", name) for name in ModelConfig.model_fields if name in zerotop.model.model_fields_set
        ]
        keys += [("zerotop", name) for name in ("lora", "evaluation") if getattr(zerotop, name) is not None]
        for key in keys:
            if key[-1] not in ("preset", "path"):
                found.problem(key, ": it needs zerotop.model.path, a Hugging Face model")

    def _complete_finetuning(self, found: Findings, notes: list[str]) -> ZerotopConfig:
        """The zerotop section with defaults for a Hugging Face model: its own tokenizer, and longer sequences."""
        zerotop = self.zerotop
        data, given = zerotop.data, zerotop.data.model_fields_set
        if not data.files:
            found.problem(
                ("zerotop", "data", "files"),
                ': expected files to train on, such as ["chats.jsonl"], or a data set on the hub, '
                f'such as ["{HUB_DATA}OWNER/NAME"]',
            )
        changes: dict[str, Any] = {}
        if "tokenizer" not in given:
            changes["tokenizer"] = zerotop.model.path
        if "seq_len" not in given:
            changes["seq_len"] = DEFAULT_FINETUNE_SEQ_LEN
            notes.append(f"zerotop.data.seq_len: {DEFAULT_FINETUNE_SEQ_LEN} tokens, the default for fine-tuning")
        return zerotop.model_copy(update={"data": data.model_copy(update=changes)})

    def _filled_autos(self, optimizer: OptimizerConfig | None) -> list[str]:
        """A note for each "auto" key that takes its default and has no note of its own."""
        spoken: set[Path] = {
            (TRAIN,), (MICRO,), (ACCUMULATION,), ("fp16", "enabled"), ("bf16", "enabled"),
            ("optimizer", "params", "lr"),
            ("scheduler", "params", "warmup_max_lr"), ("scheduler", "params", "warmup_num_steps"),
            ("scheduler", "params", "total_num_steps"),
            ("zerotop", "train", "steps"), ("zerotop", "model", "preset"),
        }  # fmt: skip
        lines = []
        for path in sorted(self._found.autos - spoken):
            value: Any = self
            for key in path:
                value = getattr(value, key, None)
            if path == ("optimizer", "params", "weight_decay") and optimizer is not None and optimizer.is_adam:
                value = optimizer.weight_decay  # its default depends on torch_adam
            lines.append(f"{dotted(path)}: {_plain(value)}, the default")
        return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else "unset" if value is None else str(value)


def _cpu(section: Section | None) -> dict[str, Any] | None:
    """The fields of an offload section whose device is "cpu"; None for any other."""
    fields = section.model_dump() if section is not None else {"device": "none"}
    return fields if fields["device"] == "cpu" else None
