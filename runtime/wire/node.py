"""What the probe of a node reports: the GPUs, the host, and the run's processes on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from runtime.wire.base import Message
from runtime.wire.bounds import Count, Finite, Int64, Name, Pid, RankNumber, Text, WallSeconds


class GpuStats(Message):
    """One GPU as reported by NVML. None: not supported by the GPU or the driver, unless `no_permission` or
    `stale_fields` names the field."""

    index: Count
    uuid: Name
    name: Name
    lost: bool = False
    """The driver has lost the GPU (fallen off the bus); nothing else is known then."""
    mig: bool = False
    """Partitioned into MIG instances: most figures do not exist for the whole GPU."""
    used_bytes: Count | None = None
    total_bytes: Count | None = None
    driver_bytes: Count | None = None
    """What the driver keeps for itself, not part of `used_bytes`. None: part of it, as older drivers count."""
    utilization_percent: Finite | None = None
    """Share of the time in which a kernel ran: 100 also for one that keeps a single SM busy, or waits for a peer."""
    sm_activity_percent: Finite | None = None
    """Share of the SMs that were busy, mean over the last second (GPM, from Hopper on); so are the next two."""
    tensor_activity_percent: Finite | None = None
    """Share of the time in which tensor cores were busy."""
    dram_activity_percent: Finite | None = None
    """Share of the memory bandwidth that was used."""
    power_w: Finite | None = None
    power_limit_w: Finite | None = None
    energy_j: Finite | None = None
    """Energy since the driver was loaded."""
    temperature_c: Finite | None = None
    slowdown_temperature_c: Finite | None = None
    """Where the hardware lowers the clocks."""
    sm_clock_mhz: Finite | None = None
    max_sm_clock_mhz: Finite | None = None
    memory_clock_mhz: Finite | None = None
    max_memory_clock_mhz: Finite | None = None
    clock_reasons: list[Name] = Field(default_factory=list)
    """Why the clocks are below their maximum, in words: "power cap", "hot (hardware)", ... Idleness is not listed."""
    pcie_generation: Count | None = None
    max_pcie_generation: Count | None = None
    """The highest that this GPU can use in this machine."""
    pcie_width: Count | None = None
    max_pcie_width: Count | None = None
    pcie_tx_bytes_per_s: Finite | None = None
    """From the GPU; rx: to the GPU."""
    pcie_rx_bytes_per_s: Finite | None = None
    nvlink_tx_bytes_per_s: Finite | None = None
    """All links together."""
    nvlink_rx_bytes_per_s: Finite | None = None
    links: list[Name] = Field(default_factory=list)
    """How it reaches each GPU of the node, by index, in the words of `nvidia-smi topo -m`: X itself, NV18 (18 NVLinks),
    PIX, PXB, PHB, NODE, SYS; empty if not known."""
    ecc_corrected: Count | None = None
    """ECC errors of the memory since the driver was loaded."""
    ecc_uncorrected: Count | None = None
    remapped_rows: Count | None = None
    """Rows of memory replaced by spare ones."""
    row_remap_pending: bool = False
    """A row waits for a reset of the GPU to be replaced."""
    row_remap_failed: bool = False
    xid: Count | None = None
    """The newest XID error since the run's start after which the GPU is not to be trusted."""
    xid_text: Text = ""
    """What it means, and what to do."""
    xid_wall_s: WallSeconds = 0.0
    """When the driver reported it."""
    no_permission: list[Name] = Field(default_factory=list)
    """Fields that the user of the run may not read."""
    stale_fields: list[Name] = Field(default_factory=list)
    """Fields that are missing because the driver has not answered for `stale_s`."""
    stale_s: Finite | None = None


class BusyProcess(Message):
    """A process outside the run that uses the node's CPUs."""

    pid: Pid
    name: Name
    cpu_percent: Finite


class NodeStats(Message):
    """One node, sampled by its probe once a second. `gpus` is None without NVML (`gpu_note` says why)."""

    kind: Literal["node"] = "node"
    host: Name
    cpu_percent: Finite
    cpu_count: Count
    load_1m: Finite
    ram_used_bytes: Count
    ram_total_bytes: Count
    ram_available_bytes: Count | None = None
    """What can be had without swapping (MemAvailable), and not more than the control group leaves."""
    cgroup_limit_bytes: Count | None = None
    """The limit of the control group that has least left; None without one."""
    cgroup_used_bytes: Count | None = None
    """What is used of it, without page cache."""
    page_cache_bytes: Count | None = None
    shared_memory_bytes: Count | None = None
    """tmpfs and shared memory of the whole node."""
    memory_pressure_percent: Finite | None = None
    """Share of the last 10 s in which some process waited for memory (PSI, some avg10)."""
    swap_used_bytes: Count = 0
    swap_in_bytes_per_s: Finite | None = None
    swap_out_bytes_per_s: Finite | None = None
    rank_rss_bytes: dict[RankNumber, Count] = Field(default_factory=dict)
    rank_cpu_percent: dict[RankNumber, Finite] = Field(default_factory=dict)
    rank_process: dict[RankNumber, Name] = Field(default_factory=dict)
    """State of each rank's process as psutil names it ("running", "sleeping", "stopped", "disk-sleep", "zombie"), or
    "gone"."""
    rank_run_delay_percent: dict[RankNumber, Finite] = Field(default_factory=dict)
    """Share of the time in which the rank's main thread was ready to run and no CPU was free; absent where the kernel
    does not say."""
    busy: list[BusyProcess] = Field(default_factory=list)
    """The processes outside the run that use the most CPU time, at most three, busiest first."""
    run_rss_bytes: Count = 0  # every process of the run on this node
    gpus: list[GpuStats] | None = None
    gpu_note: Text = ""
    at_ns: Int64
    wall_s: WallSeconds
