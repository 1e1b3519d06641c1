"""A flat parameter group: all parameters of one unit and dtype in one buffer, with their shards and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from runtime.comm import Comm, Done, Pending
from runtime.comm.profiling import profiler_range
from runtime.comm.transfer import Copy, HeldCopy, Transfers
from runtime.host.heap import mapped
from runtime.host.ledger import Ledger, zeros
from runtime.plan.layout import Layout, Slot
from runtime.zero.fingerprint import fingerprint
from runtime.zero.gradients import Gradients
from runtime.zero.initial_values import Values, set_data
from runtime.zero.parameter import reshard, unshard
from runtime.zero.stage import StagePolicy
from runtime.zero.state_placement import StatePlacement

FIRST_PASSES = 3
"""After how many times of being unsharded a group's values are no longer compared: see `written_while_unsharded`."""
Member = tuple[str, nn.Parameter, int]
"""(name, parameter, index of its optimizer parameter group)"""


class FlatParamGroup:
    """The parameters of one unit that have one dtype, in one buffer, ordered by optimizer parameter group.

    full_param  (layout.numel,) in the compute dtype; every `param.data` is a view into it. While a sharded group is
                resharded it has no memory, and its parameters are ReshardedParameters (parameter.py)
    param_shard (state shard,) the part that this rank updates: a view into `full_param`, or, if the group is sharded,
                memory of its own, on the host with offload_param
    masters     (state shard,) fp32 master weights in `placement`; the same tensor as `param_shard` if the parameters
                are fp32 and in the same memory
    gradients   None for parameters that are not trained (stage 3 shards those, too)

    The state shard is elements [start, end) of the buffer: this rank's shard from stage 1 on, all of it at stage 0.

    [Note: resharded parameters]
    An all-gather fills the same storage again (`resize_`, as in FSDP), so views that autograd saved in the forward are
    valid in the backward. In between nothing may read that memory: see [Note: parameters change their class].
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        dtype: torch.dtype,
        policy: StagePolicy,
        sharded: bool,
        comm: Comm,
        ledger: Ledger,
        values: Values,
        placement: StatePlacement,
        trainable: bool = True,
        shard_placement: StatePlacement | None = None,
        transfers: Transfers | None = None,
    ) -> None:
        """sharded: whether parameters are kept as shards and all-gathered for use (stage 3). placement: the memory of
        masters and optimizer states. shard_placement: the memory of `param_shard` of a sharded group if it is not the
        device's; `transfers` copy it to the device."""
        self.placement, self._shard_placement, self._transfers = (
            placement,
            shard_placement if sharded else None,
            transfers,
        )
        self.name, self.policy, self.comm, self.ledger = name, policy, comm, ledger
        self.dtype, self.sharded, self.trainable = dtype, sharded, trainable
        self.members = [parameter for _, parameter, _ in members]
        comm.register_name(name)
        self.layout = Layout.of([(n, p.shape, group) for n, p, group in members], comm.world_size)
        self.start, self.end = policy.state_shard(self.layout, comm.rank)
        self.segments = self.layout.segments(self.start, self.end)
        self.gradients: Gradients | None = None
        self.is_unsharded = not sharded
        self._pending: Pending | None = None
        self._last_gather: Pending | None = None
        """The last all-gather, from which other ranks may still be reading this rank's shard."""
        self._fingerprint: torch.Tensor | None = None
        self._writes = 0
        """In-place operations on the parameters, as torch counts them, when they were unsharded."""
        self._comparisons = FIRST_PASSES
        """How often values are still compared for writes that torch does not count."""
        self._adopt(values)
        self.record_fingerprint()

    # ---- taking over the model's parameters --------------------------------------------------------------------------
    @torch.no_grad()
    def _adopt(self, values: Values) -> None:
        """Move rank 0's parameter values into the flat buffers. Takes at most one group in fp32 beside the model."""
        low, high = (self.start, self.end) if self.sharded else (0, self.layout.numel)
        stored = self._allocate_shard(high - low) if self.sharded else self._allocate_parameters(high)
        exact = self._initial_values(values, low, high, stored)
        if exact is not stored:
            stored.copy_(exact)
        if self.sharded:
            self.param_shard = stored
            self._allocate_full_param()
        else:
            self.full_param = stored
            self.param_shard = self.full_param[self.start : self.end]
            self._make_views()
        self._placeholders = [_placeholder(slot.shape, self.dtype, self.comm.device) for slot in self.layout.slots]
        if self.trainable:
            self.masters = self.param_shard
            if self.dtype != torch.float32 or self.masters_in_other_memory:
                part = exact if self.sharded else exact[self.start : self.end]
                if part.numel() == exact.numel() and not self.placement.remote:
                    self.masters = self.placement.hold("masters", part)
                else:
                    self.masters = self.placement.zeros("masters", part.numel()).copy_(part)
        for parameter, view, placeholder in zip(self.members, self._views, self._placeholders, strict=True):
            parameter.grad = None
            set_data(parameter, placeholder if self.sharded else view)
            if self.sharded:
                reshard(parameter, placeholder)
        if self.sharded:
            self.full_param.untyped_storage().resize_(0)

    def _allocate_full_param(self) -> None:
        """Set `full_param` to new memory on the device, and the views with it."""
        self.full_param = torch.empty(self.layout.numel, dtype=self.dtype, device=self.comm.device)
        self._make_views()

    def _make_views(self) -> None:
        self._views = [self.full_param[slot.offset : slot.end].view(slot.shape) for slot in self.layout.slots]

    def _allocate_shard(self, numel: int) -> torch.Tensor:
        if self._shard_placement is not None:
            return self._shard_placement.zeros("parameters", numel, self.dtype)
        return self.ledger.hold("parameters", self.comm.empty(numel, self.dtype))

    def _allocate_parameters(self, numel: int) -> torch.Tensor:
        return self.ledger.hold("parameters", self.comm.empty(numel, self.dtype))

    def _initial_values(self, values: Values, low: int, high: int, stored: torch.Tensor) -> torch.Tensor:
        """(high - low,) elements [low, high) of the flat buffer, rank 0's values on every rank; fp32 if trained.

        `stored` is the memory where they will be in the compute dtype. They are read straight into it, and it is what
        is returned, where it has the right size, dtype and device: a second buffer costs as much as reading the file.
        """
        broadcast = any(values.needs_broadcast(parameter) for parameter in self.members)
        at, end = (0, self.layout.numel) if broadcast else (low, high)
        dtype = torch.float32 if self.trainable else self.dtype
        direct = (at, end) == (low, high) and stored.dtype == dtype and stored.device == self.comm.device
        exact = stored if direct else zeros(end - at, dtype, self.comm.device)
        if direct:
            exact[max(0, self.layout.used - at) :].zero_()  # the padding at the end
        for slot, parameter in zip(self.layout.slots, self.members, strict=True):
            first, last = max(slot.offset, at), min(slot.end, end)
            if first < last:
                found = values.read(slot.name, parameter, first - slot.offset, last - slot.offset)
                if found is not None:
                    exact[first - at : last - at].copy_(found)
        if not broadcast:
            return exact
        self.comm.broadcast_bytes(exact)
        return exact if (low, high) == (at, end) else self._own_copy(exact[low:high])

    def _own_copy(self, part: torch.Tensor) -> torch.Tensor:
        """`part` in memory of its own, so that the tensor it is a view of can be freed."""
        return zeros(part.numel(), part.dtype, part.device).copy_(part)

    @property
    def is_unsharding(self) -> bool:
        """Whether an all-gather of its parameters is under way."""
        return self._pending is not None

    def shard_bounds(self, slot: Slot) -> tuple[int, int]:
        """[low, high) of the state shard: the elements of the parameter in `slot`; low == high if it has none there."""
        low, high = max(slot.offset, self.start), min(slot.end, self.end)
        return (low - self.start, high - self.start) if low < high else (0, 0)

    @property
    def state_numel(self) -> int:
        """Elements of the state shard."""
        return self.end - self.start

    @property
    def masters_in_other_memory(self) -> bool:
        """Whether masters and `param_shard` are in different memories (host and device)."""
        return self.placement.remote != (self._shard_placement is not None and self._shard_placement.remote)

    # ---- changes from outside ----------------------------------------------------------------------------------------
    @property
    def tracks_script_changes(self) -> bool:
        """Whether a script can change parameters in place without updating the masters. Changes of sharded groups are
        kept inside GatheredParameters and when they are resharded, which updates the masters."""
        return self.trainable and not self.sharded and self.masters is not self.param_shard

    def record_fingerprint(self) -> None:
        """Remember the parameters' checksum: whatever differs from now on, a script has changed."""
        if self.tracks_script_changes:
            self._fingerprint = fingerprint(self.param_shard)

    def changed_by_script(self) -> torch.Tensor | bool:
        """Whether a script has changed this rank's shard since `record_fingerprint`. On a GPU a () bool tensor, so that
        the host does not wait."""
        if self._fingerprint is None:
            return False
        different = fingerprint(self.param_shard) != self._fingerprint
        return different if self.param_shard.device.type == "cuda" else bool(different)

    def in_place_writes(self) -> int:
        """Number of in-place operations on the parameters so far (not counting those through `.data`)."""
        return self._count_writes() if self.tracks_script_changes else 0

    def written_while_unsharded(self) -> bool:
        """Whether the model's forward has written into the parameters in place (an average of other weights, a clamped
        temperature) since they were unsharded. Writes through `.data`, which torch does not count, are found by
        comparing values: in the first passes, and in the later ones too where these have found one. (A comparison
        reads all values, and waits for the device.)"""
        if not (self.sharded and self.is_unsharded):
            return False
        if self._count_writes() != self._writes:
            return True
        if not self._comparisons:
            return False
        self._comparisons -= self._comparisons > 0
        own = self.full_param[self.start : self.end]
        different = not torch.equal(own.view(torch.uint8), self.param_shard.to(own.device).view(torch.uint8))
        if different:
            self._comparisons = -1
        return different

    def forget_writes(self) -> None:
        """What was written into the unsharded parameters so far is kept already, or is to be lost."""
        self._writes = self._count_writes()

    def keep_writes(self) -> None:
        """Copy what was written into the unsharded parameters to the shard and the masters."""
        self.wait_for_readers()
        self.parameters_to_masters()
        self.forget_writes()

    def _count_writes(self) -> int:
        return sum(parameter._version for parameter in self.members)

    def masters_to_parameters(self) -> None:
        """Copy the masters, rounded, to `param_shard`: after a checkpoint or another optimizer has written them."""
        if self.trainable and self.masters is not self.param_shard:
            self.param_shard.copy_(self.masters)

    @torch.no_grad()
    def updated_masters_to_parameters(self) -> Copy | None:
        """`masters_to_parameters` after an update on the device. If the parameters are offloaded, the host does not
        wait: returns the copy, for which the device must wait before the next update and before it reads them."""
        if self._transfers is None or self.placement.remote or not self.masters_in_other_memory:
            self.masters_to_parameters()
            return None
        rounded = self.masters.to(self.dtype)
        return HeldCopy(self._transfers.down(rounded, self.param_shard, self._transfers.mark()), rounded)

    @torch.no_grad()
    def parameters_to_masters(self) -> None:
        """Copy the full parameters to `param_shard` and masters: after load_state_dict or GatheredParameters has
        written them. Masters of elements that did not change keep their fp32 digits."""
        if self.sharded:
            self.param_shard.copy_(self.full_param[self.start : self.end])
        if self.trainable and self.masters is not self.param_shard:
            self.masters_follow(self.param_shard.to(self.masters.device))
        self.record_fingerprint()

    @torch.no_grad()
    def masters_follow(self, own: torch.Tensor) -> None:
        """Copy to the first masters those elements of `own`, the first ones of `param_shard` in the masters' memory, to
        which they do not round."""
        masters = self.masters[: own.numel()]
        masters.copy_(torch.where(own == masters.to(self.dtype), masters, own.to(torch.float32)))

    # ---- unshard and reshard -----------------------------------------------------------------------------------------
    def all_gather_updated(self) -> Pending:
        """Start the all-gather of updated shards into `full_param`, for a group that is not sharded (stages 0 to 2)."""
        if not self.policy.shards_states:
            return Done()
        with profiler_range("all_gather", self.policy.stage, self.name):
            return self.comm.all_gather(self.full_param, self.param_shard, self.name)

    def issue_unshard(self) -> bool:
        """Start the all-gather of a sharded group, whose `param_shard` must be up to date. Returns False if it is
        unsharded, or the all-gather under way, already. See [Note: resharded parameters]."""
        if self.is_unsharded or self._pending is not None:
            return False
        with mapped():
            self.full_param.untyped_storage().resize_(self.full_param.numel() * self.full_param.element_size())
        self.ledger.hold("communication", self.full_param)
        with profiler_range("all_gather", self.policy.stage, self.name):
            if self._transfers is None or self._shard_placement is None:
                self._pending = self.comm.all_gather(self.full_param, self.param_shard, self.name)
                return True
            on_device = self.comm.own_shard(self.full_param)  # offloaded parameters are copied to the device first
            copy = self._transfers.up(self.param_shard, on_device, self._transfers.mark())
            self._pending = self.comm.all_gather(self.full_param, on_device, self.name, after=copy)
        return True

    def wait_for_unshard(self) -> None:
        """Wait for the all-gather and make the parameters views into its result."""
        if self._pending is None:
            return
        with profiler_range("all_gather_wait", self.policy.stage, self.name):
            self._pending.wait()
        self._last_gather, self._pending = self._pending, None
        self.is_unsharded = True
        for parameter, view in zip(self.members, self._views, strict=True):
            unshard(parameter, view)
        self.forget_writes()

    def wait_for_readers(self) -> None:
        """Wait until no rank reads this rank's shard any more, so that it may be written between two steps."""
        self.wait_for_unshard()
        gather, self._last_gather = self._last_gather, None
        if gather is not None:
            gather.fence()

    def reshard(self) -> None:
        """Free the full parameters of a sharded group; this rank's shard stays."""
        if not self.sharded:
            return
        if self._pending is not None:  # fetched ahead, and not needed after all
            self._pending.wait()
            self._last_gather, self._pending = self._pending, None
        elif not self.is_unsharded:
            return
        self.is_unsharded = False
        for parameter, placeholder in zip(self.members, self._placeholders, strict=True):
            reshard(parameter, placeholder)
        self.ledger.release("communication", self.full_param)
        if not self.full_param.untyped_storage().resizable():
            # A script has called `.numpy()` on a parameter. The array, if it still lives, must keep its memory.
            self._allocate_full_param()
        self.full_param.untyped_storage().resize_(0)

    def find_moved_param(self) -> str | None:
        """Name of the first parameter whose `.data` is no longer a view into this group: a script has set it, or
        converted or moved the module, so the model computes with values that are not trained."""
        placed = self._views if self.is_unsharded else self._placeholders
        with torch._C.DisableTorchFunctionSubclass():
            for slot, parameter, place in zip(self.layout.slots, self.members, placed, strict=True):
                data = parameter.data
                if data.dtype != place.dtype or (data.numel() and data.data_ptr() != place.data_ptr()):
                    return slot.name
        return None

    # ---- gradients, as the optimizer sees them -----------------------------------------------------------------------
    @property
    def gradient(self) -> torch.Tensor:
        """(state shard,) summed over ranks and micro-steps, in the accumulation dtype."""
        assert self.gradients is not None
        return self.gradients.reduced


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of `shape` that takes one element of memory and can't be written in place: NaN, or 0 for integers."""
    value = math.nan if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
