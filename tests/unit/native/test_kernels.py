"""The CPU kernels against plain torch, against each other bit for bit, and on what real gradients throw at them."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from runtime import native  # noqa: E402
from runtime.optim.adamw import adamw_reference  # noqa: E402

pytestmark = pytest.mark.skipif(not native.available(), reason="the CPU kernels are not built (no C++ compiler)")

HERE = [name for name in ("generic", "avx2", "avx512", "sve") if native.available() and native.isa(name)]
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]
ODD = 70_003  # more than one chunk of 65,536, and a tail of every vector length


@pytest.fixture(params=HERE or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def bits(t: torch.Tensor) -> torch.Tensor:
    """Equal bits are equal integers: NaN equals NaN, -0.0 differs from 0.0."""
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()]).clone()


def states(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=gen), torch.zeros(n), torch.zeros(n)


def gradient(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1000 + seed)
    # Ten orders of magnitude, so that eps matters for some elements and for others not.
    return (torch.randn(n, generator=gen) * 10 ** torch.empty(n).uniform_(-9, 1, generator=gen)).to(dtype)


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("to", DTYPES, ids=[f"to-{name}" for name in NAMES])
def test_one_step_equals_the_reference(isa: str, to: torch.dtype, dtype: torch.dtype, decoupled: bool) -> None:
    p, m, v = states(ODD)
    q, a, b = states(ODD)
    out, want = torch.empty(ODD, dtype=to), torch.empty(ODD, dtype=to)
    for step in range(1, 4):
        g = gradient(ODD, dtype, step)
        # From equal states: what is compared is one step, not how rounding wanders.
        p.copy_(q), m.copy_(a), v.copy_(b)
        native.adamw(p, m, v, g, out, step=step, grad_scale=0.37, adamw=decoupled, isa=isa, **HYPER)
        adamw_reference(q, a, b, g, want, step=step, grad_scale=0.37, adamw=decoupled, **HYPER)
        torch.testing.assert_close(m, a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(v, b, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
        assert torch.equal(out, p.to(to))


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
def test_hundred_steps_equal_torch_optim(isa: str, decoupled: bool) -> None:
    n, eps = 10_007, 1e-5
    p, m, v = states(n)
    param = torch.nn.Parameter(p.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    opt = kind([param], lr=1e-3, betas=(0.9, 0.95), eps=eps, weight_decay=0.1)
    for step in range(1, 101):
        g = gradient(n, torch.float32, step)
        param.grad = g * 0.5
        opt.step()
        hyper = {**HYPER, "eps": eps}
        native.adamw(p, m, v, g, step=step, grad_scale=0.5, adamw=decoupled, isa=isa, **hyper)
    assert (p - param.detach()).abs().max() < 2e-6  # of values near 1 that moved by up to 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_hundred_steps_equal_the_reference(isa: str, dtype: torch.dtype) -> None:
    n, hyper = 10_007, {**HYPER, "eps": 1e-5}
    p, m, v = states(n)
    q, a, b = states(n)
    out, want = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
    for step in range(1, 101):
        g = gradient(n, dtype, step)
        native.adamw(p, m, v, g, out, step=step, grad_scale=0.5, isa=isa, **hyper)
        adamw_reference(q, a, b, g, want, step=step, grad_scale=0.5, **hyper)
    assert (p - q).abs().max() < 2e-6
    torch.testing.assert_close(m, a, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(v, b, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(out, want, rtol=2 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("n", [1, 31, 33, ODD])
def test_every_isa_and_thread_count_gives_the_same_bits(n: int, decoupled: bool, dtype: torch.dtype) -> None:
    results = []
    to = {torch.float32: torch.float16, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}[dtype]
    for name in HERE:
        for threads in (1, 2, 5):
            p, m, v = states(n)
            out = torch.empty(n, dtype=to)
            for step in (1, 2, 3):
                g = gradient(n, dtype, step)
                kw = {**HYPER, "grad_scale": 0.37, "adamw": decoupled, "threads": threads, "isa": name}
                native.adamw(p, m, v, g, out, step=step, **kw)
            results.append((name, threads, [bits(t) for t in (p, m, v, out)]))
    first = results[0][2]
    for name, threads, got in results[1:]:
        for label, one, other in zip("pmvo", first, got, strict=True):
            assert torch.equal(one, other), f"{label} of {name} with {threads} threads differs from {results[0][:2]}"


@pytest.mark.parametrize("cuts", [[1, 2, 3], [31, 64, 40_000], [65_536], [12_345, 65_537]])
def test_any_split_of_the_range_gives_the_same_bits(isa: str, cuts: list[int]) -> None:
    whole, parts = states(ODD), states(ODD)
    g = gradient(ODD, torch.float16, 1)
    out, pieces = torch.empty(ODD, dtype=torch.float16), torch.empty(ODD, dtype=torch.float16)
    native.adamw(*whole, g, out, step=1, isa=isa, **HYPER)
    for low, high in pairwise([0, *cuts, ODD]):
        native.adamw(*(t[low:high] for t in (*parts, g, pieces)), step=1, isa=isa, **HYPER)
    for one, other in zip((*whole, out), (*parts, pieces), strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("to", DTYPES, ids=NAMES)
def test_large_ranges_use_streaming_stores_with_the_same_bits(isa: str, to: torch.dtype) -> None:
    n = (1 << 20) + 77
    for shift in (0, 1, 5):  # the output starts anywhere in a cache line
        results = []
        for name in ("generic", isa):
            p, m, v = states(n)
            room = torch.full((n + 64,), 7.0, dtype=to)
            out = room[shift : shift + n]
            native.adamw(p, m, v, gradient(n, torch.bfloat16, 1), out, step=1, isa=name, **HYPER)
            assert (room[:shift] == 7).all() and (room[shift + n :] == 7).all(), "wrote outside its range"
            assert torch.equal(out, p.to(to))
            results.append(bits(p))
        assert torch.equal(*results)


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("n", [1, 33, ODD, (1 << 20) + 77])
@pytest.mark.parametrize("pair", [(1, 1), (2, 2), (1, 2), (2, 1), (0, 0)], ids=lambda p: f"{NAMES[p[0]]}-{NAMES[p[1]]}")
def test_parameters_may_take_the_memory_of_their_gradient(
    isa: str, pair: tuple[int, int], n: int, decoupled: bool
) -> None:
    dtype, to = DTYPES[pair[0]], DTYPES[pair[1]]
    together, apart = states(n), states(n)
    room = torch.empty(n + 1, dtype=dtype)
    out = torch.empty(n, dtype=to)
    for step in (1, 2):
        g = room[1:].copy_(gradient(n, dtype, step))
        native.adamw(*apart, g.clone(), out, step=step, isa=isa, adamw=decoupled, threads=2, **HYPER)
        native.adamw(*together, g, g.view(to), step=step, isa=isa, adamw=decoupled, threads=2, **HYPER)
        assert torch.equal(bits(g), bits(out))
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_parameters_may_not_lie_across_their_gradient() -> None:
    room = torch.zeros(40)
    for g, out in ((room[:20], room[10:30]), (room[:20], room.view(torch.bfloat16)[:20])):
        with pytest.raises(ValueError, match="out overlaps g"):
            native.adamw(*states(20), g, out, step=1, **HYPER)
    native.adamw(*states(20), room[:20], room[20:], step=1, **HYPER)


@pytest.mark.parametrize("shift", [1, 3, 7])
def test_unaligned_views(isa: str, shift: int) -> None:
    n = 1001
    room = [torch.full((n + 8,), 7.0) for _ in range(4)]
    p, m, v, g = (t[shift : shift + n] for t in room)
    for view, value in zip((p, m, v, g), (*states(n), gradient(n, torch.float32, 1)), strict=True):
        view.copy_(value)
    q, a, b = states(n)
    native.adamw(p, m, v, g, step=1, isa=isa, **HYPER)
    native.adamw(q, a, b, g.clone(), step=1, isa="generic", **HYPER)
    assert torch.equal(bits(p), bits(q)) and torch.equal(bits(v), bits(b))
    for t in room:
        assert (t[:shift] == 7).all() and (t[shift + n :] == 7).all(), "wrote outside its range"


def test_zero_length(isa: str) -> None:
    empty = torch.empty(0)
    native.adamw(empty, empty.clone(), empty.clone(), empty.clone(), step=1, isa=isa, **HYPER)
    native.accumulate(empty, torch.empty(0, dtype=torch.bfloat16), isa=isa)
    assert native.sum_of_squares(empty, isa=isa) == (0.0, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_denormals_infinities_and_nan_pass_through_as_in_torch(isa: str, dtype: torch.dtype) -> None:
    special = torch.tensor([1e-40, -1e-40, 1e-45, 0.0, -0.0, 3e38, math.inf, -math.inf, math.nan, 1.0])
    g = special.repeat(7).to(dtype)  # 70 elements: two vector steps of 32 and a scalar tail
    n = g.numel()
    p, m, v = states(n)
    p[:10] = 1e-40  # a denormal parameter stays one
    q, a, b = p.clone(), m.clone(), v.clone()
    out = torch.empty(n, dtype=torch.bfloat16)
    native.adamw(p, m, v, g, out, step=1, isa=isa, **{**HYPER, "weight_decay": 0.0})
    adamw_reference(q, a, b, g, step=1, **{**HYPER, "weight_decay": 0.0})
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, equal_nan=True)
    torch.testing.assert_close(m, a, rtol=1e-6, atol=1e-44, equal_nan=True)
    assert torch.equal(p.isnan(), q.isnan()) and p.isnan().any() and not p.isnan().all()
    torch.testing.assert_close(out, p.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert p[3] == p[4] == torch.tensor(1e-40), "a zero gradient moves nothing, nor is a denormal flushed"


def test_zero_gradients_without_decay_change_no_bit(isa: str) -> None:
    p, m, v = states(ODD)
    before = bits(p)
    native.adamw(p, m, v, torch.zeros(ODD), step=1, isa=isa, **{**HYPER, "weight_decay": 0.0})
    assert torch.equal(bits(p), before) and not m.any() and not v.any()


def test_fp16_rounds_half_to_even(isa: str) -> None:
    """Every fp16 number, its neighbours in fp32, the middle to the next one and that one's neighbours; both signs."""
    half = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middle = torch.cat([(half[:-1] + half[1:]) / 2, torch.tensor([65520.0])])
    around = [half, middle, *(t.nextafter(torch.tensor(x)) for t in (half, middle) for x in (math.inf, 0.0))]
    special = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F800000, 1, 0x7FFFFF], dtype=torch.int32).view(torch.float32)
    p = torch.cat([*around, torch.tensor([1e5, 3e38, 2.0**-25, 2.0**-26]), special])
    p = torch.cat([p, -p])
    for shape in (p, p[:17]):  # the vectors and the scalar tail
        q, zero = shape.clone(), torch.zeros_like(shape)
        out = torch.empty(q.numel(), dtype=torch.float16)
        native.adamw(q, zero.clone(), zero.clone(), zero, out, step=1, isa=isa, **{**HYPER, "weight_decay": 0.0})
        number = ~q.isnan()
        assert torch.equal(bits(out)[number], bits(q.half())[number])
        assert (bits(out)[~number] == 0x7E00).all()
    assert out.numel() == 17 and p.isnan().sum() == 4


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=NAMES[1:])
def test_every_16_bit_pattern_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    g = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for part in (g, g[7:30]):
        acc = torch.zeros(part.numel())
        native.accumulate(acc, part, isa=isa)
        assert torch.equal(acc.isnan(), part.isnan())
        assert torch.equal(acc[~part.isnan()], part.float()[~part.isnan()])
        finite = part[part.isfinite()]
        want = math.fsum(e * e for e in finite.double().tolist())
        assert native.sum_of_squares(finite, isa=isa)[0] == pytest.approx(want, rel=1e-14)


