"""What is known about a failed attempt: exit codes, goodbyes, logs, host memory and GPU errors. EvidenceCollector
gathers the last two while the attempt runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.config import Resolved
from runtime.diagnose.remedies import Shortage, remedies, remedy_lines
from runtime.plan.workload import built_in_workload, workload_of
from runtime.wire.messages import Goodbye
from runtime.wire.node import NodeStats
from runtime.wire.rundir import RunFile
from zerotop.diagnose.oomkill import SHARED_ENOUGH_BYTES, HostMemory, MemoryWatch, shared_memory
from zerotop.format import bytes_text
from zerotop.probe.xid import Xid
from zerotop.state.run import RunState

XID_S = 60.0
"""A rank that fails within this time after an XID error on its GPU is taken to have failed because of it."""


@dataclass(frozen=True)
class MemoryRemedies:
    """Changes to the config that would have saved host memory, largest saving first."""

    lines: tuple[str, ...] = ()
    first: str = ""
    """The first of them in a few words."""


@dataclass(frozen=True)
class SystemEvidence:
    """What the machine did during the attempt: host memory and GPU errors."""

    memory: HostMemory = field(default_factory=HostMemory)
    xids: Mapping[int, str] = field(default_factory=dict)
    """Rank -> the XID error that the driver reported for its GPU shortly before."""
    remedies: MemoryRemedies = field(default_factory=MemoryRemedies)


@dataclass(frozen=True)
class FailureEvidence:
    """Everything that `decide` uses to find the cause of a failure. `exit_codes` are those that the supervisor read
    itself (from adopted children); launcher.log has the others."""

    nproc: int
    launcher_exit: int | None
    logs: Path
    wrapped: bool = False
    """Whether the launcher is a command of the user's, which need not have ranks."""
    launcher_killed: bool = False
    """A signal from outside ended the launcher. Its ranks die with it, so they are not the cause."""
    goodbyes: Mapping[int, Goodbye] = field(default_factory=dict)
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    """Exit codes that the supervisor read itself. 0 is kept too: such a rank left while the others went on."""
    ended_by_us: Collection[int] = ()
    """Ranks that were alive when the supervisor ended the attempt: the signal that ended them is not the cause."""
    stopping: bool = False
    abort_reason: str | None = None
    failure: str | None = None
    """Why the supervisor ended the ranks, which hang. Their goodbyes and exit codes no longer count then."""
    steps: Mapping[int, int] = field(default_factory=dict)
    """The last finished optimizer step of each rank that finished one."""
    silent_script: bool = False
    """The run has a script, and no rank sent a hello: the script never called initialize()."""
    spoke: bool = False
    """At least one rank sent a hello."""
    start_step: int = 0
    """The step from which this attempt continued."""
    system: SystemEvidence | None = None
    """Host memory and GPU errors; None if they were not observed."""


class EvidenceCollector:
    """Observes host memory and GPU errors from the start of an attempt to its end."""

    def __init__(self, run: RunFile, path: Path, root: Path = Path("/")) -> None:
        """`root` is where /proc, /sys and /dev are; tests pass a folder."""
        self._run = run
        self._path = path
        self._root = root
        self._watch = MemoryWatch(root)
        self._xids: list[Xid] = []
        self._last: NodeStats | None = None

    def warning(self) -> str:
        """A condition that is known to end runs and that is visible at the start; empty if there is none."""
        shared = shared_memory(self._root)
        if self._run.device != "cuda" or shared is None or shared[0] >= SHARED_ENOUGH_BYTES:
            return ""
        return (
            f"/dev/shm has only {bytes_text(shared[0])}: NCCL, or a DataLoader with num_workers, may fail or end by "
            "SIGBUS; start the container with --shm-size=8g or --ipc=host"
        )

    def note(self, stats: NodeStats) -> None:
        """Take a sample of the probe."""
        self._watch.note(stats)
        self._last = stats

    def hear(self, xid: Xid) -> None:
        """Take an XID error."""
        self._xids.append(xid)

    def collect(self, state: RunState) -> SystemEvidence:
        """The evidence, once the attempt has ended."""
        pids = {rank: known.hello.pid for rank, known in state.ranks.items() if known.hello}
        # A rank may die before the first sample of the probe.
        told = {rank: known.memory.rss_bytes for rank, known in state.ranks.items() if known.memory}
        memory = self._watch.seen(pids, told)
        if len(memory.rank_rss_bytes) < self._run.nproc:  # a part would mislead: all processes of the run together then
            memory = replace(memory, rank_rss_bytes={})
        found = self._memory_remedies(state) if memory.evidence or memory.named else MemoryRemedies()
        return SystemEvidence(memory, self._xids_of_ranks(state), found)

    def _xids_of_ranks(self, state: RunState) -> dict[int, str]:
        found = {}
        for rank, known in state.ranks.items():
            uuid = known.hello.device_uuid if known.hello else ""
            ended = known.goodbye.wall_s if known.goodbye else time.time()
            for xid in self._xids:
                if uuid and xid.uuid == uuid and -XID_S / 10 < ended - xid.wall_s < XID_S and rank not in found:
                    found[rank] = xid.text  # the first one: the others follow from it
        return found

    def _memory_remedies(self, state: RunState) -> MemoryRemedies:
        """What to change, computed by the plan's formulas. Of a script's model only the number of parameters is known,
        and its config only if it trained with the one that was launched."""
        try:
            config = Resolved.from_json((self._path / "resolved.json").read_bytes())
        except (OSError, ValueError):
            return MemoryRemedies()
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
            return MemoryRemedies()
        found = remedies(workload, config, shortage) if workload is not None else []
        return MemoryRemedies(tuple(remedy_lines(found, shortage)), found[0].short(shortage.where) if found else "")

    def _free_device(self) -> int | None:
        gpus = (self._last.gpus if self._last else None) or []
        free = [gpu.total_bytes - gpu.used_bytes for gpu in gpus if gpu.total_bytes and gpu.used_bytes is not None]
        return min(free, default=None)
