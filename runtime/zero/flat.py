"""A flat parameter group: all parameters of a unit that have one dtype, their shards, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from runtime.comm import Comm, Done, Pending
from runtime.comm.profiling import profiler_range
from runtime.comm.transfer import Transfers
from runtime.host.heap import mapped
from runtime.host.ledger import Ledger, zeros
from runtime.plan.layout import Layout, Slot
from runtime.zero.fingerprint import fingerprint
from runtime.zero.gradients import Gradients
from runtime.zero.parameter import reshard, unshard
from runtime.zero.stage import StagePolicy
from runtime.zero.state_placement import StatePlacement
from runtime.zero.values import Values, adopt

Member = tuple[str, nn.Parameter, int]
"""Name, parameter, index of its optimizer parameter group."""


class FlatParamGroup:
    """Parameters of one dtype, ordered by optimizer parameter group.

    whole       (layout.numel,) in the compute dtype; every `param.data` is a view into it. While a sharded flat is
                released it has no memory, and its parameters are of a class that can't be computed with (parameter.py)
    own         (own shard,) what this rank keeps and updates: its shard of `whole`, or at stage 3 memory of its own,
                which may be the host's (offload_param)
    masters     (state shard,) fp32, in `placement`; for fp32 parameters there they are `own`, not a copy
    gradients   None for parameters that are not trained (stage 3 shards those, too)

    [Note: resharded parameters]
    A gather fills the same Storage again (`resize_`, as FSDP does): views that autograd saved in the forward are then
    valid in the backward. Outside a unit's use nobody may read that memory: see [Note: parameters change their class].
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
        """placement: where masters and optimizer states live. shard_placement: where the own shard of a sharded group
        does, if not on the device; `transfers` bring it from there."""
        self.placement, self._shard_placement, self._transfers = (
            placement,
            shard_placement if sharded else None,
            transfers,
        )
        self.name, self.policy, self.comm, self.ledger = name, policy, comm, ledger
        self.dtype, self.sharded, self.trainable = dtype, sharded, trainable
        self.members = [parameter for _, parameter, _ in members]
        comm.know(name)
        self.layout = Layout.of([(n, p.shape, group) for n, p, group in members], comm.world_size)
        self.start, self.end = policy.state_shard(self.layout, comm.rank)
        self.segments = self.layout.segments(self.start, self.end)
        self.gradients: Gradients | None = None
        self.is_unsharded = not sharded
        self._pending: Pending | None = None
        self._noted: torch.Tensor | None = None
        self._adopt(values)
        self.note_values()

    # ---- taking over the model's parameters --------------------------------------------------------------------------
    @torch.no_grad()
    def _adopt(self, values: Values) -> None:
        """Move the parameters' values (rank 0's) into flat memory: at most one flat in fp32 above the model at a
        time."""
        low, high = (self.start, self.end) if self.sharded else (0, self.layout.numel)
        exact = self._initial(values, low, high)
        if self.sharded:
            self.own = self._own_memory(high - low)
            self.own.copy_(exact)
            self.whole = torch.empty(self.layout.numel, dtype=self.dtype, device=self.comm.device)
        else:
            self.whole = self.ledger.hold("parameters", self.comm.empty(high, self.dtype)).copy_(exact)
            self.own = self.whole[self.start : self.end]
        self._views = [self.whole[slot.offset : slot.end].view(slot.shape) for slot in self.layout.slots]
        self._placeholders = [_placeholder(slot.shape, self.dtype, self.comm.device) for slot in self.layout.slots]
        if self.trainable:
            self.masters = self.own
            if self.dtype != torch.float32 or self.apart:
                part = exact if self.sharded else exact[self.start : self.end]
                if part.numel() == exact.numel() and not self.placement.remote:
                    self.masters = self.placement.hold("masters", part)
                else:
                    self.masters = self.placement.zeros("masters", part.numel()).copy_(part)
        for parameter, view, placeholder in zip(self.members, self._views, self._placeholders, strict=True):
            parameter.grad = None
            adopt(parameter, placeholder if self.sharded else view)
            if self.sharded:
                reshard(parameter, placeholder)
        if self.sharded:
            self.whole.untyped_storage().resize_(0)

    def _own_memory(self, numel: int) -> torch.Tensor:
        if self._shard_placement is not None:
            return self._shard_placement.zeros("parameters", numel, self.dtype)
        return self.ledger.hold("parameters", self.comm.empty(numel, self.dtype))

    def _initial(self, values: Values, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of the flat buffer, rank 0's values on every rank; fp32 where they are trained."""
        broadcast = any(values.needs_broadcast(parameter) for parameter in self.members)
        at, end = (0, self.layout.numel) if broadcast else (low, high)
        dtype = torch.float32 if self.trainable else self.dtype
        exact = zeros(end - at, dtype, self.comm.device)
        for slot, parameter in zip(self.layout.slots, self.members, strict=True):
            first, last = max(slot.offset, at), min(slot.end, end)
            if first < last:
                found = values.read(slot.name, parameter, first - slot.offset, last - slot.offset)
                if found is not None:
                    exact[first - at : last - at].copy_(found)
        if not broadcast:
            return exact
        self.comm.broadcast_bytes(exact)
        return exact if (low, high) == (at, end) else self._copied(exact[low:high])

    def _copied(self, part: torch.Tensor) -> torch.Tensor:
        """In memory of its own, so that the rest can go."""
        return zeros(part.numel(), part.dtype, part.device).copy_(part)

    @property
    def is_unsharding(self) -> bool:
        """Whether an all-gather of it is under way."""
        return self._pending is not None

    def own_part(self, slot: Slot) -> tuple[int, int]:
        """The elements [low, high) of the state shard that are those of one parameter; equal where there are none."""
        low, high = max(slot.offset, self.start), min(slot.end, self.end)
        return (low - self.start, high - self.start) if low < high else (0, 0)

    @property
    def state_numel(self) -> int:
        return self.end - self.start

    @property
    def apart(self) -> bool:
        """Whether masters and own parameters are in different memories."""
        return self.placement.remote != (self._shard_placement is not None and self._shard_placement.remote)

    # ---- changes from outside ----------------------------------------------------------------------------------------
    @property
    def _script_reaches_it(self) -> bool:
        """Whether a script can change parameters in place without the masters knowing. A sharded flat is changed
        inside GatheredParameters, which says so."""
        return self.trainable and not self.sharded and self.masters is not self.own

    def note_values(self) -> None:
        """Whatever differs from now on, a script has changed."""
        if self._script_reaches_it:
            self._noted = fingerprint(self.own)

    def changed(self) -> torch.Tensor | bool:
        """Whether a script has changed own parameters since `note_values`; () bool on a GPU, so that nobody waits."""
        if self._noted is None:
            return False
        different = fingerprint(self.own) != self._noted
        return different if self.own.device.type == "cuda" else bool(different)

    def writes(self) -> int:
        """In-place operations on the parameters so far (not those through `.data`)."""
        return sum(parameter._version for parameter in self.members) if self._script_reaches_it else 0

    def masters_to_parameters(self) -> None:
        """After the masters were written from outside (a checkpoint, another optimizer)."""
        if self.trainable and self.masters is not self.own:
            self.own.copy_(self.masters)

    @torch.no_grad()
    def parameters_to_own(self) -> None:
        """After the gathered parameters were written from outside (load_state_dict, GatheredParameters). Masters of
        elements that are what they were keep the digits that 16 bits can't hold."""
        if self.sharded:
            self.own.copy_(self.whole[self.start : self.end])
        if self.trainable and self.masters is not self.own:
            own = self.own.to(self.masters.device)
            same = own == self.masters.to(self.dtype)
            self.masters.copy_(torch.where(same, self.masters, own.to(torch.float32)))
        self.note_values()

    # ---- gathering ---------------------------------------------------------------------------------------------------
    def all_gather_updated(self) -> Pending:
        """After an update: all-gather the shards that other ranks updated, where parameters stay whole."""
        if not self.policy.shards_states:
            return Done()
        with profiler_range("all_gather", self.policy.stage, self.name):
            return self.comm.all_gather(self.whole, self.own, self.name)

    def issue_unshard(self) -> bool:
        """Start the all-gather of a sharded group, whose own shard must be up to date. See [Note: resharded
        parameters]. False where there was nothing to start."""
        if self.is_unsharded or self._pending is not None:
            return False
        with mapped():
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
        self.ledger.hold("communication", self.whole)
        with profiler_range("all_gather", self.policy.stage, self.name):
            if self._transfers is None or self._shard_placement is None:
                self._pending = self.comm.all_gather(self.whole, self.own, self.name)
                return True
            place = self.comm.own_shard(self.whole)  # offloaded parameters come to their place on the device first
            copy = self._transfers.up(self.own, place, self._transfers.mark())
            self._pending = self.comm.all_gather(self.whole, place, self.name, after=copy)
        return True

    def wait_for_unshard(self) -> None:
        """Wait for the all-gather; the parameters are views into its result afterwards."""
        if self._pending is None:
            return
        with profiler_range("all_gather_wait", self.policy.stage, self.name):
            self._pending.wait()
        self._pending = None
        self.is_unsharded = True
        for parameter, view in zip(self.members, self._views, strict=True):
            unshard(parameter, view)

    def reshard(self) -> None:
        """Free the parameters of a sharded group; the own shard stays."""
        if not self.sharded:
            return
        if self._pending is not None:  # fetched ahead, and not needed after all
            self._pending.wait()
            self._pending = None
        elif not self.is_unsharded:
            return
        self.is_unsharded = False
        for parameter, placeholder in zip(self.members, self._placeholders, strict=True):
            reshard(parameter, placeholder)
        self.ledger.release("communication", self.whole)
        self.whole.untyped_storage().resize_(0)

    def find_moved_param(self) -> str | None:
        """The first parameter that lies elsewhere than this left it: somebody set its `.data`, or converted or moved
        the module, and what it computes with is not what is trained."""
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
    """One element that looks like `shape`: NaN, or 0 where the dtype has none. It can't be written in place."""
    value = math.nan if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
