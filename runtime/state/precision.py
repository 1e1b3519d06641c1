"""The dtypes in which models compute."""

from __future__ import annotations

import torch
from torch import nn

from runtime.models.names import plain_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The config's name of each compute dtype -> the dtype."""


def note_wide_buffers(error: RuntimeError, module: nn.Module, precision: str) -> None:
    """Add a note to a forward's error about mismatched dtypes if buffers may be the cause: they keep their dtype, and
    an operation with a wider buffer has a wider result."""
    if "dtype" not in str(error) and "scalar type" not in str(error):
        return
    floating = [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    wide = [plain_name(name) for name, buffer in floating if buffer.itemsize > DTYPES[precision].itemsize]
    if wide:
        error.add_note(
            f"The parameters compute in {precision}, but {len(wide)} buffers are wider ({', '.join(wide[:3])}). Cast "
            f'the results of operations on them, or set "zerotop": {{"buffer_dtype": "{precision}"}}'
        )
