"""A run on another machine as a source: its hub's sockets are forwarded by an SshLink, which reconnects when it
breaks."""

from __future__ import annotations

import threading
from typing import Any

from runtime.wire.codec import decode_snapshot
from runtime.wire.messages import LIVE_STATES, RunStatus
from runtime.wire.rundir import Sockets
from zerotop.format import duration_text
from zerotop.output import CommandError
from zerotop.source.base import Source
from zerotop.source.live import LiveSource
from zerotop.source.recorded import EndedSource
from zerotop.source.ssh import SshLink
from zerotop.state.run import RunState

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


def open_remote(host: str, run: str | None) -> Source:
    """A started source on `run` of `host` (None: the newest live run, else the newest). A run that has ended is read
    from its recording there. ssh may prompt on the terminal. Raises SshError."""
    link = SshLink(host)
    try:
        link.open()
        found = _resolve(link, run)
        if not found["live"]:
            ended = _ended(_resolve(link, found["name"], "--recorded"))
            link.close()
            return ended
        if not found["here"]:
            raise CommandError(f"{found['name']} runs on {found['host']}, not on {host}: attach there")
        link.forward(Sockets(found["sockets"]))
    except BaseException:
        link.close()
        raise
    source = RemoteSource(link, found["name"])
    source.start()
    return source


def _ended(found: dict[str, Any]) -> EndedSource:
    state = RunState()
    state.apply_snapshot(decode_snapshot(found["recorded"].encode()))
    source = EndedSource(state, RunStatus.model_validate(found["status"]))
    source.start()
    return source


def _resolve(link: SshLink, run: str | None, *flags: str) -> dict[str, Any]:
    answer = link.ask(["resolve", *([run] if run else []), *flags, "--json"])
    if not isinstance(answer, dict) or not {"name", "live", "here", "sockets", "status"} <= answer.keys():
        raise CommandError(f"the zerotop on {link.host} has another version: install the same one on both sides")
    return answer


class RemoteSource(LiveSource):
    """A LiveSource on forwarded sockets. A thread keeps the link up and asks for the status of the run when the hub
    is silent."""

    def __init__(self, link: SshLink, run: str) -> None:
        super().__init__(link.sockets, None, self._remote_status)
        self.link = link
        self.run = run
        self._trouble = ""
        self._status_there: RunStatus | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="ssh keeper", daemon=True)

    def start(self) -> None:
        super().start()
        self._keeper.start()

    @property
    def connection(self) -> str:
        own = super().connection
        return f"lost: {self._trouble}" if self._trouble and own != "ended" else own

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        super().close()
        self.link.stop()
        if self._keeper.is_alive():
            self._keeper.join(10.0)
        self.link.close()

    def _remote_status(self) -> RunStatus | None:
        """The newest status from the other machine; the keeper's thread asks for it again."""
        self._wake.set()
        return self._status_there

    def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closing.is_set():
            asked = self._wake.wait(0.5)
            self._wake.clear()
            if self._closing.is_set() or (
                self._status_there is not None and self._status_there.state not in LIVE_STATES
            ):
                continue
            try:
                if not self.link.alive:
                    self._trouble = f"{self.link.last_words}; connecting again"
                    self.link.open(quiet=True)
                    self._ask(forward=True)
                elif asked:
                    self._ask(forward=False)
                self._trouble = ""
                pause_s = FIRST_PAUSE_S
            except (CommandError, OSError) as error:
                if not self._closing.is_set():
                    self._trouble = f"{error}; trying again in {duration_text(pause_s)}"
                    self._closing.wait(pause_s)
                    pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _ask(self, *, forward: bool) -> None:
        found = _resolve(self.link, self.run)
        if forward and found["live"]:
            self.link.forward(Sockets(found["sockets"]))
        self._status_there = RunStatus.model_validate(found["status"])
