"""The screen in a browser: textual-serve behind an address that holds a secret, on loopback alone.

Every browser gets a process of its own, which draws the screen into the page; it ends with the page. Whoever knows the
address sees the screen, so each request must name the token in its path, and a page of another site must not connect:
browsers say where a WebSocket comes from.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from textual_serve.server import Server

from zerotop.tui.terminal import SERVED_VARIABLE

HOST = "127.0.0.1"
MOST_SCREENS = 8
"""Browsers at a time: each costs a process."""
_HEADERS = {
    # The page names a font of another site; nothing of it is needed, and no site is told of the address.
    "Content-Security-Policy": "default-src 'self' data: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' ws:; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ScreenServer(Server):  # type: ignore[misc]
    """Serves what `command` draws. `address` is what to open; it holds the token."""

    def __init__(self, command: Sequence[str], listener: socket.socket, title: str) -> None:
        port = listener.getsockname()[1]
        super().__init__(shlex.join(command), host=HOST, port=port, title=title, public_url=f"http://{HOST}:{port}")
        self.token = secrets.token_urlsafe(24)
        self._listener = listener
        self._screens = 0

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"{self.public_url}/{self.token}/"

    async def application(self) -> web.Application:
        """The pages below the token; everything else does not exist."""
        inner = await self._make_app()
        inner.middlewares.append(self._guard)
        outer = web.Application(middlewares=[_with_headers])
        outer.add_subapp(f"/{self.token}/", inner)
        return outer

    @web.middleware  # type: ignore[untyped-decorator]
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return await handler(request)
        if request.headers.get("Origin", self.public_url) != self.public_url:
            raise web.HTTPForbidden(text="a page of another site may not open this screen")
        if self._screens >= MOST_SCREENS:
            raise web.HTTPServiceUnavailable(text=f"{MOST_SCREENS} browsers show this screen: close one first")
        self._screens += 1
        try:
            return await handler(request)
        finally:
            self._screens -= 1

    async def on_startup(self, app: web.Application) -> None:
        """Say nothing: the command prints the address."""

    async def serve_until_stopped(self, ready: Callable[[str], None]) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP; `ready` gets the address once it is open."""
        os.environ[SERVED_VARIABLE] = "1"  # for the processes that draw
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stopped.set)
        runner = web.AppRunner(await self.application(), access_log=None, shutdown_timeout=5.0)
        await runner.setup()
        try:
            await web.SockSite(runner, self._listener).start()
            ready(self.address)
            await stopped.wait()
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await runner.cleanup()


@web.middleware  # type: ignore[untyped-decorator]
async def _with_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    if not response.prepared:
        response.headers.update(_HEADERS)
    return response


def listen(port: int) -> socket.socket:
    """A socket on loopback; port 0: any free one. Raises OSError if it is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
    except OSError:
        listener.close()
        raise
    return listener
