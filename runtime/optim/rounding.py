"""Moments in bf16, rounded stochastically (arXiv 2010.06192): up or down with the probabilities that make them right on
average, so that a moment follows gradients that change it by less than half a unit in its last place.

The random number of an element depends on its index in its unit, on the unit and on the optimizer step. So a step that
is repeated after a resume gives the same bits, and the rounding does not depend on stage, world size or who updates.
Both moments use one number, 16 bits each. The CPU kernel does the same in one pass (zt_random in csrc/formula.h).
"""

from __future__ import annotations

import zlib

import torch

from runtime.native import Rounding

CHUNK = 1 << 22
"""Elements whose moments are in fp32 at a time, where there is no kernel for bf16 moments."""


def rounding_of(unit: str, step: int, first: int) -> Rounding:
    """The random numbers of one step. unit: name of a flat parameter group. first: index of its first
    element here."""
    return Rounding(first, zlib.crc32(f"{unit}/{step}".encode()), zlib.crc32(f"{step}/{unit}".encode()))


def round_moments(m: torch.Tensor, v: torch.Tensor, to_m: torch.Tensor, to_v: torch.Tensor, rounding: Rounding) -> None:
    """Round `m` and `v` (numel,) fp32 to `to_m` and `to_v` (numel,) bf16. In plain torch, on any device: the kernel's
    reference."""
    random = _random(m.numel(), rounding, m.device)
    to_m.copy_(_rounded(m, random & 0xFFFF))
    to_v.copy_(_rounded(v, (random >> 16) & 0xFFFF))


def _random(numel: int, rounding: Rounding, device: torch.device) -> torch.Tensor:
    """(numel,) int32 with 32 random bits: zt_random."""
    first = _signed(rounding.first & 0xFFFFFFFF)
    # From zero, because the indices may pass 2**31; int32 wraps.
    x = torch.arange(numel, dtype=torch.int32, device=device).add_(first)
    return _mix(_mix(x.bitwise_xor_(_signed(rounding.key))).bitwise_xor_(_signed(rounding.second_key)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """zt_mix in place. Shifts of int32 bring in the sign, which is masked away."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _rounded(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """`values` with 16 random bits added to the last place of bf16, and the bits below it cleared: zt_bf16_stochastic,
    still in fp32. A NaN stays one, and its copy in bf16 is 0x7fc0."""
    bits = (values.view(torch.int32) + random) & _signed(0xFFFF0000)
    return torch.where(values.isnan(), values, bits.view(torch.float32))
