"""For every test: one thread per torch operation, unless the environment says otherwise; shared process groups of real
ranks; and pytest's timeouts, multiplied by ZEROTOP_TEST_PATIENCE as all deadlines are.

Two spinning threads on a busy two-core machine make small operations 30 times slower; ranks get their own setting.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from runtime.process.garbage import collect_less_often, keep_all_objects
from tests.harness.fake_nvml import FakeNvml
from tests.harness.ranks import Ranks
from tests.harness.spreading import spread
from tests.harness.waiting import patient


@pytest.hookimpl(trylast=True)  # when pytest has deselected tests: those that are left are spread
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    usual = float(config.getini("timeout"))
    for item in items:
        mark = item.get_closest_marker("timeout")
        seconds = float(mark.args[0]) if mark else usual
        if config.getoption("timeout") is None:  # else the command line's holds
            item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = spread([(item.nodeid, item) for item in items], workers)


def pytest_collection_finish() -> None:
    """Everything has been imported."""
    collect_less_often()
    keep_all_objects()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for sockets: the path of a Unix socket has at most 107 characters, and tmp_path is long."""
    with tempfile.TemporaryDirectory(prefix="zt-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def _fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    return FakeNvml(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def fake_nvml(_fake_nvml_library: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """Eight healthy GPUs: for this process by `fake_nvml.binding()`, for others by its `environment`."""
    monkeypatch.setenv("FAKE_NVML", str(_fake_nvml_library.control))
    yield _fake_nvml_library
    _fake_nvml_library.reset()


@pytest.fixture(scope="session")
def _rank_groups() -> Iterator[dict[int, Ranks]]:
    groups: dict[int, Ranks] = {}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture
def ranks(_rank_groups: dict[int, Ranks]) -> Callable[[int], Ranks]:
    """`ranks(n)`: n processes in one Gloo group, shared by all tests of this world size (see harness/ranks.py)."""

    def of(world_size: int) -> Ranks:
        group = _rank_groups.get(world_size)
        if group is not None and group.broken:
            group.close()
            group = None
        if group is None:
            group = _rank_groups[world_size] = Ranks(world_size)
        return group

    return of
