"""Offload of saved activations to host memory, block by block, beside the computation.

forward    | block 0        | block 1        | block 2        | last block
down       |                | 0              | 1              | 2                 page-locked memory of the host
backward   | last block     | block 2        | block 1        | block 0
up         | 2              | 1              | 0              |

What autograd saves in a block's forward is copied to the host when the forward ends, while the next block computes;
when that ends, too, the compute stream waits for the copies, and the device's memory is freed. In the backward a block
brings its own activations, unless they are on their way already, and those of the block before it, which is next. So
the device holds the activations of two blocks, and of the last one, whose backward comes at once.

On a CPU the copies go to other memory of the host, which saves nothing, but runs the same code.

[Note: what is offloaded]
Whole storages: the views of one that autograd saves, also in several blocks, are copied once and become views of one
storage again, with the strides they had, so that backward runs the same kernels. Parameters and buffers of the block
stay, whatever their memory is a part of (the engine's flat buffers, at stage 3 refilled in the backward), and so do
small tensors, and slices of storages that are much larger.

[Note: with activation checkpointing]
Inside torch.utils.checkpoint its own hooks keep what is saved from being saved at all, and ours stay away. What is left
are the inputs of the function: call it through `ActivationOffload.checkpoint`, and they are offloaded.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from runtime.host.ledger import Ledger
from runtime.host.slabs import Piece, Slabs

MIN_BYTES = 1 << 16
"""Smaller tensors stay on the device: starting a copy would take longer than the copy."""
MAX_WASTE = 4
"""A tensor stays on the device if its storage is larger by more than this factor."""


def offload_activations(
    blocks: Sequence[nn.Module], *, min_bytes: int = MIN_BYTES, pin: bool = True, ledger: Ledger | None = None
) -> ActivationOffload:
    """Keep what autograd saves in the forwards of `blocks` in host memory until their backward. `remove` ends it.

    Args:
        blocks: in the order in which they run. The last one's activations stay on the device.
        min_bytes: size from which tensors are offloaded.
        pin: whether to page-lock the host memory, on a machine with a GPU; without it copies are slow, and do not run
            beside the computation.
        ledger: where the host memory is counted, as "activations".
    """
    return ActivationOffload(blocks, min_bytes, pin, ledger)


class ActivationOffload:
    """Offloads the activations of some blocks: see `offload_activations`."""

    def __init__(self, blocks: Sequence[nn.Module], min_bytes: int, pin: bool, ledger: Ledger | None) -> None:
        self._pin, self._ledger, self.min_bytes = pin, ledger, min_bytes
        self.offloaded_bytes = 0
        """Bytes that have been copied to the host so far."""
        self._places: dict[torch.device, tuple[_Streams, Slabs]] = {}
        self._last: Callable[[], _Group | None] = lambda: None
        """The last group that was begun, as a weak reference."""
        self._ending: _Group | None = None
        """The group whose copies are under way, and whose memory on the device is freed when the next one ends."""
        self._known: dict[int, tuple[StorageWeakRef, int, weakref.ref[_Saved]]] = {}
        """Address of a storage -> the storage, its version, and what was saved of it."""
        self._hooks: list[Any] = []
        for index, block in enumerate(blocks):
            if index == len(blocks) - 1:
                break
            watch = _Block(self, block)
            self._hooks += [
                block.register_forward_pre_hook(_Hook(watch.begin)),
                block.register_forward_hook(_Hook(watch.end), always_call=True),
            ]

    def remove(self) -> None:
        """Offload no further activations. Those that are in host memory stay until their backward."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs), recomputed in the backward; the inputs are kept in host memory until then. In the
        place of torch.utils.checkpoint.checkpoint, of its variant that is not reentrant."""
        kwargs.pop("use_reentrant", None)
        if not torch.is_grad_enabled() or _in_backward():
            return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
        group = self.begin_group(())
        with torch.autograd.graph.saved_tensors_hooks(group.pack, _unpack):
            result = torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
        self.end_group(group)
        return result

    # ---- groups: what is saved in one forward of a block -----------------------------------------------------------
    def begin_group(self, own: Sequence[Tensor]) -> _Group:
        """A group for the forward that begins. own: tensors whose memory stays on the device."""
        group = _Group(self, self._last(), own)
        self._last = weakref.ref(group)
        return group

    def end_group(self, group: _Group) -> None:
        """Start the copies of `group` to the host, and free the memory that the copies of the last one have read."""
        self.free_copied()
        group.send()
        self._ending = group
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}

    def free_copied(self) -> None:
        """Free the memory of the group whose copies are under way; the compute stream waits for them first."""
        if self._ending is not None:
            self._ending.free()
            self._ending = None

    def saved(self, tensor: Tensor, group: _Group) -> _Saved:
        """The storage of `tensor` as it is saved by `group`, or has been by an earlier one."""
        storage, version = tensor.untyped_storage(), tensor._version
        known = self._known.get(storage._cdata)
        if known is not None and not known[0].expired() and known[1] == version:
            earlier = known[2]()
            if earlier is not None:
                return earlier
        saved = _Saved(tensor.detach(), *self._place(storage.device))
        self._known[storage._cdata] = StorageWeakRef(storage), version, weakref.ref(saved)
        self.offloaded_bytes += saved.nbytes
        group.add(saved)
        return saved

    def _place(self, device: torch.device) -> tuple[_Streams, Slabs]:
        """The copies of `device`, and the host memory for its activations."""
        if device not in self._places:
            on_gpu = device.type == "cuda"
            slabs = Slabs(self._pin and on_gpu, device.index or 0, self._ledger, "activations")
            self._places[device] = _CudaStreams(device) if on_gpu else _HostCopies(), slabs
        return self._places[device]


class _Block:
    """Pushes autograd's hooks while a block's forward runs."""

    def __init__(self, offload: ActivationOffload, block: nn.Module) -> None:
        self._offload, self._block = offload, block
        self._running: list[tuple[torch.autograd.graph.saved_tensors_hooks, _Group] | None] = []
        """The forwards of the block that are running: its own, and if it calls itself those inside."""

    def begin(self, *_given: Any) -> None:
        """Before the forward."""
        if not torch.is_grad_enabled() or _in_backward() or _in_checkpoint():
            self._running.append(None)
            return
        own = [*self._block.parameters(), *self._block.buffers()]
        group = self._offload.begin_group(own)
        context = torch.autograd.graph.saved_tensors_hooks(group.pack, _unpack)
        context.__enter__()
        self._running.append((context, group))

    def end(self, *_given: Any) -> None:
        """After the forward, also if it failed."""
        entered = self._running.pop() if self._running else None
        if entered is not None:
            context, group = entered
            context.__exit__(None, None, None)
            self._offload.end_group(group)


class _Packed(NamedTuple):
    """In the place of a tensor in the graph: a view of a storage that is offloaded."""

    group: _Group
    saved: _Saved
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Group:
    """What one forward saved. Later groups run their backward earlier."""

    def __init__(self, offload: ActivationOffload, before: _Group | None, own: Sequence[Tensor]) -> None:
        self._offload, self._own = offload, own
        self._before = weakref.ref(before) if before is not None else lambda: None
        self._saved: list[weakref.ref[_Saved]] = []
        # Strong until the copies are issued: then the graph alone decides how long it is needed.
        self._unsent: list[_Saved] = []
        self._read = False

    def pack(self, tensor: Tensor) -> Any:
        """Called by autograd with a tensor that it saves."""
        if not self._leaves(tensor):
            return tensor if tensor.is_leaf else tensor.detach()
        saved = self._offload.saved(tensor, self)
        return _Packed(self, saved, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def _leaves(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.nbytes < self._offload.min_bytes:
            return False
        storage = tensor.untyped_storage()
        if not tensor.nbytes <= storage.nbytes() <= MAX_WASTE * tensor.nbytes:
            return False
        with torch._C.DisableTorchFunctionSubclass():  # reading a resharded parameter would unshard it
            return all(storage._cdata != own.untyped_storage()._cdata for own in self._own)

    def add(self, saved: _Saved) -> None:
        """Copy `saved` with this group."""
        self._unsent.append(saved)
        self._saved.append(weakref.ref(saved))

    def send(self) -> None:
        """Start the copies to the host of all that was saved."""
        for saved in self._unsent:
            saved.send()

    def free(self) -> None:
        """Free the device's memory of what was sent."""
        for saved in self._unsent:
            saved.free()
        self._unsent = []

    def before_backward(self) -> None:
        """At the first tensor that the backward of this group reads: bring all of them, and those of the group before,
        whose backward is next."""
        if self._read:
            return
        self._read = True
        self._offload.free_copied()
        self.bring()
        before = self._before()
        if before is not None:
            before.bring()

    def bring(self) -> None:
        """Start the copies to the device of what is not there."""
        for reference in self._saved:
            saved = reference()
            if saved is not None:
                saved.bring()


