"""The state of a run at any moment of its recording.

`advance` folds the rows of the next moments, as a live screen folds what arrives. A jump does not fold everything from
the beginning: the state at a moment needs, of the rows before it, all hellos of the attempt, the newest status, events
and commands, the curve in at most POINTS points, and the samples of the last frames. Folded in their order they give
the state that a live screen had then, so a jump costs the same anywhere in a recording, whatever its length.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime.wire.codec import ProtocolError, decode_up
from runtime.wire.messages import Hello
from runtime.wire.node import NodeStats
from zerotop.hub import timeline
from zerotop.hub.blocks import PACKED, BlockInfo, Row, list_blocks, read_block
from zerotop.recording.frames import Frames
from zerotop.state.run import COMMANDS_KEPT, EVENTS_KEPT, RunState

POINTS = 512
"""Most steps and most evaluations that a jump folds."""
STEPS_BACK = 60
"""The newest steps, all of them: figures over the recent steps need them."""
FRAMES_BACK = 24
"""Frames before a moment whose samples a jump folds."""
BLOCKS_BACK = 12
"""Earlier blocks that are searched for the last words of a rank that has been silent."""
_COLUMNS = "id, attempt, wall_s, source, kind, body"
_BEHIND = 2**62
"""Rows of the timeline are numbered by themselves: of one moment they come last."""
_LAST_WORDS = ("heartbeat", "memory", "step")


class Playback:
    """An open recording. Use it as a context. Raises FileNotFoundError or sqlite3.Error."""

    def __init__(self, run: Path) -> None:
        self._database = timeline.open_recording(run)
        self._blocks: list[BlockInfo] = []
        self._cached: tuple[int, list[Row]] = (0, [])
        self._offsets_ns: dict[int, int] = {}
        """Attempt -> the hub's monotonic clock at wall time 0, as its first rank has told it."""
        self._complete_from = float("inf")
        """From this wall time on, the recording has all phases and collectives (zerotop/hub/timeline.py)."""
        self._count = 0
        self.frames = Frames()
        self.refresh()

    def __enter__(self) -> Playback:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._database.close()

    @property
    def rows(self) -> int:
        """How many messages have been recorded so far, those that were thinned away too."""
        return self._count

    def refresh(self) -> None:
        """Take note of what has been recorded since."""
        exists = "SELECT 1 FROM sqlite_master WHERE name = 'messages'"
        if not self._database.execute(exists).fetchone():
            return  # the recorder has only just made the file
        (self._count,) = self._database.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()
        self._blocks = list_blocks(self._database)
        (packed_to,) = (
            self._database.execute("SELECT max(last_row) FROM blocks").fetchone() if self._blocks else (None,)
        )
        seconds = self._database.execute(
            "SELECT DISTINCT CAST(wall_s AS INTEGER) FROM messages WHERE id > ? AND attempt > 0 ORDER BY 1",
            (packed_to or 0,),
        )
        self.frames = Frames(self._blocks, (second for (second,) in seconds))
        known = timeline.extent(self._database)
        self._complete_from = known[0] if known is not None else float("inf")

    def step_at(self, step: int) -> float | None:
        """The wall time at which rank 0 had last finished this step, or the nearest one that is recorded after it; None
        beyond the last step."""
        query = "SELECT wall_s, body FROM messages WHERE kind = 'step' AND source = 'rank/0' ORDER BY id"
        found = None
        for wall_s, body in self._database.execute(query):
            try:
                reached = json.loads(body)["step"]
            except (ValueError, KeyError, TypeError):  # of another version
                continue
            if reached < step:
                found = None  # a restart takes the step again
            elif found is None:
                found = float(wall_s)
        return found

    def curve(self, kind: str, from_s: float = 0.0, to_s: float = float("inf")) -> Iterator[tuple[Row, Any]]:
        """Rank 0's recorded messages of a kind ("step" or "evaluation") from `from_s` to `to_s`, oldest first."""
        query = f"SELECT {_COLUMNS} FROM messages WHERE kind = ? AND source = 'rank/0' ORDER BY id"
        for values in self._database.execute(query, (kind,)):
            row = Row(*values)
            if from_s <= row.wall_s <= to_s and (message := _decoded(row)) is not None:
                yield row, message

    # ---- folding ---------------------------------------------------------------------------------------------------
    def advance(self, state: RunState, after_s: float, to_s: float) -> int:
        """Fold what was recorded from `after_s` until before `to_s`; returns the number of messages."""
        rows = self._between(after_s, to_s)
        self._fold(state, rows)
        return len(rows)

    def state_at(self, frame: int) -> RunState:
        """The state at the end of a frame; an empty one of an empty recording."""
        state = RunState()
        if self.frames.count:
            self._fold(state, self._rows_for(frame))
        for rank in state.ranks.values():
            # The curve reaches back before this attempt; a rank that has finished no step in it has none.
            if rank.step is not None and (rank.hello is None or rank.step.step <= rank.hello.start_step):
                rank.step = None
        return state

    def _fold(self, state: RunState, rows: list[Row]) -> None:
        newest_ns = state.hub_now_ns
        for row in rows:
            message = _decoded(row)
            if message is None:
                continue
            if row.attempt not in self._offsets_ns and isinstance(message, Hello | NodeStats):
                mono_ns = message.mono_ns if isinstance(message, Hello) else message.at_ns
                self._offsets_ns[row.attempt] = mono_ns - int(message.wall_s * 1e9)
            offset_ns = self._offsets_ns.get(row.attempt)
            arrival_ns = max(1, int(row.wall_s * 1e9) + offset_ns) if offset_ns is not None else 0
            state.apply(message, arrival_ns)
            newest_ns = max(newest_ns, arrival_ns)
        state.hub_now_ns = newest_ns

    # ---- choosing rows ---------------------------------------------------------------------------------------------
    def _between(self, after_s: float, to_s: float) -> list[Row]:
        """All rows of [after_s, to_s) in the order in which they arrived."""
        first, last = self._row_at(after_s), self._row_at(to_s)
        query = f"SELECT {_COLUMNS} FROM messages WHERE id >= ? AND id < ? ORDER BY id"
        rows = [Row(*values) for values in self._database.execute(query, (first, last))]
        for block in self._blocks:
            if block.last_wall_s >= after_s and block.first_wall_s < to_s:
                rows += [row for row in self._block(block) if after_s <= row.wall_s < to_s]
        if to_s > self._complete_from:
            complete_from = max(after_s, self._complete_from)
            kept = [
                row for row in rows if row.kind not in ("phases", "collectives") or row.wall_s < self._complete_from
            ]
            rows = [*kept, *self._complete(complete_from, to_s)]
        return sorted(rows, key=_order)

    def _complete(self, after_s: float, to_s: float) -> Iterator[Row]:
        """All phases and collectives of [after_s, to_s); a packed second of a rank arrives at its end."""
        query = (
            "SELECT id, attempt, source, last_wall_s, body FROM timeline "
            "WHERE last_wall_s >= ? AND last_wall_s < ? ORDER BY id"
        )
        for number, attempt, source, wall_s, body in self._database.execute(query, (after_s, to_s)):
            for text in timeline.unpacked(body):
                yield Row(_BEHIND + number, attempt, wall_s, source, "phases", text)

    def _rows_for(self, frame: int) -> list[Row]:
        """The rows whose fold is the state at the end of `frame`."""
        _, end_s = self.frames.span(frame)
        limit = self._row_at(end_s)
        newest = "SELECT attempt FROM messages WHERE id < ? ORDER BY id DESC LIMIT 1"
        (attempt,) = self._database.execute(newest, (limit,)).fetchone() or (0,)
        begin_s, _ = self.frames.span(max(0, frame - FRAMES_BACK))
        samples = _newest(row for row in self._between(begin_s, end_s) if row.attempt == attempt and row.kind in PACKED)
        once = list(self._once(limit, attempt))
        silent = self._last_words(limit, begin_s, attempt, once, samples)
        return sorted({row.number: row for row in (*once, *silent, *samples)}.values(), key=_order)

    def _once(self, limit: int, attempt: int) -> Iterator[Row]:
        """What a state needs of the rows before `limit` that are no samples."""
        yield from self._select(
            "kind = 'status' AND id IN (SELECT min(id) FROM messages WHERE kind = 'status' "
            "GROUP BY attempt) AND id < ?",
            limit,
        )
        for kind in ("status", "verdict"):
            yield from self._select("kind = ? AND id < ? ORDER BY id DESC LIMIT 1", kind, limit)
        yield from self._select("kind = 'hello' AND id < ? AND (attempt = ? OR source = 'rank/0')", limit, attempt)
        yield from self._select("kind = 'goodbye' AND id < ? AND attempt = ?", limit, attempt)
        yield from self._select("kind = 'data_report' AND id < ?", limit)
        recent = "ORDER BY id DESC LIMIT"
        kinds = "kind IN ('event', 'log', 'checkpoint_saved')"
        yield from self._select(f"{kinds} AND id < ? {recent} {EVENTS_KEPT}", limit)
        yield from self._select(f"kind = 'command_record' AND id < ? {recent} {3 * COMMANDS_KEPT}", limit)
        for kind in ("step", "evaluation"):
            yield from self._curve(kind, limit)

    def _curve(self, kind: str, limit: int) -> Iterator[Row]:
        """Rank 0's rows of a kind, evenly thinned, and the newest ones."""
        where = "kind = ? AND source = 'rank/0' AND id < ?"
        numbers = [
            n for (n,) in self._database.execute(f"SELECT id FROM messages WHERE {where} ORDER BY id", (kind, limit))
        ]
        stride = max(1, -(-len(numbers) // POINTS))
        back = STEPS_BACK if kind == "step" else 1
        chosen = sorted({*numbers[::-1][::stride], *numbers[-back:]})
        for start in range(0, len(chosen), 500):
            some = chosen[start : start + 500]
            yield from self._select(f"id IN ({','.join('?' * len(some))})", *some)

    def _last_words(self, limit: int, begin_s: float, attempt: int, once: list[Row], samples: list[Row]) -> list[Row]:
        """The newest samples of the attempt's ranks that have sent none in the last frames."""
        there = {(row.source, row.kind) for row in samples}
        sources = {row.source for row in once if row.kind == "hello" and row.attempt == attempt}
        missing = {(source, kind) for source in sources for kind in _LAST_WORDS} - there
        found: list[Row] = []
        for source, kind in sorted(missing):
            rows = self._select(
                "kind = ? AND source = ? AND attempt = ? AND id < ? ORDER BY id DESC LIMIT 1",
                kind,
                source,
                attempt,
                limit,
            )
            found += rows
        missing -= {(row.source, row.kind) for row in found}
        earlier = [block for block in self._blocks if block.first_wall_s < begin_s][-BLOCKS_BACK:]
        for block in reversed(earlier):
            if not missing:
                break
            for row in reversed(self._block(block)):
                key = (row.source, row.kind)
                if key in missing and row.attempt == attempt and row.wall_s < begin_s:
                    missing.discard(key)
                    found.append(row)
        return found

    def _select(self, where: str, *values: object) -> list[Row]:
        query = f"SELECT {_COLUMNS} FROM messages WHERE {where}"
        return [Row(*found) for found in self._database.execute(query, values)]

    def _block(self, block: BlockInfo) -> list[Row]:
        if self._cached[0] != block.number:
            self._cached = (block.number, list(read_block(self._database, block.number)))
        return self._cached[1]

    def _row_at(self, wall_s: float) -> int:
        """The number of the first row from `wall_s` on. Rows are numbered in the order in which they arrived."""
        (last,) = self._database.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()
        query = "SELECT wall_s FROM messages WHERE id >= ? ORDER BY id LIMIT 1"

        def arrived_s(number: int) -> float:
            found = self._database.execute(query, (number,)).fetchone()
            return float(found[0]) if found is not None else float("inf")

        return bisect_left(range(last + 1), wall_s, key=arrived_s)


def _newest(rows: Iterable[Row]) -> list[Row]:
    """The rows without samples that a newer one of the same rank replaces."""
    kept: dict[tuple[object, ...], Row] = {}
    for row in rows:
        replaced = row.kind in ("heartbeat", "memory")
        kept[(row.source, row.kind) if replaced else (row.number,)] = row
    return list(kept.values())


def _order(row: Row) -> tuple[float, int]:
    """By arrival; rows of one millisecond, which is as exact as blocks are, by their numbers."""
    return round(row.wall_s, 3), row.number


def _decoded(row: Row) -> Any:
    """The message of a row; None for one of another version."""
    try:
        return decode_up(row.body)
    except ProtocolError:
        return None
