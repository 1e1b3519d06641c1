"""The replay: the screen of a run on its recording, with a time bar and the keys of a player."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input

from zerotop.source.replay import SPEEDS, ReplaySource
from zerotop.tui.abilities import Zoomable
from zerotop.tui.app import ZerotopApp
from zerotop.tui.panels.log import LogPanel
from zerotop.tui.panels.timebar import ReplayStatus, TimeBar
from zerotop.tui.screens.goto import GoToScreen
from zerotop.tui.screens.help import HelpScreen
from zerotop.tui.screens.live import LiveScreen

SKIP_S = 10


@dataclass(frozen=True)
class ReplayKey:
    """A key of the player."""

    keys: str
    action: str
    label: str
    help: str
    show: bool = True

    def binding(self) -> Binding:
        """The binding for Textual. Priority: panels use some of these keys for themselves."""
        return Binding(self.keys, self.action, self.label, show=self.show, priority=True)


REPLAY_KEYS = (
    ReplayKey("space", "play", "Play", "play or pause; at the end, play from the beginning"),
    ReplayKey("left_square_bracket", "step(-1)", "Back", "pause, one frame back"),
    ReplayKey("right_square_bracket", "step(1)", "On", "pause, one frame on"),
    ReplayKey("left_curly_bracket", "speed(-1)", "Slower", f"slower, down to {SPEEDS[0]:g}x; - does it, too"),
    ReplayKey("right_curly_bracket", "speed(1)", "Faster", f"faster, up to {SPEEDS[-1]:g}x; + does it, too"),
    ReplayKey(
        "minus", "panel_first('zoom_axis(0.5)', 'speed(-1)')", "", "a plot or the timeline zooms with - and +", False
    ),
    ReplayKey("plus,equals_sign", "panel_first('zoom_axis(2.0)', 'speed(1)')", "", "", False),
    ReplayKey("j", f"skip(-{SKIP_S})", f"{SKIP_S} s back", f"{SKIP_S} s back", show=False),
    ReplayKey("k", f"skip({SKIP_S})", f"{SKIP_S} s on", f"{SKIP_S} s on", show=False),
    ReplayKey("g", "go_to", "Go to", "go to a step, a time of day, a time from the beginning or before the end"),
    ReplayKey("full_stop", "mark(1)", "Next event", "to the next event, warning, checkpoint or change of state; or n"),
    ReplayKey("comma", "mark(-1)", "Previous event", "to the one before; or N"),
    ReplayKey(
        "n", "panel_first('match(1)', 'mark(1)')", "", "in a log that is searched, n goes to the next match", False
    ),
    ReplayKey("N", "mark(-1)", "", "", False),
    ReplayKey("G", "next_figure", "Figure", "the next figure in the focused plot", show=False),
)
_NAMES = frozenset(key.action.partition("(")[0] for key in REPLAY_KEYS)


class ReplayHelp(HelpScreen):
    """The help, with the player's keys first."""

    def _first_rows(self, table: Table) -> None:
        accent = self.palette.style("accent", bold=True)
        self._head(table, "the replay")
        for key in (key for key in REPLAY_KEYS if key.help):
            table.add_row(Text(self.app.get_key_display(Binding(key.keys.split(",")[0], "")), accent), Text(key.help))


class ReplayApp(ZerotopApp):
    """Plays a started `source` until the user leaves."""

    BINDINGS: ClassVar[list[BindingType]] = [key.binding() for key in REPLAY_KEYS]

    def __init__(self, source: ReplaySource) -> None:
        super().__init__(source, read_only=True)
        self.replay = source

    # ---- the view --------------------------------------------------------------------------------------------------
    def update_view(self) -> None:
        """Draw the current view, with the time bar on whatever screen is on top."""
        screen = next((s for s in reversed(self.screen_stack) if isinstance(s, LiveScreen)), None)
        if screen is not None and screen.is_mounted:
            screen.lines_below = TimeBar.lines_for(screen.size.height)
            bars = screen.query(TimeBar)
            if not bars:
                screen.mount(TimeBar(self.status, screen.lines_below))
                screen.forget_panels()
                self.call_after_refresh(self.update_view)  # the bar takes its view once it is there
            for bar in bars:
                bar.take(screen.lines_below)
        super().update_view()

    def status(self) -> ReplayStatus:
        """What the time bar shows."""
        replay = self.replay
        frames = replay.playback.frames
        return ReplayStatus(
            playing=replay.playing,
            wall_s=replay.wall_s,
            begin_s=frames.begin_s,
            end_s=frames.end_s,
            frame=replay.frame,
            frames=frames.count,
            frame_s=replay.frame_s,
            speed=replay.speed,
            marks=tuple(replay.marks),
            now=tuple(replay.marks_in_frame()),
            following=replay.next_mark,
        )

    def key_labels(self) -> dict[str, str]:
        return {"play": "Pause"} if self.replay.playing else {}

    def hidden_keys(self) -> set[str]:
        rather = {"freeze", "zoom", "filter", "next_theme"} if self.size.width < 160 else set()
        return super().hidden_keys() | rather

    @property
    def why_not_steer(self) -> str:
        """Nothing of a replay reaches the run."""
        return "this is a replay: nothing reaches the run"

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in _NAMES and action != "next_figure":
            return isinstance(self.screen, LiveScreen) and not isinstance(self.focused, Input)
        return super().check_action(action, parameters)

    # ---- the player ------------------------------------------------------------------------------------------------
    def action_play(self) -> None:
        """Space: play or pause."""
        self.replay.toggle()
        self.tick()

    def action_step(self, frames: int) -> None:
        """[ and ]: pause, one frame back or on."""
        self.replay.step(frames)
        self.tick()

    def action_speed(self, by: int) -> None:
        """- and +: slower, faster."""
        self.replay.change_speed(by)
        self.tick()

    async def action_panel_first(self, panels: str, players: str) -> None:
        """A key of the player's that the focused panel gets if it has a use for it."""
        panel = self.focused
        uses = {
            "zoom_axis": isinstance(panel, Zoomable),
            "match": isinstance(panel, LogPanel) and bool(panel.filter),
        }
        await self.run_action(panels if uses[panels.partition("(")[0]] else players)

    def action_skip(self, seconds: int) -> None:
        """j and k: ten seconds back or on."""
        self.replay.skip(seconds)
        self.tick()

    def action_mark(self, direction: int) -> None:
        """n and N: the next event, the one before."""
        if self.replay.go_to_mark(direction) is None:
            self.notify(f"no {'later' if direction > 0 else 'earlier'} event in this recording", severity="warning")
        self.tick()

    def action_go_to(self) -> None:
        """g: go to a moment."""

        def go(wall_s: float | None) -> None:
            if wall_s is not None:
                self.replay.go_to(wall_s)
                self.tick()

        self.push_screen(GoToScreen(self.replay.extent()), go)

    def action_detach(self) -> None:
        """q: leave."""
        self.exit("ended")

    def action_help_quit(self) -> None:
        """Ctrl+C: explain how to leave."""
        self.notify("q leaves the replay")

    def action_help(self) -> None:
        """?: the help."""
        keys = self.shown_keys()
        self.push_screen(ReplayHelp(self.palette, keys, self.can_steer, self.why_not_steer))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette, with the player's keys first."""
        if isinstance(screen, LiveScreen):
            for key in (key for key in REPLAY_KEYS if key.label):
                name, _, rest = key.action.partition("(")
                act = getattr(self, f"action_{name}")
                yield SystemCommand(key.label, key.help, partial(act, int(rest[:-1])) if rest else act)
        yield from super().get_system_commands(screen)
