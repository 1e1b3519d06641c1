"""A number that tells whether memory was written, in one pass that reads it."""

from __future__ import annotations

from functools import cache

import torch

COLUMNS = 65_521
"""Words of 8 bytes that a row has. Prime: two equal shifts in a weight matrix never fall on the same column, so swapped
rows and heads are seen, too."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """() int64 of the bytes of `tensor` (contiguous, a multiple of 8 bytes), on its device: the sums of all columns,
    each times an odd number of its own, modulo 2**64. Every change of a single word changes it."""
    words = tensor.view(-1).view(torch.int64)
    rows = words.numel() // COLUMNS
    rest = words[rows * COLUMNS :]
    factors = _factors(tensor.device)
    total = (rest * factors[: rest.numel()]).sum()
    if rows:
        total = total + (words[: rows * COLUMNS].view(rows, COLUMNS).sum(0) * factors).sum()
    return total


@cache
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(COLUMNS)
    return (torch.randint(2**62, (COLUMNS,), generator=generator) * 2 + 1).to(device)
