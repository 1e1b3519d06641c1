"""The dtypes that a model computes in."""

from __future__ import annotations

import torch
from torch import nn

from runtime.models.names import plain_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the config calls each of them."""


def note_wide_buffers(error: RuntimeError, module: nn.Module, precision: str) -> None:
    """Adds a note to a forward's error of dtypes that do not fit, where buffers may be why: they keep their dtype, and
    what computes with a wider one comes out wider."""
    if "dtype" not in str(error) and "scalar type" not in str(error):
        return
    floating = [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    wide = [plain_name(name) for name, buffer in floating if buffer.itemsize > DTYPES[precision].itemsize]
    if wide:
        error.add_note(
            f"The parameters compute in {precision}, and {len(wide)} buffers are wider ({', '.join(wide[:3])}). Cast "
            f'what comes out of them, or set "zerotop": {{"buffer_dtype": "{precision}"}}'
        )
