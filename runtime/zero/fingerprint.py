"""A checksum that tells whether a tensor has changed."""

from __future__ import annotations

from functools import cache

import torch

COLUMNS = 65_521
"""Row length in words of 8 bytes. It is prime, so that swapped rows and heads of a weight matrix fall on different
columns and change the checksum."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Checksum of `tensor` (contiguous, a multiple of 8 bytes): () int64 on its device, computed in one pass.

    It is the sum modulo 2**64 of all column sums, each times an odd factor of its own. Every change of a single word
    changes it."""
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
    return (torch.randint(2**62, (COLUMNS,), generator=generator, device="cpu") * 2 + 1).to(device)
