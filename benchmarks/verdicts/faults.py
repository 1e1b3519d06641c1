"""The faults, and the machines on which they are simulated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """How noisy a machine is. `noise`: coefficient of variation of a rank's compute per micro-step; `transfer_noise`
    of a transfer; `pause_s`: length of a rare pause of one rank, once in `pause_every` steps; `run_delay`: percent of
    the time for which a rank waits for a CPU."""

    name: str
    noise: float
    transfer_noise: float
    pause_s: float
    pause_every: int
    run_delay: float


MACHINES = (
    Machine("gpu", 0.01, 0.03, 0.05, 400, 0.5),
    Machine("idle cpu", 0.04, 0.10, 0.2, 150, 3.0),
    Machine("loaded cpu", 0.15, 0.35, 0.8, 60, 12.0),
)


@dataclass(frozen=True)
class Fault:
    """One kind of fault and the verdict that is right for it: one of `what`, blaming `ranks` ("one": the faulty rank,
    "none": nobody, "any": not judged)."""

    name: str
    what: tuple[str, ...]
    ranks: str = "one"
    slow_ms: float = 0.0
    loud: bool = True
    """Whether it can be told from noise on a loaded machine, too."""
    calm: bool = False
    """Whether nothing is wrong: any other warning, at any time, is a false alarm."""


FAULTS: tuple[Fault, ...] = (
    Fault("healthy", ("healthy",), "none", calm=True),
    Fault("slowed by 20 ms", ("straggler",), slow_ms=20, loud=False),
    Fault("slowed by 50 ms", ("straggler",), slow_ms=50, loud=False),
    Fault("slowed by 200 ms", ("straggler",), slow_ms=200),
    Fault("GPU throttled", ("straggler", "throttled"), loud=False),
    Fault("slow loader", ("data starvation",), slow_ms=150),
    Fault("slow loaders", ("data starvation",), "none", slow_ms=150),
    Fault("slow link", ("slow link",), "none", loud=False),
    Fault("CPU hogs", ("contention",)),
    Fault("stopped", ("wedged",)),
    Fault("GIL held", ("wedged",)),
    Fault("hangs in data", ("hang",)),
    Fault("other order", ("desync",), "any"),
    Fault("transfer hangs", ("hang in transfer",), "none"),
    Fault("killed", ("dead", "failed")),
    Fault("ends early", ("ended early",)),
    Fault("allocator retries", ("memory-bound",)),
    Fault("paging", ("memory-bound",)),
    Fault("offload waits", ("offload-bound",), "none"),
)
_ENDS_THE_RUN = {
    "other order": Fault("other order", ("desync", "failed"), "any"),
    "killed": Fault("killed", ("dead", "failed")),
    "ends early": Fault("ends early", ("ended early", "failed")),
}
"""A real run is ended then, by the engine or the supervisor."""
LOADED = Fault("loaded machine", ("contention", "healthy"), "none", calm=True)
"""A run with which nothing is wrong, while other processes use all CPUs."""
COLD_FILE = Fault("cold file", ("data starvation", "memory-bound"))
"""A rank reads a mapped file that does not stay in memory. Paging itself wants swap, which few machines have."""
COLD_WEIGHTS = Fault("cold weights", ("memory-bound",))
"""It reads it in its forward, as if its weights did not fit into memory."""
LIVE_FAULTS: dict[str, Fault] = {
    fault.name: fault for fault in (*FAULTS, LOADED, COLD_FILE, COLD_WEIGHTS)
} | _ENDS_THE_RUN
