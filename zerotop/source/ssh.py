"""Other machines, through the user's OpenSSH: ask the zerotop there, and forward a hub's Unix sockets to here.

Everything in ~/.ssh/config applies (keys, agents, jump hosts, host-key checks); ZEROTOP_SSH replaces the `ssh` that is
called. An attach keeps one connection: a master that holds a session open and carries questions and forwardings, so a
password is asked for once. The session reads its stdin until that closes, so the connection ends with this process,
however it ends. Nothing listens on TCP.
"""

from __future__ import annotations

import collections
import json
import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from runtime.wire.rundir import Sockets
from zerotop.clean import clean
from zerotop.format import duration_text
from zerotop.output import CommandError, say
from zerotop.rundir.executable import MARK, shell_command
from zerotop.rundir.paths import make_private_folder, sockets_home

SSH_VARIABLE = "ZEROTOP_SSH"
RECONNECT_WITHIN_S = 40.0
ASK_WITHIN_S = 30.0
FORWARDED = ("screens", "commands")
# A command of ours and the user's RemoteCommand exclude each other; a pseudo-terminal would garble the answers.
_COMMON = ["-T", "-o", "RemoteCommand=none"]
_HOLD = f"exec sh -c 'echo {MARK}; exec cat >/dev/null'"


class SshError(CommandError):
    """The other machine cannot be reached, or its output is not an answer."""


def ssh_words() -> list[str]:
    """The ssh command to call, from ZEROTOP_SSH. Raises SshError if it does not exist."""
    text = os.environ.get(SSH_VARIABLE) or "ssh"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SshError(f"{SSH_VARIABLE}={text!r} is not a command line: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise SshError(f"{words[0] if words else text!r} was not found: install OpenSSH, or name it in {SSH_VARIABLE}")
    return words


def run_there(host: str, words: list[str]) -> int:
    """Run `zerotop WORDS...` on `host` with its output as ours; returns its exit code. Raises SshError if ssh fails.

    The other zerotop writes to a pipe, where `logs` passes everything through, so the output is cleaned here before it
    reaches a terminal.
    """
    command = [*ssh_words(), *_COMMON, "--", host, shell_command(words)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    answered = False
    try:
        for line in process.stdout:
            if answered:
                text = line.decode(errors="replace")
                sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
                sys.stdout.flush()
            answered = answered or line.rstrip() == MARK.encode()
        exit_code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if exit_code == 127:
        raise SshError(
            f"there is no zerotop on {host}: install it there, and launch a run once so that it can be found"
        )
    if exit_code == 255 or not answered:
        raise SshError(f"ssh to {host} failed (exit code {exit_code}); does `{ssh_words()[0]} {host}` work?")
    return exit_code


class SshLink:
    """One connection to `host` that carries questions and socket forwardings."""

    def __init__(self, host: str) -> None:
        self.host = host
        home = make_private_folder(sockets_home())
        _sweep(home)
        self.folder = Path(tempfile.mkdtemp(prefix=f"ssh-{os.getpid()}-", dir=home))
        self.sockets = Sockets(self.folder)
        self._control = self.folder / "ssh"
        self._process: subprocess.Popen[bytes] | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._echo = False
        self._lock = threading.Lock()  # a thread may be connecting again while another one closes
        self._closing = False

    @property
    def alive(self) -> bool:
        """Whether the connection is up."""
        return self._process is not None and self._process.poll() is None

    @property
    def last_words(self) -> str:
        """The last line that ssh printed: its reason if the connection broke."""
        return self._said[-1] if self._said else "the connection was closed"

    def open(self, *, quiet: bool = False) -> None:
        """Connect. ssh may prompt on the terminal unless `quiet` (a screen is drawn on it). Raises SshError."""
        self._end_process()
        self._said.clear()
        self._control.unlink(missing_ok=True)
        options = ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3", "-o", "StreamLocalBindUnlink=yes"]
        options += ["-o", "ClearAllForwardings=yes"]  # those of the user's config may be taken by another session
        if quiet:
            options += ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
        master = ["-M", "-S", str(self._control), "-o", "ControlPersist=no"]
        command = [*ssh_words(), *_COMMON, *master, *options, "--", self.host, _HOLD]
        with self._lock:
            if self._closing:
                raise SshError("the connection is being closed")
            process = self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        self._echo = not quiet
        listener = threading.Thread(target=self._listen, args=(process,), name="ssh words", daemon=True)
        listener.start()
        connected = self._await_mark(process, RECONNECT_WITHIN_S if quiet else None)
        self._echo = False
        if not connected:
            self._end_process()
            listener.join(1.0)
            raise SshError(f"ssh to {self.host} failed: {self.last_words}")

    def ask(self, words: list[str]) -> Any:
        """The JSON that `zerotop WORDS...` prints there. Raises SshError with its message if it prints an error."""
        done = self._through_master([], ["--", self.host, shell_command(words)])
        _, mark, answer = done.stdout.partition(MARK + "\n")
        try:
            document = json.loads(answer) if mark else None
        except ValueError:
            document = None
        if isinstance(document, dict) and "error" in document and done.returncode:
            raise SshError(f"{self.host}: {document['error']}")
        if done.returncode or document is None:
            raise SshError(
                f"{self.host}: {_last_line(done.stderr) or f'zerotop ended with exit code {done.returncode}'}"
            )
        return document

    def forward(self, there: Sockets) -> None:
        """Make the screens and commands sockets of `there` reachable as `self.sockets`. Raises SshError if ssh
        refuses."""
        for name in FORWARDED:
            self.sockets.path(name).unlink(missing_ok=True)
            pair = f"{self.sockets.path(name)}:{there.path(name)}"
            done = self._through_master(["-O", "forward", "-L", pair], ["--", self.host])
            if done.returncode:
                raise SshError(f"ssh to {self.host} can't forward {there.path(name)}: {_last_line(done.stderr)}")

    def stop(self) -> None:
        """End the connection for good; a thread that waits for it gets an SshError. `close` cleans up."""
        with self._lock:
            self._closing = True
            if self._process is not None:
                self._process.terminate()

    def close(self) -> None:
        """End the connection and remove its folder."""
        self.stop()
        self._end_process()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _through_master(self, options: list[str], rest: list[str]) -> subprocess.CompletedProcess[str]:
        # These must only use the master. If it is gone, ssh would open a new connection without the user's config.
        own = ["-F", "none", "-S", str(self._control), "-o", "ProxyCommand=exit 1"]
        try:
            return subprocess.run(
                [*ssh_words(), *_COMMON, *own, *options, *rest],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ASK_WITHIN_S,
            )
        except subprocess.TimeoutExpired:
            raise SshError(f"{self.host} has not answered within {duration_text(ASK_WITHIN_S)}") from None

    def _await_mark(self, process: subprocess.Popen[bytes], within_s: float | None) -> bool:
        assert process.stdout is not None
        deadline = None if within_s is None else time.monotonic() + within_s
        heard = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while MARK.encode() not in heard:
                left_s = None if deadline is None else deadline - time.monotonic()
                if (left_s is not None and left_s <= 0) or not selector.select(left_s):
                    self._said.append(f"no connection within {duration_text(within_s)}")
                    return False
                piece = os.read(process.stdout.fileno(), 4096)
                if not piece:
                    return False
                heard += piece
        return True

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._said.append(text)
            if self._echo:
                say(text)
        process.stderr.close()

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _sweep(home: Path) -> None:
    """Remove the folders of screens that were killed: ssh-PID-..."""
    for folder in home.glob("ssh-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("zerotop: ") if lines else ""
