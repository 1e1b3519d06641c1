"""The classes of parameters that are resharded, whose update is still running, or whose gradients are in the engine's
buffers instead of `.grad`.

[Note: parameters change their class]
A script can reach a parameter in more ways than an engine can watch: as an attribute, in a closure, in another module's
list, through torch.func.functional_call. But to compute with it, it always calls a torch function on it. So a resharded
parameter is a `ReshardedParameter`, whose __torch_function__ unshards it first, and an unsharded one is a plain
nn.Parameter again, at no cost per call. torch changes the class of lazy parameters in the same way.

Shapes, dtypes and hooks can be read at any time. Between two passes through the model nothing can be unsharded, because
perhaps only one rank asks (rank 0, to log a norm): then computing is an error that names the parameter, and `.data` and
`.detach()` return `ReshardedValues`, which have a shape and refuse to be computed with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class Unsharder(Protocol):
    """Unshards the unit of a parameter on demand."""

    def unshard_for_use(self) -> bool:
        """Unshard the parameter, which is about to be computed with. Returns False if that is not allowed now."""


@dataclass
class _Sharded:
    """A parameter that may be resharded."""

    name: str
    unsharded_class: type[nn.Parameter]
    """Its class while it is unsharded: some modules use parameter classes of their own."""
    unsharder: weakref.ref[Unsharder]


# Weak references, because strong ones would keep the engine alive for ever. Not attributes of the parameter, because
# they would be pickled with it.
_sharded: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> _Sharded."""
_on_grad_read: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> weak method that is called when a script reads `.grad` while the gradient is in the flat buffer."""


def register_sharded(name: str, parameter: nn.Parameter, unsharder: Unsharder) -> None:
    """Make `unsharder` unshard `parameter` whenever something computes with it."""
    _sharded[parameter] = _Sharded(name, _unsharded_class(parameter), weakref.ref(unsharder))


def on_grad_read(parameter: nn.Parameter, act: Callable[[], None]) -> None:
    """Call `act`, a bound method, when a script reads `parameter.grad` after a backward and finds None."""
    _on_grad_read[parameter] = weakref.WeakMethod(act)


def _unsharded_class(parameter: nn.Parameter) -> type[nn.Parameter]:
    if isinstance(parameter, ReshardedParameter):
        known = _sharded.get(parameter)
        return known.unsharded_class if known is not None else nn.Parameter
    return nn.Parameter if isinstance(parameter, ReducedParameter) else type(parameter)


def _name_of(parameter: nn.Parameter) -> str:
    known = _sharded.get(parameter)
    return known.name if known is not None else "?"


# ---- which functions need values -----------------------------------------------------------------------------------
# fmt: off
_NO_VALUES = frozenset((
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "is_pinned", "is_shared", "is_conj", "is_neg",
    "get_device", "has_names", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad",
    "dim_order", "__len__", "__repr__", "__format__", "_has_compatible_shallow_copy_type", "is_same_size", "grad",
    "backward", "result_type", "promote_types", "can_cast",
))
# fmt: on
"""Functions that need a tensor's shape, dtype or place in the graph, not its values."""
_VALUE_PROPERTIES = frozenset(("data", "T", "H", "mT", "mH", "real", "imag", "__cuda_array_interface__"))
_ADDRESSES = frozenset(("data_ptr", "untyped_storage", "storage", "_typed_storage", "is_set_to"))
"""Functions that kernels call to compute, and scripts to find tied parameters."""
_HANDLES = frozenset(("data.__get__", "detach"))
_CONVERSIONS = frozenset(("to", "float", "double", "half", "bfloat16", "cuda", "cpu", "type", "type_as"))


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):  # a property is read, set or deleted
        return f"{getattr(getattr(func, '__self__', None), '__name__', '')}.{name}"
    return str(name)


def _needs_values(name: str) -> bool:
    attribute, dot, what = name.partition(".")
    if dot:
        return what == "__get__" and attribute in _VALUE_PROPERTIES
    return name not in _NO_VALUES


