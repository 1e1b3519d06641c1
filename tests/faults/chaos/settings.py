"""What the rounds train: small, quick, and different in everything that a checkpoint must get right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness.cpu import BF16_IF_QUICK
from tests.harness.waiting import patient

STEPS = 500
"""Of every run but references. A round whose run has finished goes on with a new one."""
INTERVAL = 5
KEPT = 3
_CPU = {"device": "cpu", "pin_memory": False}
VARIANTS: list[dict[str, Any]] = [
    {"zero_optimization": {"stage": 2}, **BF16_IF_QUICK},
    {"zero_optimization": {"stage": 3, "offload_optimizer": _CPU, "offload_param": _CPU}, **BF16_IF_QUICK},
    {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2},
    {"zero_optimization": {"stage": 2, "offload_optimizer": _CPU}, "gradient_accumulation_steps": 2},
]
ENVIRONMENT = {
    "ZEROTOP_HANG_S": f"{patient(6):g}",
    "ZEROTOP_WRITER_PATIENCE_S": f"{patient(6):g}",
    "ZEROTOP_STOP_DEADLINE_S": f"{patient(60):g}",
    "ZEROTOP_ORPHAN_GRACE_S": f"{patient(60):g}",
}


def write_config(folder: Path, variant: int, checkpoints: Path | None, steps: int = STEPS) -> Path:
    """The config of a variant; without `checkpoints` that of its reference, which makes none. No loss depends on how
    many steps there are."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("What is written down is kept, and what is kept can be read again. " * 400)
    saving = {"interval": INTERVAL, "keep": KEPT, "folder": str(checkpoints)} if checkpoints else {"interval": 0}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 40}},
        **VARIANTS[variant],
        "zerotop": {
            "model": {"preset": "gpt-tiny"},
            "data": {"seq_len": 64, "files": ["text.txt"]},
            "train": {"steps": steps, "seed": variant},
            "checkpoint": saving,
            "restarts": {"limit": 1000, "window_minutes": 1.0, "on_hang": True},
        },
    }
    path = folder / f"variant-{variant}-{'chaos' if checkpoints else 'reference'}.json"
    path.write_text(json.dumps(config, indent=1))
    return path
