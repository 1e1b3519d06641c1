"""The CUDA kernels give the CPU's bits. Needs an NVIDIA GPU and a build with nvcc: `make gpu-check`."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from runtime import native  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(
        not native.cuda_status().startswith("built"), reason="no CUDA kernels (no nvcc at install time)"
    ),
]

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().view({4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("with_out", [True, False], ids=["bf16-out", "no-out"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 8, 4099, 1_000_003])
def test_same_bits_as_the_cpu(n: int, dtype: torch.dtype, decoupled: bool, with_out: bool, shift: int) -> None:
    gen = torch.Generator().manual_seed(n)
    host = [torch.randn(n, generator=gen), torch.zeros(n), torch.zeros(n)]
    room = [torch.zeros(n + shift, device="cuda") for _ in host]
    device = [r[shift:] for r in room]
    for d, h in zip(device, host, strict=True):
        d.copy_(h)
    out_host = torch.empty(n, dtype=torch.bfloat16) if with_out else None
    out_device = torch.empty(n, dtype=torch.bfloat16, device="cuda") if with_out else None
    for step in (1, 2, 3):
        g = torch.randn(n, generator=gen).to(dtype)
        kw = {**HYPER, "step": step, "adamw": decoupled}
        native.adamw(*host, g, out_host, grad_scale=0.37, **kw)
        # The factor once from the host, once as a scalar on the GPU.
        scale = 0.37 if step % 2 else torch.tensor(0.37, device="cuda")
        native.cuda_adamw(*device, g.cuda(), out_device, grad_scale=scale, stream=stream(), **kw)
    for name, h, d in zip("pmv", host, device, strict=True):
        assert torch.equal(bits(h), bits(d)), name
    if out_host is not None and out_device is not None:
        assert torch.equal(bits(out_host), bits(out_device))


def test_nan_and_infinity_pass_through() -> None:
    g = torch.tensor([1e-40, -0.0, 3e38, float("inf"), float("-inf"), float("nan"), 1.0] * 3)
    n = g.numel()
    host = [torch.ones(n), torch.zeros(n), torch.zeros(n)]
    device = [t.cuda() for t in host]
    out = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    native.adamw(*host, g, step=1, **HYPER)
    native.cuda_adamw(*device, g.cuda(), out, step=1, stream=stream(), **HYPER)
    for h, d in zip(host, device, strict=True):
        torch.testing.assert_close(d.cpu(), h, rtol=0, atol=0, equal_nan=True)
    assert (bits(out)[host[0].isnan()] == 0x7FC0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [0, 1, 31, 8192, 8193, 1_000_003, 8192 * 8192 + 40])
def test_sum_of_squares_is_the_cpus(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype)
    work = torch.full((max(1, 2 * -(-n // native.SUM_BLOCK)),), 7.0, dtype=torch.float64, device="cuda")
    native.cuda_sum_of_squares(x.cuda(), work, stream=stream())
    assert work[0].item() == native.sum_of_squares(x)[0]


def test_a_tensor_elsewhere_is_named() -> None:
    cpu = torch.zeros(4)
    with pytest.raises(ValueError, match="p must be on cuda, is on cpu"):
        native.cuda_adamw(cpu, cpu, cpu, cpu, stream=stream(), step=1, **HYPER)
    with pytest.raises(ValueError, match="work has 1 elements"):
        x = torch.zeros(native.SUM_BLOCK + 1, device="cuda")
        native.cuda_sum_of_squares(x, torch.zeros(1, dtype=torch.float64, device="cuda"), stream=stream())
