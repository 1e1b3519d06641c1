"""Offloaded activations: the same bits, each storage once, none of the parameters, and less memory where they were."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime.config.presets import GPTConfig
from runtime.host.ledger import Ledger
from runtime.host.slabs import SLAB_BYTES, Slabs
from runtime.models import activations
from runtime.models.activations import ActivationOffload, offload_activations
from runtime.models.gpt import GPT
from tests.harness.peak_bytes import peak_bytes

SHAPE = GPTConfig(layers=4, heads=2, dim=32, vocab_size=64, max_seq_len=64)
TOKENS = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(1))


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPE)


def gradients(model: nn.Module, *losses: Tensor, retain_graph: bool = False) -> list[Tensor]:
    for loss in losses:
        loss.backward(retain_graph=retain_graph)
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found  # type: ignore[return-value]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def offloaded(model: GPT, **settings: object) -> ActivationOffload:
    return offload_activations(list(model.blocks), min_bytes=1, **settings)  # type: ignore[arg-type]


def used_bytes(offload: ActivationOffload) -> int:
    return sum(slabs.used_bytes for _, slabs in offload._places.values())


# ---- bits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits(dtype: torch.dtype) -> None:
    model = gpt().to(dtype)
    plain = gradients(model, model(TOKENS, TOKENS))
    offload = offloaded(model)
    for _ in range(3):
        assert same(gradients(model, model(TOKENS, TOKENS)), plain)
    assert offload.offloaded_bytes > 3 * 3 * 2 * 64 * 32 * 10 * dtype.itemsize
    assert used_bytes(offload) == 0
    offload.remove()
    before = offload.offloaded_bytes
    assert same(gradients(model, model(TOKENS, TOKENS)), plain)
    assert offload.offloaded_bytes == before


def test_two_forwards_before_two_backwards_and_a_graph_that_is_kept() -> None:
    model = gpt()
    other = TOKENS.flip(1)
    plain = gradients(model, model(TOKENS, other), model(other, TOKENS))
    offload = offloaded(model)
    first, second = model(TOKENS, other), model(other, TOKENS)
    assert same(gradients(model, first, second), plain)
    plain = gradients(model, model(TOKENS, TOKENS))
    loss = model(TOKENS, TOKENS)
    assert same(gradients(model, loss, retain_graph=True), plain)
    assert same(gradients(model, loss), plain)
    del first, second, loss
    assert used_bytes(offload) == 0


def test_graphs_that_are_dropped_and_forwards_that_fail_give_the_memory_back() -> None:
    model = gpt()
    plain = gradients(model, model(TOKENS, TOKENS))
    offload = offloaded(model)
    for _ in range(2):
        model(TOKENS, TOKENS)  # no backward
    with pytest.raises(IndexError):
        model(TOKENS + 64, TOKENS)
    broken = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TOKENS, TOKENS)
    broken.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # type: ignore[attr-defined]
    assert same(gradients(model, model(TOKENS, TOKENS)), plain)
    gc.collect()
    assert used_bytes(offload) == 0


def test_evaluation_copies_nothing() -> None:
    model = gpt()
    offload = offloaded(model)
    with torch.no_grad():
        model(TOKENS, TOKENS)
    assert offload.offloaded_bytes == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
def test_a_compiled_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 16))
    x = torch.randn(8, 16)
    plain = gradients(model, model(x).square().sum())
    offload = offload_activations(list(model), min_bytes=1)
    model[0].compile(backend="aot_eager")
    for _ in range(2):
        for mine, theirs in zip(gradients(model, model(x).square().sum()), plain, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert offload.offloaded_bytes > 0 and used_bytes(offload) == 0


def test_copies_of_the_model_offload_nothing() -> None:
    model = gpt()
    offload = offloaded(model)
    twin = copy.deepcopy(model)
    twin(TOKENS, TOKENS).backward()
    assert offload.offloaded_bytes == 0


# ---- what is copied --------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Saves its input three times, once as another view, a matrix, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(2 * 16 * 16))
        self.register_buffer("table", torch.rand(8, 16))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        weight = self.flat[: 16 * 16].view(16, 16)
        return (x * shared) @ weight.t() + x * self.table + x.view(16, 8).square().view(8, 16)


def test_every_storage_once_and_no_parameter() -> None:
    blocks = nn.ModuleList(Block() for _ in range(3))
    x, shared = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    offload = offload_activations(list(blocks), min_bytes=1)
    for block in blocks:
        x = block(x, shared)
    # Each of the first two: its input and the product; the first also `shared`.
    assert offload.offloaded_bytes == (2 * 2 + 1) * 8 * 16 * 4
    x.sum().backward()


def test_small_tensors_and_small_slices_stay() -> None:
    class Slices(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2].square().sum() + x[:, 2:].exp().sum()

    blocks = [Slices(), Slices()]
    offload = offload_activations(blocks, min_bytes=1024)
    x = torch.randn(64, 16, requires_grad=True)
    blocks[0](x).backward()
    assert offload.offloaded_bytes == 64 * 14 * 4  # the result of exp


def test_a_modified_activation_is_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y.square()
            y.add_(1)
            return z

    blocks = [Broken(), nn.Identity()]
    offload = offload_activations(blocks, min_bytes=1)
    loss = blocks[0](torch.randn(8, 8, requires_grad=True)).sum()
    assert offload.offloaded_bytes == 256
    with pytest.raises(RuntimeError, match=r"activation of shape \(8, 8\).*modified by an in-place operation"):
        loss.backward()


# ---- memory ----------------------------------------------------------------------------------------------------------
class Wide(nn.Module):
    """Keeps `WIDE` floats for its backward, beside its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(x.repeat(1, 16)).view(x.shape[0], 16, -1).sum(1)


