"""A receiver of webhooks on the loopback interface: keeps what is posted, and answers as it is told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.harness.waiting import patient, until


class WebhookServer:
    """`answers` are the codes of the next answers (200 when there are none left); while `hangs` is set nothing is
    answered."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.tries = 0
        self.answers: list[int] = []
        self.hangs = threading.Event()
        self._free = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.tries += 1
                if outer.hangs.is_set():
                    outer._free.wait(patient(60))
                    return
                code = outer.answers.pop(0) if outer.answers else 200
                if code == 200:
                    outer.got.append(json.loads(body))
                    outer.paths.append(self.path)
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/hook/SECRET"

    def see(self, what: str, state: str = "firing") -> dict[str, Any]:
        """Wait for a notification."""

        def look() -> list[dict[str, Any]]:
            return [one for one in self.got if (one["what"], one["state"]) == (what, state)]

        return until(look, lambda: f"{state} of {what}; got {self.got}")[0]

    def close(self) -> None:
        self._free.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(patient(10))
        assert not self._thread.is_alive()
