"""Parameters of a model that was built under zero.Init and gets its values in initialize()."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WEIGHTS_MARK = "_zerotop_weights"
"""Attribute of modules whose meta parameters have their values in safetensors files: the files' absolute path. It is on
the module because parameters lose attributes in copy.deepcopy, in pickles, and when they are replaced."""


class AbsentParameter(nn.Parameter):
    """A parameter on the meta device whose values are on rank 0 or in a file. initialize() gives it values and makes it
    a plain nn.Parameter.

    [Note: moving a model on the meta device]
    Scripts call model.to(device), .cuda() or .bfloat16() before initialize(), and meta tensors refuse to move. These
    parameters follow changes of dtype and ignore changes of device, so that all ranks can make the same calls.
    nn.Module does the rest, and moves the buffers, which are real.
    """

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Convert to a new dtype; a new device is ignored."""
        _device, dtype, _non_blocking, _format = torch._C._nn._parse_to(*args, **kwargs)
        return self if dtype in (None, self.dtype) else super().to(dtype)

    def cuda(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Stay on the meta device."""
        return self

    def cpu(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Stay on the meta device."""
        return self

    def detach(self) -> torch.Tensor:
        """Return an AbsentParameter: nn.Parameter(p) requires the same class (nn.Embedding.from_pretrained)."""
        return AbsentParameter(super().detach(), False)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return AbsentParameter, (self.data, self.requires_grad)