WIDE = 1 << 18


def test_two_blocks_at_a_time_are_on_the_device() -> None:
    blocks = [Wide() for _ in range(8)]

    def train() -> None:
        x = torch.randn(128, WIDE // 128 // 16, requires_grad=True)
        for block in blocks:
            x = block(x)
        x.sum().backward()

    plain = peak_bytes(train)
    ledger = Ledger()
    offload = offload_activations(blocks, ledger=ledger)
    ours = peak_bytes(train)  # host memory is mapped and not of torch's allocator
    assert plain > 8 * 4 * WIDE
    assert ours < 6 * 4 * WIDE  # two blocks', the last one's, and two temporary ones inside a block
    assert ledger.offloaded()["activations"] == SLAB_BYTES and ledger.totals()["activations"] == 0
    assert used_bytes(offload) == 0


def test_activations_are_brought_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    up = activations._HostCopies.up
    monkeypatch.setattr(activations._HostCopies, "up", lambda *given: (happened.append("up"), up(*given))[1])
    blocks = [Wide() for _ in range(5)]
    offload_activations(blocks)
    x = torch.randn(128, WIDE // 128 // 16, requires_grad=True)
    for index, block in enumerate(blocks):
        x = block(x)
        x.register_hook(lambda _gradient, index=index: happened.append(f"backward {index}"))  # type: ignore[misc]
    x.sum().backward()
    expected = ["backward 4", "backward 3", "up", "up", "backward 2", "up", "backward 1", "up", "backward 0"]
    assert happened == expected


# ---- activation checkpointing ---------------------------------------------------------------------------------------
class Checkpointed(nn.Module):
    def __init__(self, through: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4))
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.through(block, x, use_reentrant=False)
        return x.square().mean()


def test_with_checkpointing_the_inputs_are_offloaded() -> None:
    x = torch.randn(32, 16)
    plain_model = Checkpointed(checkpoint)
    plain = gradients(plain_model, plain_model(x))
    model = Checkpointed(checkpoint)
    offload = offload_activations(list(model.blocks), min_bytes=1)
    assert same(gradients(model, model(x)), plain)
    assert offload.offloaded_bytes == 0  # inside torch's own checkpoint
    model.through = offload.checkpoint
    assert same(gradients(model, model(x)), plain)
    assert offload.offloaded_bytes == 4 * 32 * 16 * 4
    assert used_bytes(offload) == 0


# ---- host memory -----------------------------------------------------------------------------------------------------
def test_slabs_join_what_is_given_back() -> None:
    slabs = Slabs(pin=False)
    pieces = [slabs.take(1000) for _ in range(5)]
    assert slabs.held_bytes == SLAB_BYTES and slabs.used_bytes == 5 * 1024
    addresses = [piece.tensor.data_ptr() for piece in pieces]
    for index in (1, 3, 2):
        pieces[index] = None  # type: ignore[call-overload]
    hole = slabs.take(3 * 1024)
    assert hole.tensor.data_ptr() == addresses[1]
    pieces.clear()
    del hole
    assert slabs.used_bytes == 0
    whole = slabs.take(SLAB_BYTES)
    assert whole.tensor.data_ptr() == addresses[0] and slabs.held_bytes == SLAB_BYTES


def test_slabs_that_were_needed_once_are_freed() -> None:
    ledger = Ledger()
    slabs = Slabs(pin=False, ledger=ledger, category="activations")
    large = slabs.take(3 * SLAB_BYTES)
    memory = weakref.ref(large.tensor.untyped_storage())
    assert ledger.offloaded()["activations"] == 3 * SLAB_BYTES
    del large
    assert slabs.held_bytes == 3 * SLAB_BYTES  # it may be needed again
    small = slabs.take(100)
    del small
    assert slabs.held_bytes == 0 and ledger.offloaded()["activations"] == 0
    assert memory() is None
