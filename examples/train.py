"""A training script of your own, as one written for DeepSpeed: only the import differs.

zerotop launch examples/train.json -- examples/train.py --samples 20000
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

import runtime as deepspeed

parser = argparse.ArgumentParser()
parser.add_argument("--samples", type=int, default=20000)
options = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
inputs = torch.randn(options.samples, 32)
data = TensorDataset(inputs, inputs.square().mean(dim=1, keepdim=True))

engine, optimizer, loader, scheduler = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), training_data=data
)
for _ in range(loader.epoch, 10):  # after a resume: from the epoch under way, whose rest the loader gives first
    for batch in loader:
        sample, target = (tensor.to(engine.device) for tensor in batch)
        loss = nn.functional.mse_loss(engine(sample), target)
        engine.backward(loss)
        engine.step()
