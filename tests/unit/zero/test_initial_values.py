"""Giving parameters of the meta device their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from runtime.zero.initial_values import set_data


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_writes_to_the_buffer_behind_a_parameter_are_not_those_of_a_script(device: str) -> None:
    """The engine tells them apart by the version that in-place operations on the parameter count up."""
    parameter, flat = nn.Parameter(torch.empty(4, device=device)), torch.zeros(8)
    parameter.mark = True  # type: ignore[attr-defined]
    before = id(parameter)
    set_data(parameter, flat[:4])
    version = parameter._version
    flat.fill_(1.0)
    assert parameter._version == version
    assert parameter.tolist() == [1.0] * 4
    assert (id(parameter), parameter.mark, parameter.requires_grad) == (before, True, True)  # type: ignore[attr-defined]
    with torch.no_grad():
        parameter.mul_(2.0)
    assert parameter._version == version + 1
    assert flat.tolist() == [2.0] * 4 + [1.0] * 4
