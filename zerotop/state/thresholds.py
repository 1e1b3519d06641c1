"""From which values on a figure of a rank is worth a look: the table of the ranks and their grid colour it."""

from __future__ import annotations

from runtime.wire.node import GpuStats

FULL = 0.92
"""From this share on, the memory of a device is nearly full."""
HOT_MARGIN_C = 5.0
"""So close to the temperature at which the hardware lowers the clocks, a GPU is hot."""
USUAL_LIMIT_C = 90.0
"""Where a GPU does not say at which temperature that is."""
COOL_C = 30.0
"""A GPU without work, in a cool room."""
IDLE_PERCENT = 50.0
"""Below this utilisation, a GPU that trains stands still half of the time."""
AT_CAP = 0.98
"""From this share of the power limit on, the driver lowers the clocks."""
WAITS_LONG = 0.25
"""From this share of a step on, a rank waits for long."""
COSTS_MUCH = 0.10
"""From this share of a step on, what the others wait for a rank matters."""


def is_hot(gpu: GpuStats) -> bool:
    """Whether the GPU is about to lower its clocks, as far as it says when it does."""
    limit, now = gpu.slowdown_temperature_c, gpu.temperature_c
    return limit is not None and now is not None and now >= limit - HOT_MARGIN_C


def hottest_c(gpu: GpuStats) -> float:
    """The upper end of a scale of temperatures: where the hardware lowers the clocks."""
    return max(COOL_C + 2 * HOT_MARGIN_C, gpu.slowdown_temperature_c or USUAL_LIMIT_C)


def is_idle(gpu: GpuStats) -> bool:
    """Whether the GPU has little to do."""
    return gpu.utilization_percent is not None and gpu.utilization_percent < IDLE_PERCENT


def is_capped(gpu: GpuStats) -> bool:
    """Whether the GPU is at its power limit."""
    return bool(gpu.power_w is not None and gpu.power_limit_w and gpu.power_w >= AT_CAP * gpu.power_limit_w)
