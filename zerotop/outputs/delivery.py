"""Delivers notifications: by POST to a webhook, or by a command. Each receiver has a thread and a bounded queue, so
that one which does not answer holds up nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from zerotop.format import duration_text

QUEUED = 100
"""Notifications that wait for one receiver; further ones are dropped and counted."""
TIMEOUT_S = 10.0
"""How long a webhook may take to answer."""
COMMAND_TIMEOUT_S = 30.0
RETRIES_S = (1.0, 5.0, 25.0)
"""Pauses before the second, third and fourth try."""

Document = Mapping[str, Any]
Send = Callable[[Document, float], None]
"""send(document, timeout_s): raises DeliveryError."""


class DeliveryError(Exception):
    """Not delivered. `again`: another try may succeed."""

    def __init__(self, message: str, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


class Receiver:
    """Delivers documents one after the other. `name` is how reports call it: without secrets. `report(text)` is called
    for each that could not be delivered."""

    def __init__(
        self, name: str, send: Send, report: Callable[[str], None], retries_s: Sequence[float] = RETRIES_S
    ) -> None:
        self.name = name
        self._send = send
        self._report = report
        self._retries_s = retries_s
        self._queue: queue.Queue[Document | None] = queue.Queue(QUEUED)
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._deliver_all, name=f"notify {name}", daemon=True)
        self._thread.start()

    def put(self, document: Document) -> bool:
        """Queue a document; never waits. False if the queue is full."""
        try:
            self._queue.put_nowait(document)
        except queue.Full:
            return False
        return True

    def close(self, deadline_s: float) -> None:
        """Deliver what is queued, until `deadline_s` on the monotonic clock. No pause between two tries is longer than
        that."""
        self._deadline_s = deadline_s
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=max(0.0, deadline_s - time.monotonic()))
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        left = self._queue.qsize()
        if self._thread.is_alive() or left:
            self._report(f"{self.name}: gave up at the end of the run, {max(1, left)} not delivered")

    def _deliver_all(self) -> None:
        while (document := self._queue.get()) is not None:
            self._deliver(document)

    def _deliver(self, document: Document) -> None:
        for pause_s in (*self._retries_s, None):
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                return
            try:
                self._send(document, min(TIMEOUT_S, left_s))
                return
            except DeliveryError as error:
                if pause_s is None or not error.again:
                    tries = "" if not error.again else f" after {len(self._retries_s) + 1} tries"
                    self._report(
                        f"{self.name}: {document.get('title', 'a notification')!r} not delivered{tries}: {error}"
                    )
                    return
            self._wait(pause_s)

    def _wait(self, pause_s: float) -> None:
        """A pause, shortened when the run ends."""
        if self._closing.wait(pause_s):
            time.sleep(min(1.0, pause_s, max(0.0, self._deadline_s - time.monotonic())))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the document."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def webhook(url: str) -> Send:
    """A `Send` that posts the document as JSON."""
    opener = urllib.request.build_opener(_NoRedirects)

    def send(document: Document, timeout_s: float) -> None:
        body = json.dumps(document, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "zerotop"}
        request = urllib.request.Request(url, body, headers, method="POST")
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                answer.read(1024)
        except urllib.error.HTTPError as error:
            with error:
                temporary = error.code >= 500 or error.code in (408, 425, 429)
                raise DeliveryError(f"it answered {error.code} {error.reason}", temporary) from None
        except TimeoutError:
            raise DeliveryError(f"no answer within {duration_text(timeout_s)}") from None
        except urllib.error.URLError as error:
            slow = isinstance(error.reason, TimeoutError)
            why = f"no answer within {duration_text(timeout_s)}" if slow else _reason(error.reason)
            raise DeliveryError(why, not isinstance(error.reason, ssl.SSLCertVerificationError)) from None
        except (OSError, http.client.HTTPException) as error:
            raise DeliveryError(_reason(error)) from None

    return send


def webhook_name(url: str) -> str:
    """How reports call a webhook: its path may be a secret."""
    parts = urlsplit(url)
    return f"webhook {parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _reason(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def command(words: Sequence[str], environment: Mapping[str, str] | None = None) -> Send:
    """A `Send` that runs the command with the document's values in place of {title} and so on, and the document on
    stdin."""

    def send(document: Document, timeout_s: float) -> None:
        filled = [fill(word, document) for word in words]
        limit_s = min(COMMAND_TIMEOUT_S, max(timeout_s, 1.0)) if timeout_s < TIMEOUT_S else COMMAND_TIMEOUT_S
        try:
            done = subprocess.run(
                filled,
                input=json.dumps(document, ensure_ascii=False).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=limit_s,
                env=environment,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise DeliveryError(f"not done within {duration_text(limit_s)}, killed", again=False) from None
        except OSError as error:
            raise DeliveryError(_reason(error), again=False) from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise DeliveryError(": ".join([f"exit code {done.returncode}", *said]), again=False)

    return send


def fill(word: str, document: Document) -> str:
    """`word` with {name} replaced by the document's values; other braces stay. A value can't bring in further ones, and
    no NUL, which would end an argument."""
    parts = word.split("{")
    found = [parts[0]]
    for part in parts[1:]:
        name, closing, rest = part.partition("}")
        if closing and name in document:
            found.append(str(document[name]).replace("\0", "") + rest)
        else:
            found.append("{" + part)
    return "".join(found)
