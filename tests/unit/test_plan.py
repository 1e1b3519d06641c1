"""zerotop plan: closed forms against ZeRO's own table and the engine's layout; advice; and the command itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.advice import advise
from runtime.estimate import guess_shape, guess_units
from runtime.inflight import REDUCTIONS_IN_FLIGHT, borrowed_for_backward
from runtime.models.presets import PRESETS, GPTConfig, parameters, unit_parameters
from runtime.plan import data_parallel, find, plan, stage_layout
from runtime.sizes import format_count, format_size, parse_count, parse_size
from runtime.workload import Workload
from zerotop import cli
from zerotop.commands import plan_text

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
    from runtime.optim.streamed import ring_bytes

    work = workload(stream_chunk_bytes=64 << 20)
    streamed, without = stage_layout(work, 2, offload=True), stage_layout(workload(), 2, offload=True)
    ring = ring_bytes(64 << 20, torch.float32, torch.float32)
    assert streamed.gpu["buffers"] - without.gpu["buffers"] == ring
    assert stage_layout(work, 2).gpu["buffers"] == stage_layout(workload(), 2).gpu["buffers"]


# ---- what is in flight, and traffic ----------------------------------------------------------------------------------
def test_the_pool_is_played_through_as_the_engine_does() -> None:
    schedule = pytest.importorskip("runtime.zero.schedule")
    assert schedule.IN_FLIGHT == REDUCTIONS_IN_FLIGHT


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
    from runtime.memory import Ledger
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


# ---- the command -----------------------------------------------------------------------------------------------------
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def zerotop_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_json_is_one_document_with_every_layout(zerotop_plan: Run) -> None:
    code, out, err = zerotop_plan("gpt-7b", "--gpus", "4", "--vram", "80GiB", "--host-ram", "128GiB", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert len(document["layouts"]) == 9
    by_name = {layout["layout"]: layout for layout in document["layouts"]}
    assert by_name["stage 1"]["gpu_bytes"] == stage_layout(workload(seq_len=2048), 1).gpu_bytes
    assert [name for name, layout in by_name.items() if not layout["fits_vram"]] == ["data parallel", "stage 0"]
    assert [name for name, layout in by_name.items() if not layout["fits_host_ram"]] == ["stage 0 + offload"]
    assert document["workload"]["parameters"] == parameters(PRESETS["gpt-7b"])


def test_a_config_marks_its_own_stage_and_takes_its_own_numbers(zerotop_plan: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
                "zerotop": {"model": {"preset": "gpt-small"}, "data": {"seq_len": 256}},
            }
        )
    )
    code, out, _ = zerotop_plan(str(config), "--gpus", "2")
    assert code == 0
    assert "> stage 2 + offload" in out
    assert "micro-batch 2 x 256 tokens, 4 micro-steps" in out
    document = json.loads(zerotop_plan(str(config), "--gpus", "2", "--stage", "1", "--json")[1])
    assert document["chosen"] == "stage 1 + offload"
    assert document["workload"]["shape"]["vocab_size"] == 320


def test_a_config_of_a_script_is_planned_for_the_model_that_is_named(zerotop_plan: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 1}}')
    code, out, _ = zerotop_plan(str(config), "--gpus", "4", "--model", "7B")
    assert code == 0
    assert "A model of 7.00B parameters, fp32" in out
    assert "names no model" in zerotop_plan(str(config), "--gpus", "4")[1]


def document(zerotop_plan: Run, path: Path, config: dict[str, object], *words: str) -> dict[str, Any]:
    path.write_text(json.dumps(config))
    code, out, err = zerotop_plan(str(path), "--json", *words)
    assert (code, err) == (0, "")
    return json.loads(out)  # type: ignore[no-any-return]


def test_what_the_config_leaves_open_is_said(zerotop_plan: Run, tmp_path: Path) -> None:
    config: dict[str, object] = {"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}
    notes = document(zerotop_plan, tmp_path / "c.json", config)["notes"]
    assert "train_micro_batch_size_per_gpu: 4, our default" in notes
    assert "bf16.enabled: auto, bf16 on a GPU" in notes
    assert any(note.startswith("zerotop.data.seq_len: 512 tokens, our default") for note in notes)
    said = {"train_micro_batch_size_per_gpu": 2, "zerotop": {"data": {"seq_len": 512}}}
    assert not any("default" in note for note in document(zerotop_plan, tmp_path / "c.json", said)["notes"])


def test_features_that_take_no_memory_do_not_refuse_a_plan(zerotop_plan: Run, tmp_path: Path) -> None:
    config: dict[str, object] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    plain = document(zerotop_plan, tmp_path / "c.json", config)
    more = {"data_efficiency": {"enabled": True}, "progressive_layer_drop": {"enabled": True, "theta": 0.5}}
    found = document(zerotop_plan, tmp_path / "c.json", config | more)
    assert found["layouts"] == plain["layouts"]
    assert [note for note in found["notes"] if note.startswith(tuple(more))] == [
        f"{key}: `zerotop launch` refuses it; it makes no difference to these figures." for key in more
    ]
    (tmp_path / "c.json").write_text(json.dumps(config | more | {"amp": {"enabled": True}}))
    code, out, err = zerotop_plan(str(tmp_path / "c.json"))
    assert (code, out) == (2, "")
    assert "amp" in err and "data_efficiency" not in err


def test_units_of_a_scripts_model_do_not_refuse_a_plan(zerotop_plan: Run, tmp_path: Path) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "zerotop": {"units": ["transformer.h.*"]}}
    for words in ([], ["--model", "gpt-7b"], ["--model", "7B"]):
        notes = document(zerotop_plan, tmp_path / "c.json", config, *words)["notes"]
        assert any(note.startswith("zerotop.units names modules of the script's model") for note in notes)


def test_activation_checkpointing_is_said_when_it_is_on(zerotop_plan: Run) -> None:
    checkpointed = ["--set", "activation_checkpointing.number_checkpoints=4"]
    assert "without activation checkpointing" in " ".join(zerotop_plan("gpt-7b")[1].split())
    assert "with activation checkpointing of 4 groups" in " ".join(zerotop_plan("gpt-7b", *checkpointed)[1].split())


def test_ranks_on_a_cpu(zerotop_plan: Run, tmp_path: Path) -> None:
    code, out, _ = zerotop_plan("gpt-small", "--device", "cpu", "--gpus", "2", "--host-ram", "1GiB")
    assert code == 0
    assert "2 ranks on the CPU" in out and "Memory per rank" in out
    assert "GPU" not in out and "offload" not in out
    assert "In 1.00 GiB of host RAM, beside the processes themselves:" in out
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    found = document(zerotop_plan, tmp_path / "c.json", config, "--device", "cpu", "--gpus", "2")
    assert found["chosen"] == "stage 2 + offload"
    assert [one["layout"] for one in found["layouts"]][-2:] == ["stage 3", "stage 2 + offload"]
    assert any("offload moves nothing" in line for line in found["advice"])


def test_a_config_that_offloads_parameters_alone_is_planned_so(zerotop_plan: Run, tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    assert document(zerotop_plan, tmp_path / "c.json", config, "--gpus", "2")["chosen"] == "stage 3 + offload_param"


def test_a_reserve_of_vram_is_planned_where_the_vram_is_known(zerotop_plan: Run, tmp_path: Path) -> None:
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zerotop": {"model": {"preset": "gpt-7b"}, "data": {"seq_len": 2048}, "offload": {"vram_reserve_gib": 20}},
    }

    def optimizer_bytes(*words: str) -> int:
        found = document(zerotop_plan, tmp_path / "c.json", config, "--gpus", "2", *words)
        assert any("vram_reserve_gib" in note for note in found["notes"]) == ("--vram" not in words)
        layout = next(one for one in found["layouts"] if one["layout"] == found["chosen"])
        return int(layout["gpu_bytes_by_category"]["optimizer"])

    assert optimizer_bytes() == optimizer_bytes("--vram", "24GiB") == 0
    assert 0 < optimizer_bytes("--vram", "80GiB") < optimizer_bytes("--vram", "200GiB")


@pytest.mark.parametrize("columns", [60, 80, 118, 200])
def test_bars_and_tables_fit_the_terminal(zerotop_plan: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = zerotop_plan("70B", "--gpus", "8", "--vram", "80GiB")
    widest = max(map(len, out.splitlines()))
    assert widest <= max(columns, 80)
    assert "\x1b" not in out
    assert all(f"{glyph} " in out for glyph, _ in plan_text._GLYPHS.values())


def test_a_bar_is_as_long_as_its_bytes(zerotop_plan: Run) -> None:
    _, out, _ = zerotop_plan("gpt-7b", "--gpus", "4")
    glyphs = {glyph for glyph, _ in plan_text._GLYPHS.values()}
    lines = [line for line in out.splitlines() if "GiB  " in line]
    lengths = [sum(character in glyphs for character in line) for line in lines]
    totals = [layout.gpu_bytes for layout in plan(workload(seq_len=2048))]
    assert len(lengths) == len(totals) == 9
    for length, total in zip(lengths, totals, strict=True):
        assert length == pytest.approx(max(lengths) * total / max(totals), abs=1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpt-tny"], "Did you mean gpt-tiny?"),
        (["nowhere.json"], "no such file"),
        (["7.5"], "'7.5' is no config file, preset or parameter count. Did you mean 7.5B?"),
        (["7"], "Did you mean 7B?"),
        (["7B", "--device", "cpu", "--vram", "80GiB"], "--vram: ranks on the CPU have none; --host-ram"),
        (["gpt-tiny", "--set", 'zerotop.units=["layers.*"]'], "zerotop.units: no module is called 'layers.*'"),
        (["7B", "--gpus", "0"], "--gpus: expected at least 1"),
        (["7B", "--vram", "lots"], "--vram: 'lots' is not a size"),
        (["7B", "--vram", "80"], "--vram: expected a size with a unit, such as 80GiB; got 80"),
        (["7B", "--host-ram", "512"], "--host-ram: expected a size with a unit, such as 80GiB; got 512"),
        (["7B", "--set", "zero_optimization.stag=2"], "stage"),
        (["gpt-7b", "--model", "huge"], "--model: expected one of"),
    ],
)
def test_bad_usage_is_one_clear_message(zerotop_plan: Run, words: list[str], expected: str) -> None:
    code, out, err = zerotop_plan(*words)
    assert (code, out) == (2, "")
    assert expected in err
    assert "Traceback" not in err


def test_batch_sizes_that_do_not_multiply_are_explained(zerotop_plan: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4}
    config.write_text(json.dumps(sizes))
    code, _, err = zerotop_plan(str(config), "--gpus", "4")
    assert code == 2
    assert "64 != 16 x 4 x 4" in err


def test_plain_letters_where_the_encoding_has_no_blocks() -> None:
    command = [sys.executable, "-m", "zerotop", "plan", "gpt-7b", "--gpus", "4", "--vram", "80GiB"]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert "P parameters  G gradients  M masters  O optimizer" in done.stdout
    assert "PPGGGG" in done.stdout


def test_the_parser_registers_itself() -> None:
    from zerotop.commands import plan as command

    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers(dest="command"))
    assert parser.parse_args(["plan", "7B", "--gpus", "2"]).gpus == 2


def test_it_answers_in_a_blink_without_torch_or_numpy() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from zerotop.cli import main; main(['plan', '7B', '--gpus', '8'])\n"
        "taken = time.process_time() - start\n"
        "heavy = {'torch', 'numpy', 'textual', 'zmq', 'tokenizers'} & set(sys.modules)\n"
        "print(f'{taken:.3f} {sorted(heavy)}', file=sys.stderr)"
    )
    fastest_s = 60.0
    deadline = time.monotonic() + 30
    while fastest_s > 0.3 and time.monotonic() < deadline:  # a busy machine must not decide this
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        taken, heavy = done.stderr.strip().split(" ", 1)
        assert heavy == "[]"
        fastest_s = min(fastest_s, float(taken))
    assert fastest_s < 0.3