class _Saved:
    """One storage that is offloaded."""

    def __init__(self, tensor: Tensor, streams: _Streams, slabs: Slabs) -> None:
        self._streams, self._slabs, self._device = streams, slabs, tensor.device
        self.nbytes, self._shape = tensor.untyped_storage().nbytes(), tuple(tensor.shape)
        self._source: Tensor | None = tensor
        """A tensor with the storage itself, until the device need not keep it for us."""
        self._version, self._modified = tensor._version, False
        self._host: Piece | None = None
        self._sent: Any = None
        """The copy to `_host`."""
        self._target: torch.UntypedStorage | None = None
        """A new storage on the device."""
        self._unfinished: list[Any] = []
        """The copy to `_target`, until the compute stream has waited for it."""

    def send(self) -> None:
        """Start the copy to the host."""
        if self._source is not None and self._host is None:
            self._host = self._slabs.take(self.nbytes)
            self._sent = self._streams.down(_bytes_of(self._source.untyped_storage()), self._host.tensor)

    def free(self) -> None:
        """Give the storage up. The compute stream waits until it is copied, so its memory may be used again."""
        if self._source is not None and self._host is not None:
            self._streams.wait(self._sent)
            self._modified = self._source._version != self._version
            self._source = None

    def bring(self) -> None:
        """Start the copy to the device, unless the storage is there or on its way."""
        if self._source is None and self._target is None and self._host is not None:
            target = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
            self._target = target.untyped_storage()
            self._unfinished = [self._streams.up(self._host.tensor, target, self._sent)]

    def storage(self) -> torch.UntypedStorage:
        """The values on the device, for what the current stream does next."""
        self.bring()
        self._finish()
        if self._modified or (self._source is not None and self._source._version != self._version):
            raise RuntimeError(
                f"an activation of shape {self._shape} that backward needs was modified by an in-place operation after "
                "it had been saved: the gradient would be wrong"
            )
        found = self._source.untyped_storage() if self._source is not None else self._target
        assert found is not None
        return found

    def _finish(self) -> None:
        while self._unfinished:
            self._streams.wait(self._unfinished.pop())

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._finish()  # also of a backward that never came: the copy still writes to the memory that is freed now


