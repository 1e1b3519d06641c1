"""Collectives: in place, in one order on every rank, each timed and counted.

join      the process group: NCCL for GPUs, Gloo for CPUs
group     `Comm`, the collectives of one group
pending   a collective under way, on the host or on a GPU's own stream
(ranks of one host without GPUs exchange through memory that they share: runtime/exchange.py)

[Note: what a reduce-scatter leaves behind]
`reduce_scatter(buffer)` is "in place and the rest is clobbered": afterwards the own range of the buffer holds the sum,
the other ranges hold nothing of use. `into(target, add)` instead of `wait()` leaves the sum in another tensor, which
saves a pass over memory wherever the ranks' buffers can be read directly.
"""

from runtime.comm.group import Comm
from runtime.comm.join import init_distributed
from runtime.comm.pending import Done, Pending

__all__ = ["Comm", "Done", "Pending", "init_distributed"]