def test_bf16_rounds_half_to_even(isa: str) -> None:
    # Every pattern of the lower half-word for two upper ones, of even and odd last bit; and the ways to be NaN.
    low = torch.arange(1 << 16, dtype=torch.int64)
    words = torch.cat([0x3F800000 + low, 0x3F810000 + low, 0x7F7F0000 + low, torch.tensor([0x7F800001, 0x7FFFFFFF])])
    p = words.to(torch.int32).view(torch.float32).clone()
    out = torch.empty(p.numel(), dtype=torch.bfloat16)
    zero = torch.zeros_like(p)
    native.adamw(p, zero.clone(), zero.clone(), zero, out, step=1, isa=isa, **{**HYPER, "weight_decay": 0.0})
    number = ~p.isnan()
    assert torch.equal(bits(out)[number], bits(p.bfloat16())[number])
    assert (bits(out)[~number] == 0x7FC0).all() and (~number).sum() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n", [1, 31, 8192, 8193, ODD])
def test_sum_of_squares_is_exact_to_double_and_the_same_everywhere(n: int, dtype: torch.dtype) -> None:
    x = gradient(n, dtype, 3)
    want = math.fsum(float(e) ** 2 for e in x.double().tolist())
    got = {native.sum_of_squares(x, threads=t, isa=name) for name in HERE for t in (1, 2, 5)}
    assert len(got) == 1
    total, nonfinite = got.pop()
    assert not nonfinite and total == pytest.approx(want, rel=1e-14)


