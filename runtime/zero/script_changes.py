"""What scripts do to a model between two steps. Parameters that they change are what is trained on from then on; what
would train nothing is an error that names it: parameters that left their place, thawed, or came with a new module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from runtime.models.names import plain_name
from runtime.zero.flat import FlatParamGroup

log = logging.getLogger("runtime.engine")


class ScriptChanges:
    """Of one engine's model."""

    def __init__(
        self,
        module: nn.Module,
        flats: Sequence[FlatParamGroup],
        frozen_flats: Sequence[FlatParamGroup],
        frozen: Sequence[tuple[str, nn.Parameter]],
        before_change: Callable[[], None],
        tells: bool,
    ) -> None:
        """flats: the trained ones. frozen: parameters in no flat. before_change: returns when masters may be written.
        tells: this rank logs for all."""
        self._flats, self._before_change, self._tells = flats, before_change, tells
        self._all_flats = [*flats, *frozen_flats]
        self._frozen = [*frozen]
        for flat in frozen_flats:
            self._frozen += [(slot.name, p) for slot, p in zip(flat.layout.slots, flat.members, strict=True)]
        held = [parameter for flat in flats for parameter in flat.members] + [
            parameter for _, parameter in self._frozen
        ]
        self._structure = _Structure(module, {id(parameter) for parameter in held})

    # ---- values ------------------------------------------------------------------------------------------------------
    def found(self) -> torch.Tensor | bool:
        """Whether this rank's parameters are others than the last step left, where masters have to hear of it. () bool
        on a GPU, so that nobody waits."""
        changed: torch.Tensor | bool = False
        for flat in self._flats:
            changed = changed | flat.changed()
        return changed

    def take(self) -> None:
        """The script has changed parameters in place (clamped, averaged, swapped them): so do the masters."""
        self._before_change()
        for flat in self._flats:
            if not flat.sharded:
                flat.parameters_to_own()
        self.log_taken()

    def log_taken(self) -> None:
        """Say once that masters have followed the script's changes."""
        if self._tells:
            log.info("parameters that the script changed in place were taken over into the masters (logged once)")
        self._tells = False

    # ---- parameters --------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises RuntimeError for what would train nothing."""
        if new := self._structure.new_parameters():
            names = ", ".join(f"{name} {list(p.shape)}" for name, p in new[:5]) + (", ..." if len(new) > 5 else "")
            raise RuntimeError(
                f"{len(new)} parameters came into the model after initialize() and would not be trained: {names}. "
                "Resize, replace and add modules before initialize(), or call initialize() again on the changed model"
            )
        for flat in self._all_flats:
            if (name := flat.find_moved_param()) is not None:
                raise RuntimeError(
                    f"parameter {name} is no longer where the engine trains it: its .data was set, or the module was "
                    "converted or moved (.float(), .to(...)) after initialize(). Do that before initialize(); to "
                    "change values, write them in place, or use load_state_dict() or zero.GatheredParameters"
                )
        for name, parameter in self._frozen:
            if parameter.grad is not None:
                raise RuntimeError(
                    f"parameter {name} was frozen, or in no optimizer group, at initialize() and has a gradient now: "
                    "the engine would not train it. Recreate the engine with it trainable; this run's checkpoints load"
                )


class _Structure:
    """Notices parameters that came into `module` after initialize(), at the cost of some comparisons."""

    def __init__(self, module: nn.Module, known: Collection[int]) -> None:
        """known: the ids of all parameters that an engine holds; it keeps them alive."""
        self._module, self._known = module, known
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._learn()

    def _learn(self) -> None:
        tables = [table for owner in self._module.modules() for table in (owner._modules, owner._parameters)]
        self._places = [(table, name, entry) for table in tables for name, entry in table.items()]
        self._sizes = [(table, len(table)) for table in tables]

    def new_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that require a gradient and are in no engine, by name."""
        same = all(table.get(name) is entry for table, name, entry in self._places)
        if same and all(len(table) == size for table, size in self._sizes):
            return []
        named = self._module.named_parameters()
        found = [(plain_name(n), p) for n, p in named if p.requires_grad and id(p) not in self._known]
        if not found:
            self._learn()
        return found
