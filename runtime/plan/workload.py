"""The workload that runtime/plan plans for, and how it is made from a resolved config. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.config.presets import GPTConfig, ModelError, gradient_arrivals, load_model_config, unit_parameters
from runtime.config.vocab import count_tokens
from runtime.plan.decoder import DecoderShape
from runtime.plan.flops import ActiveWeights, FlopsPerToken, flops_per_token, gpt_weights
from runtime.plan.layout import padded
from runtime.plan.pretrained import Pretrained, pretrained

if TYPE_CHECKING:
    from runtime.config import Resolved

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# State tensors per parameter; SGD and RMSprop depend on their settings.
_MOMENTS = {"Adagrad": 1, "ASGD": 1}


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A model and how it is trained. `units` are (name, trained parameters) in forward order, as the engine cuts the
    model; a unit without any counts 0."""

    name: str
    units: tuple[tuple[str, int], ...]
    shape: GPTConfig | DecoderShape | None
    """None: a model of the user's own, whose activations and logits are not known and count as 0."""
    world_size: int
    frozen: tuple[tuple[str, int], ...] = ()
    """(name of a unit, elements of its parameters that are not trained), for units that have any."""
    arrivals: tuple[str, ...] = ()
    """The unit of each parameter, in the order in which backward makes their gradients; empty: one unit after the
    other, last to first."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where the ranks train. On a CPU offloaded states stay in the same memory."""
    precision: str = "bf16"
    grad_accum_dtype: str = "fp32"
    reduce_dtype: str | None = None
    """Precision in which gradients are reduced. None: the model's if gradients are sharded, else that in which they
    accumulate."""
    moments: int = 2
    """State tensors per parameter that the optimizer keeps: 2 for Adam."""
    moment_bytes: int = 4
    """Bytes per element of these (zerotop.optimizer_state_dtype)."""
    micro_batch: int = 1
    accumulation: int = 1
    seq_len: int = 1024
    offload_ratio: float = 1.0
    """Share of the states that are offloaded, as near as whole units come to it."""
    offload_parameters: bool = False
    """Whether parameters are offloaded at stage 3."""
    vram_reserve_bytes: int | None = None
    """VRAM that must stay free when states that would be offloaded stay on the GPU instead. None: all are offloaded."""
    free_vram_bytes: int | None = None
    """Free VRAM of a GPU before the model is built. None: not known, and vram_reserve_bytes has no effect."""
    stream_chunk_bytes: int = 0
    """Bytes of states per chunk if the GPU updates offloaded states, which stream through it; 0: it does not."""
    pin_memory: bool = True
    """Whether offloaded states are page-locked."""
    pin_parameters: bool = True
    """Whether offloaded parameters are page-locked."""
    accumulate_locally: bool = False
    """zerotop.accumulate "local": full gradients accumulate until the boundary also at stages 2 and 3."""
    segments: int | None = None
    """Number of groups of layers whose activations backward recomputes. None: all activations are kept."""
    inputs_on_host: bool = False
    """Whether the inputs of those groups are offloaded to host memory."""
    offload_activations: bool = False
    """zerotop.model.offload_activations: whether what blocks keep for backward is offloaded, whatever it is."""
    chunked_loss: bool = False
    """Whether cross-entropy is computed in chunks, so that logits never exist as a whole."""
    largest_parameter: int = 0
    """Elements of the largest trained parameter of a Hugging Face model."""
    tied_table: int = 0
    """Elements of its trained embedding, if the head shares it."""
    trains_head: bool = True
    """Whether the head's weight is trained."""
    weights: ActiveWeights | None = None
    """Of a Hugging Face model, the weights that a token is multiplied with."""
    shape_guessed: bool = False
    """Whether `shape` is guessed from a parameter count."""
    checkpoints: bool = True
    """Whether checkpoints are written during training."""

    def __post_init__(self) -> None:
        for field in ("world_size", "micro_batch", "accumulation", "seq_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("precision", "grad_accum_dtype"):
            if getattr(self, field) not in ELEMENT_BYTES:
                raise ValueError(f"{field}: expected one of {', '.join(ELEMENT_BYTES)}, got {getattr(self, field)!r}")
        if self.reduce_dtype is not None and self.reduce_dtype not in ELEMENT_BYTES:
            raise ValueError(f"reduce_dtype: expected one of {', '.join(ELEMENT_BYTES)}, got {self.reduce_dtype!r}")
        if not 0 <= self.offload_ratio <= 1:
            raise ValueError(f"offload_ratio must be between 0 and 1, got {self.offload_ratio}")
        if not self.units or any(numel < 0 for _, numel in self.units):
            raise ValueError("units must name at least one unit, none with a negative size")

    @property
    def parameters(self) -> int:
        """Number of parameters, trained or not."""
        return self.trained_parameters + self.frozen_parameters

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained."""
        return sum(numel for _, numel in self.units)

    @property
    def frozen_parameters(self) -> int:
        """Number of parameters that are not trained."""
        return sum(numel for _, numel in self.frozen)

    @property
    def padded_frozen(self) -> list[tuple[str, int]]:
        """(name, padded elements) of the parameters of each unit that are not trained and that stage 3 shards."""
        return [(name, padded(numel, self.world_size)) for name, numel in self.frozen if name != "small"]

    @property
    def padded_parameters(self) -> int:
        """Number of trained parameters, with every unit padded."""
        return sum(padded(numel, self.world_size) for _, numel in self.units)

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter in the model's precision."""
        return ELEMENT_BYTES[self.precision]

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of an accumulated gradient element."""
        return ELEMENT_BYTES[self.grad_accum_dtype]

    @property
    def flops_per_token(self) -> FlopsPerToken | None:
        """FLOPs of forward and backward per token; None if the model's shape is not known, or of a model that stands
        for one with adapters."""
        if isinstance(self.shape, GPTConfig) and not self.frozen:
            weights: ActiveWeights | None = gpt_weights(self.shape)
        else:
            weights = self.weights
        if self.shape is None or weights is None:
            return None
        return flops_per_token(self.shape, weights, self.seq_len, recomputed=self.segments is not None)

    def shards_gradients(self, stage: int) -> bool:
        """Whether a rank keeps only its shard of the accumulated gradients."""
        return stage >= 2 and not self.accumulate_locally

    def reduced_bytes(self, stage: int) -> int:
        """Bytes of a gradient element that is reduced."""
        sharded = self.shards_gradients(stage)
        return ELEMENT_BYTES[self.reduce_dtype or (self.precision if sharded else self.grad_accum_dtype)]

    @property
    def padded_units(self) -> list[tuple[str, int]]:
        """(name, padded elements) of each unit, in forward order."""
        return [(name, padded(numel, self.world_size)) for name, numel in self.units]

    @property
    def small_parameters(self) -> int:
        """Padded elements of the small trained parameters, which are not sharded at stage 3 either."""
        return sum(padded(numel, self.world_size) for name, numel in self.units if name == "small")


def workload_of(
    resolved: Resolved,
    name: str,
    units: Sequence[tuple[str, int]],
    shape: GPTConfig | DecoderShape | None,
    world_size: int | None = None,
) -> Workload:
    """Make the workload of a config. units: (name, trained parameters) in forward order. shape: None if it is not
    known. world_size: overrides the config's."""
    offload, parameters, checkpointing = (
        resolved.offload_optimizer, resolved.offload_param, resolved.activation_checkpointing
    )  # fmt: skip
    section = resolved.zerotop.offload
    reserve = section.vram_reserve_gib
    pinned = all(part is None or part.pin_memory for part in (offload, parameters))
    streams = pinned and section.update != "cpu" and is_adam(resolved)
    streams = streams and resolved.zerotop.optimizer_state_dtype == "fp32"  # the CPU updates states in bf16
    segments = None
    if checkpointing is not None and shape is not None:
        segments = shape.layers  # a Hugging Face model's blocks are checkpointed one by one
        if isinstance(shape, GPTConfig):
            segments = checkpointing.number_checkpoints or shape.layers
    return Workload(
        name=name,
        units=tuple(units),
        shape=shape,
        world_size=resolved.world_size if world_size is None else world_size,
        arrivals=_arrivals(resolved, units, shape),
        device=resolved.device,
        precision=resolved.precision,
        grad_accum_dtype=resolved.grad_accum_dtype,
        reduce_dtype=resolved.communication_data_type,
        moments=moments(resolved),
        moment_bytes=2 if resolved.zerotop.optimizer_state_dtype == "bf16" else 4,
        micro_batch=resolved.micro_batch,
        accumulation=resolved.accumulation,
        seq_len=resolved.zerotop.data.seq_len,
        offload_ratio=offload.ratio if offload else 1.0,
        offload_parameters=parameters is not None,
        vram_reserve_bytes=None if reserve is None else int(reserve * 2**30),
        stream_chunk_bytes=int(section.chunk_mib * 2**20) if streams else 0,
        pin_memory=offload.pin_memory if offload else True,
        pin_parameters=parameters.pin_memory if parameters else True,
        accumulate_locally=resolved.zerotop.accumulate == "local",
        segments=segments,
        inputs_on_host=checkpointing is not None and checkpointing.cpu_checkpointing,
        checkpoints=bool(resolved.zerotop.checkpoint.interval or resolved.zerotop.checkpoint.minutes),
    )


def pretrained_workload(resolved: Resolved, model: Pretrained, world_size: int | None = None) -> Workload:
    """Make the workload of a Hugging Face model. world_size: overrides the config's."""
    units = [(unit.name, unit.trained) for unit in model.units]
    section = resolved.zerotop.model
    return dataclasses.replace(
        workload_of(resolved, model.name, units, model.shape, world_size),
        frozen=tuple((unit.name, unit.frozen) for unit in model.units if unit.frozen),
        arrivals=model.arrivals,
        offload_activations=section.offload_activations,
        chunked_loss=section.cross_entropy != "whole" and not model.adapts_head,
        largest_parameter=model.largest,
        tied_table=model.tied_table,
        trains_head=model.trains_head,
        weights=model.weights,
    )


def built_in_workload(resolved: Resolved, folder: Path) -> Workload | None:
    """Make the workload of the built-in trainer with this config, whose relative paths start in `folder`; None if its
    model or tokenizer can't be read."""
    section = resolved.zerotop.model
    try:
        if section.path is not None:
            return pretrained_workload(resolved, pretrained(resolved, folder))
        tokens = count_tokens(resolved.zerotop.data.tokenizer, folder)
        shape = load_model_config(section, tokens, resolved.zerotop.data.seq_len)
        units = unit_parameters(shape, resolved.persistence_threshold, resolved.zerotop.units)
    except (OSError, ValueError, ModelError):
        return None
    return workload_of(resolved, str(section.preset), units, shape)


def _arrivals(
    resolved: Resolved, units: Sequence[tuple[str, int]], shape: GPTConfig | DecoderShape | None
) -> tuple[str, ...]:
    """`Workload.arrivals` of the built-in GPT of this shape; empty if its units are not `units`."""
    if not isinstance(shape, GPTConfig):
        return ()
    try:
        found = gradient_arrivals(shape, resolved.persistence_threshold, resolved.zerotop.units)
    except ModelError:
        return ()
    return found if set(found) == {name for name, _ in units} else ()


def is_adam(resolved: Resolved) -> bool:
    """Whether the optimizer is Adam or AdamW."""
    return resolved.optimizer is None or resolved.optimizer.type in ("Adam", "AdamW")


def moments(resolved: Resolved) -> int:
    """State tensors per parameter that the optimizer keeps."""
    optimizer = resolved.optimizer
    if optimizer is None:
        return 2
    extra = optimizer.extra
    if optimizer.type == "SGD":
        return int(bool(extra.get("momentum")))
    if optimizer.type == "RMSprop":
        return 1 + bool(extra.get("momentum")) + bool(extra.get("centered"))
    return _MOMENTS.get(optimizer.type, 2)


def workload_document(workload: Workload) -> dict[str, Any]:
    """The workload as JSON."""
    document = dataclasses.asdict(workload)
    del document["arrivals"]
    del document["frozen"]
    del document["weights"]
    frozen = dict(workload.frozen)
    document["units"] = [
        {"name": name, "parameters": numel} | ({"frozen_parameters": frozen[name]} if name in frozen else {})
        for name, numel in workload.units
    ]
    return document | {
        "parameters": workload.parameters,
        "trained_parameters": workload.trained_parameters,
        "padded_parameters": workload.padded_parameters,
    }
