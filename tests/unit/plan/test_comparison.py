"""What ZeRO saves or costs against data parallelism, in one sentence."""

from __future__ import annotations

import pytest

from runtime.plan import data_parallel, stage_layout
from runtime.plan.comparison import against_data_parallel
from tests.unit.plan.test_plan import GIB, workload


def test_what_is_saved_is_the_difference_of_states_and_buffers() -> None:
    work = workload("gpt-7b", 4)
    layout = stage_layout(work, 3)
    found = against_data_parallel(work, layout)
    assert found.saved_bytes == data_parallel(work).variable_bytes - layout.variable_bytes > 80 * GIB
    assert found.text.startswith("ZeRO saves ") and " per rank against data parallelism here (stage 3: " in found.text


@pytest.mark.parametrize(
    ("stage", "world", "changes", "why"),
    [
        (2, 1, {"precision": "bf16"}, "because one rank has nothing to shard, and the fp32 master weights"),
        (0, 2, {"precision": "fp32", "reduce_dtype": "bf16"}, "because its buffers for all-gather and reduce-scatter"),
    ],
)
def test_what_costs_more_says_why(stage: int, world: int, changes: dict[str, str], why: str) -> None:
    work = workload("gpt-124m", world, **changes)
    found = against_data_parallel(work, stage_layout(work, stage))
    assert found.saved_bytes < 0 and f"Stage {stage} costs " in found.text and why in found.text, found


def test_equal_memory_is_called_so() -> None:
    work = workload("gpt-124m", 1, precision="fp32")
    found = against_data_parallel(work, stage_layout(work, 0))
    assert found.saved_bytes == 0 and "as much as data parallelism" in found.text
