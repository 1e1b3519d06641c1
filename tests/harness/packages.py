"""Packages that not every environment has."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*packages: str) -> None:
    """Skip the module that calls this where one of `packages` is not installed. pytest.importorskip imports them, and
    for transformers and peft that takes seconds in each worker, whether it runs a test of the module or not."""
    if missing := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)
