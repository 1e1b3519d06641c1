"""The memory that real ranks report is theirs: the parts add up to the RSS, peaks are there, and a memory snapshot is
written by all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import Memory
from tests.faults.test_real_run import CONFIG, START_DEADLINE_S
from tests.harness.runs import StartedRun
from zerotop.state.memory import memory_use

pytestmark = pytest.mark.timeout(240)
REST = 0.03


def settled(run: StartedRun) -> list[Memory]:
    """The memory of both ranks, sampled after their second step."""
    run.see_step(2, deadline_s=START_DEADLINE_S)
    before = {rank: state.memory for rank, state in run.source.state.ranks.items()}
    run.see(
        lambda source: all(
            state.memory is not None and state.memory is not before[rank] for rank, state in source.state.ranks.items()
        ),
        "a sample after the second step",
    )
    return [state.memory for _, state in sorted(run.source.state.ranks.items()) if state.memory is not None]


def pid_of(run: StartedRun, rank: int) -> int:
    hello = run.source.state.ranks[rank].hello
    assert hello is not None
    return hello.pid


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_parts_of_a_rank_are_its_rss_and_all_have_names(launch_real: Callable[..., StartedRun], stage: int) -> None:
    config = CONFIG | {"zero_optimization": {"stage": stage}}
    run = launch_real(config, overrides=["zerotop.train.steps=1000000", "zerotop.data.seq_len=64"])
    for memory in settled(run):
        use = memory_use(memory)
        parts = dict(use.parts)
        rest = parts.pop("other", 0) + use.untouched_bytes
        assert rest <= REST * memory.rss_bytes, (rest, memory)
        assert sum(parts.values()) == pytest.approx(memory.rss_bytes, rel=REST)
        from_outside = psutil.Process(pid_of(run, memory.rank)).memory_info().rss
        assert memory.rss_bytes == pytest.approx(from_outside, rel=0.1)  # a moment later
        assert {"imports", "libraries"} <= parts.keys() and parts["parameters"] > 0
        assert max(memory.peak_bytes.values()) >= 0.97 * memory.rss_bytes
        assert memory.major_faults is not None and memory.alloc_retries is None
    hello = run.source.state.hello
    assert hello is not None and hello.planned is not None and hello.planned.shape_known

    ranks = run.source.state.ranks.values()
    run.see(lambda _: all(rank.memory and rank.memory.unit_activations for rank in ranks), "activations by unit")
    for rank_state in ranks:
        assert rank_state.memory is not None
        count, nbytes = rank_state.memory.unit_activations["blocks.*"]
        assert count == 4 and 0 < nbytes <= max(rank_state.memory.activation_bytes.values())

    record = run.command("memory-snapshot", steps=1)
    assert record.ack.state == "applied", record.ack
    folder = Path(record.ack.result["path"])
    for rank in range(2):
        found = json.loads((folder / f"rank-{rank}.json").read_text())
        assert found["rank"] == rank and found["step"] == record.ack.step
        kept = found["activations_kept_by_unit"]
        assert {f"blocks.{index}" for index in range(4)} <= kept.keys() and kept["blocks.0"] > 0
        assert found["largest_tensors"][0]["bytes"] >= found["largest_tensors"][-1]["bytes"] > 0
        assert found["memory"]["rss_bytes"] > found["tensor_bytes"] > 0
