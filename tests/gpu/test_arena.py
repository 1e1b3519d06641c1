"""The arena's memory is page-locked for CUDA while it is open, and plain afterwards.

Needs an NVIDIA GPU and a build with nvcc: `make gpu-check`.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from runtime import native  # noqa: E402
from runtime.host.pinned import Arena  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(
        not native.cuda_status().startswith("built"), reason="no CUDA kernels (no nvcc at install time)"
    ),
]


def test_page_locked_until_closed() -> None:
    arena = Arena(device=0)
    tensor = arena.zeros(1_000_003, torch.bfloat16)
    assert tensor.is_pinned() and tensor[500_000:].is_pinned()
    assert not Arena(pin=False).zeros(10, torch.float32).is_pinned()
    there = torch.full_like(tensor, 2, device="cuda")
    tensor.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    arena.close()
    assert not tensor.is_pinned()
    assert (tensor == 2).all()


def test_a_range_can_be_registered_once() -> None:
    with Arena() as arena:
        tensor = arena.zeros(1024, torch.float32)
        with pytest.raises(RuntimeError, match=r"already (been )?(mapped|registered)"):
            native.pin(tensor.data_ptr(), 4096, 0)


def test_states_of_an_arena_stream() -> None:
    n = 100_000
    kw = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    with Arena() as arena:
        p, m, v = (arena.zeros(n, torch.float32) for _ in range(3))
        p.fill_(1)
        g = torch.full((n,), 0.25, dtype=torch.float16, device="cuda")
        memory = torch.empty(native.StreamedAdamW.bytes_needed(4096, 3), dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        with native.StreamedAdamW(memory, chunk=4096) as streamed:
            h = native.hyper(step=1, lr=1e-3, grad_scale=1.0, adamw=True, **kw)
            streamed.step([native.Range(p, m, v, g)], [h], wait_stream=stream, signal_stream=stream)
            torch.cuda.synchronize()
        q, a, b = torch.ones(n), torch.zeros(n), torch.zeros(n)
        native.adamw(q, a, b, g.cpu(), step=1, lr=1e-3, **kw)
        assert torch.equal(p, q) and torch.equal(m, a) and torch.equal(v, b)
