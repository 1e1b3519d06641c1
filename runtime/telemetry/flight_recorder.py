"""A rank's copy of torch's Flight Recorder: which collectives its process groups have enqueued and completed.

The functions that dump it are private to torch and differ between backends, so they are looked up, never assumed. Torch
is not imported: a process that has not loaded it has no collectives either.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.process.atomic_file import replace_text
from runtime.wire.messages import FlightRequest
from runtime.wire.rundir import RUN_VARIABLE, evidence_folder, flight_file

ENTRIES_KEPT = 400
"""Newest entries of each recorder that are written; a rank may hold 2000 of them."""
FRAMES_KEPT = 12
_DUMPS = (("nccl", "_dump_nccl_trace"), ("other", "_dump_fr_trace"))
"""Recorder -> function of torch._C._distributed_c10d. NCCL has one of its own; all other backends share one."""
_ENTRY_KEYS = (
    "record_id",
    "pg_id",
    "process_group",
    "collective_seq_id",
    "p2p_seq_id",
    "is_p2p",
    "profiling_name",
    "state",
    "retired",
    "input_sizes",
    "input_dtypes",
    "output_sizes",
    "output_dtypes",
    "time_created_ns",
    "time_discovered_started_ns",
    "time_discovered_completed_ns",
)


class FlightWriter:
    """Answers requests for the Flight Recorder, each in a thread of its own: a dump may have to wait for a lock that a
    hanging communicator holds, and the heartbeat must go on. One at a time; others are dropped meanwhile."""

    def __init__(self, rank: int, attempt: int) -> None:
        self._rank = rank
        self._attempt = attempt
        self._thread: threading.Thread | None = None

    def answer(self, request: FlightRequest) -> None:
        """Begin to write the answer to `request`."""
        if self._thread is not None and self._thread.is_alive():
            return
        run = os.environ.get(RUN_VARIABLE, "")
        folder = evidence_folder(Path(run) / "logs" / str(self._attempt), request.number)
        if not run or not folder.is_dir():
            return  # the hub makes the folder before it asks
        self._thread = threading.Thread(
            target=write_flight, args=(folder, self._rank), name="zerotop-flight-recorder", daemon=True
        )
        self._thread.start()


def write_flight(folder: Path, rank: int) -> None:
    """Write the Flight Recorder of this process to `folder`, or why there is none. A disk that can't be written leaves
    no file."""
    try:
        replace_text(flight_file(folder, rank), json.dumps(collect(rank), separators=(",", ":")) + "\n")
    except OSError as error:
        print(f"zerotop: the Flight Recorder can't be saved in {folder}: {error.strerror}", file=sys.stderr)


def collect(rank: int) -> dict[str, Any]:
    """The Flight Recorder as JSON: `recorders` (name -> entries, pg_status, version), `groups` (name -> ranks and
    backend), and `trouble`, which says why something is missing."""
    document: dict[str, Any] = {"rank": rank, "wall_s": time.time(), "recorders": {}, "groups": {}, "trouble": ""}
    c10d = sys.modules.get("torch._C._distributed_c10d")
    if c10d is None:
        return document | {"trouble": "torch.distributed is not loaded in this process"}
    # With the call sites of the collectives torch imports its compiler, which takes seconds and much memory.
    call_sites = "torch._inductor.codecache" in sys.modules
    troubles = []
    for name, function in _DUMPS:
        dump = getattr(c10d, function, None)
        if dump is None:
            continue
        try:
            found = _recorder(pickle.loads(dump(includeStackTraces=call_sites)))  # bytes of our own process
        except Exception as error:  # private functions of torch, of any version
            troubles.append(f"{function}: {type(error).__name__}: {error}")
            continue
        if found["entries"] or found["pg_status"]:
            document["recorders"][name] = found
    if not troubles and not document["recorders"]:
        off = any(os.environ.get(v) == "0" for v in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"))
        have = any(hasattr(c10d, function) for _, function in _DUMPS)
        troubles.append(
            "the Flight Recorder is off (TORCH_FR_BUFFER_SIZE=0)"
            if off
            else "no collective of torch.distributed was recorded"
            if have
            else "this torch has no Flight Recorder"
        )
    return document | {"groups": _groups(), "trouble": "; ".join(troubles)}


def _recorder(dump: Mapping[str, Any]) -> dict[str, Any]:
    entries = dump.get("entries") or []
    return {
        "version": str(dump.get("version", "")),
        "library": str(dump.get("nccl_version") or dump.get("comm_lib_version") or ""),
        "pg_status": {str(key): dict(value) for key, value in (dump.get("pg_status") or {}).items()},
        "entries": [_entry(entry) for entry in entries[-ENTRIES_KEPT:]],
        "dropped": max(0, len(entries) - ENTRIES_KEPT),
    }


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: entry[key] for key in _ENTRY_KEYS if key in entry}
    frames = entry.get("frames") or []
    kept["frames"] = [[frame.get("filename"), frame.get("line"), frame.get("name")] for frame in frames[:FRAMES_KEPT]]
    return kept


def _groups() -> dict[str, dict[str, Any]]:
    """Process groups by name, which is the same on all of their ranks: global ranks and backend. Gloo's dumps do not
    name the members."""
    module = sys.modules.get("torch.distributed.distributed_c10d")
    world = getattr(module, "_world", None)
    groups: dict[str, dict[str, Any]] = {}
    try:
        for group, name in dict(world.pg_names).items():  # type: ignore[union-attr]
            ranks = sorted(int(rank) for rank in world.pg_group_ranks[group])  # type: ignore[union-attr]
            groups[str(name)] = {"ranks": ranks, "backend": str(world.pg_map[group][0])}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError, RuntimeError):
        return groups  # another torch; or a group is just being made
    return groups