def _call_plain(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _instances_in(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from _instances_in(entry, kind)
    elif isinstance(value, dict):
        yield from _instances_in(list(value.values()), kind)


def _refusal(parameter: str, function: str) -> RuntimeError:
    if function in _CONVERSIONS:
        return RuntimeError(
            f"stage 3: parameter {parameter} is sharded and can't be converted or moved by .{function}(): convert and "
            "move the model before initialize()"
        )
    return RuntimeError(
        f"stage 3: parameter {parameter} is sharded and has values only from the beginning of a forward to the end of "
        f"its backward; {function} was called on it at another time. Read it inside "
        "zero.GatheredParameters(parameters), or change it inside zero.GatheredParameters(parameters, modifier_rank=0) "
        "on every rank"
    )


class ReshardedValues(torch.Tensor):
    """The `.data` of a resharded parameter: it has a shape, a dtype and a device, and refuses to be computed with."""

    _zt_name = "?"

    @classmethod
    def of(cls, parameter: ReshardedParameter) -> ReshardedValues:
        """Return the `.data` of `parameter`."""
        values = _call_plain(torch.Tensor.detach, (parameter,), {}).as_subclass(cls)
        values._zt_name = _name_of(parameter)
        return values  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), kwargs or {}
        if name in _HANDLES:
            return args[0]
        if _needs_values(name) and name not in _ADDRESSES:
            for values in _instances_in([args, kwargs], ReshardedValues):
                if name in _CONVERSIONS and _call_plain(func, args, kwargs) is values:
                    return values
                raise _refusal(values._zt_name, name)
        return _call_plain(func, args, kwargs)


def _unshard_for_use(parameter: nn.Parameter) -> bool:
    known = _sharded.get(parameter)
    unsharder = known.unsharder() if known is not None else None
    return unsharder is not None and unsharder.unshard_for_use()


_unshard_for_use._torchdynamo_disable = True  # type: ignore[attr-defined]  # a compiled graph has no collectives


class ReshardedParameter(nn.Parameter):
    """A parameter of which this rank has only its shard. See [Note: parameters change their class]."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), kwargs or {}
        if name == "grad.__get__":
            _notify_grad_read(args[0])
        elif name == "data.__set__" and not isinstance(args[1], (ReshardedParameter, ReshardedValues)):
            raise _refusal(_name_of(args[0]), "setting .data")
        elif _needs_values(name):
            for parameter in _instances_in([args, kwargs], ReshardedParameter):
                if _unshard_for_use(parameter) or name in _ADDRESSES:
                    continue
                if name in _HANDLES:
                    return ReshardedValues.of(parameter)
                if name in _CONVERSIONS and _call_plain(func, args, kwargs) is parameter:
                    return parameter
                raise _refusal(_name_of(parameter), name)
        return _call_plain(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"resharded parameter {_name_of(self)}: {tuple(self.shape)}, {self.dtype}"


_late: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""LateParameter -> what waits for its update."""


def _wait_for_update(parameter: nn.Parameter) -> None:
    if (wait := _late.get(parameter)) is not None:
        wait()


_wait_for_update._torchdynamo_disable = True  # type: ignore[attr-defined]


class LateParameter(nn.Parameter):
    """A parameter whose offloaded update may still be running in the model's forward: computing with it waits."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), kwargs or {}
        if _needs_values(name):
            for parameter in _instances_in([args, kwargs], LateParameter):
                _wait_for_update(parameter)
        return _call_plain(func, args, kwargs)


_GRAD: Any = torch.Tensor.grad  # the property itself


class ReducedParameter(nn.Parameter):
    """A parameter between the boundary's backward and step(): its gradient is reduced and in the flat buffer."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = memo[id(self)] = nn.Parameter(self.data.clone(), self.requires_grad)
        return copied

    def _read_grad(self) -> torch.Tensor | None:
        found: torch.Tensor | None = _GRAD.__get__(self)
        if found is None:
            _notify_grad_read(self)
        return found

    grad = property(_read_grad, _GRAD.__set__, _GRAD.__delete__)  # type: ignore[assignment]


def _notify_grad_read(parameter: nn.Parameter) -> None:
    weak = _on_grad_read.get(parameter)
    if weak is not None and (act := weak()) is not None:
        act()


# ---- for the engine ------------------------------------------------------------------------------------------------
def reshard(parameter: nn.Parameter, placeholder: torch.Tensor) -> None:
    """Make `parameter` a ReshardedParameter. placeholder: a tensor of its shape that takes no memory."""
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = placeholder
    parameter.__class__ = ReshardedParameter


def unshard(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Make `parameter` an ordinary parameter with `values`."""
    parameter.__class__ = _unsharded_class(parameter)
    parameter.data = values


def mark_reduced(parameters: Iterable[nn.Parameter], reduced: bool) -> None:
    """Make `parameters` ReducedParameters, which report reads of `.grad`, or (reduced=False) plain ones again."""
    before, after = (nn.Parameter, ReducedParameter) if reduced else (ReducedParameter, nn.Parameter)
    for parameter in parameters:
        if type(parameter) is before:
            parameter.__class__ = after


def mark_late(parameters: Iterable[nn.Parameter], wait: Callable[[], None]) -> None:
    """Make `parameters` LateParameters, which call `wait` before something computes with them."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter:
            _late[parameter] = wait
            parameter.__class__ = LateParameter


def mark_on_time(parameters: Iterable[nn.Parameter]) -> None:
    """Make LateParameters plain ones again."""
    for parameter in parameters:
        if type(parameter) is LateParameter:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            del _late[parameter]
