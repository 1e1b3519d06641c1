"""What one attempt's end may have to do with memory or a GPU's error, and what to change then; for the outcome."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.config import Resolved
from runtime.diagnose.remedies import Shortage, remedies, remedy_lines
from runtime.plan.workload import built_in_workload, workload_of
from runtime.wire.messages import NodeStats
from runtime.wire.rundir import RunFile
from runtime.wire.sizes import format_size
from zerotop.probe.xid import Xid
from zerotop.runs.oomkill import SHARED_ENOUGH_BYTES, HostMemory, MemoryWatch, shared_memory
from zerotop.state.run import RunState

XID_S = 60.0
"""A rank that fails so long after an XID on its GPU failed because of it, as far as anyone can tell."""


@dataclass(frozen=True)
class Changes:
    """What would have saved host memory."""

    lines: tuple[str, ...] = ()
    first: str = ""
    """In a few words."""


@dataclass(frozen=True)
class Account:
    """Beside goodbyes, exit codes and logs."""

    memory: HostMemory = field(default_factory=HostMemory)
    xids: Mapping[int, str] = field(default_factory=dict)
    """Rank -> what the driver reported of its GPU shortly before."""
    changes: Changes = field(default_factory=Changes)


class Witness:
    """Sees one attempt from its start on."""

    def __init__(self, run: RunFile, path: Path, root: Path = Path("/")) -> None:
        """root: where /proc, /sys and /dev are, for tests."""
        self._run = run
        self._path = path
        self._root = root
        self._watch = MemoryWatch(root)
        self._xids: list[Xid] = []
        self._last: NodeStats | None = None

    def warning(self) -> str:
        """What may end this attempt, and can be seen before; "" for nothing."""
        shared = shared_memory(self._root)
        if self._run.device != "cuda" or shared is None or shared[0] >= SHARED_ENOUGH_BYTES:
            return ""
        return (
            f"/dev/shm has only {format_size(shared[0])}: NCCL, or a DataLoader with num_workers, may fail or end by "
            "SIGBUS; start the container with --shm-size=8g or --ipc=host"
        )

    def note(self, stats: NodeStats) -> None:
        self._watch.note(stats)
        self._last = stats

    def hear(self, xid: Xid) -> None:
        self._xids.append(xid)

    def account(self, state: RunState) -> Account:
        pids = {rank: known.hello.pid for rank, known in state.ranks.items() if known.hello}
        # A rank may die before the probe has looked at it.
        told = {rank: known.memory.rss_bytes for rank, known in state.ranks.items() if known.memory}
        memory = self._watch.seen(pids, told)
        if len(memory.rank_rss_bytes) < self._run.nproc:  # a part would mislead: all processes of the run together then
            memory = replace(memory, rank_rss_bytes={})
        changes = self._changes(state) if memory.evidence or memory.named else Changes()
        return Account(memory, self._xids_of_ranks(state), changes)

    def _xids_of_ranks(self, state: RunState) -> dict[int, str]:
        found = {}
        for rank, known in state.ranks.items():
            uuid = known.hello.device_uuid if known.hello else ""
            ended = known.goodbye.wall_s if known.goodbye else time.time()
            for xid in self._xids:
                if uuid and xid.uuid == uuid and -XID_S / 10 < ended - xid.wall_s < XID_S and rank not in found:
                    found[rank] = xid.text  # the first one: the others follow from it
        return found

    def _changes(self, state: RunState) -> Changes:
        """By the plan's arithmetic. Of a script's model the number of parameters is known, and its config only where it
        trained with what was launched."""
        try:
            config = Resolved.from_json((self._path / "resolved.json").read_bytes())
        except (OSError, ValueError):
            return Changes()
        hello = state.hello
        shortage = Shortage("host", free_device_bytes=self._free_device())
        if self._run.script is None:
            workload = built_in_workload(config, Path(self._run.config_folder))
        elif hello is not None and hello.parameters and hello.config_digest == config.digest():
            workload = workload_of(config, hello.model_name, [("model", hello.parameters)], None)
            told = [known.memory for known in state.ranks.values() if known.memory]
            held = sum(sum((*one.ledger.values(), *one.offloaded.values())) for one in told)
            rss = sum(one.rss_bytes for one in told)
            shortage = Shortage(
                "host",
                free_device_bytes=shortage.free_device_bytes,
                unexplained_bytes=max(0, rss - held),
                units_known=False,
            )
        else:
            return Changes()
        found = remedies(workload, config, shortage) if workload is not None else []
        return Changes(tuple(remedy_lines(found, shortage)), found[0].short(shortage.where) if found else "")

    def _free_device(self) -> int | None:
        gpus = (self._last.gpus if self._last else None) or []
        free = [gpu.total_bytes - gpu.used_bytes for gpu in gpus if gpu.total_bytes and gpu.used_bytes is not None]
        return min(free, default=None)
