"""What the scripts share: a tiny model, data by rank, and a line with the losses at the end.

WATCH=0 leaves the one line of zerotop out; SLOW_MS slows each micro-step, so that commands meet a running loop;
HANG=STEP makes rank 1 stand still after a step.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
from torch import nn

WATCH = os.environ.get("WATCH", "1") == "1"
STEPS = int(os.environ.get("STEPS", "6"))
SLOW_S = float(os.environ.get("SLOW_MS", "0")) / 1000
HANG = int(os.environ.get("HANG", "0"))
OUT = os.environ.get("OUT", ".")
RANK = int(os.environ.get("RANK", "0"))
MICRO_STEPS = 2
VOCABULARY, LENGTH, BATCH = 64, 16, 2


class Model(nn.Module):
    """Predicts each token from itself; with `labels` it returns the loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.head(hidden)
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(step: int, micro_step: int) -> torch.Tensor:
    """(BATCH, LENGTH) token ids, another one for each rank."""
    if SLOW_S:
        time.sleep(SLOW_S)
    if HANG and step == HANG and RANK == 1:
        time.sleep(3600)
    generator = torch.Generator().manual_seed(1000 * RANK + MICRO_STEPS * step + micro_step)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)


class Samples(torch.utils.data.Dataset):
    """Single samples for trainers that make their own batches."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if SLOW_S:
            time.sleep(SLOW_S)
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def tell(losses: list[float]) -> None:
    """Print the losses with all their bits."""
    print("LOSSES", json.dumps([float(loss).hex() for loss in losses]), flush=True)
