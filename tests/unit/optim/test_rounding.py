"""Moments in bf16: rounding is unbiased, depends on nothing but element, unit and step, and is the same in the kernel
and in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime import native
from runtime.optim.adamw import adamw_reference
from runtime.optim.rounding import round_moments, rounding_of
from runtime.optim.shard_optimizer import update_rounded

HYPER: dict[str, Any] = {
    "step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "adamw": True
}  # fmt: skip
needs_kernels = pytest.mark.skipif(not native.available(), reason="the CPU kernels are not built")


def rounded(values: torch.Tensor, step: int = 1, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` in bf16 as first and as second moment."""
    to = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.bfloat16)
    round_moments(values, values, *to, rounding_of("blocks.0", step, first))
    return to


def material(n: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    p, m, v, g = (torch.randn(n, generator=generator) for _ in range(4))
    return {"p": p, "m": m.bfloat16(), "v": v.square().bfloat16(), "g": g.to(dtype)}


# ---- rounding --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 2**-9, 3.3e-5, -1e-30, 0.0, 1.5])
def test_rounding_is_unbiased(value: float) -> None:
    n = 1 << 18
    for moment in rounded(torch.full((n,), value)):
        low, high = moment.min().item(), moment.max().item()
        unit = abs(value) * 2**-7
        assert low <= value <= high and high - low <= unit
        # The mean of n numbers that are `unit` apart: six of its standard deviations at most.
        assert abs(moment.double().mean().item() - value) <= 6 * unit / 2 / n**0.5


def test_numbers_that_bf16_has_stay_and_so_do_infinities_and_nans() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2**-130, float("inf"), -float("inf"), float("nan")]).repeat(999)
    for moment in rounded(values):
        assert torch.equal(moment[:7].float(), values[:7])
        assert torch.equal(moment.view(999, 8)[:, :7], moment.view(999, 8)[:1, :7].expand(999, 7))
        assert moment.view(999, 8)[:, 7].isnan().all()


def test_moments_steps_and_neighbours_are_rounded_independently() -> None:
    n = 1 << 16
    values = torch.full((n,), 1.0 + 2**-8)  # half way: up or down
    up = [(moment > 1).double() * 2 - 1 for step in (1, 2) for moment in rounded(values, step)]
    for index, one in enumerate(up):
        for other in [*up[:index], one.roll(1), one.roll(64), one.roll(4096)]:
            assert abs((one * other).mean().item()) < 6 / n**0.5


def test_a_shard_rounds_as_the_whole_does() -> None:
    values = torch.randn(1000)
    whole = rounded(values)
    for start, end in ((0, 300), (300, 301), (301, 1000)):
        for moment, part in zip(whole, rounded(values[start:end], first=start), strict=True):
            assert torch.equal(moment[start:end], part)


def test_a_small_gradient_moves_a_moment_on_average() -> None:
    """beta2 = 0.999 changes the second moment by an eighth of a unit in its last place: to nearest it would stay."""
    v = torch.full((4096,), 1.0).bfloat16()
    nearest = v.clone()
    m, g, p = torch.zeros(4096).bfloat16(), torch.full((4096,), 2.0), torch.zeros(4096)
    wide = torch.ones(4096)
    for step in range(1, 101):
        hyper = {**HYPER, "step": step}
        update_rounded(native.Range(p, m, v, g), rounding_of("unit", step, 0), [hyper], 1.0)
        wide = wide * 0.999 + 0.001 * 4
        nearest.copy_(nearest.float() * 0.999 + 0.001 * 4)
    assert nearest.float().mean().item() == 1.0 and wide.mean().item() > 1.28
    assert v.float().mean().item() == pytest.approx(wide.mean().item(), rel=2e-3)


# ---- the kernel ------------------------------------------------------------------------------------------------------
@needs_kernels
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "sve"])
@pytest.mark.parametrize("n", [1, 777, 2048, (1 << 17) + 13])
@pytest.mark.parametrize("adamw", [True, False], ids=["decoupled", "L2"])
def test_the_kernel_gives_the_bits_of_its_parts(n: int, adamw: bool, isa: str) -> None:
    """Moments widened to fp32, the fp32 kernel, and rounded by plain torch."""
    if native.isa(isa) is None:
        pytest.skip(f"no {isa} here")
    hyper = {**HYPER, "adamw": adamw, "grad_scale": 0.5}
    ours, parts = material(n, torch.bfloat16), material(n, torch.bfloat16)
    outs = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.bfloat16)
    rounding = rounding_of("unit", 7, 2**32 - 500)  # the index wraps
    native.adamw(*ours.values(), outs[0], rounding=rounding, threads=2, isa=isa, **hyper)
    wide = [parts[name].float() for name in "mv"]
    native.adamw(parts["p"], *wide, parts["g"], outs[1], isa=isa, **hyper)
    round_moments(wide[0], wide[1], parts["m"], parts["v"], rounding)
    for name in "pmv":
        assert torch.equal(ours[name], parts[name]), name
    assert torch.equal(*outs)


@needs_kernels
def test_moments_of_the_wrong_dtype_are_refused() -> None:
    given = material(10)
    with pytest.raises(ValueError, match=r"m must be torch.float32, is torch.bfloat16"):
        native.adamw(*given.values(), **HYPER)
    wide = [given["p"], given["m"].float(), given["v"].float(), given["g"]]
    with pytest.raises(ValueError, match=r"m must be torch.bfloat16, is torch.float32"):
        native.adamw(*wide, rounding=rounding_of("unit", 1, 0), **HYPER)


def test_without_kernels_chunks_are_updated_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.optim.shard_optimizer.CHUNK", 100)
    monkeypatch.setattr(native, "available", lambda: False)
    ours, parts = material(1050), material(1050)
    rounding = rounding_of("unit", 3, 40)
    update_rounded(native.Range(*ours.values()), rounding, [HYPER], 1.0)
    wide = [parts[name].float() for name in "mv"]
    adamw_reference(parts["p"], *wide, parts["g"], **HYPER)
    round_moments(wide[0], wide[1], parts["m"], parts["v"], rounding)
    for name in "pmv":
        assert torch.equal(ours[name], parts[name]), name


def test_a_skipped_step_of_the_device_changes_nothing() -> None:
    ours, before = material(500), material(500)
    update_rounded(native.Range(*ours.values()), rounding_of("unit", 3, 0), [HYPER], torch.tensor(float("nan")))
    assert all(torch.equal(ours[name], before[name]) for name in "pmv")
