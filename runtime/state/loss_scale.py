"""Loss scaling for fp16: gradients below 2**-24 would vanish, so the loss is multiplied before backward and the
gradients divided after it. (arXiv 1710.03740, section 3.2)

A dynamic scale halves when a gradient overflows and doubles after a number of updates without overflow. Keys and
behaviour are those of DeepSpeed's `fp16` section.
"""

from __future__ import annotations

from typing import Any, Protocol

from runtime.config import Fp16Config, Resolved

FACTOR = 2.0
"""Factor by which a dynamic scale changes."""


class ScaleExhausted(OverflowError):
    """Gradients overflow at the smallest loss scale that the config allows."""


class Scaler(Protocol):
    """The loss scale of one engine."""

    scale: float

    def update(self, overflow: bool) -> None:
        """Adapt the scale, once per boundary. overflow: whether a gradient was not finite."""

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; empty if the checkpoint was made in another precision."""


class FixedScaler:
    """A constant scale; 1 if the precision is not fp16."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self._dynamic: dict[str, Any] = {}
        """State of a dynamic scale that a checkpoint had: it is saved again, for a run that uses one."""

    def update(self, overflow: bool) -> None:
        """Do nothing: an overflow only skips the step."""

    def state_dict(self) -> dict[str, Any]:
        """See Scaler."""
        return dict(self._dynamic)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep `state` for the next checkpoint; the scale stays the config's."""
        self._dynamic = dict(state)


class DynamicScaler:
    """A scale that starts at 2**initial_scale_power, halves after `hysteresis` overflows, but not below
    `min_loss_scale`, and doubles after `loss_scale_window` updates without one."""

    def __init__(self, config: Fp16Config) -> None:
        self.config = config
        self.scale = FACTOR**config.initial_scale_power
        self._tolerated = config.hysteresis  # overflows until it halves
        self._updates = 0
        self._last_overflow = -1

    def update(self, overflow: bool) -> None:
        """See Scaler. Raises ScaleExhausted if the scale would have to fall below `min_loss_scale`."""
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
        """See Scaler."""
        return {
            "scale": self.scale,
            "tolerated": self._tolerated,
            "updates": self._updates,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Scaler. An empty state leaves the initial scale."""
        if state:
            self.scale, self._tolerated = float(state["scale"]), int(state["tolerated"])
            self._updates, self._last_overflow = int(state["updates"]), int(state["last_overflow"])


def scaler_for(config: Resolved) -> Scaler:
    """Make the scaler of a config."""
    if config.precision != "fp16":
        return FixedScaler()
    return DynamicScaler(config.fp16) if config.fp16.dynamic else FixedScaler(config.fp16.loss_scale)
