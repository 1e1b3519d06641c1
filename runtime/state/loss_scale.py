"""Loss scaling for fp16: gradients below 2**-24 would vanish, so the loss is multiplied before backward and the
gradients divided after it. (arXiv 1710.03740, section 3.2)

The factor is as large as the gradients bear: it halves when one overflows and doubles after a while without. Keys and
behaviour are DeepSpeed's (its `fp16` section).
"""

from __future__ import annotations

from typing import Any, Protocol

from runtime.config import Fp16Config, Resolved

FACTOR = 2.0
"""What a dynamic scale is multiplied or divided by."""


class ScaleExhausted(OverflowError):
    """Gradients overflow although the loss scale is as small as it may be."""


class Scaler(Protocol):
    scale: float

    def update(self, overflow: bool) -> None:
        """Once per boundary, after it is known whether a gradient was not finite."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedScaler:
    """A constant factor; 1 where the precision is not fp16."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self._dynamic: dict[str, Any] = {}
        """What a checkpoint of a run with a dynamic scale held: its next one may have it again."""

    def update(self, overflow: bool) -> None:
        """Nothing: an overflow only skips the step."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self._dynamic)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The factor stays the config's."""
        self._dynamic = dict(state)


class DynamicScaler:
    """Starts at 2**initial_scale_power; `hysteresis` overflows halve it, `loss_scale_window` updates without one double
    it. It never falls below `min_loss_scale`."""

    def __init__(self, config: Fp16Config) -> None:
        self.config = config
        self.scale = FACTOR**config.initial_scale_power
        self._tolerated = config.hysteresis  # overflows until it halves
        self._updates = 0
        self._last_overflow = -1

    def update(self, overflow: bool) -> None:
        """Raises ScaleExhausted on an overflow that a smaller scale can't answer."""
        config = self.config
        if overflow:
            if config.hysteresis == 1 or self._tolerated == 1:
                if self.scale <= config.min_loss_scale:
                    raise ScaleExhausted(
                        f"gradients overflow at the smallest loss scale ({self.scale:g}, fp16.min_loss_scale): the "
                        "training has diverged, or fp16 can't hold this model's gradients; lower optimizer.params.lr, "
                        'or use "bf16": {"enabled": true}'
                    )
                self.scale = max(self.scale / FACTOR, config.min_loss_scale)
            else:
                self._tolerated -= 1
            self._last_overflow = self._updates
        else:
            if config.consecutive_hysteresis:
                self._tolerated = config.hysteresis
            if (self._updates - self._last_overflow) % config.loss_scale_window == 0:
                if not config.consecutive_hysteresis:
                    self._tolerated = config.hysteresis
                self.scale *= FACTOR
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "tolerated": self._tolerated,
            "updates": self._updates,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; an empty one (made in another precision) leaves the fresh scale."""
        if state:
            self.scale, self._tolerated = float(state["scale"]), int(state["tolerated"])
            self._updates, self._last_overflow = int(state["updates"]), int(state["last_overflow"])


def scaler_for(config: Resolved) -> Scaler:
    if config.precision != "fp16":
        return FixedScaler()
    return DynamicScaler(config.fp16) if config.fp16.dynamic else FixedScaler(config.fp16.loss_scale)
