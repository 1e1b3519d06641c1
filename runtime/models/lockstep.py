"""Models of transformers whose ranks must run them equally often, because every forward all-gathers parameters."""

from __future__ import annotations

import sys

from torch import nn

_MARK = "_is_fsdp_managed_module"
"""transformers reads this attribute of a model: generate() then goes on until every rank's sequences are complete (its
synced_gpus), and layers that a rank drops at random run all the same. With DeepSpeed it looks at DeepSpeed's config."""


class Lockstep:
    """Keeps the ranks of the transformers models in `module` in step, until remove()."""

    def __init__(self, module: nn.Module) -> None:
        transformers = sys.modules.get("transformers.modeling_utils")
        kind = transformers.PreTrainedModel if transformers is not None else ()
        self._marked = [m for m in module.modules() if isinstance(m, kind) and not getattr(m, _MARK, False)]
        for model in self._marked:
            setattr(model, _MARK, True)

    def remove(self) -> None:
        """Let each rank run its model alone again."""
        for model in self._marked:
            delattr(model, _MARK)
        self._marked.clear()
