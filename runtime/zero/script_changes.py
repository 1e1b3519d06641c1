"""Changes that a script makes to the model between two steps. Changed values are copied to the masters. Changes after
which a parameter would not be trained are errors: moved, unfrozen or new parameters."""

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
    """Detects changes to one engine's model."""

    def __init__(
        self,
        module: nn.Module,
        flats: Sequence[FlatParamGroup],
        frozen_flats: Sequence[FlatParamGroup],
        frozen: Sequence[tuple[str, nn.Parameter]],
        before_change: Callable[[], None],
        logs: bool,
    ) -> None:
        """flats: groups of trained parameters. frozen: frozen parameters in no group. before_change: waits until
        masters may be written. logs: whether this rank logs for all."""
        self._flats, self._before_change, self._logs = flats, before_change, logs
        self._all_flats = [*flats, *frozen_flats]
        self._frozen = [*frozen]
        for flat in frozen_flats:
            self._frozen += [(slot.name, p) for slot, p in zip(flat.layout.slots, flat.members, strict=True)]
        held = [parameter for flat in flats for parameter in flat.members] + [
            parameter for _, parameter in self._frozen
        ]
        self._tables = _ModuleTables(module, {id(parameter) for parameter in held})

    # ---- values ------------------------------------------------------------------------------------------------------
    def detected(self) -> torch.Tensor | bool:
        """Whether this rank's parameters have changed since the last step while their masters have not. On a GPU a ()
        bool tensor, so that the host does not wait."""
        changed: torch.Tensor | bool = False
        for flat in self._flats:
            changed = changed | flat.changed_by_script()
        return changed

    def commit(self) -> None:
        """Copy parameters that the script has changed in place (clamped, averaged, swapped) to the masters."""
        self._before_change()
        for flat in self._flats:
            if not flat.sharded:
                flat.parameters_to_masters()
        self.log_commit()

    def log_commit(self) -> None:
        """Log once that the masters have followed the script's changes."""
        if self._logs:
            log.info("parameters changed in place by the script were copied to the fp32 masters (logged once)")
        self._logs = False

    # ---- parameters --------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises RuntimeError if a parameter would not be trained: it is new, was moved, or was unfrozen."""
        if new := self._tables.new_parameters():
            names = ", ".join(f"{name} {list(p.shape)}" for name, p in new[:5]) + (", ..." if len(new) > 5 else "")
            raise RuntimeError(
                f"{len(new)} parameters were added to the model after initialize() and would not be trained: {names}. "
                "Resize, replace and add modules before initialize(), or call initialize() again on the changed model"
            )
        for flat in self._all_flats:
            if (name := flat.find_moved_param()) is not None:
                raise RuntimeError(
                    f"parameter {name} is no longer a view into the engine's buffers: its .data was set, or the module "
                    "was converted or moved (.float(), .to(...)) after initialize(). Do that before initialize(); to "
                    "change values, write them in place, or use load_state_dict() or zero.GatheredParameters"
                )
        for name, parameter in self._frozen:
            if parameter.grad is not None:
                raise RuntimeError(
                    f"parameter {name} was frozen, or in no optimizer group, at initialize() and has a gradient now: "
                    "the engine would not train it. Recreate the engine with it trainable; this run's checkpoints load"
                )


class _ModuleTables:
    """Finds parameters that were added to `module` after initialize(), by comparing its modules' tables."""

    def __init__(self, module: nn.Module, known: Collection[int]) -> None:
        """known: the ids of all parameters of the engine, which keeps them alive."""
        self._module, self._known = module, known
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._record()

    def _record(self) -> None:
        tables = [table for owner in self._module.modules() for table in (owner._modules, owner._parameters)]
        self._places = [(table, name, entry) for table in tables for name, entry in table.items()]
        self._sizes = [(table, len(table)) for table in tables]

    def new_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of those that require a gradient and were not known at initialize()."""
        same = all(table.get(name) is entry for table, name, entry in self._places)
        if same and all(len(table) == size for table, size in self._sizes):
            return []
        named = self._module.named_parameters()
        found = [(plain_name(n), p) for n, p in named if p.requires_grad and id(p) not in self._known]
        if not found:
            self._record()
        return found
