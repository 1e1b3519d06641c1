"""Random keys break nothing, and nothing is sent that was not asked for: some of every kind of session. `make monkey`
presses a hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tui.monkey import session


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 18))])
async def test_random_keys_break_nothing_and_send_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_PICTURES_DIR", str(tmp_path))
    assert await session(seed, 80, tmp_path) >= 80
