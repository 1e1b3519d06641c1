"""The screen's application: polls a source four times a second, shows what changed, and turns keys into commands."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import RenderableType
from textual import events, on
from textual._compositor import ChopsUpdate
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.notifications import SeverityLevel
from textual.screen import Screen
from textual.theme import Theme

from runtime.wire.messages import LIVE_STATES, CommandName, Hello
from runtime.wire.profile import DEFAULT_STEPS
from zerotop.clean import clean
from zerotop.source.base import Source
from zerotop.state import abilities
from zerotop.state.frozen_view import freeze
from zerotop.state.losstrend import EarlierRun
from zerotop.state.material import ROLES
from zerotop.state.run import RunState
from zerotop.state.settings import known_values
from zerotop.tui import steering
from zerotop.tui.commands import CommandDesk
from zerotop.tui.keys import KEYS, STEERING, load_keymap
from zerotop.tui.lens import Lens
from zerotop.tui.narrow import NarrowUpdate
from zerotop.tui.pagekeys import FIRST, PRELOAD_S, import_pages, mode_of
from zerotop.tui.pager import LogOpener
from zerotop.tui.pages.overview import OverviewPage
from zerotop.tui.palette_commands import palette_commands
from zerotop.tui.panels.rank_grid import RankGrid
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.panels.settings import SettingTable
from zerotop.tui.screens.confirm import ConfirmScreen
from zerotop.tui.screens.help import HelpScreen
from zerotop.tui.screens.knobs import KnobScreen, Setting
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.palette import ActionPalette
from zerotop.tui.screens.rank import RankScreen
from zerotop.tui.screens.stacks import StacksScreen
from zerotop.tui.screens.themes import ThemeScreen
from zerotop.tui.screenshot import screenshot_path
from zerotop.tui.terminal import driver_class, leave_on_signals
from zerotop.tui.theme import DEFAULT, Palette, SteadyStylesheet, load_palettes
from zerotop.tui.view import TICK_S, View, build_view
from zerotop.tui.widgets.keybar import KeyBar

THEME_VARIABLE = "ZEROTOP_THEME"
FEW_RANKS = 8
"""Up to so many, the table shows all: the key of the grid takes no room in the footer."""
Outcome = Literal["detached", "ended"]


class ZerotopApp(LogOpener[Outcome]):
    """Shows a started `source` until the user leaves. `run()` returns "detached" if the run is still live then, else
    "ended".

    Whoever opened the source closes it. The app reads the source in one thread, its own. `find_earlier` returns runs to
    compare the loss with, given the hello of a rank; it may take a while, and is called once in another thread. `host`
    is the machine of a run that is watched over SSH.
    """

    TITLE = "zerotop"
    CSS_PATH = "zerotop.tcss"
    DEFAULT_MODE = mode_of(FIRST)
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012 (an instance variable in App)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (24, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [key.binding() for key in KEYS]

    def __init__(
        self,
        source: Source,
        read_only: bool = False,
        find_earlier: Callable[[Hello], tuple[EarlierRun, ...]] | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(driver_class=driver_class())
        self.stylesheet = SteadyStylesheet(variables=self.get_css_variables())
        self.source = source
        self.read_only = read_only
        self.host = host
        self.clock: Callable[[], float] = time.time
        self.lens = Lens()
        self.earlier: tuple[EarlierRun, ...] = ()
        self._find_earlier = find_earlier
        self._looked_for_earlier = False
        self.palettes, self._problems = load_palettes()
        keymap, problems = load_keymap()
        self._problems += problems
        self._keymap_given = keymap
        self.desk = CommandDesk()
        self.frozen: RunState | None = None
        self._signature: tuple[object, ...] = ()
        self._can_steer: bool | None = None
        self.left_by: int | None = None
        """The signal that ended the screen, if one did."""
        self.add_pages()
        for palette in self.palettes.values():
            self.register_theme(palette.theme())
        wanted = os.environ.get(THEME_VARIABLE, DEFAULT)
        if wanted not in self.palettes:
            self._problems.append(f"{THEME_VARIABLE}={wanted}: no such theme; there are {', '.join(self.palettes)}")
            wanted = DEFAULT
        self.theme = wanted
        for name in set(self.available_themes) - set(self.palettes):
            self.unregister_theme(name)

    # ---- life ------------------------------------------------------------------------------------------------------
    def on_mount(self) -> None:
        self.set_keymap(self._keymap_given)
        for problem in self._problems:
            self.notify(problem, title="skipped", severity="warning", timeout=15)
        if not self.is_headless:
            leave_on_signals(self._leave)
        self.theme_changed_signal.subscribe(self, lambda _: self._repaint())
        self.set_interval(TICK_S, self.tick)
        self.call_after_refresh(self.tick)
        self.set_timer(PRELOAD_S, self._preload)

    def _preload(self) -> None:
        self.run_worker(import_pages, thread=True, exclusive=False)

    def _leave(self, number: int) -> None:
        """A signal ends the screen. As with `q`, the run continues."""
        self.left_by = number
        self.action_detach()

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = False,
    ) -> None:
        """A toast. Its text may quote anything, so it is never markup, whatever a caller in Textual asks for."""
        super().notify(clean(message), title=clean(title), severity=severity, timeout=timeout, markup=False)

    def _display(self, screen: Screen[Any], renderable: RenderableType | None) -> None:
        # Textual's own hook for what goes to the terminal.
        narrow = NarrowUpdate.of(renderable) if isinstance(renderable, ChopsUpdate) else renderable
        super()._display(screen, narrow)

    def takes(self, event: events.Key | events.Paste) -> bool:
        return super().takes(event) and (not isinstance(self.screen, ConfirmScreen) or self.screen.takes(event))

    def get_theme(self, theme_name: str) -> Theme | None:
        """The theme of that name. It is asked for whenever a widget is rendered, and Textual copies all themes for
        that."""
        return self._registered_themes.get(theme_name) or super().get_theme(theme_name)

    @property
    def palette(self) -> Palette:
        """The colours of the current theme."""
        return self.palettes.get(self.theme, self.palettes[DEFAULT])

    @property
    def shown_state(self) -> RunState:
        """What panels show: the live state, or the copy of a frozen view."""
        return self.frozen if self.frozen is not None else self.source.state

    @property
    def rank_count(self) -> int:
        """The number of ranks."""
        return max(max(self.shown_state.ranks, default=-1) + 1, self.shown_state.world_size)

    def tick(self) -> None:
        """Poll the source; draw only if something that is shown has changed."""
        changed = self.source.poll()
        age_s = self.source.age_s() or 0.0
        # The age is shown in whole seconds from two on; a command waits in tenths of a second only as long as it is
        # open, and its answer fades and goes.
        waiting = bool(self.desk.waiting(self.source.state))
        answers = tuple((life.id, life.fading) for life in self.desk.lives(self.source.state, age_s) if life.fresh)
        signature = (self.source.connection, int(age_s) if age_s >= 2 else 0, self.source.can_control, answers)
        if not changed and signature == self._signature and not waiting:
            return
        self._signature = signature
        if self.can_steer != self._can_steer:
            self._can_steer = self.can_steer
            self.refresh_bindings()
        # A frozen view is drawn too: its panels come out as they were, only the header and the commands are live.
        self.update_view()

    def update_view(self) -> None:
        """Draw the current view."""
        screen = next((s for s in reversed(self.screen_stack) if isinstance(s, LiveScreen)), None)
        if screen is None or not screen.is_mounted:
            return
        screen.show_view(self.make_view())
        self._relabel(screen)
        self._look_for_earlier()

    def _relabel(self, screen: LiveScreen) -> None:
        """What the keys in the footer do now, and at which step."""
        state = self.source.state
        labels = self.key_labels()
        page = self.page
        role = page.other_role() if page is not None else None
        if role is not None:
            labels["data"] = ROLES[role].capitalize()
        if isinstance(page, OverviewPage) and isinstance(page.ranks, RankGrid):
            labels["grid"] = "Table"
        long, greyed = steering.long_labels(state), frozenset(steering.impossible_actions(state))
        hidden = self.hidden_keys() - ({"data"} if labels.get("data") else set())
        for bar in screen.key_bars:  # none yet in a screen that has just been pushed
            bar.relabel(labels, hidden, {**labels, **long}, greyed)

    def _look_for_earlier(self) -> None:
        """Once the run is known and drawn, look for others to compare it with."""
        hello = self.source.state.hello
        if self._find_earlier is None or self._looked_for_earlier or hello is None:
            return
        self._looked_for_earlier = True
        self.run_worker(self._take_earlier(self._find_earlier, hello), exclusive=False)

    async def _take_earlier(self, find: Callable[[Hello], tuple[EarlierRun, ...]], hello: Hello) -> None:
        self.earlier = await asyncio.to_thread(find, hello)
        self.update_view()

    def key_labels(self) -> dict[str, str]:
        """Action -> what its key does now, where that differs from its usual label."""
        return {"pause_resume": "Resume"} if self.source.state.state_name == "paused" else {}

    def hidden_keys(self) -> set[str]:
        """Actions whose keys take no room in the footer now."""
        few = {"grid"} if self.rank_count <= FEW_RANKS else set()
        return {"data"} | few | (set() if self.source.state.evaluations else {"texts"})

    def make_view(self) -> View:
        """Everything that panels may show at this tick."""
        age_s = self.source.age_s() or 0.0
        return build_view(
            self.shown_state,
            self.palette,
            connection=self.source.connection,
            age_s=age_s,
            frozen=self.frozen is not None,
            read_only=self.read_only,
            # Commands stay live in a frozen view: an answer to a key must never be missed.
            commands=self.desk.lives(self.source.state, age_s),
            live=self.source.state,
            wall_s=self.clock(),
            lens=self.lens,
            earlier=self.earlier,
            host=self.host or "",
        )

    def _repaint(self) -> None:
        for stack in self._screen_stacks.values():
            for screen in stack:
                for bar in screen.query(KeyBar):
                    bar.palette = self.palette
                    bar.renew()
        self.update_view()

    # ---- what may be done now --------------------------------------------------------------------------------------
    @property
    def can_steer(self) -> bool:
        """Whether the keys that act on the run work."""
        return not self.why_not_steer

    @property
    def why_not_steer(self) -> str:
        """Why the keys that act on the run do not work; empty if they do."""
        state = self.source.state.state_name
        if self.read_only:
            return "this screen is read-only (--read-only)"
        if state not in LIVE_STATES:
            return f"the run has ended ({state})"
        return "" if self.source.can_control else "this source can't reach the run"

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.may(action, self.screen)

    def may(self, action: str, screen: Screen[Any]) -> bool:
        """Whether `action` makes sense while `screen` is on top."""
        if action in STEERING and not self.can_steer:
            return False
        return self.page_may(action, screen)

    def why_impossible(self, action: str) -> str:
        """Why the run's trainer can't do what `action` asks for; empty if it can."""
        return steering.why_impossible(self.source.state, action)

    @property
    def is_frozen(self) -> bool:
        return self.frozen is not None

    # ---- steering --------------------------------------------------------------------------------------------------
    def send(self, name: CommandName, arguments: dict[str, Any] | None = None) -> None:
        """Send one command to the run; the command strip shows its state from now on. One that the run's trainer can't
        obey is not sent, and the reason is shown."""
        if why := abilities.why_impossible(self.source.state, name):
            self.notify(why, title=name, severity="warning")
            return
        self.source.send(self.desk.make(name, arguments))
        self.update_view()

    def action_pause_resume(self) -> None:
        """P: pause the run, or resume a paused one."""
        name, problem = steering.pause_or_resume(self.source.state, self.desk.waiting(self.source.state))
        if problem:
            self.notify(problem, severity="warning")
        else:
            self.send(name)

    def action_checkpoint(self) -> None:
        """C: write a checkpoint."""
        self.send("checkpoint")

    def action_stop(self) -> None:
        """S: stop after a checkpoint, once confirmed."""
        self.push_screen(steering.stop_question(self.source.state), lambda yes: self.send("stop") if yes else None)

    def action_abort(self) -> None:
        """A: abort, once confirmed."""
        self.push_screen(steering.abort_question(self.source.state), lambda yes: self.send("abort") if yes else None)

    def action_set_knob(self, name: str = "") -> None:
        """E: change a setting."""
        if why := abilities.why_impossible(self.source.state, "set"):
            self.notify(why, title="set", severity="warning")
            return

        def send(setting: Setting | None) -> None:
            if setting is not None:
                self.send("set", {setting[0]: setting[1]})

        self.push_screen(KnobScreen(known_values(self.source.state), name), send)

    def action_stacks(self) -> None:
        """T: dump the stacks of all ranks."""
        command = self.desk.make("stacks")
        self.source.send(command)
        name = steering.run_name(self.source.state)
        self.push_screen(StacksScreen(self.palette, name, lambda: self.source.state.commands.get(command.id)))
        self.update_view()

    def action_profile(self) -> None:
        """R: profile the next steps; the event that names the file comes when it is there."""
        ranks = {"ranks": [self.screen.rank]} if isinstance(self.screen, RankScreen) else {}
        self.send("profile", {"steps": DEFAULT_STEPS, **ranks})

    def action_memory_snapshot(self) -> None:
        """M: record the memory of all ranks during the next step."""
        self.send("memory-snapshot")

    # ---- the view --------------------------------------------------------------------------------------------------
    def action_detach(self) -> None:
        """q: leave the screen."""
        self.exit("detached" if self.source.state.state_name in LIVE_STATES else "ended")

    def action_help_quit(self) -> None:
        """Ctrl+C: explain how to leave and how to stop."""
        self.notify(
            "q leaves the screen, and the run continues; S asks, and then stops the run", title="the run continues"
        )

    def action_freeze(self) -> None:
        """f: freeze the view, or follow again."""
        self.frozen = freeze(self.source.state) if self.frozen is None else None
        for screen in self.screen_stack:
            screen.set_class(self.frozen is not None, "-frozen")
        self.update_view()

    def action_themes(self) -> None:
        """t: choose a theme."""
        self.push_screen(ThemeScreen(self))

    def reload_palettes(self) -> list[str]:
        """Read all palettes again. Returns a line for each file that cannot be used."""
        palettes, problems = load_palettes()
        changed = palettes.get(self.theme) != self.palettes.get(self.theme)
        self.palettes = palettes
        for palette in palettes.values():
            self.register_theme(palette.theme())
        if self.theme not in palettes:
            self.theme = DEFAULT
        elif changed:
            self.refresh_css(animate=False)
            self._repaint()
        return problems

    async def action_back(self) -> None:
        """Esc: back from a zoomed panel, a filter or a screen."""
        screen = self.screen
        if isinstance(screen, LiveScreen) and screen.unzoom():
            return
        if isinstance(screen, PageScreen):
            if not screen.close_filter():
                self.action_page(FIRST)
        elif len(self.screen_stack) > 1:
            self.pop_screen()
            self.call_after_refresh(self.update_view)

    def action_help(self) -> None:
        """?: the help."""
        impossible = steering.impossible_actions(self.source.state)
        self.push_screen(HelpScreen(self.palette, self.shown_keys(), self.can_steer, self.why_not_steer, impossible))

    def shown_keys(self) -> dict[str, str]:
        """Key id -> the key that this user has set, as it is displayed."""
        return {key.id: self._keys_text(self._keymap_given.get(key.id, key.keys)) for key in KEYS}

    def _keys_text(self, keys: str) -> str:
        return " ".join(self.get_key_display(Binding(key, "")) for key in keys.split(","))

    def get_key_display(self, binding: Binding) -> str:
        """`Ctrl+S`, as in the help and the documentation."""
        *modifiers, key = binding.key.split("+")
        if not modifiers or binding.key_display:
            return super().get_key_display(binding)
        shown = key.upper() if len(key) == 1 else super().get_key_display(Binding(key, ""))
        return "+".join([*(modifier.capitalize() for modifier in modifiers), shown])

    def action_save_screenshot(self) -> None:
        """Ctrl+S: save a picture of the screen."""
        target = screenshot_path(steering.run_name(self.source.state))
        try:
            self.save_svg(target)
        except OSError as error:
            self.notify(f"{target}: {error.strerror or error}", title="screenshot not saved", severity="error")
        else:
            self.notify(str(target), title="screenshot saved")

    def save_svg(self, path: str | Path) -> Path:
        """Write the screen as it is now as an SVG picture. Raises OSError."""
        target = Path(path)
        target.write_text(self.export_screenshot(title=f"{self.TITLE}"), encoding="utf-8")
        return target

    def on_rank_panel_opened(self, message: RankPanel.Opened) -> None:
        self.open_over(RankScreen(self.palette, message.rank))

    @on(SettingTable.Chosen)
    def _setting_chosen(self, message: SettingTable.Chosen) -> None:
        if self.can_steer:
            self.action_set_knob(message.name)
        else:
            self.notify(self.why_not_steer, severity="warning")

    def action_command_palette(self) -> None:
        """Ctrl+P: all actions and themes by name."""
        if not isinstance(self.screen, ActionPalette):
            self.push_screen(ActionPalette())

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: what the keys do, as far as it is possible now."""
        yield from palette_commands(self, screen)
