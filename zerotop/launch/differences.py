"""How two resolved configs differ."""

from __future__ import annotations

import json
from typing import Any

Difference = tuple[str, Any, Any]
"""The key, its value before and after; None where there is none."""
SECRET_KEYS = frozenset({"zerotop.notify"})
"""Keys whose values are told to nobody: the URL of a webhook is a secret."""
HIDDEN = "(hidden)"


def differences(old: Any, new: Any, key: str = "") -> list[Difference]:
    """The keys whose values differ, at any depth, in the order of `old`. Values of SECRET_KEYS are HIDDEN."""
    if key not in SECRET_KEYS and isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [
            change
            for name in names
            for change in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    if old == new:
        return []
    return [(key, HIDDEN, HIDDEN) if key in SECRET_KEYS else (key, old, new)]


def value_text(value: Any) -> str:
    """A value of a config as JSON."""
    return json.dumps(value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value)
