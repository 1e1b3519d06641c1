"""What is advised when memory ran out: each change, made in the config and planned, saves what was promised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.config import load
from runtime.config.presets import PRESETS
from runtime.config.resolved import Resolved
from runtime.diagnose.remedies import Remedy, Shortage, remedies, remedy_lines
from runtime.plan import find, plan
from runtime.plan.estimate import activation_bytes
from runtime.plan.workload import Workload, built_in_workload, workload_of
from tests.harness.model_headers import llama

GIB = 2**30
CPU_OFFLOAD = {"device": "cpu", "pin_memory": True}


def config_of(stage: int = 0, micro: int = 4, preset: str = "gpt-350m", **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
        "zerotop": {"model": {"preset": preset}, "data": {"seq_len": 1024}},
    }


def resolve(config: dict[str, Any], device: str = "cuda", world_size: int = 4) -> Resolved:
    return load(config).resolve(world_size, device)  # type: ignore[arg-type]


def workload(config: Resolved) -> Workload:
    found = built_in_workload(config, Path())
    assert found is not None
    return found


def changed(config: dict[str, Any], remedy: Remedy) -> dict[str, Any]:
    """The config as the user would edit it."""
    edited = json.loads(json.dumps(config))  # sections that share a value here do not in a file
    for key, (old, new) in remedy.changes.items():
        *path, last = key.split(".")
        section = edited
        for part in path:
            section = section.setdefault(part, {})
        if old is not None:
            assert last == "ratio" or section[last] == old or isinstance(old, dict)
        if new is None:
            del section[last]
        else:
            section[last] = new
    return edited


def planned(config: Resolved, shortage: Shortage) -> int:
    """Bytes of the memory that ran out, by `zerotop plan`'s own arithmetic."""
    work = workload(config)
    offload, parameters = config.offload_optimizer is not None, config.offload_param is not None
    layout = find(plan(work), config.stage, offload, parameters)
    if config.device == "cpu":
        return layout.gpu_bytes * work.world_size + layout.host_bytes
    return layout.gpu_bytes if shortage.place == "device" else layout.host_bytes


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain": (config_of(), "cuda", "device"),
    "stage 2": (config_of(2), "cuda", "device"),
    "micro batch of 6": (config_of(1, micro=6), "cuda", "device"),
    "stage 3": (config_of(3, micro=1, preset="gpt-7b"), "cuda", "device"),
    "stage 3 with offload": (config_of(3, micro=1, preset="gpt-7b", offload_optimizer=CPU_OFFLOAD), "cuda", "device"),
    "half offloaded": (config_of(2, offload_optimizer={**CPU_OFFLOAD, "ratio": 0.5}), "cuda", "device"),
    "host, stage 0": (config_of(0, offload_optimizer=CPU_OFFLOAD), "cuda", "host"),
    "host, stage 3": (config_of(3, offload_optimizer=CPU_OFFLOAD, offload_param=CPU_OFFLOAD), "cuda", "host"),
    "parameters offloaded": (config_of(3, micro=1, offload_param=CPU_OFFLOAD), "cuda", "device"),
    "host, parameters alone": (config_of(3, offload_param=CPU_OFFLOAD), "cuda", "host"),
    "cpu": (config_of(1), "cpu", "host"),
    "cpu, offload": (config_of(2, offload_optimizer=CPU_OFFLOAD), "cpu", "host"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 4])
def test_each_change_saves_what_the_plan_of_the_changed_config_says(case: str, world_size: int) -> None:
    given, device, place = CASES[case]
    config = resolve(given, device, world_size)
    shortage = Shortage(place)  # type: ignore[arg-type]
    found = remedies(workload(config), config, shortage)
    assert len(found) <= 4
    assert [one.saves_bytes for one in found] == sorted((one.saves_bytes for one in found), reverse=True)  # type: ignore[type-var]
    for remedy in found:
        after = resolve(changed(given, remedy), device, world_size)
        assert planned(config, shortage) - planned(after, shortage) == remedy.saves_bytes, remedy
        assert remedy.saves_bytes is not None and remedy.saves_bytes > 0
        assert after.global_batch == config.global_batch


