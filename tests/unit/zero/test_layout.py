"""Properties of the shard arithmetic: every element has exactly one owner, whatever the sizes and the world."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from runtime.engine.build import _dtypes, _specs
from runtime.engine.model_checks import TRAINABLE
from runtime.plan.layout import ALIGNMENT, Layout
from runtime.zero.cut import cut
from runtime.zero.stage import policy_for

shapes = st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=0, max_size=12)


def layout_of(sizes: list[list[int]], world: int) -> Layout:
    return Layout.of([(f"p{i}", shape, i % 3) for i, shape in enumerate(sorted(sizes))], world)


@given(shapes, st.integers(1, 9))
def test_ranges_tile_the_buffer(sizes, world):
    layout = layout_of(sizes, world)
    ends = [layout.shard(rank) for rank in range(world)]
    assert ends[0][0] == 0 and ends[-1][1] == layout.numel
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert layout.shard_numel % ALIGNMENT == 0
    assert 0 <= layout.numel - layout.used < world * ALIGNMENT


@given(shapes, st.integers(1, 9))
def test_slices_cover_every_parameter_element_exactly_once(sizes, world):
    layout = layout_of(sizes, world)
    owned: dict[str, list[tuple[int, int]]] = {slot.name: [] for slot in layout.slots}
    for rank in range(world):
        start, end = layout.shard(rank)
        for part in layout.slices(start, end):
            assert part.shard_start >= 0 and part.shard_start + part.numel <= layout.shard_numel
            owned[part.name].append((part.param_start, part.param_start + part.numel))
    for slot in layout.slots:
        parts = sorted(owned[slot.name])
        assert sum(high - low for low, high in parts) == slot.numel == math.prod(slot.shape)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))


@given(shapes, st.integers(1, 9))
def test_segments_hold_one_group_each_and_no_padding(sizes, world):
    layout = layout_of(sizes, world)
    group_at = [slot.group for slot in layout.slots for _ in range(slot.numel)]
    covered = 0
    for rank in range(world):
        start, end = layout.shard(rank)
        for segment in layout.segments(start, end):
            assert segment.start < segment.end
            assert set(group_at[start + segment.start : start + segment.end]) == {segment.group}
            covered += segment.end - segment.start
    assert covered == layout.used


# ---- the flats that setup makes of a model ---------------------------------------------------------------------------
FP32, BF16, FP16, INT = torch.float32, torch.bfloat16, torch.float16, torch.int64


class Ragged(nn.Module):
    """Parameters of given shapes and dtypes."""

    def __init__(self, parameters: list[tuple[list[int], torch.dtype, bool]]) -> None:
        super().__init__()
        for index, (shape, dtype, trained) in enumerate(parameters):
            trained = trained and dtype in TRAINABLE
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=trained))


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Blocks, something before and after them, a parameter of the model's own, and parameters that two modules share;
    all dtypes anywhere, trained or not."""
    parameter = st.tuples(
        st.lists(st.integers(0, 9), max_size=3), st.sampled_from([FP32, BF16, FP16, INT]), st.booleans()
    )
    parts = st.lists(parameter, max_size=4)
    model = nn.Module()
    model.before = Ragged(draw(parts))
    model.blocks = nn.ModuleList(Ragged(draw(parts)) for _ in range(draw(st.integers(0, 4))))
    model.after = Ragged(draw(parts))
    model.own = nn.Parameter(torch.zeros(draw(st.integers(1, 9))))
    modules = [model.before, *model.blocks, model.after]
    for _ in range(draw(st.integers(0, 2))):
        giver, taker = draw(st.sampled_from(modules)), draw(st.sampled_from(modules))
        if giver is not taker and giver._parameters:
            taker.shared = giver._parameters[draw(st.sampled_from(sorted(giver._parameters)))]
    return model


@settings(deadline=None)
@given(models(), st.integers(0, 3), st.integers(1, 5), st.sampled_from([FP32, BF16]), st.integers(0, 40), st.data())
def test_every_element_of_a_mixed_model_has_one_owner(model, stage, world, precision, small_below, data):
    named = dict(model.named_parameters())
    trained = [p for p in named.values() if p.requires_grad]
    group_of = {p: data.draw(st.integers(0, 2)) for p in trained if data.draw(st.integers(0, 9))}  # some are left out
    frozen = {p for p in named.values() if p not in group_of}
    policy = policy_for(stage, False)
    parts = SimpleNamespace(policy=policy, units=[], frozen=[])
    specs = _specs(cut(model, None, small_below), parts, world > 1, group_of, frozen, _dtypes(model, precision))

    owners = {name: torch.zeros(p.numel(), dtype=torch.int64) for name, p in named.items()}
    for spec in specs:
        assert all((computes_in(p, precision), p in group_of) == (spec.dtype, spec.trained) for _, p, _ in spec.members)
        groups = [group for _, _, group in spec.members]
        assert groups == sorted(groups) == [group_of.get(p, 0) for _, p, _ in spec.members]
        layout = Layout.of([(name, p.shape, group) for name, p, group in spec.members], world)
        for rank in range(world):
            ranges = policy.state_shard(layout, rank) if spec.trained else layout.shard(rank)
            for part in layout.slices(*ranges):
                owners[part.name][part.param_start : part.param_start + part.numel] += 1
    whole = {name for name, _ in parts.frozen}
    assert len(whole) == len(parts.frozen)
    for name, parameter in named.items():
        everywhere = parameter in group_of and not policy.shards_states  # stage 0: every rank updates everything
        expected = 0 if name in whole else world if everywhere else 1
        assert owners[name].eq(expected).all(), name
        assert name not in whole or parameter in frozen


def computes_in(parameter: torch.Tensor, precision: torch.dtype) -> torch.dtype:
    """Under 16-bit precision all floating parameters have it; under fp32 they keep their own."""
    return precision if precision == BF16 and parameter.is_floating_point() else parameter.dtype
