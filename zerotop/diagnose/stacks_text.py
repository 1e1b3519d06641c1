"""The stacks of all ranks as one text: where they are in one line, a line per rank, then every distinct stack once."""

from __future__ import annotations

from collections.abc import Mapping

from zerotop.diagnose.frames import grouped, place, summary
from zerotop.diagnose.stacks import RankStacks
from zerotop.format import duration_text
from zerotop.state.run import RankState, RunState
from zerotop.state.stall import ranks_text


def where_text(ranks: Mapping[int, RankStacks]) -> str:
    """Where the ranks are, outliers named. The C frames that a few ranks have must not make them differ from others."""
    places = {}
    for rank, found in ranks.items():
        python = next((place(thread.frames) for thread in found.threads if thread.main), "")
        same = [other for other in ranks.values() if _python(other) == _python(found)]
        native = next((other.place for other in same if other.native and not other.trouble), "")
        places[rank] = found.place if found.trouble or not python else native or found.place
    return summary(places)


def _python(found: RankStacks) -> tuple[str, ...]:
    return next((thread.frames for thread in found.threads if thread.main), ())


def stacks_text(ranks: Mapping[int, RankStacks], state: RunState) -> str:
    """A line per rank, then every distinct stack once under the ranks that share it, training threads first; then C
    frames, and what the kernel says of ranks that did not answer."""
    lines = [_rank_line(stacks, state.ranks.get(rank), state.hub_now_ns) for rank, stacks in sorted(ranks.items())]
    for main in (True, False):
        stacks = grouped(
            ((thread.frames, found.by_pyspy), rank)
            for rank, found in sorted(ranks.items())
            for thread in found.threads
            if thread.main == main
        )
        for (frames, by_pyspy), who in stacks.items():
            by = ", read by py-spy" if by_pyspy else ""
            which = "training" if main else "another"
            lines += ["", f"{ranks_text(who)}, {which} thread (innermost call first{by}):", *frames]
    native = grouped((found.native, rank) for rank, found in sorted(ranks.items()) if found.native)
    for frames, who in native.items():
        lines += ["", f"{ranks_text(who)}, training thread (with C frames, read by py-spy):", *frames]
    for rank, found in sorted(ranks.items()):
        if found.kernel:
            lines += ["", f"rank {rank}, process {found.pid} as the kernel sees it:", *(f"  {x}" for x in found.kernel)]
    return "\n".join(lines) + "\n"


def _rank_line(stacks: RankStacks, known: RankState | None, hub_now_ns: int) -> str:
    parts = [f"pid {stacks.pid}" if stacks.pid else "no process", stacks.host]
    if stacks.trouble and stacks.trouble != stacks.host:
        parts.append(stacks.trouble)
    if stacks.holds_gil:
        parts.append("holds the GIL")
    beat = known.heartbeat if known else None
    if known is None or beat is None:
        parts.append("nothing heard yet")
    else:
        parts.append(f"step {beat.step}, {beat.phase}")
        if beat.micro_step:
            parts.append(f"micro-step {beat.micro_step}/{beat.micro_steps}")
        if beat.entered_seq:
            op = f" ({beat.entered_op})" if beat.entered_op else ""
            over = "completed" if beat.completed_seq >= beat.entered_seq else f"completed up to {beat.completed_seq}"
            parts.append(f"last collective {beat.entered_seq}{op}, {over}")
        silent_s = max(0, hub_now_ns - known.heard_ns) / 1e9
        if silent_s >= 2:
            parts.append(f"nothing heard for {duration_text(silent_s)}")
    if stacks.native_trouble:
        parts.append(stacks.native_trouble)
    return f"rank {stacks.rank}: " + ", ".join(parts)