def keys(found: list[Remedy]) -> list[str]:
    return [next(iter(one.changes)).rpartition(".")[2] for one in found]


def test_what_is_advised_where() -> None:
    def advised(case: str, world_size: int = 4, **changes: Any) -> list[str]:
        given, device, place = CASES[case]
        config = resolve(given, device, world_size)
        return keys(remedies(workload(config), config, Shortage(place, **changes)))  # type: ignore[arg-type]

    everything = {"stage", "train_micro_batch_size_per_gpu", "activation_checkpointing", "offload_optimizer"}
    assert set(advised("plain")) == everything
    assert "stage" not in advised("plain", world_size=1)  # nobody to share with
    assert "offload_optimizer" not in advised("plain", free_host_bytes=GIB // 8)  # it would not start
    assert "train_micro_batch_size_per_gpu" not in advised("stage 3")  # it is 1 already
    assert "offload_param" in advised("stage 3 with offload")
    assert "ratio" in advised("half offloaded")
    assert advised("host, stage 0")[0] == "stage"
    assert set(advised("host, stage 3", free_device_bytes=80 * GIB)) == {"offload_param", "ratio"}
    assert advised("host, stage 3", free_device_bytes=0) == []
    assert "offload_optimizer" not in advised("cpu")  # one memory
    given, _, _ = CASES["plain"]
    config = resolve(given)
    assert remedies(workload(config), config, Shortage("host")) == []  # the engine keeps nothing there


def test_words_are_the_users_keys() -> None:
    config = resolve(config_of())
    found = remedies(workload(config), config, Shortage("device"))
    texts = {next(iter(one.changes)): one.text(" per GPU") for one in found}
    batch = texts["train_micro_batch_size_per_gpu"]
    assert batch.startswith(
        '"train_micro_batch_size_per_gpu": 4 -> 2, "gradient_accumulation_steps": 4 -> 8: saves about'
    )
    assert batch.endswith("per GPU, same global batch")
    assert texts["zero_optimization.stage"].startswith('"zero_optimization.stage": 0 -> ')
    assert (
        '"zero_optimization.offload_optimizer": {"device": "cpu", "pin_memory": true}: saves'
        in (texts["zero_optimization.offload_optimizer"])
    )
    assert "of host memory" in texts["zero_optimization.offload_optimizer"]


def test_the_largest_micro_batch_that_is_enough() -> None:
    config = resolve(config_of(micro=8))
    whole = workload(config)

    def micro(need_bytes: int | None) -> int:
        found = remedies(whole, config, Shortage("device", need_bytes=need_bytes))
        return next(int(n) for one in found for k, (_, n) in one.changes.items() if k.startswith("train_micro"))

    assert micro(None) == 4
    per_sequence = find(plan(whole), 0).gpu["activations"] + find(plan(whole), 0).gpu["logits"]
    assert micro(per_sequence * 3 // 4) == 1
    lines = remedy_lines(remedies(whole, config, Shortage("device", need_bytes=10**15)), Shortage("device", 10**15))
    assert "None of these alone" in lines[-1]


def test_of_an_unknown_model_only_states_have_figures() -> None:
    config = resolve(config_of())
    scripted = workload_of(config, "Net", [("model", 10**9)], None)
    shortage = Shortage("device", unexplained_bytes=10 * GIB, units_known=False)
    found = remedies(scripted, config, shortage)
    assert set(keys(found)) == {"train_micro_batch_size_per_gpu", "stage", "offload_optimizer"}
    unknown = next(one for one in found if one.saves_bytes is None)
    assert "activations shrink to 1/2" in unknown.text() and "saves" not in unknown.text()
    stage = next(one for one in found if "zero_optimization.stage" in one.changes)
    new = stage.changes["zero_optimization.stage"][1]
    states = {n: find(plan(dataclasses.replace(scripted, units=(("x", 10**9),))), n).state_bytes for n in (0, new)}
    assert stage.saves_bytes == states[0] - states[new]
    first = remedies(scripted, config, dataclasses.replace(shortage, unexplained_bytes=100 * GIB))[0]
    assert first.saves_bytes is None  # most of the memory is activations


def test_checkpointing_keeps_the_inputs_of_segments_and_the_layers_of_one() -> None:
    shape = PRESETS["gpt-350m"]
    whole = activation_bytes(shape, 2, 512, 2)
    each, pairs = (activation_bytes(shape, 2, 512, 2, segments) for segments in (shape.layers, shape.layers // 2))
    layer = 2 * 512 * (16 * shape.dim * 2 + 4 * (4 + shape.heads))
    assert whole - each == (shape.layers - 1) * layer - shape.layers * 2 * 512 * shape.dim * 2
    assert pairs - each == layer - shape.layers // 2 * 2 * 512 * shape.dim * 2
    assert activation_bytes(shape, 2, 512, 2, 1) >= whole  # one segment: everything again, and its input


# ---- a Hugging Face model --------------------------------------------------------------------------------------------
def finetuning(folder: Path, stage: int = 2, micro: int = 1, **zerotop: Any) -> dict[str, Any]:
    model = {"path": str(llama(folder)), **zerotop.pop("model", {})}
    data = {"files": ["chats.jsonl"], "seq_len": 4096}
    return config_of(stage, micro) | {"zerotop": {"model": model, "data": data, **zerotop}}


OF_ANOTHER_RESULT = ("lora", "optimizer_state_dtype", "seq_len")


@pytest.mark.parametrize(
    "zerotop",
    [
        {},
        {"model": {"cross_entropy": "whole"}},
        {"model": {"offload_activations": True}},
        {"lora": {"r": 8}},
        {"optimizer_state_dtype": "bf16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [0, 3])
def test_each_change_to_fine_tuning_saves_what_its_plan_says(
    tmp_path: Path, stage: int, zerotop: dict[str, Any]
) -> None:
    given = finetuning(tmp_path, stage, **zerotop)
    config, shortage = resolve(given), Shortage("device")
    found = remedies(workload(config), config, shortage)
    assert 2 <= len(found) <= 4
    for remedy in found:
        after = resolve(changed(given, remedy))
        saved = planned(config, shortage) - planned(after, shortage)
        exact = "zerotop.lora" not in remedy.changes  # how large the adapters are is left out
        assert remedy.saves_bytes == (saved if exact else pytest.approx(saved, rel=0.03)), remedy
        assert after.global_batch == config.global_batch


def test_what_is_advised_for_fine_tuning(tmp_path: Path) -> None:
    def advised(place: str = "device", **settings: Any) -> list[str]:
        config = resolve(finetuning(tmp_path, **settings))
        return keys(remedies(workload(config), config, Shortage(place)))  # type: ignore[arg-type]

    assert advised()[-1] in OF_ANOTHER_RESULT  # the last one, and only one where others help
    assert {"activation_checkpointing", "offload_activations"} < set(advised())
    assert "cross_entropy" not in advised()  # in chunks already
    whole = advised(stage=3, model={"cross_entropy": "whole", "offload_activations": True}, lora={"r": 8})
    assert "cross_entropy" in whole and "lora" not in whole
    assert "offload_activations" not in whole


def test_what_changes_the_result_says_so(tmp_path: Path) -> None:
    config = resolve(finetuning(tmp_path, stage=3) | {"activation_checkpointing": {}})
    texts = [one.text() for one in remedies(workload(config), config, Shortage("device"))]
    assert any(text.startswith('"zerotop.lora": {"r": 16}: saves') for text in texts)
    assert any(text.endswith("trains adapters instead of the model") for text in texts)
