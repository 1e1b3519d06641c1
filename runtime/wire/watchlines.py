"""The one line that shows a training script of any kind: one for each trainer."""

from __future__ import annotations

from collections.abc import Container

WATCH_LINE = "from runtime.telemetry import watch; watch(model, optimizer)"
_CALLBACK = "from zerotop.integrations.{} import ZerotopCallback; Trainer(..., callbacks=[ZerotopCallback()])"
WATCH_LINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformers' Trainer, TRL": (_CALLBACK.format("transformers"), ("transformers.trainer",)),
    "PyTorch Lightning": (_CALLBACK.format("lightning"), ("lightning.pytorch", "pytorch_lightning")),
    "DeepSpeed": ("from runtime.telemetry import watch; watch(engine)", ("deepspeed",)),
    "plain torch, DDP, FSDP2": (WATCH_LINE, ()),
}
"""Trainer -> (its line, modules of which a process that trains with it has loaded one). The first that fits counts: the
Trainer loads others' packages, too."""


def watch_line(loaded: Container[str]) -> str:
    """The line for a process that has loaded these modules."""
    return next((line for line, modules in WATCH_LINES.values() if any(one in loaded for one in modules)), WATCH_LINE)
