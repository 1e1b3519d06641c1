"""The fake driver library, built once for the tests of the probe."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.fake_nvml import FakeNvml


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    return FakeNvml(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def fake(fake_library: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """Eight healthy GPUs, seen by `fake.binding()` in this process."""
    monkeypatch.setenv("FAKE_NVML", str(fake_library.control))
    yield fake_library
    fake_library.reset()
