"""The streamed offload optimizer gives the CPU kernel's bits, in the order that its caller asks for.

Needs an NVIDIA GPU and a build with nvcc: `make gpu-check`. The schedule itself is tested without one in
tests/unit/native/test_stream_schedule.py.
"""

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

HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
LR = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().view({4: torch.int32, 2: torch.int16}[t.element_size()])


def ring(chunk: int, slots: int, grad_size: int = 0, out_size: int = 0) -> native.StreamedAdamW:
    need = native.StreamedAdamW.bytes_needed(chunk, slots, grad_size, out_size)
    memory = torch.full((need,), 255, dtype=torch.uint8, device="cuda")  # NaN, if anything reads it before it is loaded
    torch.cuda.synchronize()
    return native.StreamedAdamW(memory, chunk=chunk, slots=slots, grad_size=grad_size, out_size=out_size)


def hyper(step: int) -> native.Hyper:
    return native.hyper(step=step, lr=LR, grad_scale=0.5, adamw=True, **HYPER)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 3 * 4096, 100_003])
@pytest.mark.parametrize("places", ["cuda-cuda", "cpu-cuda", "cuda-cpu", "cpu-cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_same_bits_as_the_cpu(dtype: torch.dtype, places: str, n: int, slots: int) -> None:
    g_at, out_at = places.split("-")
    gen = torch.Generator().manual_seed(n)
    p, m, v = torch.randn(n, generator=gen).pin_memory(), torch.zeros(n).pin_memory(), torch.zeros(n).pin_memory()
    q, a, b = p.clone(), m.clone(), v.clone()
    g = torch.empty(n, dtype=dtype, device=g_at, pin_memory=g_at == "cpu")
    out = torch.empty(n, dtype=dtype, device=out_at, pin_memory=out_at == "cpu")
    want = torch.empty(n, dtype=dtype)
    stream = torch.cuda.current_stream().cuda_stream
    size = g.element_size()
    with ring(4096, slots, size if g_at == "cpu" else 0, size if out_at == "cpu" else 0) as streamed:
        for step in (1, 2, 3):
            gradient = torch.randn(n, generator=gen).to(dtype)
            torch.cuda.synchronize()  # the host writes g next, and the last step may still read it
            g.copy_(gradient)
            streamed.step([native.Range(p, m, v, g, out)], [hyper(step)], wait_stream=stream, signal_stream=stream)
            native.adamw(q, a, b, gradient, want, step=step, lr=LR, grad_scale=0.5, **HYPER)
        torch.cuda.synchronize()
    for one, other in zip((p, m, v, out), (q, a, b, want), strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("events", [False, True], ids=["streams", "events"])
def test_it_waits_for_a_late_gradient_and_holds_back_a_reader(events: bool) -> None:
    """The gradient is written after a long-running kernel, and the output is read right behind: without the waits the
    one is stale and the other too early."""
    n = 3 * (1 << 20) + 5
    p, m, v = torch.ones(n).pin_memory(), torch.zeros(n).pin_memory(), torch.zeros(n).pin_memory()
    q, a, b = p.clone(), m.clone(), v.clone()
    g = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    out, want = torch.zeros_like(g), torch.empty(n, dtype=torch.bfloat16)
    producer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    ready, done = torch.cuda.Event(), torch.cuda.Event()
    done.record(reader)  # torch creates an event when it is first recorded
    with ring(1 << 18, 3) as streamed:
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(200_000_000)
            g.fill_(0.25)
            ready.record(producer)
        order = (
            {"wait_event": ready.cuda_event, "signal_event": done.cuda_event}
            if events
            else {"wait_stream": producer.cuda_stream, "signal_stream": reader.cuda_stream}
        )
        streamed.step([native.Range(p, m, v, g, out)], [hyper(1)], **order)
        if events:
            reader.wait_event(done)
        with torch.cuda.stream(reader):
            seen = out.clone()
        assert not producer.query(), "step() waited for the GPU"
        torch.cuda.synchronize()
    native.adamw(q, a, b, torch.full((n,), 0.25, dtype=torch.bfloat16), want, step=1, lr=LR, grad_scale=0.5, **HYPER)
    assert torch.equal(bits(seen), bits(want)) and torch.equal(bits(p), bits(q))


def test_many_units_follow_one_another_with_a_scale_on_the_gpu() -> None:
    gen = torch.Generator().manual_seed(7)
    units, wanted = [], []
    for n in (70_001, 12, 200_000, 64, 131_072):
        p = torch.randn(n, generator=gen)
        g = torch.randn(n, generator=gen).half()
        wanted.append((p.clone(), torch.zeros(n), torch.zeros(n), g, torch.empty(n, dtype=torch.float16)))
        states = (p.pin_memory(), torch.zeros(n).pin_memory(), torch.zeros(n).pin_memory())
        units.append(native.Range(*states, g.cuda(), torch.empty(n, dtype=torch.float16, device="cuda")))
    stream = torch.cuda.current_stream().cuda_stream
    scale = torch.tensor(0.125, device="cuda")
    with ring(8192, 3) as streamed:
        for step in (1, 2):
            for unit in units:
                streamed.step([unit], [hyper(step)], scale=scale, wait_stream=stream)
            streamed.step([], [], signal_stream=stream)  # behind all of them: the next step reads what this one wrote
        torch.cuda.synchronize()
    for unit, (p, m, v, g, out) in zip(units, wanted, strict=True):
        for step in (1, 2):
            native.adamw(p, m, v, g, out, step=step, lr=LR, grad_scale=0.5 * 0.125, **HYPER)
        for one, other in zip((unit.p, unit.m, unit.v, unit.out), (p, m, v, out), strict=True):
            assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("places", ["cuda-cuda", "cpu-cuda", "cuda-cpu", "cpu-cpu"])
def test_a_step_that_only_the_gpu_knows_to_be_skipped_changes_nothing(places: str) -> None:
    g_at, out_at = places.split("-")
    n, gen = 100_003, torch.Generator().manual_seed(3)
    p, m, v = (torch.rand(n, generator=gen).pin_memory() for _ in range(3))
    g, out = torch.randn(n, generator=gen).bfloat16(), p.bfloat16()
    g = g.cuda() if g_at == "cuda" else g.pin_memory()
    out = out.cuda() if out_at == "cuda" else out.pin_memory()
    before = [t.clone() for t in (p, m, v, g, out)]
    stream = torch.cuda.current_stream().cuda_stream
    scale, changed = torch.tensor(float("nan"), device="cuda"), torch.tensor(False, device="cuda")
    with ring(8192, 3, 2 if g_at == "cpu" else 0, 2 if out_at == "cpu" else 0) as streamed:
        unit = native.Range(p, m, v, g, out)
        streamed.step([unit], [hyper(1)], scale=scale, changed=changed, wait_stream=stream, signal_stream=stream)
        torch.cuda.synchronize()
    for one, other in zip((p, m, v, g, out), before, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_what_cannot_stream_is_named() -> None:
    plain = torch.zeros(64)
    pinned = plain.pin_memory()
    g = torch.zeros(64, device="cuda")
    with ring(64, 2) as streamed:
        with pytest.raises(ValueError, match="m must be page-locked"):
            streamed.step([native.Range(pinned, plain, pinned, g)], [hyper(1)])
        with pytest.raises(ValueError, match="p must be on cpu"):
            streamed.step([native.Range(g, pinned, pinned, g)], [hyper(1)])
        with pytest.raises(ValueError, match="has hyper index 1"):
            streamed.step([native.Range(pinned, pinned, pinned, g, None, 1)], [hyper(1)])
        with pytest.raises(ValueError, match="never recorded"):
            streamed.step([], [], wait_event=torch.cuda.Event().cuda_event)
        with pytest.raises(RuntimeError, match="invalid argument"):  # the slots have no room for a host gradient
            streamed.step([native.Range(pinned, pinned.clone().pin_memory(), pinned, pinned)], [hyper(1)])
    with pytest.raises(ValueError, match="multiple of 64"):
        native.StreamedAdamW.bytes_needed(100, 2)