def _unpack(packed: Any) -> Tensor:
    """Called by autograd when the backward reads what a group's `pack` returned."""
    if isinstance(packed, Tensor):
        return packed
    packed.group.before_backward()
    storage = packed.saved.storage()
    empty = torch.empty(0, dtype=packed.dtype, device=storage.device)
    return empty.set_(storage, packed.offset, packed.shape, packed.stride)  # type: ignore[call-overload, no-any-return]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload, no-any-return]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def _in_checkpoint() -> bool:
    """Whether the hooks of torch.utils.checkpoint are the innermost ones."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


class _Hook:
    """A module's hook that copies and pickles of the module do without."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *given: Any) -> None:
        _call(self._act, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _plain, ()


def _nothing(*_given: Any) -> None:
    """In the place of a _Hook in copies and pickles."""


def _plain() -> Callable[..., None]:
    return _nothing


def _call(act: Callable[..., None], given: tuple[Any, ...]) -> None:
    # Autograd's hooks are pushed and popped by Python, and a compiled block runs between them. torch.compiler.disable
    # would import the compiler (100 MB): call it only when the script has imported that.
    global _uncompiled
    if _uncompiled is None and "torch._dynamo" in sys.modules:
        _uncompiled = torch.compiler.disable(_act)
    (_uncompiled or _act)(act, given)


def _act(act: Callable[..., None], given: tuple[Any, ...]) -> None:
    act(*given)


_call._torchdynamo_disable = True  # type: ignore[attr-defined]
_uncompiled: Callable[[Callable[..., None], tuple[Any, ...]], None] | None = None


# ---- copies ----------------------------------------------------------------------------------------------------------
class _Streams(Protocol):
    """Copies between one device and the host. Each begins after what the current stream has been given so far."""

    def down(self, source: Tensor, target: Tensor) -> Any:
        """Copy from the device to the host. Returns the copy, for `wait` and `up`."""

    def up(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Copy from the host to the device, not before the copy `after`."""

    def wait(self, copy: Any) -> None:
        """Make the current stream wait for a copy."""


class _HostCopies:
    """The device is the host itself."""

    def down(self, source: Tensor, target: Tensor) -> None:
        """See _Streams."""
        target.copy_(source)

    def up(self, source: Tensor, target: Tensor, after: None) -> None:
        """See _Streams."""
        target.copy_(source)

    def wait(self, copy: None) -> None:
        """See _Streams."""


class _CudaStreams:
    """One stream per direction, because a GPU has a copy engine for each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def down(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """See _Streams."""
        self._down.wait_stream(self._up)  # the host memory may be read by the copy of an earlier activation
        return self._copy(self._down, source, target)

    def up(self, source: Tensor, target: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        """See _Streams."""
        self._up.wait_event(after)
        return self._copy(self._up, source, target)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> torch.cuda.Event:
        # No record_stream: the current stream waits for the copy before the device's memory is freed.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
        return done

    def wait(self, copy: torch.cuda.Event) -> None:
        """See _Streams."""
        torch.cuda.current_stream(self._device).wait_event(copy)
