"""What the benchmark of real faults does to the machine, and how it counts changes of the verdict."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest

from benchmarks.verdicts import live as module
from benchmarks.verdicts.live import HOGS, LIVE, Injection, report
from tests.harness.waiting import until
from tests.unit.state.test_stall import a_run
from zerotop.verdict.finding import Finding

KINDS = {live.fault.name: live for live in LIVE}


def test_a_loaded_machine_is_one_on_whose_cpus_other_processes_compute() -> None:
    assert KINDS["loaded machine"].loaded and not KINDS["healthy"].loaded
    injection = Injection()
    try:
        injection.load()
        hogs = [psutil.Process(child.pid) for child in injection.children]
        cpus = os.sched_getaffinity(0)
        assert len(hogs) == HOGS * len(cpus)
        assert all(set(hog.cpu_affinity()) == cpus for hog in hogs)  # type: ignore[attr-defined]
        until(lambda: all(hog.cpu_times().user > 0.05 for hog in hogs), "hogs that compute")
    finally:
        injection.end()
    assert not any(hog.is_running() for hog in hogs)


def verdict(what: str, severity: str = "warning", ranks: tuple[int, ...] = ()) -> Finding:
    return Finding(what, f"{what} it is", severity, ranks)  # type: ignore[arg-type]


class PlayedSource:
    """A run at step 100 with another verdict at each look, until there is none left."""

    def __init__(self, *found: Finding) -> None:
        self.state = a_run(steps=100)
        self._coming = list(found)

    def poll(self) -> None:
        if self._coming:
            self.state.apply(self._coming.pop(0).message(100, 1.0))

    def wait(self, seconds: float) -> None: ...

    def close(self) -> None: ...


def test_changes_from_and_to_bad_news_and_of_its_kind_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    contention = verdict("contention")
    source = PlayedSource(
        verdict("healthy", "info"),
        verdict("checkpoint", "info"),
        contention,  # 1
        Finding("contention", "other figures"),
        verdict("straggler", ranks=(1,)),  # 2
        Finding("straggler", "other figures", ranks=(1,)),
        verdict("offload-bound", "info"),  # 3
        verdict("healthy", "info"),
        contention,  # 4
    )
    monkeypatch.setattr(module, "open_source", lambda entry: source)
    monkeypatch.setattr(module, "_newest_step", lambda state: module.AT_STEP)
    entry: Any = None
    seen = module._watch(KINDS["loaded machine"], entry, Injection(), None, limit_s=0.5)
    assert (seen.changes, seen.right, len(seen.others)) == (4, False, 1)
    assert seen.text == "contention it is" and seen.watched_s >= 0.5
    seen.watched_s, seen.load = 600.0, 7.25
    told = "- loaded machine: 4 changes of the verdict from or to bad news in 600 s; load average 7.2"
    assert told in report({"loaded machine": [seen]}, pipes=False).splitlines()
