"""The loop of the outputs' process: fold what the hub publishes, and hand it to each output."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

from runtime.config import Resolved
from runtime.config.outputs import PrometheusConfig
from runtime.wire.base import Message
from runtime.wire.messages import Packet, RunStatus
from runtime.wire.rundir import RunFile, Sockets, read_run, read_status
from zerotop.outputs.conditions import Conditions
from zerotop.outputs.notifier import Notifier, make_notifier
from zerotop.outputs.points import Points, hyperparameters
from zerotop.outputs.prometheus import MetricsServer, RunCollector
from zerotop.outputs.reports import Reports
from zerotop.outputs.trackers.base import About, TrackerThread
from zerotop.outputs.trackers.make import TRACKERS
from zerotop.source.live import LiveSource

WAIT_S = 0.25
FINISH_S = 15.0
"""How long outputs may take after the end of the run."""


class OutputsProcess:
    """The outputs of one run. `supervisor` is the process id of our parent; `after`: trackers have the steps up to this
    one."""

    def __init__(self, path: Path, supervisor: int, after: int, reports: Reports) -> None:
        self._path = path
        self._supervisor = supervisor
        self._after = after
        self._reports = reports
        self._run = read_run(path)
        self._resolved = Resolved.from_json((path / "resolved.json").read_bytes())
        self._stop = threading.Event()
        self._lock = threading.Lock()
        """Held while the state is folded or scraped."""
        self._messages: list[Message] = []
        self._source = LiveSource(Sockets(self._run.sockets), path, self._read_status)
        self._source.on_packet = self._hear
        self._server: MetricsServer | None = None
        self._conditions = Conditions()
        self._notifiers: list[Notifier] = []
        self._trackers: list[TrackerThread] = []
        self._points = Points(after)

    def _read_status(self) -> RunStatus | None:
        """What the run directory says while the hub is silent; None if somebody has removed it."""
        try:
            return read_status(self._path)
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        """End soon; for a signal handler."""
        self._stop.set()

    def serve(self) -> None:
        """Serve until the run has ended or `stop` was called."""
        self._source.start()
        try:
            self._open()
            while not self._stop.is_set() and not self._is_over():
                self._source.wait(WAIT_S)
                self._look()
        finally:
            self._finish()

    # ---- outputs ---------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        section = self._resolved.zerotop
        if section.prometheus is not None:
            self._serve_metrics(section.prometheus)
        for config in section.notify:
            try:
                notifier = make_notifier(config, self._run.name, self._run.host, self._reports.warn, os.environ)
            except KeyError as error:
                self._reports.warn(f"zerotop.notify: the environment variable {error} is not set any more")
                continue
            self._notifiers.append(notifier)
        for writer in section.writers:
            name = f"{writer.type} ({writer.project})" if writer.project else writer.type
            about = _AboutRun(self._path, self._run, self._resolved, writer.name, self._after, self._source)
            tracker = TRACKERS[writer.type](writer)
            self._trackers.append(TrackerThread(name, tracker, about, self._reports.say, writer.interval))

    def _serve_metrics(self, config: PrometheusConfig) -> None:
        collector = RunCollector(self._run.name, lambda: self._source.state, self._lock)
        try:
            self._server = MetricsServer(config.host, config.port, collector)
        except OSError as error:
            where = f"port {config.port} of {config.host}"
            self._reports.warn(f"no metrics for Prometheus: can't listen on {where}: {error.strerror or error}")
            return
        self._reports.say(f"metrics for Prometheus at {self._server.url}")

    # ---- what comes in ---------------------------------------------------------------------------------------------
    def _hear(self, packet: Packet) -> None:
        self._messages += packet.messages

    def _look(self) -> None:
        with self._lock:
            self._source.poll()
        state = self._source.state
        if state.status is None:
            return
        messages, self._messages = self._messages, []
        if self._trackers:
            for point in self._points.new(state, messages):
                for tracker in self._trackers:
                    tracker.put(point)
        if self._notifiers:
            notices = self._conditions.look(state, self._source.connection)
            if os.getppid() != self._supervisor:
                notices += self._conditions.lost(state)
            for notifier in self._notifiers:
                notifier.tell(notices)

    def _is_over(self) -> bool:
        return self._source.connection == "ended" or os.getppid() != self._supervisor

    def _finish(self) -> None:
        deadline_s = time.monotonic() + FINISH_S
        state = self._source.state
        if state.status is not None:
            self._look()
        if self._server is not None:  # first: a run that is resumed at once wants the same port
            self._server.close()
        good = state.state_name in ("finished", "stopped")
        for tracker in self._trackers:
            tracker.close(good, deadline_s)
        for notifier in self._notifiers:
            notifier.close(deadline_s)
        self._source.close()


class _AboutRun:
    """What trackers list; asked for when the first point comes, and then the ranks have said what they train."""

    def __init__(
        self, path: Path, run: RunFile, resolved: Resolved, name: str | None, after: int, source: LiveSource
    ) -> None:
        self._path, self._run, self._resolved, self._source = path, run, resolved, source
        self._name = name or run.name
        self._after = after

    def __call__(self) -> About:
        seed = f"{self._run.name} {self._run.host} {self._run.created_wall_s}"
        return About(
            run=self._run.name,
            name=self._name,
            identity=hashlib.sha256(seed.encode()).hexdigest()[:16],
            folder=self._path,
            config_folder=Path(self._run.config_folder),
            after=self._after,
            settings=hyperparameters(self._resolved, self._source.state.hello),
        )
