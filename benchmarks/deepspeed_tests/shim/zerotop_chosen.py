"""A plugin of pytest's: which of a file's tests run, by the environment that the benchmark sets; and what came of each,
one line at a time, so that a test that hangs takes no other's result with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    Path(os.environ["ZEROTOP_NAMES"]).write_text("\n".join(item.nodeid for item in items))
    wanted = set(Path(os.environ["ZEROTOP_WANTED"]).read_text().split("\n"))
    items[:] = [item for item in items if _name(item.nodeid) in wanted]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = f"{crash.message[-1500:] if crash is not None else ''}\n{report.longreprtext[-1500:]}".strip()
    if report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    line = {"name": _name(report.nodeid), "when": report.when, "result": report.outcome, "seconds": report.duration}
    with Path(os.environ["ZEROTOP_REPORT"]).open("a") as file:
        file.write(json.dumps({**line, "message": text}) + "\n")


def _name(nodeid: str) -> str:
    """Class and test."""
    return nodeid.partition("::")[2]
