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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().view({4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("to", [*DTYPES, None], ids=[*(f"to-{name}" for name in NAMES), "no-out"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n", [1, 8, 4099, 1_000_003])
def test_same_bits_as_the_cpu(n: int, dtype: torch.dtype, decoupled: bool, to: torch.dtype | None, shift: int) -> None:
    gen = torch.Generator().manual_seed(n)
    host = [torch.randn(n, generator=gen), torch.zeros(n), torch.zeros(n)]
    room = [torch.zeros(n + shift, device="cuda") for _ in host]
    device = [r[shift:] for r in room]
    for d, h in zip(device, host, strict=True):
        d.copy_(h)
    out_host = torch.empty(n, dtype=to) if to else None
    out_device = torch.empty(n, dtype=to, device="cuda") if to else None
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


def many(count: int, gen: torch.Generator, dtype: torch.dtype) -> list[native.Range]:
    """Ranges of many lengths, some of them not on 16-byte boundaries, in turn with one of three hypers or of twelve."""
    ranges = []
    for index in range(count):
        n, shift = int(torch.randint(0, 5000, (1,), generator=gen)), index % 3
        p, m, v = (torch.randn(n + shift, generator=gen)[shift:] for _ in range(3))
        g = torch.randn(n + shift, generator=gen).to(dtype)[shift:]
        ranges.append(
            native.Range(p, m, v.abs(), g, torch.empty(n, dtype=torch.bfloat16), index % (12 if count > 56 else 3))
        )
    return ranges


@pytest.mark.parametrize("count", [1, 56, 57, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_many_ranges_in_one_call(dtype: torch.dtype, count: int) -> None:
    host = many(count, torch.Generator().manual_seed(count), dtype)
    device = [native.Range(*(t.cuda() for t in r[:5]), r.hyper) for r in host]
    rates = [1e-3 * (1 + h) for h in range(12)]
    kw = {key: value for key, value in HYPER.items() if key != "lr"}
    hypers = [native.hyper(step=2, lr=lr, grad_scale=0.5, adamw=True, **kw) for lr in rates]
    native.cuda_adamw_ranges(device, hypers, stream=stream())
    for r, d in zip(host, device, strict=True):
        native.adamw(*r[:5], step=2, lr=rates[r.hyper], grad_scale=0.5, **kw)
        for h, t in zip(r[:5], d[:5], strict=True):
            assert torch.equal(bits(h), bits(t))


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_parameters_may_take_the_memory_of_their_gradient(dtype: torch.dtype, shift: int) -> None:
    n = 100_003
    gen = torch.Generator().manual_seed(1)
    host = [torch.randn(n, generator=gen), torch.zeros(n), torch.zeros(n)]
    device = [t.cuda() for t in host]
    g = torch.randn(n + shift, generator=gen).to(dtype)[shift:]
    both = g.cuda()
    native.adamw(*host, g, g, step=1, **HYPER)
    native.cuda_adamw(*device, both, both, step=1, stream=stream(), **HYPER)
    assert torch.equal(bits(g), bits(both))


def test_fp16_is_rounded_as_on_the_cpu() -> None:
    half = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middle = torch.cat([(half[:-1] + half[1:]) / 2, torch.tensor([65520.0, 3e38, float("inf"), float("nan")])])
    p = torch.cat([half, middle, middle.nextafter(torch.tensor(0.0)), -half, -middle])
    out, zero = torch.empty(p.numel(), dtype=torch.float16), torch.zeros_like(p)
    device = [t.cuda() for t in (p, zero, zero.clone(), zero.clone(), out)]
    kw = {**HYPER, "weight_decay": 0.0}
    native.adamw(p, zero.clone(), zero.clone(), zero, out, step=1, **kw)
    native.cuda_adamw(*device, step=1, stream=stream(), **kw)
    assert torch.equal(bits(out), bits(device[4]))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n", [0, 1, 31, 8192, 8193, 1_000_003, 8192 * 8192 + 40])
def test_sum_of_squares_is_the_cpus(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert sums([x]).tolist() == [native.sum_of_squares(x)[0]] * 2


def test_sums_of_squares_of_many_ranges() -> None:
    gen = torch.Generator().manual_seed(4)
    lengths = [0, 1, 8192, 8193, 300_000, *range(1000, 1150)]  # more than one launch takes
    xs = [torch.randn(n, generator=gen).to(DTYPES[i % 3]) for i, n in enumerate(lengths)]
    want = [native.sum_of_squares(x)[0] for x in xs]
    assert sums(xs).tolist() == [*want, sum(want)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_non_finite_element_is_reported(value: float) -> None:
    xs = [torch.full((20_000,), 6e4, dtype=torch.float16) for _ in range(3)]
    assert sums(xs).isfinite().all()
    xs[1][-1] = value
    assert sums(xs).isfinite().tolist() == [True, False, True, False]


def sums(xs: list[torch.Tensor]) -> torch.Tensor:
    work = torch.full((native.sums_work(xs),), 7.0, dtype=torch.float64, device="cuda")
    result = torch.full((len(xs) + 1,), 7.0, dtype=torch.float64, device="cuda")
    native.cuda_sums_of_squares([x.cuda() for x in xs], work, result, stream=stream())
    return result.cpu()


def test_a_tensor_elsewhere_is_named() -> None:
    cpu = torch.zeros(4)
    with pytest.raises(ValueError, match="p must be on cuda, is on cpu"):
        native.cuda_adamw(cpu, cpu, cpu, cpu, stream=stream(), step=1, **HYPER)
    with pytest.raises(ValueError, match="work has 1 elements"):
        x = torch.zeros(native.SUM_BLOCK + 1, device="cuda")
        short, result = (
            torch.zeros(1, dtype=torch.float64, device="cuda"),
            torch.zeros(2, dtype=torch.float64, device="cuda"),
        )
        native.cuda_sums_of_squares([x], short, result, stream=stream())


@pytest.mark.parametrize("n", [64, 4099])
def test_a_factor_that_is_not_finite_skips_and_changed_outputs_become_masters(n: int) -> None:
    gen = torch.Generator().manual_seed(n)
    p, m, v = (torch.randn(n, generator=gen).abs().cuda() for _ in range(3))
    g, out = torch.randn(n, generator=gen).cuda(), p.to(torch.bfloat16)
    out[::3] = 0.5
    followed = torch.where(p.to(torch.bfloat16) == out, p, out.float())
    flags = {flag: torch.tensor(flag, device="cuda") for flag in (False, True)}
    factors = {name: torch.tensor(value, device="cuda") for name, value in (("skip", float("nan")), ("take", 0.25))}

    def after(factor: str, changed: bool) -> list[torch.Tensor]:
        states = [t.clone() for t in (p, m, v, out)]
        one = native.Range(*states[:3], g, states[3])
        hyper = native.hyper(step=2, grad_scale=1.0, adamw=True, **HYPER)
        native.cuda_adamw_ranges([one], [hyper], stream=stream(), scale=factors[factor], changed=flags[changed])
        return states

    for name, before, found in zip(("p", "m", "v", "out"), (p, m, v, out), after("skip", False), strict=True):
        assert torch.equal(bits(before), bits(found)), name
    for name, before, found in zip(("p", "m", "v", "out"), (followed, m, v, out), after("skip", True), strict=True):
        assert torch.equal(bits(before), bits(found)), name
    expected = [t.clone() for t in (followed, m, v, out)]
    native.cuda_adamw(*expected[:3], g, expected[3], grad_scale=0.25, stream=stream(), step=2, adamw=True, **HYPER)
    for name, before, found in zip(("p", "m", "v", "out"), expected, after("take", True), strict=True):
        assert torch.equal(bits(before), bits(found)), name
