"""What ranks have profiled becomes one trace, however large it is and whatever is wrong with a part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.profile import CLOCK, part_path
from tests.harness import ROOT
from tests.harness.fakerun import write_run
from tests.harness.recordings import MS, WALL_S, record
from tests.harness.trace_check import Trace
from zerotop.trace import merge as module
from zerotop.trace.merge import merge
from zerotop.trace.parts import clock_of, events_of

BASE_US = 1_000_000.0
"""The profiler's clock at CLOCK_MONOTONIC 0: anything."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run with ten recorded steps."""
    monkeypatch.setattr(module, "RECORDED_WITHIN_S", 0.0)
    ended = RunStatus(name="q1", state="finished")
    found = write_run(tmp_path, "q1", Path("/nowhere"), ended, created_wall_s=WALL_S - 10)
    record(found)
    return found


def events(pid: int, operations: int = 20) -> Iterator[dict[str, Any]]:
    """A part of steps 3 and 4, as kineto writes it: marks of the clock at the boundaries, operations on two threads and
    a stream."""
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 1.0, "args": {"name": "python"}}
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": pid, "ts": 1.0, "args": {"name": f"thread {pid}"}}
    yield {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "ts": 1.0, "args": {"name": "stream 7"}}
    yield {"ph": "X", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler", "ts": 1.0, "dur": 9.0}
    for step in (3, 4, 5):
        name = f"{CLOCK}{step * 100 * MS}"
        at = BASE_US + step * 100_000 + (0.4 if step == 4 else 0)  # one of them was held up
        yield {"ph": "X", "cat": "user_annotation", "name": name, "pid": pid, "tid": pid, "ts": at, "dur": 1.5}
    for index in range(operations):
        at = BASE_US + 300_000 + index * 200_000 / operations
        operation = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": pid, "ts": at, "dur": 0.5}
        yield operation | {"tid": pid + index % 2, "args": {"External id": index, "note": 'a "quoted" ] }, brace'}}
        yield {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": at, "dur": 0.4}
        yield {"ph": "s", "id": index, "pid": pid, "tid": pid, "ts": at, "cat": "ac2g", "name": "ac2g"}
        yield {"ph": "f", "id": index, "pid": 0, "tid": 7, "ts": at, "cat": "ac2g", "name": "ac2g", "bp": "e"}


def write_part(run: Path, rank: int, operations: int = 20) -> Path:
    path = part_path(run, 3, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.write('{\n  "schemaVersion": 1,\n  "deviceProperties": [{"id": 0, "name": "x"}],\n  "traceEvents": [\n')
        for index, event in enumerate(events(1000 + 100 * rank, operations)):
            file.write((",\n  " if index else "  ") + json.dumps(event, indent=2))
        file.write('\n  ],\n  "traceName": "x"\n}\n')
    return path


def test_all_ranks_on_one_time_line_beside_our_own_tracks(run: Path) -> None:
    parts = {rank: write_part(run, rank) for rank in (0, 1)}
    found = merge(run, 3, parts)
    assert found["path"] == "profiles/profile-3-steps-3-4.json.gz"
    assert found["steps"] == [3, 4]
    trace = Trace(run / found["path"])
    assert sorted(trace.processes.values()) == ["rank 0 · cpu · node-b", "rank 1 · cpu · node-b"]
    for rank, pid in ((0, 1000), (1, 1100)):
        process = f"rank {rank}"
        assert [one[2]["name"] for one in trace.track(process, "steps")] == ["step 3", "step 4"]
        begin, end = trace.track(process, "steps")[0][0], trace.track(process, "steps")[1][1]
        operations = trace.track(process, f"torch: thread {pid}")
        assert len(operations) == 10
        assert len(trace.track(process, "GPU 0: stream 7")) == 20
        assert operations[0][0] == pytest.approx(begin, abs=0.5)
        assert begin <= operations[0][0] and operations[-1][1] <= end
        assert len(trace.track(process, "collectives")) == 6
    flows = [event["id"] for event in trace.document["traceEvents"] if event["ph"] == "s"]
    assert len(set(flows)) == 40, "flows of two ranks meet"
    assert not any(path.exists() for path in parts.values())
    assert not (run / "profiles" / "3").exists()
    assert (run / found["path"]).stat().st_mode & 0o777 == 0o600


def test_a_damaged_part_is_left_out_and_named(run: Path) -> None:
    whole, cut, other = write_part(run, 0), write_part(run, 1), part_path(run, 3, 2)
    cut.write_bytes(cut.read_bytes()[:-200])
    other.write_text('{"traceEvents": []}')
    found = merge(run, 3, {0: whole, 1: cut, 2: other})
    trace = Trace(run / found["path"])
    assert trace.metadata["damaged"] == [
        "rank 1: rank-1.json is damaged: it ends within an event",
        "rank 2: rank-2.json has no mark of the clock",
    ]
    assert len(trace.track("rank 0", "GPU 0: stream 7")) == 20


def test_without_any_part_that_can_be_read_there_is_no_file(run: Path) -> None:
    path = part_path(run, 3, 0)
    path.parent.mkdir(parents=True)
    path.write_text("not a trace")
    with pytest.raises(ValueError, match="no mark of the clock"):
        merge(run, 3, {0: path})
    assert [one.name for one in (run / "profiles").iterdir()] == ["3"]


def test_events_come_one_by_one_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(tmp_path, 0, operations=50)
    path = part_path(tmp_path, 3, 0)
    expected = list(events(1000, 50))
    for size in (7, 64, 1 << 20):
        monkeypatch.setattr("zerotop.trace.parts.CHUNK_BYTES", size)
        assert list(events_of(path)) == expected
    clock = clock_of(path)
    assert clock is not None
    assert (clock.marks, clock.first_ns, clock.last_ns) == (3, 300 * MS, 500 * MS)
    assert clock.offset_ns == -BASE_US * 1000


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [', '{"traceEvents": [{"ph": "X"}'])
def test_files_that_are_no_traces(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rank-0\.json (is no trace|is damaged)"):
        list(events_of(path))


MEASURED = """
import json, resource, sys
from pathlib import Path
from zerotop.trace.merge import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(Path(sys.argv[1]), 3, {0: Path(sys.argv[2])})
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_a_large_trace_takes_little_memory(run: Path) -> None:
    """As Python objects its 20 MB would be ten times as much."""
    path = write_part(run, 0, operations=40_000)
    size = path.stat().st_size
    assert size > 20e6
    words = [sys.executable, "-c", MEASURED, str(run), str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    grown = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment).stdout) * 1024
    assert grown < size / 2
