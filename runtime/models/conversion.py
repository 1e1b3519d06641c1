"""How the tensors of files become the parameters of a transformers model: renamed, stacked, concatenated, permuted.

transformers 5 keeps some parameters in another form than files do, above all the experts of a layer: one 3-D tensor in
memory, two or three small ones per expert in files. Per model it lists renamings and converters (a converter is a chain
of operations on tensors). We take that list as it is, and find out what its operations do by running them on tensors
of labels, one label per row: an operation that only moves rows moves labels in the same way, so that afterwards any
slice of the parameter can be read from the rows of the files that it consists of, and nothing else is read. Where an
operation does more (transposes, scales), the parameter is converted as a whole, one at a time.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from runtime.config import ConfigError
from runtime.models.names import plain_name, without_adapters

log = logging.getLogger("runtime.setup")

_LABELS_PER_ROW = 4
"""Labels that stand for a row of any length: one would not show an operation that reverses or interleaves rows."""
_SHORT_RUN_BYTES, _MANY_RUNS = 64 << 10, 256
"""A parameter of more runs than this, each shorter than this on average, is faster converted as a whole."""

_OPERATION_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError)
"""What operations raise for tensors that they can't convert, or not without their values."""

Shape = tuple[int, ...]


class StoredTensors(Protocol):
    """What a conversion needs of the files."""

    def stored_shape(self, stored: str) -> Shape:
        """Shape of a tensor in the files."""

    def stored_dtype(self, stored: str) -> str:
        """Its dtype, as safetensors calls it."""

    def read_stored(self, stored: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor in the files."""


class _Run(NamedTuple):
    """Consecutive rows of a parameter that are consecutive in one stored tensor, too."""

    row: int
    source: int
    source_row: int
    rows: int


@dataclass
class _Group:
    """Stored tensors that one converter turns into one parameter, or into several."""

    converter: Any
    first_target: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    """The converter's source pattern -> stored names that match it, in the order of their numbers."""

    @property
    def stored(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


@dataclass
class Converted:
    """A parameter that is made of several stored tensors, or by operations on one."""

    name: str
    shape: Shape
    group: _Group
    runs: list[_Run] | None
    """Where its rows are in the files; None if it has to be converted as a whole."""

    @property
    def row_numel(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1


class Conversion:
    """The conversion of a model's files: which parameters have other names there, and which are made of several
    tensors."""

    def __init__(self, model: Any, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        """The transformers model, and the prefix of its parameters' names in the model that contains it."""
        self.renamed: dict[str, str] = {}
        """Parameter -> its name in the files, for parameters that are stored as they are."""
        self.converted: dict[str, Converted] = {}
        self._whole: tuple[_Group, dict[str, torch.Tensor]] | None = None
        """The group that was converted last, until all of its parameters have been read."""

    def read(self, files: StoredTensors, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) elements [start, stop) of the flattened parameter, in its stored dtype."""
        converted = self.converted[name]
        if converted.runs is None:
            return self._read_whole(files, converted, start, stop)
        stored, row = converted.group.stored, converted.row_numel
        values: torch.Tensor | None = None
        first = bisect.bisect_right(converted.runs, start // row, key=lambda run: run.row) - 1
        for run in converted.runs[max(first, 0) :]:
            low, high = max(start, run.row * row), min(stop, (run.row + run.rows) * row)
            if run.row * row >= stop:
                break
            if low < high:
                shift = (run.source_row - run.row) * row
                found = files.read_stored(stored[run.source], low + shift, high + shift)
                values = torch.empty(stop - start, dtype=found.dtype) if values is None else values
                values[low - start : high - start] = found
        return torch.empty(0) if values is None else values

    def _read_whole(self, files: StoredTensors, converted: Converted, start: int, stop: int) -> torch.Tensor:
        if self._whole is None or self._whole[0] is not converted.group:
            self._whole = None  # before the next one is made
            group = converted.group
            tensors = {
                pattern: [
                    files.read_stored(name, 0, math.prod(files.stored_shape(name))).view(files.stored_shape(name))
                    for name in names
                ]
                for pattern, names in group.sources.items()
            }
            try:
                self._whole = group, _convert(self.model, group, tensors)
            except _OPERATION_ERRORS as error:
                raise ConfigError(
                    f"weights: transformers can't make {converted.name} of {', '.join(group.stored)}: {error}"
                ) from error
        made = self._whole[1]
        values = made[converted.name].reshape(-1)[start:stop]
        if stop == math.prod(converted.shape):
            del made[converted.name]
            if not made:
                self._whole = None
        return values


def conversion_of(model: nn.Module, names: Iterable[str], files: StoredTensors, stored: Sequence[str]) -> Conversion:
    """How the `stored` tensors become the parameters and buffers `names` of the transformers model inside `model`.
    Without one, or with a transformers without converters (before 5), a Conversion that does nothing."""
    path, inner = _transformers_model(model, names)
    conversion = Conversion(inner, f"{path}." if path else "")
    mapping = _Mapping.of(inner) if inner is not None else None
    if mapping is None:
        return conversion
    shapes = {
        without_adapters(plain_name(name)): tuple(tensor.shape)
        for tensors in (inner.named_parameters(remove_duplicate=False), inner.named_buffers(remove_duplicate=False))
        for name, tensor in tensors
    }
    groups: dict[str, _Group] = {}
    for name in sorted(stored, key=mapping.order):
        target, converter, pattern = mapping.target(name, shapes)
        if converter is None:
            if target in shapes:
                conversion.renamed.setdefault(target, name)
            continue
        if target not in groups:
            groups[target] = _Group(copy.deepcopy(converter), target)
        groups[target].sources.setdefault(pattern, []).append(name)
    conversion.model = _Shapes(inner, shapes)
    maps: dict[Any, Any] = {}
    for target, group in groups.items():
        if target in shapes:
            conversion.converted |= {one.name: one for one in _converted(conversion.model, group, files, maps)}
    return conversion


def _transformers_model(model: nn.Module, names: Iterable[str]) -> tuple[str, Any]:
    """(path, module) of the outermost transformers model in `model` that has a parameter of `names`, or ("", None)."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:  # nothing can be an instance of what was never imported
        return "", None
    names = list(names)
    for path, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            plain = plain_name(path)
            if not plain or any(name.startswith(plain + ".") for name in names):
                return plain, module
    return "", None


@dataclass
class _Mapping:
    """transformers' list of renamings and converters for a model, and its functions that apply it."""

    renamings: list[Any]
    converters: list[Any]
    base_model_prefix: str
    rename: Callable[..., tuple[str, str | None]]
    order: Callable[[str], Any]

    @classmethod
    def of(cls, model: Any) -> _Mapping | None:
        try:
            from transformers import core_model_loading as loading
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # before transformers 5: files have the model's names and shapes
            return None
        transforms = get_model_conversion_mapping(model)
        return cls(
            [one for one in transforms if isinstance(one, loading.WeightRenaming)],
            [one for one in transforms if isinstance(one, loading.WeightConverter)],
            model.base_model_prefix,
            loading.rename_source_key,
            loading.dot_natural_key,
        )

    def target(self, stored: str, known: Mapping[str, Any]) -> tuple[str, Any, str]:
        """(parameter, converter or None, its source pattern) of a stored tensor."""
        target, pattern = self.rename(stored, self.renamings, self.converters, self.base_model_prefix, known)
        if target not in known and stored in known:
            return stored, None, ""
        if pattern is None:
            return target, None, ""
        return target, next(one for one in self.converters if pattern in one.source_patterns), pattern


class _Shapes:
    """Stands in for the model in operations that look up its parameters, under the names they have without adapters."""

    def __init__(self, model: Any, shapes: Mapping[str, Shape]) -> None:
        self._model, self._shapes = model, shapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor with the shape of the parameter."""
        return torch.empty(self._shapes[name], device="meta")

    get_parameter_or_buffer = get_parameter


def _convert(model: Any, group: _Group, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Parameter -> what the group's converter makes of `tensors`, which are freed on the way."""
    converter = copy.deepcopy(group.converter)
    for pattern, names in group.sources.items():
        for name, tensor in zip(names, tensors.pop(pattern), strict=True):
            converter.add_tensor(group.first_target, name, pattern, tensor)
    made = converter.convert(group.first_target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _converted(model: Any, group: _Group, files: StoredTensors, maps: dict[Any, Any]) -> list[Converted]:
    """The parameters that a group makes. `maps` has the runs of those that were made of tensors of the same shapes."""
    counts = {pattern: len(names) for pattern, names in group.sources.items() if "*" in pattern}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"weights: tensors are missing for {group.first_target}: the files have "
            + ", ".join(f"{count} that match {pattern}" for pattern, count in counts.items())
            + ". Give all files of the model"
        )
    stored = {pattern: [files.stored_shape(name) for name in names] for pattern, names in group.sources.items()}
    shapes = _made_shapes(model, group, stored)
    key = (tuple(group.converter.source_patterns), *((p, *all_) for p, all_ in stored.items()), *shapes.values())
    if key not in maps:
        maps[key] = _follow_rows(model, group, stored, list(shapes.values()))
    one_dtype = len({files.stored_dtype(name) for name in group.stored}) == 1
    return [
        Converted(name, shape, group, runs if one_dtype else None)
        for (name, shape), runs in zip(shapes.items(), maps[key] or [None] * len(shapes), strict=True)
    ]


def _made_shapes(model: Any, group: _Group, stored: dict[str, list[Shape]]) -> dict[str, Shape]:
    """Parameter -> its shape, of those that the group makes. Where the operations need values to tell, it is the first
    one alone, with the shape that the model expects."""
    tensors = {pattern: [torch.empty(shape, device="meta") for shape in shapes] for pattern, shapes in stored.items()}
    try:
        return {name: tuple(tensor.shape) for name, tensor in _convert(model, group, tensors).items()}
    except _OPERATION_ERRORS as error:
        log.debug(f"weights: the shape of {group.first_target} is not known before it is converted: {error}")
        return {group.first_target: tuple(model.get_parameter(group.first_target).shape)}


def _follow_rows(
    model: Any, group: _Group, stored: dict[str, list[Shape]], made: list[Shape]
) -> list[list[_Run]] | None:
    """The runs of each parameter that the group makes of tensors of these shapes; None unless its operations only move
    whole rows, which they have to show with two different labellings."""
    shapes = [shape for all_ in stored.values() for shape in all_]
    row_numel = {shape[-1] if len(shape) > 1 else 1 for shape in (*shapes, *made)}
    several = {len(shape) > 1 for shape in (*shapes, *made)}
    if len(row_numel) != 1 or len(several) != 1 or not all(map(math.prod, (*shapes, *made))):
        return None
    bounds = list(itertools.accumulate((math.prod(_labelled(shape)) for shape in shapes), initial=0))
    generator = torch.Generator().manual_seed(0)  # the ranks' random states stay as they are
    renumbered = torch.randperm(bounds[-1], generator=generator)
    try:
        first = _run_on_labels(model, group, stored, torch.arange(bounds[-1]))
        second = _run_on_labels(model, group, stored, renumbered)
    except _OPERATION_ERRORS as error:
        log.debug(f"weights: {group.first_target} is converted as a whole: {error}")
        return None
    if len(first) != len(made):
        return None
    found = []
    for labels, others, shape in zip(first, second, made, strict=True):
        kept = labels.dtype == torch.int64 and tuple(labels.shape) == _labelled(shape)
        kept = kept and int(labels.min()) >= 0 and int(labels.max()) < bounds[-1]
        if not kept or not torch.equal(others, renumbered[labels]):
            return None
        width = labels.shape[-1] if len(shape) > 1 else 1
        rows = labels.reshape(-1, width)
        if not torch.equal(rows, rows[:, :1] + torch.arange(width)) or bool((rows[:, 0] % width).any()):
            return None
        runs = _runs(rows[:, 0] // width, [bound // width for bound in bounds])
        if len(runs) > _MANY_RUNS and math.prod(shape) * 2 < len(runs) * _SHORT_RUN_BYTES:
            return None
        found.append(runs)
    return found


def _labelled(shape: Shape) -> Shape:
    return (*shape[:-1], _LABELS_PER_ROW) if len(shape) > 1 else shape


def _run_on_labels(
    model: Any, group: _Group, stored: dict[str, list[Shape]], labels: torch.Tensor
) -> list[torch.Tensor]:
    """What the group's converter makes of tensors that hold `labels` instead of values, in order."""
    tensors: dict[str, list[torch.Tensor]] = {}
    at = 0
    for pattern, shapes in stored.items():
        tensors[pattern] = []
        for shape in map(_labelled, shapes):
            tensors[pattern].append(labels[at : at + math.prod(shape)].clone().view(shape))
            at += math.prod(shape)
    return list(_convert(model, group, tensors).values())


def _runs(rows: torch.Tensor, bounds: Sequence[int]) -> list[_Run]:
    """rows: for each row of a parameter, its number among all rows of the sources. bounds: where each source begins."""
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[1:] = (rows[1:] != rows[:-1] + 1) | torch.isin(rows[1:], torch.tensor(bounds))
    at = starts.nonzero().flatten()
    lengths = torch.diff(at, append=torch.tensor([len(rows)]))
    runs = []
    for row, source_row, length in zip(at.tolist(), rows[at].tolist(), lengths.tolist(), strict=True):
        source = bisect.bisect_right(bounds, source_row) - 1
        runs.append(_Run(row, source, source_row - bounds[source], length))
    return runs
