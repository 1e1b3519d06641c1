"""A copy of the state that does not change, for a frozen view."""

from __future__ import annotations

import copy

from zerotop.state.run import RunState


def freeze(state: RunState) -> RunState:
    """A copy that later messages do not change. Messages are immutable, so only the containers are copied."""
    still = copy.copy(state)
    still.ranks = {number: copy.copy(rank) for number, rank in state.ranks.items()}
    for rank in still.ranks.values():
        rank.spans, rank.collectives = copy.copy(rank.spans), copy.copy(rank.collectives)
    still._folded = dict(state._folded)
    still.nodes = dict(state.nodes)
    still.energy = state.energy.copy()
    still.events = copy.copy(state.events)
    still.alerts = dict(state.alerts)
    still.commands = dict(state.commands)
    still.answered_ns = dict(state.answered_ns)
    still.series = state.series.copy()
    still.evaluations = state.evaluations.copy()
    still.data = dict(state.data)
    still.waits = state.waits.copy()
    still.histories = state.histories.copy()
    still.breakdowns = state.breakdowns.copy()
    return still
