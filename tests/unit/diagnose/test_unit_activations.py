from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.diagnose.unit_activations import UnitActivations, by_kind


class Meter:
    """Stands in for the allocator: what each block's forward keeps is added by hand."""

    def __init__(self) -> None:
        self.nbytes: int | None = 0

    def read(self) -> int | None:
        return self.nbytes


class Block(nn.Module):
    def __init__(self, meter: Meter, keeps: int) -> None:
        super().__init__()
        self.linear, self.meter, self.keeps = nn.Linear(4, 4), meter, keeps

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.meter.nbytes is not None:
            self.meter.nbytes += self.keeps
        result: torch.Tensor = self.linear(inputs)
        return result


def test_the_most_that_a_forward_of_each_unit_has_left() -> None:
    meter = Meter()
    blocks = {"blocks.0": Block(meter, 100), "blocks.1": Block(meter, 300), "head": Block(meter, -50)}
    measured = UnitActivations([(name, [block]) for name, block in blocks.items()], meter.read)
    blocks["head"](torch.ones(4))  # not yet
    measured.begin()
    for block in blocks.values():
        block(torch.ones(4))
    blocks["blocks.0"].keeps = 70
    blocks["blocks.0"](torch.ones(4))
    measured.stop()
    blocks["blocks.0"].keeps = 9000
    blocks["blocks.0"](torch.ones(4))
    assert measured.kept == {"blocks.0": 100, "blocks.1": 300, "head": 0}
    assert by_kind(measured.kept) == {"blocks.*": (2, 400), "head": (1, 0)}


def test_a_forward_that_backward_computes_again_does_not_count() -> None:
    meter, phase = Meter(), "forward"
    block = Block(meter, 100)
    measured = UnitActivations([("block", [block])], meter.read, lambda: phase == "forward")
    measured.begin()
    output = checkpoint(block, torch.ones(4, requires_grad=True), use_reentrant=False)
    phase, block.keeps = "backward", 5000
    output.sum().backward()
    assert measured.kept == {"block": 100}


def test_nothing_is_known_where_nothing_can_be_measured() -> None:
    meter = Meter()
    meter.nbytes = None
    block = Block(meter, 100)
    measured = UnitActivations([("block", [block])], meter.read)
    measured.begin()
    block(torch.ones(4))
    assert measured.kept == {}
