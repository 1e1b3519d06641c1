"""zerotop plan: closed forms against ZeRO's own table and the engine's layout; and advice."""

from __future__ import annotations

import dataclasses

import pytest

from runtime.config.presets import PRESETS, GPTConfig, parameters, unit_parameters
from runtime.diagnose.advice import advise
from runtime.plan import data_parallel, find, plan, stage_layout
from runtime.plan.constants import REDUCTIONS_IN_FLIGHT
from runtime.plan.estimate import guess_shape, guess_units
from runtime.plan.inflight import borrowed_for_backward
from runtime.plan.workload import Workload
from runtime.wire.sizes import format_count, format_size, parse_count, parse_size

GIB = 2**30


def workload(name: str = "gpt-7b", world_size: int = 4, **changes: object) -> Workload:
    shape = PRESETS[name]
    return dataclasses.replace(Workload(name, tuple(unit_parameters(shape)), shape, world_size), **changes)  # type: ignore[arg-type]


def even(psi: int, world_size: int, **changes: object) -> Workload:
    """Units whose sizes need no padding at this world size."""
    units = tuple((f"blocks.{index}", psi // 8) for index in range(8))
    base = Workload("even", units, PRESETS["gpt-7b"], world_size)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


# ---- states: exact ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_states_with_16_bit_accumulation_are_zeros_own_table(world_size: int) -> None:
    psi = 8 * 64 * 8 * 1000
    work = even(psi, world_size, grad_accum_dtype="bf16")
    expected = {
        0: 16 * psi,
        1: 4 * psi + 12 * psi // world_size,
        2: 2 * psi + 14 * psi // world_size,
        3: 16 * psi // world_size,
    }
    assert {stage: stage_layout(work, stage).state_bytes for stage in range(4)} == expected
    assert data_parallel(work).state_bytes == 16 * psi


def test_fp32_accumulation_takes_two_bytes_more_per_kept_gradient() -> None:
    psi = 8 * 64 * 4 * 1000
    exact, rounded = even(psi, 4), even(psi, 4, grad_accum_dtype="bf16")
    more = {
        stage: stage_layout(exact, stage).state_bytes - stage_layout(rounded, stage).state_bytes for stage in range(4)
    }
    assert more == {0: 2 * psi, 1: 2 * psi, 2: 2 * psi // 4, 3: 2 * psi // 4}


def test_fp32_parameters_are_their_own_masters_unless_offloaded() -> None:
    psi = 8 * 64 * 4 * 1000
    work = even(psi, 4, precision="fp32")
    assert [stage_layout(work, stage).state_bytes for stage in range(4)] == [
        16 * psi,
        8 * psi + 8 * psi // 4,
        4 * psi + 12 * psi // 4,
        16 * psi // 4,
    ]
    assert all(stage_layout(work, stage).gpu["masters"] == 0 for stage in range(4))
    assert stage_layout(work, 2, offload=True).host["masters"] == 4 * psi


def test_units_are_padded_to_64_elements_per_rank() -> None:
    work = Workload("odd", (("blocks.0", 1), ("blocks.1", 1000)), PRESETS["gpt-tiny"], 3)
    assert work.padded_parameters == 192 + 1152
    assert stage_layout(work, 3).gpu["optimizer"] == 8 * (192 + 1152) // 3


def test_offload_moves_states_to_the_host_and_loses_none() -> None:
    psi = 8 * 64 * 4 * 1000
    work = even(psi, 4)
    on_gpu, offloaded = stage_layout(work, 2), stage_layout(work, 2, offload=True)
    assert offloaded.state_bytes == 2 * psi
    moved = sum(offloaded.host[name] for name in ("gradients", "masters", "optimizer"))
    assert moved == 4 * (on_gpu.state_bytes - offloaded.state_bytes)
    whole = stage_layout(work, 0, offload=True)
    assert whole.host["optimizer"] == 4 * stage_layout(work, 1, offload=True).host["optimizer"]


def test_offload_ratio_splits_the_states() -> None:
    work = even(8 * 64 * 4 * 1000, 4, offload_ratio=0.25)
    on_gpu, split = stage_layout(work, 2), stage_layout(work, 2, offload=True)
    assert split.gpu["optimizer"] == on_gpu.gpu["optimizer"] * 3 // 4
    assert split.host["optimizer"] == on_gpu.gpu["optimizer"]  # a quarter of each of four ranks


def test_sgd_keeps_no_moments() -> None:
    assert stage_layout(workload(moments=0), 0).gpu["optimizer"] == 0


# ---- what a config changes -------------------------------------------------------------------------------------------
def test_whole_gradients_until_the_boundary_are_what_stage_1_keeps_and_sends() -> None:
    """zerotop.accumulate "local"."""
    psi = 8 * 64 * 4 * 1000
    work = even(psi, 4, accumulation=8)
    local = dataclasses.replace(work, accumulate_locally=True)
    for stage in (2, 3):
        whole, own = stage_layout(local, stage), stage_layout(work, stage)
        assert whole.gpu["gradients"] == 4 * psi
        assert own.gpu["gradients"] == psi
        assert whole.sent_bytes < own.sent_bytes
    assert stage_layout(local, 2).gpu == stage_layout(work, 1).gpu
    assert stage_layout(local, 2).sent_bytes == stage_layout(work, 1).sent_bytes
    assert stage_layout(local, 2, offload=True).host["gradients"] == 0


def test_on_a_cpu_offload_takes_no_copies_and_moves_nothing() -> None:
    work = workload("gpt-small", 2, device="cpu", precision="fp32")
    for stage in range(4):
        kept, offloaded = stage_layout(work, stage), stage_layout(work, stage, offload=True)
        assert 2 * kept.gpu_bytes == 2 * offloaded.gpu_bytes + offloaded.host_bytes
        assert (offloaded.host["masters"], offloaded.host["staging"]) == (0, 0)
        assert (offloaded.pcie_bytes, offloaded.pinned_bytes, kept.gpu["context"]) == (0, 0, 0)


def test_parameters_alone_are_offloaded_at_stage_3() -> None:
    work = workload("gpt-7b", 4, offload_parameters=True, pin_memory=False)
    alone = find(plan(work), 3, parameters=True)
    assert alone.label == "stage 3 + offload_param"
    kept, both = find(plan(work), 3), find(plan(work), 3, offload=True)
    assert alone.gpu["parameters"] == both.gpu["parameters"] == 0
    assert alone.host["parameters"] == alone.host_bytes == alone.pinned_bytes == 4 * kept.gpu["parameters"]
    assert alone.gpu["optimizer"] == kept.gpu["optimizer"]
    assert both.pinned_bytes == both.host["parameters"]  # pin_memory of offload_param alone
    assert len(plan(workload())) == len(plan(work)) - 1


def test_inputs_of_checkpointed_layers_wait_on_the_host() -> None:
    work = workload("gpt-7b", 4, segments=32)
    moved = dataclasses.replace(work, inputs_on_host=True)
    here, there = stage_layout(work, 2), stage_layout(moved, 2)
    one_input = 2 * 4096 * 1024
    assert there.host == {"activations": 4 * 32 * one_input}
    assert here.gpu["activations"] - there.gpu["activations"] == 31 * one_input
    assert there.pinned_bytes == there.host_bytes
    on_a_cpu = dataclasses.replace(moved, device="cpu")
    assert stage_layout(on_a_cpu, 2).host == {}


@pytest.mark.parametrize("batch", [1, 64])
def test_a_tied_tables_gradient_is_a_sum(batch: int) -> None:
    """The head's part is there as backward starts; at its end the embedding's and the sum are, too."""
    tied = workload("gpt-124m", 2, micro_batch=batch, seq_len=32)
    gpu, table = stage_layout(tied, 2).gpu, 2 * 50304 * 768
    kept = gpu["activations"] + gpu["logits"]
    assert kept + gpu["temporary"] == max(kept + table, 3 * table)
    assert stage_layout(workload("gpt-7b"), 2).gpu["temporary"] == 2 * 50304 * 4096


def test_pieces_that_stream_through_the_gpu_are_what_the_streamer_takes() -> None:
    torch = pytest.importorskip("torch")
    from runtime.offload.streamed import ring_bytes

    work = workload(stream_chunk_bytes=64 << 20)
    streamed, without = stage_layout(work, 2, offload=True), stage_layout(workload(), 2, offload=True)
    ring = ring_bytes(64 << 20, torch.float32, torch.float32)
    assert streamed.gpu["buffers"] - without.gpu["buffers"] == ring
    assert stage_layout(work, 2).gpu["buffers"] == stage_layout(workload(), 2).gpu["buffers"]


# ---- what is in flight, and traffic ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([("a", 64)], 64),
        ([(f"blocks.{index}", 64) for index in range(10)], 2 * 64),  # one is reduced while the next is filled
        ([("root", 640), *((f"blocks.{index}", 64) for index in range(10))], 2 * 64 + 640),
        ([("small", 64), *((f"blocks.{index}", 64) for index in range(10))], 3 * 64),  # these are open all along
        # the head's buffer is too small for a block and makes room, a block's for the embedding
        ([("embedding", 192), *((f"blocks.{index}", 128) for index in range(4)), ("head", 64)], 128 + 192),
    ],
)
def test_buffers_borrowed_for_a_backward(units: list[tuple[str, int]], expected: int) -> None:
    assert borrowed_for_backward(units) == expected


def test_the_pool_is_what_the_engines_pool_lends_out() -> None:
    """The engine's own BufferPool, driven in the order of a backward, allocates what the closed form says."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from runtime.comm import Done
    from runtime.host.ledger import Ledger
    from runtime.zero.pool import BufferPool

    work = workload("gpt-tiny", world_size=2)
    comm = SimpleNamespace(empty=lambda numel, dtype: torch.empty(numel, dtype=dtype), release=lambda buffer: None)
    ledger = Ledger()
    pool = BufferPool(comm, ledger)
    flying: list[object] = []
    for name, numel in reversed(work.units):
        assert name != "root"
        buffer = pool.borrow(-(-numel // 128) * 128, torch.float32)
        if len(flying) == REDUCTIONS_IN_FLIGHT:
            pool.give_back(flying.pop(0), Done())
        flying.append(buffer)
    assert ledger.peaks()["communication"] == 4 * borrowed_for_backward(work.padded_units)


def test_traffic_in_closed_form() -> None:
    psi, ranks = 8 * 64 * 4 * 1000, 4
    work = even(psi, ranks, accumulation=8)
    ring = {stage: stage_layout(work, stage).sent_bytes * ranks // (ranks - 1) for stage in range(4)}
    assert ring == {0: 8 * psi, 1: 6 * psi, 2: 8 * 2 * psi + 2 * psi, 3: 8 * (2 + 2 + 2) * psi}
    assert data_parallel(work).sent_bytes == 8 * psi * 3 // 4
    assert all(layout.sent_bytes == 0 for layout in plan(even(psi, 1)))


def test_what_gradients_send_follows_their_precision() -> None:
    psi = 8 * 64 * 4 * 1000
    assert stage_layout(even(psi, 4), 2).sent_bytes == 4 * psi * 3 // 4  # the model's own, and 2 for the parameters
    assert stage_layout(even(psi, 4, reduce_dtype="fp32"), 2).sent_bytes == 6 * psi * 3 // 4
    assert stage_layout(even(psi, 4, reduce_dtype="bf16"), 1).sent_bytes == 4 * psi * 3 // 4


def test_small_parameters_stay_whole_at_stage_3_and_travel_once_a_step() -> None:
    units = (("small", 6400), *((f"blocks.{index}", 64000) for index in range(4)))
    work = Workload("w", units, PRESETS["gpt-tiny"], 4, precision="bf16", accumulation=2)
    assert stage_layout(work, 3).gpu["parameters"] == 2 * (6400 + 4 * 16000)
    per_small, per_large = 2 * 2 + 2, 2 * (2 + 2 + 2)
    assert stage_layout(work, 3).sent_bytes == (per_small * 6400 + per_large * 256000) * 3 // 4


def test_offload_copies_gradients_down_and_parameters_up() -> None:
    psi = 8 * 64 * 4 * 1000
    assert stage_layout(even(psi, 4), 2, offload=True).pcie_bytes == (2 + 2) * psi // 4
    assert stage_layout(even(psi, 4, accumulation=3), 2, offload=True).pcie_bytes == (6 + 2) * psi // 4
    assert stage_layout(even(psi, 4), 2).pcie_bytes == 0


@pytest.mark.parametrize("changes", [{"world_size": 0}, {"precision": "int8"}, {"offload_ratio": 1.5}, {"units": ()}])
def test_impossible_workloads_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        workload(**changes)


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="0, 1, 2, 3, got 4"):
        stage_layout(workload(), 4)


# ---- guesses from a count --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 5_000, 3_300_000, 124_000_000, 7_000_000_000, 70_000_000_000, 10**12])
def test_guessed_units_add_up_exactly(count: int) -> None:
    shape = guess_shape(count, 50304 if count > 10**8 else 320, 1024)
    units = guess_units(count, shape)
    assert sum(numel for _, numel in units) == count
    assert all(numel >= 0 for _, numel in units)
    assert len(units) == (shape.layers + 2 if shape.layers > 1 else 1)


def test_the_guess_for_7b_is_near_the_7b_preset() -> None:
    shape = guess_shape(parameters(PRESETS["gpt-7b"]), 50304, 2048)
    assert (shape.layers, shape.dim) == (32, 4096)


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * GIB),
        ("80GB", 80 * 10**9),
        ("24G", 24 * GIB),
        ("24g", 24 * GIB),
        ("1.5 TiB", 3 * 2**39),
        ("9B", 9),
    ],
)
def test_parse_size(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-5G", "0B", "80iB", "80GiBs", "1e9", "nan"])
def test_what_is_no_size_says_what_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"80GiB|more than 0"):
        parse_size(text)


@pytest.mark.parametrize("text", ["80", " 80 ", "1024", "1.5"])
def test_a_bare_number_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=f"^expected a size with a unit, such as 80GiB; got {text.strip()}$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7B", 7 * 10**9),
        ("1.3b", 1300 * 10**6),
        ("3,311,872", 3311872),
        ("7e9", 7 * 10**9),
        ("1.5E+3", 1500),
        ("7X", None),
        ("0", None),
        ("gpt-7b", None),
        ("7", None),
        ("7.5", None),
        ("1000.5", None),
        ("7e-3", None),
        ("7e9B", None),
    ],
)
def test_parse_count(text: str, expected: int | None) -> None:
    assert parse_count(text) == expected


def test_formats_round_trip_in_three_digits() -> None:
    assert [format_size(size) for size in (0, 512, 1023, 1024, 39.5 * GIB, 1.21 * 2**40)] == [
        "0 B", "512 B", "1.00 KiB", "1.00 KiB", "39.5 GiB", "1.21 TiB"
    ]  # fmt: skip
    assert [format_count(count) for count in (999, 3311872, 6854807552, 124 * 10**6)] == [
        "999",
        "3.31M",
        "6.85B",
        "124M",
    ]


# ---- advice ----------------------------------------------------------------------------------------------------------
def said(work: Workload, **limits: object) -> str:
    return "\n".join(advise(work, plan(work), **limits))  # type: ignore[arg-type]


def test_one_gpu_is_told_that_zero_saves_nothing() -> None:
    text = said(workload(world_size=1))
    assert "stages 1 to 3 save nothing" in text
    assert "Only offload lowers VRAM" in text
    assert "save nothing" not in said(workload(world_size=2))


def test_tiny_models_are_told_that_states_do_not_matter() -> None:
    assert "The states are only" in said(workload("gpt-tiny"))
    assert "The states are only" not in said(workload("gpt-7b"))


def test_one_unit_and_no_moments_is_told_where_zero_costs_memory() -> None:
    """SGD has no moments to share out, and a model of one unit is whole in flight."""
    work = Workload("one unit", (("root", 64 * 10**6),), GPTConfig(1, 1, 64, 64, 64), 2, precision="fp32", moments=0)
    layouts = plan(work)
    assert find(layouts, 3).variable_bytes > data_parallel(work).variable_bytes
    assert "ZeRO costs memory here: stage 3" in said(work)


def test_padding_is_named_as_the_reason_where_it_is() -> None:
    units = tuple((f"blocks.{index}", 10) for index in range(4))
    assert "padding to 64 elements per rank" in said(Workload("crumbs", units, GPTConfig(1, 1, 8, 8, 8), 8))


def test_accumulation_is_told_that_stage_2_sends_more_than_stage_1() -> None:
    assert "With 8 micro-steps stage 2 sends" in said(workload(accumulation=8))
    assert "micro-steps stage 2 sends" not in said(workload(accumulation=1))


def test_the_copy_for_checkpoints_is_named_unless_it_is_small_or_not_made() -> None:
    work = workload("gpt-7b")
    copied = format_size(12 * work.padded_parameters)
    assert f"from a copy of the states: at stage 2 {copied} of pinned host RAM more" in said(work)
    assert {layout.snapshot_bytes for layout in plan(work) if not layout.offload and layout.stage is not None} == {
        12 * work.padded_parameters
    }
    small = find(plan(work), 2, offload=True)
    assert small.snapshot_bytes == work.world_size * 64 * 2**20
    for silent in (said(workload("gpt-tiny")), said(dataclasses.replace(work, checkpoints=False))):
        assert "Checkpoints are written" not in silent
    assert "512 MiB of pinned host RAM more" not in said(work, chosen=small)
    part = dataclasses.replace(work, offload_ratio=0.4)
    words = said(part, chosen=find(plan(part), 2, offload=True))
    assert "from a copy of the states that aren't offloaded: at stage 2 + offload" in words


def test_host_ram_is_compared_with_what_offload_needs() -> None:
    assert "not enough for stage 0 + offload (316 GiB)" in said(workload(), host_ram_bytes=200 * GIB)
    assert "is enough for every offload (316 GiB at most)" in said(workload(), host_ram_bytes=512 * GIB)


@pytest.mark.parametrize(
    ("changes", "vram_gib", "expected"),
    [
        ({}, 200, "Data parallel fits"),
        ({}, 80, "The smallest change that fits: stage 1."),
        ({}, 60, "The smallest change that fits: stage 2."),
        ({"micro_batch": 8}, 60, "stage 2, train_micro_batch_size_per_gpu 4 with gradient_accumulation_steps 2."),
        ({}, 44, "The smallest change that fits: stage 3."),
        ({}, 30, "The smallest change that fits: stage 2 + offload."),
        ({}, 17, "The smallest change that fits: stage 3 + offload."),
        ({}, 10, "The smallest change that fits: 8 GPUs at stage 3 + offload."),
        ({}, 1, "Nothing up to 4096 GPUs fits."),
    ],
)
def test_the_smallest_change_that_fits(changes: dict[str, object], vram_gib: float, expected: str) -> None:
    assert expected in said(workload(**changes), vram_bytes=int(vram_gib * GIB))


def test_a_change_that_is_advised_does_fit() -> None:
    for vram_gib in range(12, 130, 3):
        work = workload(micro_batch=4)
        text = said(work, vram_bytes=vram_gib * GIB)
        if "smallest change that fits: stage" in text and "train_micro" not in text:
            words = text.split("smallest change that fits: stage ")[1]
            layout = stage_layout(work, int(words[0]), offload=words[1:].startswith(" + offload"))
            assert layout.gpu_bytes <= vram_gib * GIB
