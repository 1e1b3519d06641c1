"""What a rank says of its arithmetic: FLOPs per token of its model, and the peak of its device."""

from __future__ import annotations

import logging

import torch
from torch import nn

from runtime.config import Resolved
from runtime.config.presets import ModelError
from runtime.models.gpt import GPT
from runtime.models.origin import origin_of
from runtime.plan.flops import FlopsPerToken, flops_per_token, gpt_weights
from runtime.plan.peaks import peak_of, peak_tflops
from runtime.plan.pretrained import pretrained

log = logging.getLogger("runtime.engine")


def model_flops(module: nn.Module, config: Resolved) -> FlopsPerToken | None:
    """FLOPs per token of the built-in trainer's model; None for the model of a script, whose sequence length the config
    does not know, and for architectures whose shape is not known."""
    seq_len, recomputed = config.zerotop.data.seq_len, config.activation_checkpointing is not None
    if isinstance(module, GPT):
        if module.config.max_seq_len != seq_len:
            return None
        return flops_per_token(module.config, gpt_weights(module.config), seq_len, recomputed)
    origin = origin_of(module)
    if origin is None or config.zerotop.model.path is None:
        return None
    try:
        found = pretrained(config, origin.folder, origin.folder)
    except ModelError as error:
        log.debug(f"the FLOPs of {origin.path} are not known: {error}")
        return None
    if found.shape is None or found.weights is None:
        return None
    return flops_per_token(found.shape, found.weights, seq_len, recomputed)


def peak_flops(config: Resolved, device: torch.device, device_name: str) -> tuple[float | None, str]:
    """(peak FLOPs per second of the device in the run's precision, where that figure comes from); (None, why) if it is
    not known."""
    given = config.zerotop.telemetry.peak_tflops
    if given is not None:
        return given * 1e12, "zerotop.telemetry.peak_tflops"
    if device.type != "cuda":
        return None, "the peak of this CPU is not known (zerotop.telemetry.peak_tflops sets it)"
    # Not allow_tf32: reading that raises once a script has used the newer setting.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tflops, row = peak_tflops(device_name, config.precision, tf32), peak_of(device_name)
    if tflops is None or row is None:
        what = f"the peak of {device_name} in {config.precision} is not known"
        return None, f"{what} (zerotop.telemetry.peak_tflops sets it)"
    kind = "tf32" if config.precision == "fp32" and tf32 else config.precision
    return tflops * 1e12, f"{tflops:g} TFLOPS {kind}, {row.source}"