def test_sum_of_squares_of_many_blocks_follows_the_written_order() -> None:
    """formula.h's tree in Python: 8192 blocks and one more need three levels."""
    n = 8192 * 8192 + 40
    x = torch.zeros(n, dtype=torch.bfloat16)
    x[::4097] = 1.5
    x[-1] = 2**-30
    assert native.sum_of_squares(x) == native.sum_of_squares(x, threads=1, isa="generic")
    small = gradient(8192 + 100, torch.float32, 5).double()

    def fold(terms: list[float]) -> float:
        lane = [0.0] * 32
        for i, t in enumerate(terms):
            lane[i % 32] += t
        width = 16
        while width:
            lane[:width] = [lane[j] + lane[j + width] for j in range(width)]
            width //= 2
        return lane[0]

    terms = [e * e for e in small.tolist()]
    blocks = [fold(terms[i : i + 8192]) for i in range(0, len(terms), 8192)]
    assert native.sum_of_squares(small.float())[0] == fold(blocks)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 8191, ODD - 1])
def test_one_non_finite_element_is_reported(isa: str, at: int, value: float) -> None:
    x = torch.full((ODD,), 3.3e38)  # near the largest float: the squares do not overflow
    assert native.sum_of_squares(x, isa=isa)[1] is False
    x[at] = value
    assert native.sum_of_squares(x, isa=isa)[1] is True


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("nbytes", [0, 1, 79, 80, 4099, (1 << 20) + 1, (3 << 20) + 77])
def test_a_copy_past_the_cache_is_a_copy(nbytes: int, shift: int, threads: int) -> None:
    source = torch.randint(0, 255, (nbytes + 16,), dtype=torch.uint8)[3 : 3 + nbytes]
    memory = torch.full((nbytes + 16,), 255, dtype=torch.uint8)
    native.copy_past_cache(memory[shift : shift + nbytes], source, threads=threads)
    assert torch.equal(memory[shift : shift + nbytes], source)
    assert (memory[:shift] == 255).all() and (memory[shift + nbytes :] == 255).all()


