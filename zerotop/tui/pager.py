"""A rank's log file in the user's pager: the screen steps aside and comes back."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from textual import events
from textual.app import SuspendNotSupported
from textual.screen import Screen

from zerotop.output import is_served
from zerotop.rundir.logs import find_log
from zerotop.source.base import Source
from zerotop.tui.pagekeys import LOGS, PageKeys, ReturnType
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.rank import RankScreen

DEFAULT_PAGERS = ("less", "more")
TO_THE_END = {"less": ("-f", "+G"), **dict.fromkeys(("vi", "vim", "nvim", "view"), ("+",))}
"""Pager -> the arguments that open a file at its end. Without -f, `less` asks first whether a log with colours in it is
binary; it shows their escape sequences as text, and does not obey them."""
NO_PAGERS = frozenset({"", "cat"})
"""What $PAGER is set to where nothing should page: the screen would be back before a line could be read."""


class PagerError(Exception):
    """There is no pager that could be started; the message says what to do."""


def pager_command(log: Path, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The words of $PAGER, or of `less`, on this file; no shell reads them. Raises PagerError."""
    given = environment.get("PAGER", "")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise PagerError(f"$PAGER is {given!r}: {error}") from None
    if not words or Path(words[0]).name in NO_PAGERS:
        words = next(([name] for name in DEFAULT_PAGERS if shutil.which(name)), [])
        if not words:
            raise PagerError("there is neither `less` nor `more`: set $PAGER")
    if shutil.which(words[0]) is None:
        raise PagerError(f"$PAGER is {given!r}: there is no command {words[0]!r}")
    end = TO_THE_END.get(Path(words[0]).name, ())
    return [*words, *end, str(log.absolute())]  # an absolute path is never taken for an option


class LogOpener(PageKeys[ReturnType]):
    """Opens logs. While a pager has the terminal, nothing is drawn and no key is taken, but the run is followed."""

    source: Source
    host: str | None
    """The machine of a run that is watched over SSH, as the user has named it."""
    paging = False

    def page_may(self, action: str, screen: Screen[Any]) -> bool:
        if action == "open_log":
            return isinstance(screen, RankScreen) or (isinstance(screen, PageScreen) and screen.page.KEY == LOGS)
        return super().page_may(action, screen)

    def _display(self, screen: Screen[Any], renderable: RenderableType | None) -> None:
        if not self.paging:
            super()._display(screen, renderable)

    def takes(self, event: events.Key | events.Paste) -> bool:
        return not self.paging and super().takes(event)

    def action_open_log(self) -> None:
        """e: the log file of the rank."""
        rank = self._rank_of_log()
        try:
            command = pager_command(self._log_of(rank))
        except PagerError as error:
            self.notify(str(error), title="the log is not opened", severity="warning", timeout=12)
        else:
            self.run_worker(self._page(command, rank), exclusive=False)

    def _rank_of_log(self) -> int:
        """That of the screen, or of the log that is shown; among all of them the one that failed."""
        if isinstance(self.screen, RankScreen):
            return self.screen.rank
        panel, status = self._log_panel(), self.source.state.status
        chosen = panel.rank_in_view() if panel is not None else None
        if chosen is None and status is not None:
            chosen = status.failed_rank
        return chosen or 0

    def _log_of(self, rank: int) -> Path:
        """Raises PagerError where this machine does not have it, or no terminal for it."""
        other = self._other_way(rank)
        if is_served():
            raise PagerError(f"a browser has no terminal for a pager; {other}")
        if self.host is not None:
            raise PagerError(f"the log is on {self.host}; {other}")
        folder, state = self.source.run_path, self.source.state.ranks.get(rank)
        attempt = state.hello.attempt if state is not None and state.hello is not None else None
        log = find_log(folder, rank, attempt) if folder is not None else None
        if log is None:
            where = f" in {folder / 'logs'}" if folder is not None else " on this machine"
            raise PagerError(
                f"there is no log of rank {rank}{where}; if it is elsewhere, {self._other_way(rank)} there"
            )
        return log

    def _other_way(self, rank: int) -> str:
        """The command that shows the log."""
        status, hello = self.source.state.status, self.source.state.hello
        name = status.name if status is not None else hello.run if hello is not None else "RUN"
        target = f"{self.host}:{name}" if self.host is not None else name
        return f"`zerotop logs {shlex.quote(target)} --rank {rank}` shows it"

    async def _page(self, command: list[str], rank: int) -> None:
        problem = ""
        try:
            with self.suspend():
                self.paging = True
                # Nothing may be raised in here: the terminal would stay as it is.
                problem = await _run(command)
                self.paging = False
        except SuspendNotSupported:
            problem = f"this terminal can't be handed to a pager; {self._other_way(rank)}"
        if problem:
            self.notify(problem, title="the log is not opened", severity="warning", timeout=12)
        self.update_view()


async def _run(command: list[str]) -> str:
    """Until the pager has ended. Returns what went wrong; empty if nothing did."""
    with _ctrl_c_is_the_pagers():
        try:
            pager = await asyncio.create_subprocess_exec(*command)
        except OSError as error:
            return f"{command[0]}: {error.strerror or error}"
        try:
            code = await pager.wait()
        except asyncio.CancelledError:  # the screen is ending
            with suppress(ProcessLookupError):
                pager.terminate()
            raise
    return f"{command[0]} ended with exit code {code}" if code > 0 else ""


@contextmanager
def _ctrl_c_is_the_pagers() -> Iterator[None]:
    """The terminal sends Ctrl-C to both: in a pager it ends a search, and it must not end the screen. The handler does
    nothing; to ignore the signal would make the pager ignore it, too."""
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
