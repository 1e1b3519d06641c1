"""What Flight Recorders say together: the missing rank, other operations, other sizes, and what is not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.rundir import flight_file
from zerotop.diagnose.flight import FILE_BYTES, SILENT, Flight, read_flight, text
from zerotop.diagnose.flight import findings as all_findings

Write = Callable[..., None]


def findings(flight: Flight, places: dict[int, str] | None = None) -> list[str]:
    return [found.text for found in all_findings(flight, places)]


def entry(seq: int, op: str = "all_reduce", size: int = 4, group: str = "0", **more: Any) -> dict[str, Any]:
    return {
        "pg_id": int(group), "process_group": [group, "default_pg" if group == "0" else "undefined"],
        "collective_seq_id": seq, "profiling_name": f"gloo:{op}", "input_sizes": [[size]], "input_dtypes": ["Float"],
        "state": "scheduled", "frames": [], **more,
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(rank, entries, completed, ...)`: the file of a rank whose groups have these entries, all enqueued."""

    def begin(
        rank: int, entries: list[dict[str, Any]], completed: dict[str, int], recorder: str = "other", world: int = 2
    ) -> None:
        enqueued: dict[str, int] = {}
        for one in entries:
            enqueued[one["process_group"][0]] = one["collective_seq_id"]
        status = {
            group: {"last_enqueued_collective": str(last), "last_completed_collective": str(completed.get(group, -1))}
            for group, last in enqueued.items()
        }
        groups = {group: {"ranks": list(range(world)), "backend": "gloo"} for group in enqueued}
        document = {
            "rank": rank, "recorders": {recorder: {"entries": entries, "pg_status": status}}, "groups": groups,
            "trouble": "",
        }  # fmt: skip
        flight_file(tmp_path, rank).write_text(json.dumps(document))

    return begin


def test_the_rank_that_has_not_enqueued_is_named(write: Write, tmp_path: Path) -> None:
    write(0, [entry(1), entry(2, "broadcast"), entry(3)], {"0": 2})
    write(1, [entry(1), entry(2, "broadcast")], {"0": 2})
    flight = read_flight(tmp_path, [0, 1])
    missing = "rank 1 has not enqueued all_reduce 3 of the default group; rank 0 waits in it"
    assert findings(flight) == [missing]
    assert findings(flight, {0: "all_reduce at x.py:7"}) == [f"{missing}, at x.py:7"]
    assert "the default group: rank 0: enqueued 3, completed 2; rank 1: enqueued 2, completed 2" in text(flight)


def test_a_rank_ahead_with_asynchronous_collectives_waits_in_the_first_that_is_open(
    write: Write, tmp_path: Path
) -> None:
    write(0, [entry(n) for n in range(1, 8)], {"0": 3}, world=3)
    write(1, [entry(n) for n in range(1, 4)], {"0": 3}, world=3)
    write(2, [entry(n) for n in range(1, 5)], {"0": 3}, world=3)
    (found,) = findings(read_flight(tmp_path, [0, 1, 2]))
    assert found.startswith("rank 1 has not enqueued all_reduce 4 of the default group; ranks 0, 2 wait in it")


def test_another_operation_and_another_size_under_one_number(write: Write, tmp_path: Path) -> None:
    write(0, [entry(1), entry(2)], {"0": 1})
    write(1, [entry(1), entry(2, "broadcast")], {"0": 1})
    found = findings(read_flight(tmp_path, [0, 1]))
    assert found[0] == (
        "different collectives under number 2 of the default group: rank 0: all_reduce of [4] Float; "
        "rank 1: broadcast of [4] Float"
    )
    assert found[1].startswith("all ranks with a recorder have enqueued all_reduce 2 of the default group")
    write(1, [entry(1), entry(2, size=8)], {"0": 1})
    assert findings(read_flight(tmp_path, [0, 1]))[0].startswith("different sizes under number 2 of the default group")
    # Ranks may give inputs of different sizes to these.
    write(0, [entry(1, "alltoall_base")], {"0": 1})
    write(1, [entry(1, "alltoall_base", size=8)], {"0": 1})
    assert findings(read_flight(tmp_path, [0, 1])) == []


def test_a_rank_without_an_entry_of_a_group_of_its_is_missing(write: Write, tmp_path: Path) -> None:
    write(0, [entry(1), entry(1, group="1")], {"0": 1})
    write(1, [entry(1)], {"0": 1})
    assert findings(read_flight(tmp_path, [0, 1])) == [
        "rank 1 has not enqueued all_reduce 1 of process group 1; rank 0 waits in it"
    ]


def test_a_silent_rank_is_not_called_missing(write: Write, tmp_path: Path) -> None:
    write(0, [entry(1), entry(2)], {"0": 1})
    flight = read_flight(tmp_path, [0, 1])
    assert flight.troubles == {1: SILENT}
    assert findings(flight) == [
        "all ranks with a recorder have enqueued all_reduce 2 of the default group, rank 0 has not completed it"
    ]
    assert "rank 1: no Flight Recorder: it did not answer" in text(flight)


def test_point_to_point_and_completed_collectives_are_no_findings(write: Write, tmp_path: Path) -> None:
    write(0, [entry(1), entry(1, "send", is_p2p=True)], {"0": 1})
    write(1, [entry(1)], {"0": 1})
    flight = read_flight(tmp_path, [0, 1])
    assert findings(flight) == [] and text(flight).startswith("no collective of torch.distributed is open")


def test_files_that_can_not_be_read_are_troubles(write: Write, tmp_path: Path) -> None:
    flight_file(tmp_path, 0).write_text("{")
    flight_file(tmp_path, 1).write_text(json.dumps({"recorders": [], "groups": {}}))
    flight_file(tmp_path, 2).write_bytes(b" " * (FILE_BYTES + 1))
    flight_file(tmp_path, 3).write_text(json.dumps({"recorders": {}, "groups": {}, "trouble": "it is off"}))
    troubles = read_flight(tmp_path, range(4)).troubles
    assert troubles[0].startswith("its file can't be read") and troubles[1].startswith("its file can't be read")
    assert troubles[2] == "its file is larger than 8 MiB" and troubles[3] == "it is off"


def test_findings_name_the_ranks(write: Write, tmp_path: Path) -> None:
    for rank in range(3):
        write(rank, [entry(1), entry(2, "broadcast" if rank == 2 else "all_reduce")], {"0": 1}, world=3)
    found = all_findings(read_flight(tmp_path, [0, 1, 2]))
    assert [(one.what, one.ranks) for one in found] == [("different", (2,)), ("open", (0, 1, 2))]
    assert found[0].document() == {"what": "different", "ranks": [2], "text": found[0].text}
    write(2, [entry(1)], {"0": 1}, world=3)
    assert [(one.what, one.ranks) for one in all_findings(read_flight(tmp_path, [0, 1, 2]))] == [("missing", (2,))]
    write(2, [entry(1), entry(2, "broadcast")], {"0": 1}, world=2)
    alone = all_findings(read_flight(tmp_path, [1, 2]))[0]
    assert (alone.what, alone.ranks) == ("different", (1, 2))  # neither is to blame more than the other
