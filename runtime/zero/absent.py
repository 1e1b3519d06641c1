"""Parameters of a model that was built under zero.Init, whose values are elsewhere until initialize()."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WEIGHTS_MARK = "_zerotop_weights"
"""Attribute of modules whose meta parameters have their values in safetensors: the absolute path. Modules keep it where
parameters lose theirs: in copy.deepcopy, in pickles, and when somebody gives them another parameter."""


class Absent(nn.Parameter):
    """A parameter on the meta device whose values rank 0 or a file has. It stays there until initialize() gives it
    values, and is a plain Parameter from then on.

    [Note: moving a model that is not there]
    Scripts call model.to(device), .cuda() or .bfloat16() before initialize(), and meta tensors refuse to move. These
    follow changes of dtype and ignore changes of device, so that all ranks can make the same calls; nn.Module does the
    rest, and moves buffers, which are real.
    """

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        _device, dtype, _non_blocking, _format = torch._C._nn._parse_to(*args, **kwargs)
        return self if dtype in (None, self.dtype) else super().to(dtype)

    def cuda(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    def cpu(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    def detach(self) -> torch.Tensor:
        """Of this class: nn.Parameter(p) wants it so (nn.Embedding.from_pretrained)."""
        return Absent(super().detach(), False)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return Absent, (self.data, self.requires_grad)