def test_a_copy_past_the_cache_needs_alike_tensors() -> None:
    with pytest.raises(ValueError, match="source has 3 elements instead of 4"):
        native.copy_past_cache(torch.empty(4), torch.empty(3))
    with pytest.raises(ValueError, match=r"source must be .*float32, is .*bfloat16"):
        native.copy_past_cache(torch.empty(4), torch.empty(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_accumulate(isa: str, dtype: torch.dtype) -> None:
    acc = torch.randn(ODD, generator=torch.Generator().manual_seed(1))
    g = gradient(ODD, dtype, 2)
    want = (acc.double() + g.double() * 0.25).float()
    native.accumulate(acc, g, scale=0.25, threads=2, isa=isa)
    torch.testing.assert_close(acc, want, rtol=1e-7, atol=0)


def test_wrong_tensors_are_named() -> None:
    p, m, v = states(10)
    g = torch.zeros(10)
    kw = {"step": 1, **HYPER}
    for args, message in [
        ((p, m[:9], v, g), "m has 9 elements instead of 10"),
        ((p, m, v.double(), g), "v must be torch.float32, is torch.float64"),
        ((p, m, v, g.double()), "g must be torch.float32 or torch.bfloat16 or torch.float16, is torch.float64"),
        ((torch.zeros(20)[::2], m, v, g), "p must be one-dimensional and contiguous"),
        ((p.view(2, 5), m, v, g), "p must be one-dimensional and contiguous"),
        ((p, m, v, g, torch.zeros(10, dtype=torch.int16)), "out must be torch.float32 or torch.bfloat16 or"),
        ((p, m, v, torch.zeros(10, device="meta")), "g must be on cpu, is on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.adamw(*args, **kw)
    with pytest.raises(ValueError, match="step counts from 1"):
        native.adamw(p, m, v, g, **{**kw, "step": 0})
    with pytest.raises(ValueError, match="isa='sse9' was not built"):
        native.adamw(p, m, v, g, isa="sse9", **kw)


def test_the_environment_forces_an_isa() -> None:
    def ask(value: str) -> str:
        code = "from runtime import native; print(native.isa(), '|', native.cpu_status())"
        env = {**os.environ, "ZEROTOP_ISA": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    assert ask("generic").startswith("generic | generic, up to ")
    assert ask("sse9").startswith("None | ZEROTOP_ISA=sse9 does not run here")
    assert ask("").startswith(f"{HERE[-1]} |")


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    import runtime

    monkeypatch.setattr(runtime, "__path__", [str(tmp_path)])
    native.cpu.cache_clear()
    try:
        assert not native.available()
        assert native.cpu_status().startswith("not available: libzt_cpu.so is not in")
        with pytest.raises(ImportError, match="make install"):
            native.adamw(*states(1), torch.zeros(1), step=1, **HYPER)
    finally:
        native.cpu.cache_clear()


def test_the_cuda_library_loads_without_a_driver() -> None:
    status = native.cuda_status()
    assert status.startswith(("built, ", "not available: libzt_cuda.so is not in"))


def test_hyper_is_the_struct_of_formula_h() -> None:
    h = native.hyper(step=2, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.5, grad_scale=3.0, adamw=True)
    want = [0.1 / (1 - 0.81), 0.1, 0.99, 0.01, 1e-8, 0.95, 0.0, 1 / math.sqrt(1 - 0.9801), 3.0]
    assert struct.unpack("9f", bytes(h)) == pytest.approx(want, rel=1e-6)


class OldAndNew:
    """The CUDA library on a box with a Volta and a Hopper, built for Turing and newer."""

    def zt_device_count(self) -> int:
        return 2

    def zt_capability(self, device: int) -> int:
        return (70, 90)[device]

    def zt_oldest_capability(self) -> int:
        return 75


def test_a_gpu_that_is_too_old_for_the_kernels_runs_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.native import loading

    monkeypatch.setattr(loading, "cuda", OldAndNew)
    native.cuda_available.cache_clear()
    try:
        assert not native.cuda_available() and native.too_old() == {0: "7.0"}
        assert native.cuda_status() == (
            "built for compute capability 7.5 and newer, but cuda:0 has 7.0: torch's own operations run instead"
        )
        monkeypatch.setattr(OldAndNew, "zt_capability", lambda self, device: 90)
        native.cuda_available.cache_clear()
        assert native.cuda_available() and native.cuda_status() == "built, 2 GPUs"
    finally:
        native.cuda_available.cache_clear()
